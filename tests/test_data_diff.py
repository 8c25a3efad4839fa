"""What changed between two versions of the data, in a real DVC repository."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, make_project, retune
from ruamel.yaml import YAML

from pipeline.data.diff import DataDiffError, compare, previous_revision, report_at
from pipeline.data.report import SKETCH, DataStats, Report, write_report
from pipeline.data.report_pages import render
from pipeline.settings import load_params


def report(train: range, test: range = range(9_000_000, 9_000_010), **more: str) -> Report:
    stats = DataStats()
    for split, numbers in (("train", train), ("test", test)):
        ids = [hashlib.sha256(str(number).encode()).hexdigest()[:16] for number in numbers]
        stats.add_read("alpaca", "rows.json", len(ids))
        stats.add_kept(
            split, ids, [more.get("task", "a")] * len(ids), [20] * len(ids), [10] * len(ids), ["en"] * len(ids)
        )
    return stats.report(64, hashlib.sha256(str(test).encode()).hexdigest(), [("text", True)])


def test_the_same_data_differs_in_nothing() -> None:
    diff = compare(report(range(100)), report(range(100)))
    assert diff["same"] and diff["same_test"]
    assert "Nothing" in render({}, "diff.md", diff)


@pytest.mark.parametrize("scale", [10, 1_000, 40_000])
def test_rows_that_came_went_and_stayed_are_counted(scale: int) -> None:
    diff = compare(report(range(2 * scale)), report(range(scale, 4 * scale)))
    train = diff["splits"][0]
    assert (train["before"], train["after"], train["exact"]) == (2 * scale, 3 * scale, 3 * scale <= SKETCH)
    assert train["stayed"] is not None and train["added"] is not None and train["removed"] is not None
    slack = 0 if train["exact"] else 0.05 * 4 * scale  # of the union: three standard errors of the sketch
    assert abs(train["stayed"] - scale) <= slack
    assert abs(train["added"] - 2 * scale) <= slack
    assert abs(train["removed"] - scale) <= slack
    assert ("≈" in render({}, "diff.md", diff)) != train["exact"]


def test_an_estimate_is_within_two_percent_of_the_rows() -> None:
    draw = random.Random(0)
    for _ in range(5):
        shared, old, new = (draw.randrange(5_000, 30_000) for _ in range(3))
        before = report(range(shared + old))
        after = report(range(old, old + shared + new))
        stayed = compare(before, after)["splits"][0]["stayed"]
        assert stayed is not None and abs(stayed - shared) < 0.02 * (shared + old + new), (shared, old, new, stayed)


def test_a_changed_test_split_is_said_and_its_items_counted() -> None:
    diff = compare(report(range(50)), report(range(50), range(9_000_004, 9_000_012)))
    test = diff["splits"][2]
    assert not diff["same"] and not diff["same_test"]
    assert (test["stayed"], test["added"], test["removed"]) == (6, 2, 4)
    assert "not the same" in render({}, "diff.md", diff)
    # The same rows, but scored in another way.
    rescored = compare(report(range(50)), Report(**report(range(50)) | {"test_sha256": "0" * 64}))
    assert not rescored["same"] and not rescored["same_test"]


def test_a_row_that_moved_between_splits_left_one_and_came_to_the_other() -> None:
    old, new = report(range(50)), report(range(49), range(49, 50))
    train, _, test = compare(old, new)["splits"]
    assert (train["removed"], train["added"], test["added"]) == (1, 0, 1)


def test_changes_of_tasks_and_lengths_are_listed() -> None:
    diff = compare(report(range(50)), report(range(60), task="b"))
    assert diff["counts"]["task"] == [("b", 0, 70), ("a", 60, 0)]
    assert ("training tokens", 1000, 1200) in diff["lengths"]


def test_a_report_of_an_earlier_release_is_compared_by_counts() -> None:
    old = {"rows_in": 60, "rows": {"train": 50, "validation": 0, "test": 10}, "tasks": {"train": {"a": 50}},
           "dropped": {}, "repaired": {}, "test_sha256": "0", "example": "text",
           "train_tokens": {"total": 1000, "trained": 500, "median_per_row": 20, "max_per_row": 20}}  # fmt: skip
    diff = compare(old, report(range(60)))  # type: ignore[arg-type]
    assert diff["splits"][0]["stayed"] is None
    assert "not known" in render({}, "diff.md", diff)


def record(root: Path, rows: int) -> None:
    """Let DVC take a dataset of `rows` training rows for the stage's output."""
    write_report(report(range(rows)), root / "artifacts" / "dataset")
    command = [sys.executable, "-m", "dvc", "commit", "-q", "-f", "prepare"]
    subprocess.run(command, cwd=root, check=True, env=environment())


def commit(root: Path) -> None:
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *author, "commit", "-qm", "a version"], cwd=root, check=True)


def test_versions_are_read_by_their_git_revisions(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()  # no stage runs here: a model is not needed
    (tmp_path / "base" / "config.json").write_text("{}")
    root = make_project(tmp_path / "project", tmp_path / "base", load_params(ROOT / "params.yaml"))
    with pytest.raises(DataDiffError, match="dvc repro prepare"):
        report_at(None, root)
    with pytest.raises(DataDiffError, match="nothing is no git revision here"):
        report_at("nothing", root)
    record(root, 40)
    commit(root)
    with pytest.raises(DataDiffError, match="name a revision"):
        previous_revision(root)
    record(root, 50)
    before = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    )
    assert previous_revision(root) == before.stdout.strip()
    assert report_at("HEAD", root)["rows"]["train"] == 40

    said = retune(root, "diff-data", "--html", "diff.html")
    assert said.returncode == 0, said.stderr
    assert [line.split() for line in said.stdout.splitlines() if line.split()[:1] == ["train"]] == [
        ["train", "40", "50", "40", "10", "0"]
    ]
    assert "What changed" in (root / "diff.html").read_text()
    assert "newer" not in said.stderr

    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())
    lock["stages"]["prepare"]["deps"] = [{"path": "data", "md5": "0" * 32 + ".dir"}]
    with (root / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    assert "data/ is newer than the prepared dataset" in retune(root, "diff-data").stderr

    commit(root)
    assert compare(report_at("HEAD", root), report_at(None, root))["same"]
    for file in (root / ".dvc" / "cache").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(DataDiffError, match="dvc fetch artifacts/dataset --all-commits"):
        report_at("HEAD~1", root)
    subprocess.run(
        ["dvc", "remote", "add", "--default", "team", str(tmp_path / "team")], cwd=root, check=True, env=environment()
    )
    commit(root)
    with pytest.raises(DataDiffError, match="dvc fetch artifacts/dataset --all-commits"):
        report_at("HEAD~2", root)
