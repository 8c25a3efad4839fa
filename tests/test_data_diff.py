"""What changed between two versions of the data, in a real DVC repository."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, dvc, git, make_project, retune
from ruamel.yaml import YAML

from pipeline.data.diff import DataDiffError, Dataset, compare, dataset_at, previous_revision
from pipeline.data.report import DataStats, render, write_report
from pipeline.settings import load_params


def dataset(train: range, test: range = range(9_000_000, 9_000_010), **more: str) -> Dataset:
    stats = DataStats()
    for split, numbers in (("train", train), ("test", test)):
        rows = len(numbers)
        stats.add_read("alpaca", "rows.json", rows)
        stats.add_kept(split, [more.get("task", "a")] * rows, [20] * rows, [10] * rows, ["en"] * rows)
    digest = more.get("test_sha256", hashlib.sha256(str(test).encode()).hexdigest())
    splits = {"train": train, "validation": range(0), "test": test}
    ids = {split: pa.chunked_array([[str(n) for n in numbers]], pa.string()) for split, numbers in splits.items()}
    return Dataset(stats.report(64, digest, [("text", True)]), ids)


@pytest.mark.parametrize(
    ("old", "new", "moves"),  # (stayed, added, removed) of train and test
    [
        ((range(100),), (range(100),), [(100, 0, 0), (10, 0, 0)]),
        ((range(20_000),), (range(10_000, 40_000),), [(10_000, 20_000, 10_000), (10, 0, 0)]),
        ((range(50),), (range(49), range(49, 50)), [(49, 0, 1), (0, 1, 10)]),  # a row moved between splits
    ],
)
def test_rows_that_came_went_and_stayed_are_counted(
    old: tuple[range], new: tuple[range], moves: list[tuple[int, int, int]]
) -> None:
    diff = compare(dataset(*old), dataset(*new))
    train, _, test = diff["splits"]
    assert (train["before"], train["after"]) == (len(old[0]), len(new[0]))
    assert [(split["stayed"], split["added"], split["removed"]) for split in (train, test)] == moves
    assert diff["same"] == (old == new) and diff["same_test"] == (len(new) == 1)
    assert ("Nothing" in render({}, "diff.md", diff)) == diff["same"]


def test_changes_of_tasks_and_lengths_are_listed() -> None:
    diff = compare(dataset(range(50)), dataset(range(60), task="b"))
    assert diff["counts"]["task"] == [("b", 0, 70), ("a", 60, 0)]
    assert ("training tokens", 1000, 1200) in diff["lengths"]


def record(root: Path, rows: int) -> None:
    """Let DVC take a dataset of `rows` training rows for the stage's output."""
    written, folder = dataset(range(rows)), root / "artifacts" / "dataset"
    write_report(written.report, folder)
    for split, ids in written.ids.items():
        pq.write_table(pa.table({"id": ids}), folder / f"{split}.parquet")
    dvc(root, "commit", "-q", "-f", "prepare")


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a version")


def test_versions_are_read_by_their_git_revisions(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()  # no stage runs here: a model is not needed
    (tmp_path / "base" / "config.json").write_text("{}")
    root = make_project(tmp_path / "project", tmp_path / "base", load_params(ROOT / "params.yaml"))
    with pytest.raises(DataDiffError, match="dvc repro prepare"):
        dataset_at(None, root)
    with pytest.raises(DataDiffError, match="nothing is not a git revision"):
        dataset_at("nothing", root)
    record(root, 40)
    commit(root)
    with pytest.raises(DataDiffError, match="name a revision"):
        previous_revision(root)
    record(root, 50)
    assert previous_revision(root) == git(root, "rev-parse", "--short", "HEAD")
    assert dataset_at("HEAD", root).report["rows"]["train"] == 40

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
    assert compare(dataset_at("HEAD", root), dataset_at(None, root))["same"]
    shutil.rmtree(root / ".dvc" / "cache")
    with pytest.raises(DataDiffError, match="dvc fetch artifacts/dataset --all-commits"):
        dataset_at("HEAD~1", root)
