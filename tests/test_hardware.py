"""Training on any GPU, or in several processes: kernels, memory, and the same steps everywhere."""

import importlib.util
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_
from safetensors.torch import load_file
from transformers import LlamaConfig

from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.train import TrainError, _choose_batches, train
from pipeline.training.footprint import GIB, Counts, Gpu, choose_batches, count, step_memory
from pipeline.training.hardware import require_kernels, use_liger
from pipeline.training.launch import launcher
from pipeline.training.watching import Interrupted, Watch

LLAMA_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)


def a100(total: float, free: float | None = None) -> Gpu:
    return Gpu("A100", int(total * GIB), int((total if free is None else free) * GIB))


FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        *(("attn_implementation", value, package) for value, package in FLASH.items()),
        ("use_liger_kernel", True, "liger_kernel"),
        ("torch_compile", True, "torch"),
    ],
)
def test_a_kernel_without_its_gpu_or_package_is_refused(
    params: Params, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, package: str
) -> None:
    train = with_(params, train={key: value}).train
    with pytest.raises(TrainError, match=rf"train\.{key}"):
        require_kernels(train, cuda=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(TrainError, match=rf"train\.{key} .*{package}"):
        require_kernels(train, cuda=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_kernels(train, cuda=True)
    require_kernels(params.train, cuda=False)  # it names no kernel


@pytest.fixture(scope="module")
def automatic(params: Params) -> Params:
    """Eight sequences of 2,048 tokens per step."""
    return with_(params, train={"packed_length": 2048, "tokens_per_step": 8 * 2048, "lora_r": 16})


@pytest.fixture(scope="module")
def counts(automatic: Params) -> Counts:
    return count(LLAMA_8B, automatic.train)


def test_the_same_parameters_take_the_same_steps_on_a_small_and_a_large_gpu(automatic: Params, counts: Counts) -> None:
    taken = {gib: choose_batches(automatic.train, counts, a100(gib), [2048] * 100) for gib in (24, 48, 141)}
    assert {rows * accumulation for rows, accumulation in taken.values()} == {8}
    assert taken[24][0] < taken[48][0] < taken[141][0]
    for gib, (rows, _) in taken.items():
        peaks = {n: step_memory(counts, automatic.train, n, 2048, on_gpu=True)["peak"] for n in (1, 2, 4, 8)}
        assert rows == max((n for n, peak in peaks.items() if peak <= 0.92 * gib * GIB), default=1)


def test_a_step_has_the_same_rows_however_many_at_a_time(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokens_per_step": 4 * 256, "max_steps": 4, "warmup_ratio": 0.0}
    steps: dict[int, list[list[int]]] = {1: [], 4: []}
    finish = Watch.finish_step
    for rows, taken in steps.items():

        def note(watch: Watch, *sums: Any, taken: list[list[int]] = taken) -> None:
            taken.append(sorted(torch.cat(watch.step_rows).tolist()))
            finish(watch, *sums)

        monkeypatch.setattr(Watch, "finish_step", note)
        monkeypatch.setattr("pipeline.train._choose_batches", lambda *_, rows=rows: (rows, 4 // rows))
        train(with_(params, train=settings).train, dataset, tmp_path / f"{rows}", tmp_path / f"checkpoints{rows}")
    assert steps[1] == steps[4] and len(steps[1]) > 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 8)),
        ({"per_device_train_batch_size": 4}, (4, 2)),
        ({"strategy": "ddp", "num_processes": 2}, (1, 4)),
        ({"tokens_per_step": 100}, (1, 1)),
        ({"packing": False, "tokens_per_step": 1024}, (1, 10)),  # rows of 100 tokens on average
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "tokens_per_step": None}, (3, 5)),
    ],
)
def test_a_step_has_the_tokens_that_the_parameters_set(
    automatic: Params, settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    lengths = [100] * 50 if settings.get("packing") is False else [2048] * 50
    assert choose_batches(with_(automatic, train=settings).train, None, None, lengths) == expected


def test_an_old_gpu_and_gpus_of_different_sizes_are_reported(
    automatic: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LLAMA_8B.save_pretrained(tmp_path)
    base = {"name_or_path": str(tmp_path), "revision": None, "trust_remote_code": False}
    both = with_(automatic, train={"strategy": "ddp", "num_processes": 2, "tokens_per_step": 16 * 2048}).train
    for name, answer in {"is_available": True, "mem_get_info": (48 * GIB, 48 * GIB), "get_device_name": "T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr("pipeline.train.compute_dtype", lambda: torch.float16)
    monkeypatch.setattr("pipeline.train.PartialState", lambda: None)
    monkeypatch.setattr("pipeline.train.gather_object", lambda own: [*own, 1])
    assert _choose_batches(both, base, [2048] * 100) == (1, 8)
    old, sizes = capsys.readouterr().out.splitlines()
    assert "T4" in old and "float16" in old
    assert "1 and 2" in sizes


def test_a_gpu_that_other_processes_fill_is_refused_before_training(automatic: Params, counts: Counts) -> None:
    with pytest.raises(TrainError, match=r"leave 3\.0.*CUDA_VISIBLE_DEVICES"):
        choose_batches(automatic.train, counts, a100(80, free=3), [2048] * 10)
    choose_batches(automatic.train, counts, a100(10), [2048] * 10)  # too small by itself: smaller pieces are tried


@pytest.mark.parametrize(
    ("choice", "installed", "family", "device", "layers"),
    [
        ("auto", True, "llama", "cuda", "Liger's"),
        (True, True, "llama", "cuda", "Liger's"),
        (False, True, "llama", "cuda", "use_liger_kernel is false"),
        ("auto", False, "llama", "cuda", "not installed"),
        ("auto", True, "bloom", "cuda", "does not know bloom"),
        (True, True, "bloom", "cuda", None),
        ("auto", True, "llama", "cpu", "llama's own"),
        ("auto", True, "qwen3_5_moe", "cuda", "cannot be imported"),
    ],
)
def test_liger_is_used_where_it_is_installed_and_knows_the_model(
    params: Params, monkeypatch: pytest.MonkeyPatch, choice: Any, installed: bool, family: str, device: str, layers: str
) -> None:
    applied: list[dict[str, Any]] = []
    package: Any = types.ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen3_5_moe": None}

    def apply(model: Any, **options: Any) -> None:
        if model.config.model_type != "llama":
            raise ImportError("cannot import name 'LigerQwen3_5MoeCausalLMOutputWithPast'")
        applied.append(options)

    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    model = types.SimpleNamespace(device=torch.device(device), config=types.SimpleNamespace(model_type=family))
    chosen = with_(params, train={"use_liger_kernel": choice}).train
    with nullcontext() if layers else pytest.raises(TrainError, match=family):
        assert layers in use_liger(model, chosen)
    assert len(applied) == (layers == "Liger's")
    assert all(not options["fused_linear_cross_entropy"] for options in applied)  # the loss is the trainer's


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", sys.executable)  # so torchrun starts forks of `preloaded`


@pytest.fixture(scope="module")
def few(params: Params) -> Params:
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tokens_per_step": None}
    return with_(params, train=settings | {"max_steps": 4, "logging_steps": 2, "eval_steps": 2})


def two(params: Params, **values: object) -> Params:
    settings = {"strategy": "ddp", "num_processes": 2, "gradient_accumulation_steps": 1}
    return with_(params, train=settings | values)


FSDP = {"strategy": "fsdp", "bnb_4bit_quant_storage": "float32"}


@pytest.mark.parametrize(
    "strategy", [pytest.param({}, id="ddp", marks=pytest.mark.faults), pytest.param(FSDP, id="fsdp")]
)
def test_two_processes_train_as_one_with_the_same_effective_batch(
    tmp_path: Path, few: Params, dataset: Path, strategy: dict[str, str]
) -> None:
    """With FSDP each process has half of every layer of the 4-bit base, of the adapter and of the optimiser's state."""
    one = train(few.train, dataset, tmp_path / "one", tmp_path / "checkpoints")
    both = train(two(few, **strategy).train, dataset, tmp_path / "two", tmp_path / "checkpoints")
    assert both.trainable_parameters == one.trainable_parameters
    assert both.loss == pytest.approx(one.loss, rel=1e-3)
    assert both.validation_loss == pytest.approx(one.validation_loss, rel=1e-3)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert all((a[key] - b[key]).norm() < 1e-2 * a[key].norm() for key in a)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_stop_together_and_resume(
    tmp_path: Path, few: Params, dataset: Path, strategy: dict[str, str]
) -> None:
    few = two(few, **strategy)
    short = with_(few, train={"max_hours": 1e-9})
    with pytest.raises(Interrupted, match=r"max_hours .* at step 1"):
        train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    resumed = train(few.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert (resumed.resumed_from_step, resumed.steps) == (1, 4)
    alone = train(few.train, dataset, tmp_path / "alone", tmp_path / "checkpoints")
    assert alone.loss == resumed.loss
    assert read_json(tmp_path / "alone" / "training.json") == read_json(tmp_path / "adapter" / "training.json")


@pytest.mark.faults
def test_an_error_in_one_process_is_reported(
    tmp_path: Path, few: Params, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = two(few, learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0, lr_scheduler_type="constant")
    with pytest.raises(TrainError, match="2 processes failed with status"):
        train(wild.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert "whose batch is rows.json" in capfd.readouterr().err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("strategy", "flag"), [("ddp", "--multi_gpu"), ("fsdp", "--use_fsdp"), ("deepspeed", "--use_deepspeed")]
)
def test_accelerate_accepts_the_flags_for_gpus(
    params: Params, strategy: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command = launcher(
        with_(params, train={"strategy": strategy, "num_processes": 2, "bnb_4bit_quant_storage": "bfloat16"}).train
    )
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"] and flag in command
    parsed = launch_command_parser().parse_args([*command[3:], "script.py"])
    assert parsed.num_processes == 2
