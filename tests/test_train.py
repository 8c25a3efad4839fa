"""Training is repeatable, resumed, or starts from an earlier adapter; a base that cannot be used is refused."""

import csv
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment, make_base, with_
from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from test_methods import short
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer
from versions import parameters, published

from pipeline.chat.template import local_source
from pipeline.core import graph
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.core.sanitise import portable
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params, TrainParams
from pipeline.prepare import prepare
from pipeline.promote import promote
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.init_adapter import PIN, fetch_init, pin_champion
from pipeline.registry.model import RegisteredModel
from pipeline.train import QUANTISATION, train
from pipeline.training.checkpoints import last_checkpoint, seal
from pipeline.training.methods import check_init
from pipeline.training.watching import Interrupted, TrainError
from pipeline.weights.loading import load_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def test_the_adapter_is_saved_as_safetensors_with_its_contract_and_curve(adapter: Path, dataset: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert read_json(adapter / "contract.json") == portable(read_json(dataset / "contract.json"))
    rows = list(csv.DictReader((adapter / "loss.csv").open()))
    assert float(rows[-1]["loss"] or rows[-2]["loss"]) < float(rows[0]["loss"])
    assert any(row["validation_loss"] for row in rows)


def test_the_same_seed_gives_the_same_adapter_in_another_process(tmp_path: Path, params: Params, dataset: Path) -> None:
    short = with_(params, train={"max_steps": 3, "logging_steps": 1}).train
    train(short, dataset, tmp_path / "here", tmp_path / "checkpoints")
    command = training_command(short, dataset, tmp_path)
    subprocess.run(command, env=environment() | {"PYTHONHASHSEED": "1"}, check=True)  # another order of sets
    assert_same_files(tmp_path / "here", tmp_path / "adapter")


def training_command(params: TrainParams, dataset: Path, folder: Path) -> list[str]:
    """A command that trains into `folder` in another process."""
    code = (
        "import sys, pathlib, pipeline.train as t, pipeline.params as p\n"
        "settings, dataset, folder = p.TrainParams.model_validate_json(sys.argv[1]), *map(pathlib.Path, sys.argv[2:])\n"
        "t.train(settings, dataset, folder / 'adapter', folder / 'checkpoints')"
    )
    return [sys.executable, "-c", code, params.model_dump_json(), str(dataset), str(folder)]


def assert_same_files(folder: Path, other: Path) -> None:
    for path in folder.iterdir():
        assert sha256_file(other / path.name) == sha256_file(path), path.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigterm_saves_and_the_next_run_makes_the_same_adapter(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Kills that cannot be caught are in `test_kills.py`; bfloat16 is what adapters have on a GPU."""
    monkeypatch.setattr("pipeline.train.compute_dtype", lambda: dtype)
    short, steps = with_(params, train={"max_steps": 10, "logging_steps": 4}).train, iter(range(1000))
    train(short, dataset, tmp_path / "alone", tmp_path / "checkpoints")
    hook = register_optimizer_step_post_hook(
        lambda *_: signal.raise_signal(signal.SIGTERM) if next(steps) == 6 else None
    )
    try:
        with pytest.raises(Interrupted, match="signal at step 7"):
            train(short, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    finally:
        hook.remove()
    assert not (tmp_path / "adapter").exists()
    assert train(short, dataset, tmp_path / "adapter", tmp_path / "checkpoints").resumed_from_step == 7
    assert_same_files(tmp_path / "alone", tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert not list((tmp_path / "checkpoints").iterdir())


def test_no_stage_uses_a_deprecated_name(tmp_path: Path, params: Params, dataset: Path) -> None:
    settings = {"max_steps": 2, "logging_steps": 1, "warmup_ratio": 0.0, "gradient_checkpointing": True}
    params = with_(params, train=settings, evaluate={"max_samples": 4}, merge={"min_agreement": 0.0})
    inputs = (dataset, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(params.train, *inputs, tmp_path / "checkpoints")
        evaluate(params.evaluate, *inputs, tmp_path / "evaluation")
        merge(params.merge, *inputs, tmp_path / "evaluation", tmp_path / "merged", tmp_path / "parity")
    deprecations = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, deprecations)] == []


@pytest.mark.parametrize("truncated", ["adapter_model.safetensors", "digests.json"])
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], truncated: str
) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "target_modules": "all-linear"})
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({"step": torch.zeros(2)}, folder / name)
        seal(folder)
    file = tmp_path / "checkpoint-4" / truncated
    file.write_bytes(file.read_bytes()[:-3])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4" in capsys.readouterr().out


def test_the_base_is_nf4_and_the_record_says_so_to_later_stages(base: Path, adapter: Path) -> None:
    state = load_base(local_source(base), NF4).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    record = read_json(adapter / "training.json")
    assert (record["quantisation"], record["device"]) == (NF4, "cpu")
    assert record["shipped_step"] == record["steps"]
    assert set(NF4) == set(QUANTISATION)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda base: write_json(base / "config.json", read_json(base / "config.json") | values)


def truncated(base: Path) -> None:
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000])


def shard_missing(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    first = {name: weights[name] for name, file in files.items() if file.startswith("model-00001")}
    save_file(first, base / "model-00001-of-00002.safetensors", {"format": "pt"})
    (base / "model.safetensors").unlink()
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def smaller_vocabulary(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config(vocab_size=300)(base)


def control_token_beyond(base: Path) -> None:
    """A control token is added to the tokenizer, but not to the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(base)


COMPOSED = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
COMPOSED |= {"model_type": "musicgen", "decoder": {"model_type": "musicgen_decoder"}}
CHANGED = r"base is not the one .* \(digest [0-9a-f]{12}"


@pytest.mark.parametrize(
    ("stage", "damage", "message"),
    [
        ("prepare", truncated, r"model.safetensors may not be loaded"),
        ("prepare", smaller_vocabulary, r"300 tokens.* has the id 300"),
        ("prepare", control_token_beyond, r"<\|turn\|> has the id \d+"),
        ("prepare", config(model_type="unheard-of"), r"^no model configuration could be read from .*base: "),
        ("prepare", config(**COMPOSED), r"^no model configuration could be read from .*base: "),
        ("train", shard_missing, "model-00002-of-00002.safetensors"),
        ("train, changed after prepare", shutil.rmtree, r"model_name_or_path is .*base"),
        ("train, changed after prepare", config(rms_norm_eps=1e-5), CHANGED),
        ("train, changed after prepare", lambda base: make_base(base, seed=1), CHANGED),
    ],
)
def test_a_base_model_that_cannot_be_used_or_changed_is_refused_before_training(
    tmp_path: Path, params: Params, data: Path, stage: str, damage: Callable[[Path], None], message: str
) -> None:
    base, dataset = make_base(tmp_path / "base"), tmp_path / "dataset"
    settings = with_(params, prepare={"model_name_or_path": str(base)})

    def use() -> None:
        if "changed" not in stage:
            damage(base)
        prepare(settings.prepare, data, dataset)
        assert stage != "prepare"
        if "changed" in stage:
            damage(base)
        train(params.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")

    with pytest.raises(ValueError, match=message) as error:
        use()
    assert type(error.value).__module__.startswith("pipeline.")
    assert stage != "prepare" or not ("\n" in str(error.value) or dataset.exists())
    assert "changed" not in stage or not (tmp_path / "checkpoints").exists()


def test_virtual_tokens_that_do_not_fit_the_context_are_refused(tmp_path: Path, params: Params, dataset: Path) -> None:
    many = short(params, "prompt", num_virtual_tokens=500).train
    with pytest.raises(ValueError, match=r"num_virtual_tokens is 500 .*512 .*max_length .* 12$"):
        train(many, dataset, tmp_path / "adapter", tmp_path / "checkpoints")


def digest(adapter: Path) -> str:
    return sha256_file(adapter / "adapter_model.safetensors")


def tiny_steps(params: Params, method: str = "qlora", **train: Any) -> Params:
    """Steps that change almost nothing, so the result is the adapter that the training started with."""
    return short(params, method, learning_rate=1e-9, max_steps=1, logging_steps=1, **train)


@pytest.mark.parametrize(
    ("method", "dtype"), [("qlora", torch.float32), ("qlora", torch.bfloat16), ("prompt", torch.float32)]
)
def test_a_training_starts_with_the_weights_of_init(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("pipeline.train.compute_dtype", lambda: dtype)  # bfloat16 as on a GPU
    train(short(params, method).train, dataset, tmp_path / "first", tmp_path / "checkpoints")
    rate = 1e-9 if dtype is torch.float32 else 1e-3  # bfloat16 has no smaller steps
    settings = with_(tiny_steps(params, method), train={"learning_rate": rate}).train
    train(settings, dataset, tmp_path / "second", tmp_path / "checkpoints", init=tmp_path / "first")
    train(settings, dataset, tmp_path / "new", tmp_path / "checkpoints")
    first, second, new = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second", "new")
    )
    assert {weight.dtype for weight in second.values()} == {dtype}
    assert all(torch.allclose(first[name], second[name], atol=max(1e-6, 5 * rate)) for name in first)
    assert not all(torch.allclose(first[name], new[name], atol=1e-4) for name in first)
    assert read_json(tmp_path / "second" / "training.json")["init_adapter_sha256"] == digest(tmp_path / "first")


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (LoraConfig(r=4, lora_alpha=32), r" r 8.* train\.lora_r .*4"),
        (LoraConfig(r=8, lora_alpha=8), r" lora_alpha 32.* train\.lora_alpha .*8"),
        (LoraConfig(r=8, lora_alpha=32, use_dora=True), r" use_dora False.* train\.method .*True"),
        (IA3Config(), r" peft_type LORA.* train\.method .*IA3"),
    ],
)
def test_an_adapter_with_other_settings_is_refused(
    dataset: Path, adapter: Path, config: PeftConfig, difference: str
) -> None:
    contract = read_json(dataset / "contract.json")
    check_init(adapter, contract, LoraConfig(r=8, lora_alpha=32))
    with pytest.raises(TrainError, match=difference):
        check_init(adapter, contract, config)


def test_an_adapter_of_another_base_or_other_modules_is_refused_before_training(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path
) -> None:
    other = tiny_steps(params, lora_target_modules=["q_proj"], lora_r=8).train
    with pytest.raises(TrainError, match=r"train\.lora_target_modules"):
        train(other, dataset, tmp_path / "out", tmp_path / "other", init=adapter)
    shutil.copytree(adapter, tmp_path / "adapter")
    contract = read_json(adapter / "contract.json")
    write_json(tmp_path / "adapter" / "contract.json", contract | {"model": contract["model"] | {"digest": "0" * 64}})
    with pytest.raises(TrainError, match=r"another base.* \(digest 000000000000\)"):
        train(params.train, dataset, tmp_path / "out", tmp_path / "checkpoints", init=tmp_path / "adapter")
    assert not (tmp_path / "checkpoints").exists()


def test_an_adapter_in_a_folder_needs_the_digest_of_its_weights(tmp_path: Path, params: Params, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "earlier")
    pinned = with_(params, train={"init_adapter": f"earlier@{digest(adapter)}"})
    assert fetch_init(pinned, tmp_path) == tmp_path / "earlier"
    with pytest.raises(TrainError, match=f"{digest(adapter)}.*{'0' * 64}"):
        fetch_init(with_(params, train={"init_adapter": f"earlier@{'0' * 64}"}), tmp_path)
    with pytest.raises(TrainError, match="nowhere.*adapter_model"):
        fetch_init(with_(params, train={"init_adapter": f"nowhere@{'0' * 64}"}), tmp_path)
    with pytest.raises(StoreError, match="0123456789abcdef is not published"):
        fetch_init(with_(params, train={"init_adapter": "0123456789abcdef"}), tmp_path)


def test_the_champions_adapter_comes_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    promote(params, version, tmp_path, force="the first one")
    write_json(tmp_path / PIN, {"version": None})
    monkeypatch.setattr(graph, "stale", lambda root: {"train": []})
    settings = with_(params, train={"init_adapter": "champion"})
    assert pin_champion(settings, tmp_path) == version
    for name in ("champion", version):
        folder = fetch_init(with_(params, train={"init_adapter": name}), tmp_path)
        assert folder is not None and digest(folder) == digest(tmp_path / "artifacts" / "adapter")


def test_the_pin_moves_to_the_champion_only_when_the_run_trains_anyway(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale: dict[str, Any] = {}
    serving = "a" * 16
    monkeypatch.setattr(graph, "stale", lambda root: stale)
    monkeypatch.setattr(RegisteredModel, "champion", lambda model: serving)
    write_json(tmp_path / PIN, {"version": None})
    settings = with_(params, train={"init_adapter": "champion"})
    assert fetch_init(settings, tmp_path) is None and "no champion is pinned" in capsys.readouterr().out
    assert pin_champion(settings, tmp_path) is None  # nothing to train
    stale["train"] = [{"changed deps": {"artifacts/dataset": "modified"}}]
    assert pin_champion(params, tmp_path) is None  # init_adapter is none
    assert pin_champion(settings, tmp_path) == serving
    assert read_json(tmp_path / PIN) == {"version": serving}
    stale.clear()
    serving = "b" * 16  # promoted by this very run
    assert pin_champion(settings, tmp_path) == "a" * 16
    assert read_json(tmp_path / PIN) == {"version": "a" * 16}
