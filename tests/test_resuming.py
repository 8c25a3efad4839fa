"""What makes a training the same run as one before, and what a spent time limit leaves; see also `test_kills.py`."""

from pathlib import Path

import pytest
from conftest import with_

from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.train import train
from pipeline.training.checkpoints import identity, last_checkpoint, open_run


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
    tmp_path: Path, params: Params, dataset: Path
) -> None:
    from pipeline.training.watching import Interrupted

    short = with_(params, train={"max_steps": 6, "save_steps": 3, "logging_steps": 4})
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
