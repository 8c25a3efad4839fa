"""What changed between two versions of the dataset: rows, test items, tasks, languages, reasons, lengths.

Comes in: two reports of `prepare`, by the git revisions whose `dvc.lock` records them, or the workspace's. Goes out:
the differences. It stands apart from the stage, whose output may not depend on what was there before: the same data
would have another digest, and be trained on again.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from ruamel.yaml import YAML

from pipeline import graph
from pipeline.data.report import SKETCH, Report, sketch_ids
from pipeline.data.report_pages import SPLITS
from pipeline.files import read_json

REPORT = "artifacts/dataset/report.json"
DATASET = "artifacts/dataset"
MOST_LINES = 12  # of changes by task, language or reason


class DataDiffError(RuntimeError):
    """A version's report cannot be read; the message says which, and where to look."""


class SplitDiff(TypedDict):
    split: str
    before: int  # rows
    after: int
    stayed: int | None  # rows that both versions have in this split; None where a report holds no row ids
    added: int | None
    removed: int | None
    exact: bool  # False: stayed, added and removed are estimates, see `data_report.SKETCH`


class Diff(TypedDict):
    old: str
    new: str
    same: bool  # not a row differs, nor a test item
    same_test: bool  # the test splits are the same to the last byte: scores on them compare
    splits: list[SplitDiff]
    counts: dict[str, list[tuple[str, int, int]]]  # task, language, dropped, … → (name, before, after) that changed
    lengths: list[tuple[str, float, float]]  # what, before, after


def compare(old: Report, new: Report, names: tuple[str, str] = ("before", "now")) -> Diff:
    """The differences of two reports; `names` are what people call the two versions."""
    splits = [_split(split, old, new) for split in SPLITS]
    same_test = old["test_sha256"] == new["test_sha256"]
    counts = {
        "task": _changed(_over_splits(old, "tasks"), _over_splits(new, "tasks")),
        "language": _changed(_over_splits(old, "languages"), _over_splits(new, "languages")),
        "dropped": _changed(old["dropped"], new["dropped"]),
        "repaired": _changed(old["repaired"], new["repaired"]),
    }
    lengths = [
        (what, before, after)
        for what, before, after in zip(_LENGTHS, _lengths(old), _lengths(new), strict=True)
        if before != after
    ]
    moved = any(split["added"] != 0 or split["removed"] != 0 for split in splits)
    same = same_test and not moved and not any(counts.values()) and not lengths
    return Diff(
        old=names[0], new=names[1], same=same, same_test=same_test, splits=splits, counts=counts, lengths=lengths
    )


def report_at(revision: str | None, root: Path = Path(".")) -> Report:
    """The report of the dataset that git `revision` records, from DVC's cache or remote; None: the workspace's.

    Raises:
        DataDiffError: there is no such revision, it records no dataset, or its report is nowhere to be had.
    """
    if revision is None:
        if not (root / REPORT).exists():
            raise DataDiffError(f"{REPORT} does not exist; `dvc repro prepare` makes it")
        return read_json(root / REPORT)
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", say=f"{revision} is no git revision here")
    try:
        return json.loads(dvc.api.read(REPORT, repo=str(root), rev=revision))
    except (DvcException, DataIndexDirError, OSError) as error:
        raise DataDiffError(
            f"the dataset of commit {revision} is neither on this machine nor in a DVC remote ({error}); `dvc fetch "
            f"{DATASET} --all-commits` brings what a remote has, and `git checkout {revision}` with `dvc repro "
            "prepare` makes it again"
        ) from None


def previous_revision(root: Path = Path(".")) -> str:
    """The newest commit whose `dvc.lock` records another dataset than the workspace's.

    Raises:
        DataDiffError: there is none.
    """
    now = _dataset(graph.lock(root))
    for commit in _git(root, "log", "--format=%h", "--", "dvc.lock", say="this is no git repository").split():
        text = _git(root, "show", f"{commit}:./dvc.lock", say=None)
        before = _dataset(YAML(typ="safe").load(text) or {}) if text else None
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


_LENGTHS = ("median tokens of a training row", "mean", "longest", "training tokens", "fraction that carries loss")


def _lengths(report: Report) -> tuple[float, ...]:
    tokens, rows = report["train_tokens"], report["rows"]["train"]
    return (
        tokens["median_per_row"],
        round(tokens["total"] / max(1, rows), 1),
        tokens["max_per_row"],
        tokens["total"],
        round(tokens["trained"] / max(1, tokens["total"]), 3),
    )


def _split(split: str, old: Report, new: Report) -> SplitDiff:
    before, after = old["rows"].get(split, 0), new["rows"].get(split, 0)
    found = SplitDiff(split=split, before=before, after=after, stayed=None, added=None, removed=None, exact=True)
    if "row_sketch" not in old or "row_sketch" not in new:  # a report of an earlier release
        return found
    ids = [sketch_ids(report["row_sketch"].get(split, "")) for report in (old, new)]
    # Below the smaller of the two largest ids that were kept, both sides are known completely.
    ends = [each[-1] for each, rows in zip(ids, (before, after), strict=True) if len(each) == SKETCH < rows]
    if not ends:
        added = len(np.setdiff1d(ids[1], ids[0]))
        return found | {"stayed": after - added, "added": added, "removed": len(np.setdiff1d(ids[0], ids[1]))}
    known_old, known_new = (each[each <= min(ends)] for each in ids)
    alike = len(np.intersect1d(known_old, known_new)) / len(np.union1d(known_old, known_new))  # Jaccard similarity
    stayed = min(before, after, round(alike * (before + after) / (1 + alike)))
    return found | {"stayed": stayed, "added": after - stayed, "removed": before - stayed, "exact": False}


def _over_splits(report: Report, key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for counts in report.get(key, {}).values():  # type: ignore[attr-defined]  # `key` is tasks or languages
        total.update(counts)
    return total


def _changed(old: Mapping[str, int], new: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Names whose counts differ, the largest change first."""
    names = sorted(old.keys() | new.keys(), key=lambda name: (-abs(new.get(name, 0) - old.get(name, 0)), name))
    changes = [(name, old.get(name, 0), new.get(name, 0)) for name in names if old.get(name, 0) != new.get(name, 0)]
    if rest := changes[MOST_LINES:]:
        changes[MOST_LINES:] = [(f"{len(rest)} more", sum(b for _, b, _ in rest), sum(a for _, _, a in rest))]
    return changes


def _dataset(lock: Mapping[str, Any]) -> str | None:
    outs = lock.get("stages", {}).get("prepare", {}).get("outs", [])
    return next((out["md5"] for out in outs if out["path"] == DATASET), None)


def _git(root: Path, *arguments: str, say: str | None) -> str:
    """git's answer; where it fails, the error that it `say`s, or nothing."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode != 0 and say is not None:
        raise DataDiffError(f"{say} ({done.stderr.strip() or 'git'})")
    return done.stdout if done.returncode == 0 else ""
