"""A model larger than the memory it may use answers as one that fits; 4-bit numbers are the same however they lie."""

import gc
import os
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from peft import LoraConfig, get_peft_model
from test_train import identity
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.core.files import WORK_DIR, read_json
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.weights import loading, placement
from pipeline.weights.loading import ModelError, load_adapter, load_base
from pipeline.weights.placement import available_memory, load_for_scoring, load_tuned, place

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Of the fixtures' base, which takes 520 KiB, or 240 KiB in 4 bits.
IN_4_BITS, ON_DISK = "cpu=400KiB", "cpu=200KiB"
IDS = torch.arange(3, 60).reshape(3, 19)
GIB = 2**30


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def in_4_bits(model: torch.nn.Module) -> bool:
    return any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


@pytest.fixture(autouse=True)
def offload_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(placement, "WORK_DIR", tmp_path / WORK_DIR)
    return tmp_path / WORK_DIR / "offload"


@pytest.mark.parametrize("limit", ["", IN_4_BITS, ON_DISK])
def test_a_4_bit_base_has_the_same_numbers_wherever_it_lies(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    expected = load_adapter(load_base(identity(base), NF4), adapter)
    monkeypatch.setenv("RETUNE_MAX_MEMORY", limit)
    model = load_tuned(identity(base), NF4, adapter)
    assert in_4_bits(model) == (limit == IN_4_BITS)
    assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (limit == ON_DISK)
    said = capsys.readouterr().err
    assert ("stays in 4 bits" in said) == (limit == IN_4_BITS)
    assert ("larger than the memory of the device" in said) == (limit == ON_DISK)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    load_adapter(model, adapter, "again").set_adapter("again")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)


def test_a_checkpoint_in_another_type_is_offloaded_and_its_folder_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload_folder: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    expected = load_for_scoring(identity(tmp_path / "base"))
    (offload_folder / "99999999-0").mkdir(parents=True)  # of a process that was killed
    monkeypatch.setenv("RETUNE_MAX_MEMORY", "cpu=300KiB")
    model = load_for_scoring(identity(tmp_path / "base"))
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    (folder,) = offload_folder.iterdir()
    assert folder.name.startswith(f"{os.getpid()}-")
    del model
    gc.collect()
    assert not list(offload_folder.iterdir())


def test_stages_give_the_same_results_under_a_limit_below_their_model(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RETUNE_MAX_MEMORY", ON_DISK)
    few = with_(params, evaluate={"max_samples": 12}).evaluate
    evaluate(few, dataset, adapter, tmp_path / "evaluation")
    for system in ("base", "adapter"):
        answers = pq.read_table(tmp_path / "evaluation" / f"items.{system}.parquet").select(["id", "answer", "loss"])
        everything = pq.read_table(evaluation / f"items.{system}.parquet").to_pylist()
        whole = {item["id"]: item for item in everything}
        for item in answers.to_pylist():
            assert item["answer"] == whole[item["id"]]["answer"]
            assert item["loss"] == pytest.approx(whole[item["id"]]["loss"], rel=1e-5)
    outputs = [tmp_path / name for name in ("merged", "parity")]
    merge(params.merge, dataset, adapter, tmp_path / "evaluation", *outputs)
    assert read_json(tmp_path / "parity" / "parity.json")["token_agreement"] == 1.0


@pytest.mark.parametrize(
    ("gpus", "size", "where"),
    [
        ([10], 10, "one"),
        ([10], 11, None),
        ([10, 40], 10, "one"),  # the first computes; the others would only add copies
        ([10, 40], 44, "all"),
        ([10, 40], 48, None),  # layers are not cut in two
    ],
)
def test_weights_go_to_one_gpu_then_to_all(gpus: list[int], size: int, where: str | None) -> None:
    chosen = place(size * GIB, {number: limit * GIB for number, limit in enumerate(gpus)} | {"cpu": 64 * GIB})
    kind = None if chosen is None else "all" if chosen["device_map"] == "auto" else "one"
    assert kind == where


def test_a_gpu_that_another_process_fills_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    memory: placement.Memory = {0: GIB, "cpu": 64 * GIB}
    with pytest.raises(ModelError, match=r"other processes use 21.0 GiB of its 24.0 GiB"):
        placement._refuse_full_gpu(4 * GIB, memory)
    placement._refuse_full_gpu(40 * GIB, memory)  # too large for the empty card as well
    monkeypatch.setenv("RETUNE_MAX_MEMORY", "gpu=1GiB")
    placement._refuse_full_gpu(4 * GIB, memory)  # as asked for


@pytest.mark.parametrize("text", ["6GiB", "gpu=6", "gpu=xGiB", "disk=1GiB", "gpu=1GiB;cpu=2GiB"])
def test_a_limit_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RETUNE_MAX_MEMORY", text)
    with pytest.raises(ModelError, match="gpu=6GiB,cpu=20GiB"):
        available_memory()


def test_an_adapter_that_reads_its_bases_weights_needs_them_in_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True)
    get_peft_model(load_base(identity(base)), dora).save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("RETUNE_MAX_MEMORY", ON_DISK)
    with pytest.raises(ModelError, match="use_dora"):
        load_tuned(identity(base), NF4, tmp_path / "adapter")


def test_a_gpu_that_pytorch_cannot_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "NVIDIA_DRIVER", tmp_path)
    loading.device.cache_clear()
    assert [loading.device().type for _ in range(2)] == ["cpu", "cpu"]
    loading.device.cache_clear()
    assert len(capsys.readouterr().err.splitlines()) == 1
