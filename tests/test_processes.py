"""One training in several processes: with gloo on the CPU; GPUs run the same command with another back end."""

import sys
from pathlib import Path

import pytest
from conftest import with_
from safetensors.torch import load_file

from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.train import TrainError, train
from pipeline.training.launch import launcher
from pipeline.training.watching import Interrupted


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
