"""Training when memory runs out, when it diverges, stalls or stops learning, and what it reports.

The tests inject out-of-memory errors: a wrapper of the model's forward pass raises torch's error for too many tokens.
"""

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from safetensors.torch import load_file
from transformers import LlamaModel

from pipeline.chat.template import load_contract
from pipeline.core.files import read_json
from pipeline.core.memory import OutOfMemory
from pipeline.params import Params
from pipeline.scoring import generation
from pipeline.scoring.generation import generate
from pipeline.scoring.likelihood import sequence_losses
from pipeline.train import TrainError, train
from pipeline.training.checkpoints import identity, last_checkpoint, open_run
from pipeline.training.watching import Interrupted, Watch
from pipeline.weights.loading import load_base

CHECKS = 11  # forward passes before the first step: isolation 2, row attention 6, TRL's head 2, gradients 1


@contextmanager
def memory_for(
    tokens: int, after: int = 0, checkpointed: bool = False, backward: bool = False
) -> Iterator[list[tuple[int, bool]]]:
    """Limit forward passes after the first `after` ones to `tokens` tokens; yields size and checkpointing of all.

    Args:
        checkpointed: no limit with gradient checkpointing.
        backward: fail half-way through the backward pass instead.
    """
    original_forward, passes = LlamaModel.forward, list[tuple[int, bool]]()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail_below(handle: Any, hidden: torch.Tensor) -> None:
        handle.remove()
        hidden.register_hook(fail)

    def forward(self: Any, *arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        passes.append((input_ids.numel(), self.gradient_checkpointing and self.training))
        enough = input_ids.numel() <= tokens or len(passes) <= after or (checkpointed and self.gradient_checkpointing)
        if not enough and not backward:
            fail()
        if not enough:
            # The backward pass starts at the last block and fails below the second one.
            handle = self.layers[1].register_forward_pre_hook(lambda _, inputs: fail_below(handle, inputs[0]))
        return original_forward(self, *arguments, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", forward)
        yield passes


@pytest.fixture(scope="module")
def few(params: Params) -> Params:
    """Four steps of four lines each, without dropout, so that the result does not depend on micro-batches."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_step": None}
    return with_(params, train=settings | {"max_steps": 4, "logging_steps": 1, "warmup_ratio": 0.0})


def trained(params: Params, dataset: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    train(params.train, dataset, folder / "adapter", folder / "checkpoints", tables=folder / "tables")
    fallbacks = read_json(folder / "tables" / "run.json")["memory"]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), fallbacks


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory, few: Params, dataset: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    weights, fallbacks = trained(few, dataset, tmp_path_factory.mktemp("unlimited"))
    assert fallbacks == []
    return weights


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    # Adam amplifies gradients near zero, so single weights may differ by more than rounding.
    assert all((a[key] - b[key]).norm() < 2e-3 * a[key].norm() for key in a)


def test_out_of_memory_takes_the_same_steps_in_smaller_pieces(
    tmp_path: Path, few: Params, dataset: Path, unlimited: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    # A step has 2 passes: this fails in step 2, half-way through the backward pass.
    with memory_for(300, after=CHECKS + 2 + 1, backward=True) as passes:
        weights, fallbacks = trained(few, dataset, tmp_path)
    assert max(passes[CHECKS + 5 :])[0] <= 300
    assert (fallbacks[0]["step"], fallbacks[0]["pieces"]) == (2, 2)
    assert not fallbacks[-1]["gradient_checkpointing"]
    assert_close(weights, unlimited)
    assert "out of memory at step 2; retrying the same batch in 2 pieces" in capsys.readouterr().out


def test_gradient_checkpointing_is_the_last_fallback(
    tmp_path: Path, few: Params, dataset: Path, unlimited: dict[str, torch.Tensor]
) -> None:
    with memory_for(3, after=CHECKS, checkpointed=True):  # every row is longer
        weights, fallbacks = trained(few, dataset, tmp_path)
    assert fallbacks[-1]["gradient_checkpointing"] and not fallbacks[-2]["gradient_checkpointing"]
    assert_close(weights, unlimited)


def test_without_a_fallback_the_error_says_what_to_change(tmp_path: Path, few: Params, dataset: Path) -> None:
    advice = r"at step 1 with one row .* lower prepare.max_length"
    with memory_for(3, after=CHECKS), pytest.raises(OutOfMemory, match=advice):
        trained(few, dataset, tmp_path)


def test_a_padded_batch_is_split_too(tmp_path: Path, few: Params, dataset: Path) -> None:
    padded = with_(few, train={"packing": False, "per_device_train_batch_size": 4})
    expected, _ = trained(padded, dataset, tmp_path / "unlimited")
    with memory_for(100, after=2):
        weights, fallbacks = trained(padded, dataset, tmp_path / "split")
    assert fallbacks and not fallbacks[-1]["gradient_checkpointing"]
    assert_close(weights, expected)


def test_generation_and_likelihoods_halve_their_batch_when_memory_runs_out(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, real = list[int](), generation.SlotBatch
    monkeypatch.setattr(generation, "SlotBatch", lambda model, *rest: rows.append(rest[0]) or real(model, *rest))
    contract = read_json(dataset / "contract.json")
    model, template = load_base(contract["model"], None), load_contract(contract)
    prompts = [ids[-12:] for ids in pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()[:10]]
    sequences = [(list(range(5, 15)), [-100] * 5 + list(range(10, 15))) for _ in range(8)]
    answers = generate(model, template, prompts, 4, 8, "evaluate", "base")
    likelihoods = sequence_losses(model, sequences, 0, "evaluate", "base")
    with memory_for(45):
        assert generate(model, template, prompts, 4, 8, "evaluate", "base") == answers
        losses, counts = sequence_losses(model, sequences, 0, "evaluate", "base")
    assert rows == [8, 8, 4, 2]  # slots again after each failure
    assert losses == pytest.approx(likelihoods[0], abs=1e-4) and counts == likelihoods[1]
    printed = capsys.readouterr()
    assert "8 prompts at once; retrying with 4" in printed.err and "fixed batches" not in printed.err
    assert printed.out.count("a batch of 8 (text of 10 tokens); retrying with 4") == 1
    with memory_for(3), pytest.raises(OutOfMemory, match="one prompt of 12 tokens"):
        generate(model, template, prompts, 4, 8, "evaluate", "base")
    with memory_for(3), pytest.raises(OutOfMemory, match="one text of 10 tokens"):
        sequence_losses(model, sequences, 0, "evaluate", "base")


@pytest.mark.parametrize(
    ("settings", "message", "said"),
    [
        ({"learning_rate": 1e30, "max_grad_norm": 1e30}, r"is (nan|inf) at step \d+, whose batch is rows\.json:", ""),
        ({"learning_rate": 1e-30, "max_steps": 12, "logging_steps": 1}, "the adapter did not change in 12 steps",
         "have not changed after 10 steps"),
    ],
)  # fmt: skip
def test_an_infinite_loss_and_an_adapter_that_does_not_change_are_refused_with_step_and_rows(
    tmp_path: Path, params: Params, dataset: Path, capsys: Any, settings: dict[str, Any], message: str, said: str
) -> None:
    bad = with_(params, train={"warmup_ratio": 0.0} | settings)
    with pytest.raises(TrainError, match=message):
        train(bad.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert said in capsys.readouterr().out


def test_a_jump_of_the_loss_stops_the_run(tmp_path: Path, params: Params, dataset: Path) -> None:
    steady = with_(params, train={"max_loss_rise": 0.5, "learning_rate": 1e-5, "warmup_ratio": 0.0, "max_steps": 20})
    broken = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    rows = pq.read_table(dataset / "train.parquet")
    # One row in forty has labels that the base model considers very unlikely.
    labels, bad = rows.column("labels").to_pylist(), range(7, len(rows), 40)
    for row in bad:
        labels[row] = [label if label == -100 else 390 for label in labels[row]]
    column = pa.array(labels, rows.schema.field("labels").type)
    pq.write_table(rows.drop_columns("labels").append_column("labels", column), broken / "train.parquet")
    with pytest.raises(TrainError, match=r"train\.max_loss_rise \(0\.5\) at step \d+, whose batch is") as caught:
        train(steady.train, broken, tmp_path / "adapter", tmp_path / "checkpoints")
    sources, named = rows.column("source").to_pylist(), str(caught.value).split("whose batch is ")[1]
    assert any(sources[row] in re.split("[,; ]", named) for row in bad)


def test_early_stopping_keeps_the_best_step(tmp_path: Path, params: Params, dataset: Path) -> None:
    """The learning rate overshoots after the first steps; the adapter with the best validation loss is saved."""
    settings = {"eval_steps": 2, "early_stopping_patience": 2, "max_steps": 60, "logging_steps": 100}
    settings |= {"save_steps": 1}  # more checkpoints follow the best one than are kept
    settings |= {"learning_rate": 0.05, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "max_loss_rise": None}
    patient = with_(params, train=settings)
    stopped = train(patient.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    rows = [row for row in csv.DictReader((tmp_path / "adapter" / "loss.csv").open()) if row["validation_loss"]]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    record = read_json(tmp_path / "adapter" / "training.json")
    assert stopped.steps == int(rows[-1]["step"]) < 60
    assert record["shipped_step"] == int(best["step"]) < stopped.steps
    assert record["validation_loss"] == stopped.validation_loss == float(best["validation_loss"])
    assert record["loss"] == stopped.loss == float(best["loss"])
    shorter = with_(patient, train={"max_steps": stopped.shipped_step, "early_stopping_patience": None})
    expected = train(shorter.train, dataset, tmp_path / "shorter", tmp_path / "checkpoints")
    assert expected.validation_loss == stopped.validation_loss
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "shorter"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_tables_have_every_step_and_validation_does_not_change_the_weights(
    tmp_path: Path, few: Params, dataset: Path, unlimited: dict[str, torch.Tensor]
) -> None:
    """On AVX512-BF16 CPUs, bitsandbytes would repack the layers at the first validation and stop the learning."""
    weights, _ = trained(with_(few, train={"eval_steps": 2}), dataset, tmp_path)
    assert all(torch.equal(weights[key], unlimited[key]) for key in unlimited)
    curve = list(csv.DictReader((tmp_path / "adapter" / "loss.csv").open()))
    assert [row["step"] for row in curve] == ["1", "2", "3", "4"]
    assert [bool(row["validation_loss"]) for row in curve] == [False, True, False, True]
    assert all(float(row[key]) > 0 for row in curve for key in ("loss", "learning_rate", "grad_norm", "weight_change"))
    speed = list(csv.DictReader((tmp_path / "tables" / "speed.csv").open()))
    assert all(float(row["tokens_per_second"]) > 0 and float(row["memory_gib"]) > 0 for row in speed)


def test_the_change_of_a_module_is_estimated_from_a_sample_of_its_weights(params: Params) -> None:
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(512, 512), "still": torch.nn.Linear(4, 4)})
    watch = Watch(params.train, [])
    watch.remember_start(model)
    change = torch.randn(512, 512)
    with torch.no_grad():
        model["large"].weight += change
    assert watch.changes(model) == {"large": pytest.approx(float(change.norm()), rel=0.02), "still": 0}


def test_a_frozen_layer_that_passes_no_gradient_is_refused(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        model = load_base(*arguments)
        layer = model.model.layers[1].mlp.down_proj
        original_forward = layer.forward
        # Like a repacked 4-bit layer: right in the forward pass, no gradient in the backward pass.
        layer.forward = lambda x: original_forward(x.detach()) + 0 * x.detach().sum() * layer_bias
        layer_bias = torch.zeros((), requires_grad=True)
        return model

    monkeypatch.setattr("pipeline.train.load_base", broken)
    with pytest.raises(TrainError, match=r"1 frozen layers pass no gradient back.*layers\.1\.mlp\.down_proj"):
        train(params.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")


def test_the_gradient_check_uses_one_short_row_and_the_checkpointing_of_the_training(
    tmp_path: Path, few: Params, dataset: Path
) -> None:
    shortest = min(map(len, pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()))
    with memory_for(10**9) as passes:
        trained(with_(few, train={"gradient_checkpointing": True, "max_steps": 1}), dataset, tmp_path)
    assert passes[CHECKS - 1] == (shortest, True)
    assert all(length > shortest for length, _ in passes[CHECKS : CHECKS + 2])


def test_a_run_with_other_parameters_starts_from_the_beginning_and_says_why(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_run(params.train, dataset, tmp_path)
    assert open_run(with_(params, train={"learning_rate": 0.001}).train, dataset, tmp_path) != folder
    assert "train.learning_rate" in capsys.readouterr().out
    assert open_run(with_(params, train={"max_hours": 2.0}).train, dataset, tmp_path) == folder
    assert capsys.readouterr().out == ""
    assert identity(params.train, dataset) != identity(params.train, dataset, adapter)


def test_a_reached_time_limit_saves_a_checkpoint_and_the_next_run_continues(
    tmp_path: Path, params: Params, dataset: Path
) -> None:
    short = with_(params, train={"max_steps": 6, "save_steps": 3, "logging_steps": 4})
    hurried = with_(short, train={"max_hours": 1e-9})
    with pytest.raises(Interrupted, match=r"train.max_hours .* at step 1"):
        train(hurried.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert not (tmp_path / "adapter").exists()
    [run] = (tmp_path / "checkpoints").iterdir()
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None and checkpoint.name == "checkpoint-1"
    seconds = read_json(checkpoint / "watch.json")["seconds"]
    train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints", tables=tmp_path / "training")
    run_record = read_json(tmp_path / "training" / "run.json")
    assert (run_record["resumed_from_step"], run_record["earlier_seconds"]) == (1, seconds) and seconds > 0
