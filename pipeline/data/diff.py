"""What changed between two versions of the dataset: rows, test items, tasks, languages, reasons, lengths.

A version is the dataset that a git revision's `dvc.lock` records, or the workspace's. This is not part of the stage,
whose output may not depend on what was there before: the same data would have another digest, and train again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from pipeline.core import git, graph
from pipeline.data.report import SPLITS, over_splits

DATASET = "artifacts/dataset"
MOST_LINES = 12  # of changes by task, language or reason


class DataDiffError(RuntimeError):
    """A version's report cannot be read; the message says which, and where to look."""


@dataclass(frozen=True)
class Dataset:
    report: dict[str, Any]
    ids: dict[str, pa.ChunkedArray]  # split → row ids


def compare(before: Dataset, now: Dataset, names: tuple[str, str] = ("before", "now")) -> dict[str, Any]:
    """The differences of two versions; `names` are what people call them.

    Returns:
        `splits`: rows before and after, and how many stayed, came and went; `counts`: what changed by task, language
        and reason, as (name, before, after); `lengths`: the same of tokens; `same_test`: scores of both compare.
    """
    old, new = before.report, now.report
    splits = [_split(split, before.ids[split], now.ids[split]) for split in SPLITS]
    same_test = old["test_sha256"] == new["test_sha256"]
    counts = {
        "task": _changed(over_splits(old["tasks"]), over_splits(new["tasks"])),
        "language": _changed(over_splits(old["languages"]), over_splits(new["languages"])),
        "dropped": _changed(old["dropped"], new["dropped"]),
        "repaired": _changed(old["repaired"], new["repaired"]),
    }
    was, now_is = _lengths(old), _lengths(new)
    lengths = [(what, was[what], now_is[what]) for what in was if was[what] != now_is[what]]
    moved = any(split["added"] or split["removed"] for split in splits)
    return {
        "old": names[0],
        "new": names[1],
        "same": same_test and not moved and not any(counts.values()) and not lengths,
        "same_test": same_test,
        "splits": splits,
        "counts": counts,
        "lengths": lengths,
    }


def dataset_at(revision: str | None, root: Path = Path(".")) -> Dataset:
    """The dataset that git `revision` records, from DVC's cache or remote; None: the workspace's.

    Raises:
        DataDiffError: there is no such revision, it records no dataset, or its files cannot be found.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    try:
        if revision is None:
            return _read(lambda name: (root / DATASET / name).open("rb"))
        if git.ask(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
            raise DataDiffError(f"{revision} is not a git revision here")
        files = DVCFileSystem(str(root), rev=revision)
        return _read(lambda name: files.open(f"{DATASET}/{name}", "rb"))
    except (DvcException, DataIndexDirError, OSError) as error:
        raise DataDiffError(
            f"the dataset of {revision or 'this folder'} is neither here nor in a DVC remote ({error}); `dvc fetch "
            f"{DATASET} --all-commits` brings what a remote has, and `dvc repro prepare` makes it again, of a commit "
            "after `git checkout`"
        ) from None


def previous_revision(root: Path = Path(".")) -> str:
    """The newest commit whose `dvc.lock` records another dataset than the workspace's.

    Raises:
        DataDiffError: there is none.
    """
    now = _dataset_md5(graph.lock(root))
    for commit in (git.ask(root, "log", "--format=%h", "--", "dvc.lock") or "").split():
        text = git.ask(root, "show", f"{commit}:./dvc.lock")
        before = _dataset_md5(YAML(typ="safe").load(text) or {}) if text else None
        if before not in (None, now):
            return commit
    raise DataDiffError(
        "no commit records another dataset than the present one: commit dvc.lock after a run, or name a revision"
    )


def data_is_newer(root: Path = Path(".")) -> bool:
    """Whether rows were ingested that the workspace's dataset does not hold."""
    deps = graph.lock(root).get("stages", {}).get("prepare", {}).get("deps", [])
    prepared = next((dep["md5"] for dep in deps if dep["path"] == "data"), None)
    return prepared is not None and prepared != graph.snapshot(root)["md5"]


def _read(open_file: Callable[[str], BinaryIO]) -> Dataset:
    ids = {}
    for split in SPLITS:
        with open_file(f"{split}.parquet") as file:
            ids[split] = pq.read_table(file, columns=["id"])["id"]
    with open_file("report.json") as file:
        return Dataset(json.load(file), ids)


def _lengths(report: dict[str, Any]) -> dict[str, float]:
    tokens, rows = report["train_tokens"], report["rows"]["train"]
    return {
        "median tokens of a training row": tokens["median_per_row"],
        "mean": round(tokens["total"] / max(1, rows), 1),
        "longest": tokens["max_per_row"],
        "training tokens": tokens["total"],
        "fraction that carries loss": round(tokens["trained"] / max(1, tokens["total"]), 3),
    }


def _split(split: str, old: pa.ChunkedArray, new: pa.ChunkedArray) -> dict[str, Any]:
    stayed, still_there = (pc.sum(pc.is_in(a, value_set=b)).as_py() or 0 for a, b in ((new, old), (old, new)))
    counts = {"before": len(old), "after": len(new), "stayed": stayed}
    return counts | {"split": split, "added": len(new) - stayed, "removed": len(old) - still_there}


def _changed(old: Mapping[str, int], new: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Names whose counts differ, the largest change first."""
    changes = [(name, old.get(name, 0), new.get(name, 0)) for name in sorted(old.keys() | new.keys())]
    changes = sorted((each for each in changes if each[1] != each[2]), key=lambda each: -abs(each[2] - each[1]))
    if rest := changes[MOST_LINES:]:
        changes[MOST_LINES:] = [(f"{len(rest)} more", sum(b for _, b, _ in rest), sum(a for _, _, a in rest))]
    return changes


def _dataset_md5(lock: Mapping[str, Any]) -> str | None:
    outs = lock.get("stages", {}).get("prepare", {}).get("outs", [])
    return next((out["md5"] for out in outs if out["path"] == DATASET), None)
