"""A model larger than its memory limit answers like one that fits, with the same 4-bit weights wherever they are."""

import gc
import os
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.chat.template import local_source
from pipeline.core.files import WORK_DIR, read_json
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.weights import loading, placement
from pipeline.weights.loading import ModelError, load_adapter, load_base
from pipeline.weights.placement import available_memory, load_for_scoring, load_tuned, placement_for

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Limits for the base of the fixtures, which takes 520 KiB, or 240 KiB in 4 bits.
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
def test_a_4_bit_base_has_the_same_weights_wherever_it_is_placed(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    expected = load_adapter(load_base(local_source(base), NF4), adapter)
    monkeypatch.setenv("RETUNE_MAX_MEMORY", limit)
    model = load_tuned(local_source(base), NF4, adapter)
    assert in_4_bits(model) == (limit == IN_4_BITS)
    assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (limit == ON_DISK)
    output = capsys.readouterr().err
    assert ("stays in 4 bits" in output) == (limit == IN_4_BITS)
    seconds = re.search(r"larger than the memory of the device .* takes about ([\d.e-]+) s", output)
    assert (seconds is not None and float(seconds[1]) > 0) == (limit == ON_DISK)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    load_adapter(model, adapter, "again").set_adapter("again")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)


def test_an_offloaded_models_folder_is_removed_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload_folder: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    expected = load_for_scoring(local_source(tmp_path / "base"))
    (offload_folder / "99999999-0").mkdir(parents=True)  # of a process that was killed
    monkeypatch.setenv("RETUNE_MAX_MEMORY", "cpu=300KiB")
    model = load_for_scoring(local_source(tmp_path / "base"))
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
    (folder,) = offload_folder.iterdir()
    assert folder.name.startswith(f"{os.getpid()}-")
    del model
    gc.collect()
    assert not list(offload_folder.iterdir())


def test_stages_give_the_same_results_with_less_memory_than_the_model_needs(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RETUNE_MAX_MEMORY", ON_DISK)
    few = with_(params, evaluate={"max_samples": 12}).evaluate
    evaluate(few, dataset, adapter, tmp_path / "evaluation")
    for system in ("base", "adapter"):
        answers = pq.read_table(tmp_path / "evaluation" / f"items.{system}.parquet").select(["id", "answer", "loss"])
        all_items = pq.read_table(evaluation / f"items.{system}.parquet").to_pylist()
        expected = {item["id"]: item for item in all_items}
        for item in answers.to_pylist():
            assert item["answer"] == expected[item["id"]]["answer"]
            assert item["loss"] == pytest.approx(expected[item["id"]]["loss"], rel=1e-5)
    outputs = [tmp_path / name for name in ("merged", "parity")]
    merge(params.merge, dataset, adapter, tmp_path / "evaluation", *outputs)
    assert read_json(tmp_path / "parity" / "parity.json")["token_agreement"] == 1.0


@pytest.mark.parametrize(
    ("gpus", "size", "expected"),
    [
        ([10], 10, "one"),
        ([10], 11, None),
        ([10, 40], 10, "one"),  # the first computes; the others would only add copies
        ([10, 40], 44, "all"),
        ([10, 40], 48, None),  # layers are not split
    ],
)
def test_weights_go_to_one_gpu_or_else_to_all(gpus: list[int], size: int, expected: str | None) -> None:
    memory = {number: limit * GIB for number, limit in enumerate(gpus)} | {"cpu": 64 * GIB}
    chosen = placement_for(size * GIB, memory)
    assert expected == (None if chosen is None else "all" if chosen["device_map"] == "auto" else "one")


def test_a_gpu_that_other_processes_fill_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    memory: placement.Memory = {0: GIB, "cpu": 64 * GIB}
    with pytest.raises(ModelError, match=r"4.0 GiB .* 21.0 GiB .* 24.0 GiB"):
        placement._refuse_full_gpu(4 * GIB, memory)
    placement._refuse_full_gpu(40 * GIB, memory)  # too large for an empty GPU as well
    monkeypatch.setenv("RETUNE_MAX_MEMORY", "gpu=1GiB")
    placement._refuse_full_gpu(4 * GIB, memory)  # the user wants it


@pytest.mark.parametrize("text", ["6GiB", "gpu=6", "gpu=xGiB", "disk=1GiB", "gpu=1GiB;cpu=2GiB"])
def test_a_limit_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RETUNE_MAX_MEMORY", text)
    with pytest.raises(ModelError, match="gpu=6GiB,cpu=20GiB"):
        available_memory()


def test_dora_needs_the_whole_base_in_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True)
    get_peft_model(load_base(local_source(base)), dora).save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("RETUNE_MAX_MEMORY", ON_DISK)
    with pytest.raises(ModelError, match="use_dora"):
        load_tuned(local_source(base), NF4, tmp_path / "adapter")


def test_a_gpu_that_pytorch_cannot_use_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "NVIDIA_DRIVER", tmp_path)
    loading.device.cache_clear()
    assert [loading.device().type for _ in range(2)] == ["cpu", "cpu"]
    loading.device.cache_clear()
    assert len(capsys.readouterr().err.splitlines()) == 1
