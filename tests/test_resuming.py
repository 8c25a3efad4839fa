"""A killed training goes on to the very adapter of one that was left alone; see also `test_train.py`."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, with_

from pipeline.core.files import read_json, sha256_file
from pipeline.params import Params
from pipeline.train import train
from pipeline.training.checkpoints import identity, last_checkpoint, open_run

Run = Any


@pytest.fixture(scope="module")
def forks() -> Iterator[Run]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "forked_training.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment() | {"OMP_NUM_THREADS": "1"}
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"

        def run(params: Params, dataset: Path, folder: Path, event: int | None = None) -> dict[str, Any]:
            folder.mkdir(exist_ok=True)
            order = {"params": params.model_dump_json(), "dataset": str(dataset), "folder": str(folder), "event": event}
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        yield run
        child.stdin.close()


@pytest.fixture(scope="module")
def short(params: Params) -> Params:
    """Dropout on, two micro-batches a step, a checkpoint every 3 steps, validation every 4: nothing falls together."""
    return with_(
        params,
        train={
            "lora_dropout": 0.1,
            "gradient_accumulation_steps": 2,
            "max_steps": 20,
            "save_steps": 3,
            "eval_steps": 4,
            "logging_steps": 4,
            "early_stopping_patience": 10,
        },
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forks: Run, short: Params, dataset: Path) -> tuple[Path, int]:
    """What the training makes when nothing kills it, and how many events it has."""
    folder = tmp_path_factory.mktemp("whole")
    done = forks(short, dataset, folder)
    assert done.get("steps") == 20, done
    return folder / "adapter", done["events"]


def killed_until_done(forks: Run, params: Params, dataset: Path, folder: Path, events: Iterator[int]) -> list[int]:
    """Kill the run at each of `events` after its start, again and again, until a run ends; the steps resumed from."""
    resumed = []
    for event in events:
        done = forks(params, dataset, folder, event)
        assert "error" not in done, done
        if not done["killed"]:
            resumed.append(done["resumed"])
            return resumed
        resumed.append(-1)
        assert not (folder / "adapter").exists() or (folder / "adapter" / "training.json").exists()
    raise AssertionError("it never came to its end")


def same_files(a: Path, b: Path) -> bool:
    names = {path.name for path in a.iterdir()}
    return names == {path.name for path in b.iterdir()} and all(sha256_file(a / n) == sha256_file(b / n) for n in names)


def test_a_resumed_adapter_is_bit_identical(
    tmp_path: Path, forks: Run, short: Params, dataset: Path, whole: tuple[Path, int]
) -> None:
    adapter, events = whole
    kills = [events * 6 // 10, events * 3 // 10, 10**9]  # mid-epoch, between two checkpoints
    resumed = killed_until_done(forks, short, dataset, tmp_path / "run", iter(kills))
    assert resumed[-1] > 3
    assert same_files(tmp_path / "run" / "adapter", adapter)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(int(os.environ.get("RETUNE_KILLED_RUNS", "8"))))
def test_random_kills_leave_the_adapter_bit_identical(
    tmp_path: Path, forks: Run, short: Params, dataset: Path, whole: tuple[Path, int], seed: int
) -> None:
    adapter, events = whole
    draw = random.Random(seed)
    # At least three kills a run, so 24 in all, each somewhere in what is left; then it may end.
    kills = [draw.randrange(1, events // 2) for _ in range(3)] + [10**9]
    killed_until_done(forks, short, dataset, tmp_path / "run", iter(kills))
    assert same_files(tmp_path / "run" / "adapter", adapter)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_differs_starts_afresh_and_says_why(
    tmp_path: Path, params: Params, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = open_run(params.train, dataset, tmp_path)
    other = open_run(with_(params, train={"learning_rate": 0.001}).train, dataset, tmp_path)
    assert own != other
    assert "other parameters (train.learning_rate); this training starts afresh" in capsys.readouterr().out
    assert open_run(params.train, dataset, tmp_path) == own
    assert "afresh" not in capsys.readouterr().out


def test_a_time_limit_is_no_other_run(params: Params, dataset: Path) -> None:
    longer = with_(params, train={"max_hours": 2.0})
    assert identity(longer.train, dataset) == identity(params.train, dataset)


def test_a_spent_time_limit_saves_a_checkpoint_and_the_next_run_goes_on(
    tmp_path: Path, short: Params, dataset: Path
) -> None:
    from pipeline.training.watching import Interrupted

    hurried = with_(short, train={"max_hours": 1e-9})
    with pytest.raises(Interrupted, match=r"train.max_hours .* at step 1; the next run goes on from there"):
        train(hurried.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert not (tmp_path / "adapter").exists()
    [run] = (tmp_path / "checkpoints").iterdir()
    found = last_checkpoint(run)
    assert found is not None and found.name == "checkpoint-1"
    kept = read_json(found / "watch.json")
    assert kept["recent"]
    train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints", tables=tmp_path / "training")
    told = read_json(tmp_path / "training" / "run.json")
    assert (told["resumed_from_step"], told["earlier_seconds"]) == (1, kept["seconds"])
    assert kept["seconds"] > 0
