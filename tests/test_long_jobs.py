"""What a training does when memory runs out, when it diverges, stalls or stops learning, and what it tells meanwhile.

Out of memory is injected: a wrapper round the model's output raises torch's own error for more tokens than it allows.
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

from pipeline.core.files import read_json
from pipeline.core.memory import OutOfMemory
from pipeline.params import Params
from pipeline.train import TrainError, train
from pipeline.training.checkpoints import identity, last_checkpoint, open_run
from pipeline.training.watching import Interrupted, Watch
from pipeline.weights.loading import load_base

CHECKS = 9  # forward passes before the first step: 2 for isolation, 6 for row attention, 1 for gradients


@contextmanager
def memory_for(tokens: int, after: int = 0, checkpointed: bool = False, backward: bool = False) -> Iterator[list[int]]:
    """Let the model take `tokens` tokens at a time, from its `after`-th forward pass on; yields the passes' sizes.

    checkpointed: any number with gradient checkpointing. backward: it fails half-way through the backward pass.
    """
    own, sizes = LlamaModel.forward, []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail_below(handle: Any, hidden: torch.Tensor) -> None:
        handle.remove()
        hidden.register_hook(fail)

    def forward(self: Any, *arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(input_ids.numel())
        enough = input_ids.numel() <= tokens or len(sizes) <= after or (checkpointed and self.gradient_checkpointing)
        if not enough and not backward:
            fail()
        if not enough:
            # The gradient comes back from the top; below the second block it finds no memory.
            handle = self.layers[1].register_forward_pre_hook(lambda _, inputs: fail_below(handle, inputs[0]))
        return own(self, *arguments, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", forward)
        yield sizes


@pytest.fixture(scope="module")
def few(params: Params) -> Params:
    """Four steps of four lines each, without dropout: what does not depend on the pieces a batch comes in."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_step": None}
    return with_(params, train=settings | {"max_steps": 4, "logging_steps": 1, "warmup_ratio": 0.0})


def trained(params: Params, dataset: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    train(params.train, dataset, folder / "adapter", folder / "checkpoints", tables=folder / "tables")
    rungs = read_json(folder / "tables" / "run.json")["memory"]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), rungs


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory, few: Params, dataset: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    weights, rungs = trained(few, dataset, tmp_path_factory.mktemp("plenty"))
    assert rungs == []
    return weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    # Adam makes much of a gradient near zero, so single weights may differ by more than rounding.
    assert all((a[key] - b[key]).norm() < 2e-3 * a[key].norm() for key in a)


def test_out_of_memory_takes_the_same_steps_in_smaller_pieces(
    tmp_path: Path, few: Params, dataset: Path, plenty: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # Then 2 passes a step: it fails within step 2, half-way through the backward pass.
    with memory_for(300, after=CHECKS + 2 + 1, backward=True) as sizes:
        weights, rungs = trained(few, dataset, tmp_path)
    assert max(sizes[CHECKS + 5 :]) <= 300
    assert (rungs[0]["step"], rungs[0]["pieces"]) == (2, 2)
    assert not rungs[-1]["gradient_checkpointing"]
    same(weights, plenty)
    assert "out of memory at step 2; retrying the same batch in 2 pieces" in capsys.readouterr().out


def test_gradient_checkpointing_is_the_last_rung(
    tmp_path: Path, few: Params, dataset: Path, plenty: dict[str, torch.Tensor]
) -> None:
    with memory_for(3, after=CHECKS, checkpointed=True):  # no row is so short
        weights, rungs = trained(few, dataset, tmp_path)
    assert rungs[-1]["gradient_checkpointing"] and not rungs[-2]["gradient_checkpointing"]
    same(weights, plenty)


def test_below_the_last_rung_it_says_what_to_change(tmp_path: Path, few: Params, dataset: Path) -> None:
    with (
        memory_for(3, after=CHECKS),
        pytest.raises(OutOfMemory, match=r"at step 1 with one row .* lower prepare.max_length"),
    ):
        trained(few, dataset, tmp_path)


def test_a_padded_batch_is_split_too(tmp_path: Path, few: Params, dataset: Path) -> None:
    padded = with_(few, train={"packing": False, "per_device_train_batch_size": 4})
    alone, _ = trained(padded, dataset, tmp_path / "alone")
    with memory_for(100, after=2):
        weights, rungs = trained(padded, dataset, tmp_path / "split")
    assert rungs and not rungs[-1]["gradient_checkpointing"]
    same(weights, alone)


def test_generation_and_likelihoods_halve_their_batch_when_memory_runs_out(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.chat.template import load_contract
    from pipeline.scoring.generation import generate
    from pipeline.scoring.likelihood import sequence_losses

    contract = read_json(dataset / "contract.json")
    model, template = load_base(contract["model"], None), load_contract(contract)
    prompts = [ids[-12:] for ids in pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()[:10]]
    sequences = [(list(range(5, 15)), [-100] * 5 + list(range(10, 15))) for _ in range(8)]
    answers = generate(model, template, prompts, 4, 8, "evaluate", "base")
    likelihoods = sequence_losses(model, sequences, 0, "evaluate", "base")
    with memory_for(45):
        assert generate(model, template, prompts, 4, 8, "evaluate", "base") == answers
        losses, counts = sequence_losses(model, sequences, 0, "evaluate", "base")
    assert losses == pytest.approx(likelihoods[0], abs=1e-4) and counts == likelihoods[1]
    said = capsys.readouterr()
    assert "8 prompts at once; retrying with 4" in said.err
    assert said.out.count("a batch of 8 (text of 10 tokens); retrying with 4") == 1
    with memory_for(3), pytest.raises(OutOfMemory, match="one prompt of 12 tokens"):
        generate(model, template, prompts, 4, 8, "evaluate", "base")
    with memory_for(3), pytest.raises(OutOfMemory, match="one text of 10 tokens"):
        sequence_losses(model, sequences, 0, "evaluate", "base")


def test_a_loss_that_is_no_number_names_step_and_rows(tmp_path: Path, params: Params, dataset: Path) -> None:
    wild = with_(params, train={"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0.0})
    with pytest.raises(TrainError, match=r"is (nan|inf) at step \d+, whose batch is rows\.json:\[\d+\], "):
        train(wild.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")


def test_a_jump_of_the_loss_stops_the_run(tmp_path: Path, params: Params, dataset: Path) -> None:
    steady = with_(params, train={"max_loss_rise": 0.5, "learning_rate": 1e-5, "warmup_ratio": 0.0, "max_steps": 20})
    broken = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    rows = pq.read_table(dataset / "train.parquet")
    # One row in forty asks for nonsense: labels that the base finds most unlikely.
    labels, bad = rows.column("labels").to_pylist(), range(7, len(rows), 40)
    for row in bad:
        labels[row] = [label if label == -100 else 390 for label in labels[row]]
    index = rows.schema.get_field_index("labels")
    pq.write_table(
        rows.set_column(index, "labels", pa.array(labels, rows.schema.field(index).type)), broken / "train.parquet"
    )
    with pytest.raises(TrainError, match=r"train\.max_loss_rise \(0\.5\) at step \d+, whose batch is") as caught:
        train(steady.train, broken, tmp_path / "adapter", tmp_path / "checkpoints")
    sources, named = rows.column("source").to_pylist(), str(caught.value).split("whose batch is ")[1]
    assert any(sources[row] in re.split("[,; ]", named) for row in bad)


def test_early_stopping_keeps_the_best_step(tmp_path: Path, params: Params, dataset: Path) -> None:
    """A rate that overshoots after its first steps: the adapter saved is that of the best validation."""
    settings = {"eval_steps": 2, "early_stopping_patience": 2, "max_steps": 60, "logging_steps": 100}
    settings |= {"save_steps": 1}  # more checkpoints follow the best one than are kept
    settings |= {"learning_rate": 0.05, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "max_loss_rise": None}
    patient = with_(params, train=settings)
    done = train(patient.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    rows = [row for row in csv.DictReader((tmp_path / "adapter" / "loss.csv").open()) if row["validation_loss"]]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    record = read_json(tmp_path / "adapter" / "training.json")
    assert done.steps == int(rows[-1]["step"]) < 60
    assert record["shipped_step"] == int(best["step"]) < done.steps
    assert record["validation_loss"] == done.validation_loss == float(best["validation_loss"])
    assert record["loss"] == done.loss == float(best["loss"])
    cut = with_(patient, train={"max_steps": done.shipped_step, "early_stopping_patience": None})
    again = train(cut.train, dataset, tmp_path / "again", tmp_path / "checkpoints")
    assert again.validation_loss == done.validation_loss
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_was_watched_is_in_the_tables_and_a_validation_changes_nothing(
    tmp_path: Path, few: Params, dataset: Path, plenty: dict[str, torch.Tensor]
) -> None:
    """On AVX512-BF16 CPUs bitsandbytes would repack the layers at the first validation, and the rest learn nothing."""
    weights, _ = trained(with_(few, train={"eval_steps": 2}), dataset, tmp_path)
    assert all(torch.equal(weights[key], plenty[key]) for key in plenty)
    curve = list(csv.DictReader((tmp_path / "adapter" / "loss.csv").open()))
    assert [row["step"] for row in curve] == ["1", "2", "3", "4"]
    assert [bool(row["validation_loss"]) for row in curve] == [False, True, False, True]
    assert all(float(row[key]) > 0 for row in curve for key in ("loss", "learning_rate", "grad_norm", "weight_change"))
    speed = list(csv.DictReader((tmp_path / "tables" / "speed.csv").open()))
    assert all(float(row["tokens_per_second"]) > 0 and float(row["memory_gib"]) > 0 for row in speed)


def test_how_far_a_module_moved_is_told_from_a_sample_of_its_weights(params: Params) -> None:
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(512, 512), "still": torch.nn.Linear(4, 4)})
    watch = Watch(params.train, [])
    watch.remember_start(model)
    by = torch.randn(512, 512)
    with torch.no_grad():
        model["large"].weight += by
    assert watch.changes(model) == {"large": pytest.approx(float(by.norm()), rel=0.02), "still": 0}


def test_an_adapter_that_does_not_move_is_warned_about(
    tmp_path: Path, params: Params, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = with_(params, train={"learning_rate": 1e-30, "max_steps": 12, "logging_steps": 1, "warmup_ratio": 0.0})
    with pytest.raises(TrainError, match="the adapter did not change in 12 steps"):
        train(still.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert "have not changed after 10 steps" in capsys.readouterr().out


def test_a_frozen_layer_that_passes_no_gradient_is_refused(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        model = load_base(*arguments)
        layer = model.model.layers[1].mlp.down_proj
        own = layer.forward
        # As a repacked 4-bit layer does: the right numbers forward, nothing back.
        layer.forward = lambda x: own(x.detach()) + 0 * x.detach().sum() * layer_bias
        layer_bias = torch.zeros((), requires_grad=True)
        return model

    monkeypatch.setattr("pipeline.train.load_base", broken)
    with pytest.raises(TrainError, match=r"1 frozen layers pass no gradient back.*layers\.1\.mlp\.down_proj"):
        train(params.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")


def test_the_check_of_gradients_takes_one_short_row_and_the_checkpointing_of_the_training(
    tmp_path: Path, few: Params, dataset: Path
) -> None:
    shortest = min(map(len, pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()))
    checkpointed = []
    own = LlamaModel.forward

    def forward(self: Any, *arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        checkpointed.append((input_ids.numel(), self.gradient_checkpointing and self.training))
        return own(self, *arguments, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", forward)
        short = with_(few, train={"gradient_checkpointing": True, "max_steps": 1})
        train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert checkpointed[CHECKS - 1] == (shortest, True)
    assert all(length > shortest for length, _ in checkpointed[CHECKS : CHECKS + 2])


def test_a_run_that_differs_starts_afresh_and_says_why(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_run(params.train, dataset, tmp_path)
    assert open_run(with_(params, train={"learning_rate": 0.001}).train, dataset, tmp_path) != folder
    assert "other train.learning_rate; this one starts afresh" in capsys.readouterr().out
    assert open_run(with_(params, train={"max_hours": 2.0}).train, dataset, tmp_path) == folder
    assert "afresh" not in capsys.readouterr().out
    assert identity(params.train, dataset) != identity(params.train, dataset, adapter)


def test_a_spent_time_limit_saves_a_checkpoint_and_the_next_run_goes_on(
    tmp_path: Path, params: Params, dataset: Path
) -> None:
    short = with_(params, train={"max_steps": 6, "save_steps": 3, "logging_steps": 4})
    hurried = with_(short, train={"max_hours": 1e-9})
    with pytest.raises(Interrupted, match=r"train.max_hours .* at step 1; the next run goes on from there"):
        train(hurried.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert not (tmp_path / "adapter").exists()
    [run] = (tmp_path / "checkpoints").iterdir()
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None and checkpoint.name == "checkpoint-1"
    seconds = read_json(checkpoint / "watch.json")["seconds"]
    train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints", tables=tmp_path / "training")
    told = read_json(tmp_path / "training" / "run.json")
    assert (told["resumed_from_step"], told["earlier_seconds"]) == (1, seconds) and seconds > 0
