"""Candidate against champion: both systems' scores of the same frozen test items in, one row a gating metric out.

The numbers are those of the merged models that would serve. Scores that a version was published with count only if test
split, decoding, metric signatures and library versions are today's; else the version is fetched and scored again.
Refused: a comparison on items that the champion may have been trained on.
"""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import graph
from pipeline.files import WORK_DIR, read_json, write_json
from pipeline.params import PromoteParams
from pipeline.process import python_ending_with_parent
from pipeline.publish import fetch_version
from pipeline.statistics import corpus_score, group_of, metric_items, num_groups, paired_difference
from pipeline.store.artifact_store import ArtifactStore
from pipeline.versions.manifest import Manifest, read_manifest

RESAMPLES = 2000
MIN_GROUPS = 20  # independent test items (or groups of them) below which nothing is promoted
BASE = "the base model"
COLUMNS = ("metric", "candidate", "champion", "difference", "95 % CI", "needed", "verdict")
Comparison = dict[
    str, Any
]  # metric → candidate, champion, difference, low, high, margin, items, groups, needed, passed


class CompareError(RuntimeError):
    """No comparison can be made; the message says why and what can be done."""


class UnfairError(CompareError):
    """The champion was trained on rows that are test rows now; a candidate is refused for it."""


def compare(
    store: ArtifactStore, candidate: Manifest, serving: str | None, params: PromoteParams, root: Path = Path(".")
) -> tuple[Comparison, list[str]]:
    """Each gating metric's row, and notes that a reader of the numbers needs.

    The primary metric passes when the whole interval of the paired difference lies above `min_improvement`; a guard
    metric when it lies above minus its margin. Without a champion the base model that the candidate was tuned from
    stands in. `passed` is None for a guard metric that no test item counts for.

    Raises:
        UnfairError: the champion was trained on some of the test items.
        CompareError: the systems answered different items, or no item counts for the primary metric.
    """
    notes: list[str] = []
    if serving is None:
        folder = root / WORK_DIR / "versions" / candidate["version"]
        ours = pq.read_table(fetch_version(store, candidate, "parity", folder) / "items.merged.parquet")
        theirs = pq.read_table(fetch_version(store, candidate, "evaluation", folder) / "items.base.parquet")
    else:
        champion = read_manifest(store, serving)
        if champion is None:
            raise CompareError(f"the champion {serving} is no longer in {store.uri}; restore its manifest and objects")
        notes += _split_notes(candidate, champion)
        ours = _current_items(store, candidate, root)
        theirs = _current_items(store, champion, root)
    if ours.column("id").to_pylist() != theirs.column("id").to_pylist():
        raise CompareError("candidate and champion answered different test items; run `retune run` to score both again")
    margins: dict[str, float | None] = {params.primary_metric: None} | {
        metric: margin for metric, margin in params.guard_metrics.items() if metric != params.primary_metric
    }
    rows = {metric: _row(ours, theirs, metric, margin, params) for metric, margin in margins.items()}
    notes += [
        f"{metric} guards nothing here: no test item counts for it" for metric, row in rows.items() if not row["items"]
    ]
    return rows, notes


def refusals(comparison: Comparison) -> list[str]:
    """The metrics that speak against the candidate."""
    return [metric for metric, row in comparison.items() if row["passed"] is False]


def reason(comparison: Comparison, against: str, primary: str) -> str:
    """The decision in one sentence: the primary metric's numbers, or those of every metric that refused."""
    failed = refusals(comparison)
    if not failed:
        row, number = comparison[primary], _format(primary)
        return (
            f"{_scores(primary, row)} of {against} on {row['items']} test items "
            f"(difference {number(row['difference'], '+')}, 95 % CI {_interval(primary, row)})"
        )
    parts = []
    for metric in failed:
        row = comparison[metric]
        first = metric == failed[0]
        numbers = f"{'95 % CI ' if first else ''}{_interval(metric, row)}, needed {row['needed']}"
        parts.append(f"{_scores(metric, row)}{f' of {against}' if first else ''} ({numbers})")
    return "; ".join(parts)


def verdict_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The comparison as text, one dictionary with `COLUMNS` as keys for each metric."""
    words = {True: "passed", False: "refused", None: "not measured"}
    rows = []
    for metric, row in comparison.items():
        number = _format(metric)
        measured = row["items"] > 0
        cells = [
            number(row["candidate"]) if measured else "–",
            number(row["champion"]) if measured else "–",
            number(row["difference"], "+") if measured else "–",
            _interval(metric, row) if measured else "–",
            row["needed"],
            words[row["passed"]],
        ]
        rows.append(dict(zip(COLUMNS, [metric, *cells], strict=True)))
    return rows


def _row(ours: pa.Table, theirs: pa.Table, metric: str, margin: float | None, params: PromoteParams) -> dict[str, Any]:
    a, b = metric_items(ours, metric), metric_items(theirs, metric)
    groups = group_of(ours)
    difference = paired_difference(a, b, RESAMPLES, params.seed, groups)
    needed = f"more than {params.min_improvement:g}" if margin is None else f"at least -{margin:g}"
    if difference.score != difference.score:  # NaN
        if margin is None:
            raise CompareError(f"promote.primary_metric is {metric}, but no test item counts for it; choose another")
        empty = dict.fromkeys(("candidate", "champion", "difference", "low", "high"))
        return empty | {"margin": margin, "items": 0, "groups": 0, "needed": needed, "passed": None}
    independent = num_groups(a, groups)
    passed = difference.low > params.min_improvement if margin is None else difference.low >= -margin
    if margin is None and independent < MIN_GROUPS:
        passed = False  # an interval over a handful of items is narrower than the truth
        needed = f"at least {MIN_GROUPS} independent test items, there are {independent}"
    return {
        "candidate": corpus_score(a),
        "champion": corpus_score(b),
        **{"difference" if key == "score" else key: value for key, value in asdict(difference).items()},
        "margin": margin,
        "items": num_groups(a),  # each item its own group
        "groups": independent,
        "needed": needed,
        "passed": bool(passed),
    }


def _split_notes(candidate: Manifest, champion: Manifest) -> list[str]:
    """What differing splits mean for the comparison.

    A row's place is fixed by its group, and the test split is the places below `test_fraction`: a smaller one holds
    only rows that were test rows before, a larger one also rows that the champion was trained on.
    """
    if champion["evaluation"]["test_sha256"] == candidate["evaluation"]["test_sha256"]:
        return []
    ours, theirs = (manifest["params"]["prepare"]["test_fraction"] for manifest in (candidate, champion))
    if ours > theirs:
        raise UnfairError(
            f"prepare.test_fraction is {ours:g}, and was {theirs:g} for the champion {champion['version']}: it was "
            "trained on rows that are test rows now, so its scores on them would be too high. Set the fraction back, "
            "or promote by hand: `retune promote VERSION --force --reason …`"
        )
    if ours < theirs:
        return [f"the test split is a part of the champion's: prepare.test_fraction {ours:g} instead of {theirs:g}"]
    return ["the test split is not the champion's (rows or their preparation changed); the champion was scored again"]


def _current_items(store: ArtifactStore, manifest: Manifest, root: Path) -> pa.Table:
    """A version's merged-model scores on the workspace's test split, measured again if what they rest on changed."""
    folder = root / WORK_DIR / "versions" / manifest["version"]
    wanted = read_json(root / "artifacts" / "parity" / "parity.json")["evaluation"]
    if manifest["evaluation"] == wanted:
        return pq.read_table(fetch_version(store, manifest, "parity", folder) / "items.merged.parquet")
    scored = folder / "scored"
    if not (scored / "evaluation.json").is_file() or read_json(scored / "evaluation.json") != wanted:
        model = fetch_version(store, manifest, "merged", folder)
        settings = folder / "settings.json"
        write_json(settings, wanted)
        # A process of its own: promotion stays light, and the model's memory is returned when it ends.
        command = python_ending_with_parent(
            "pipeline",
            "score",
            str(model.resolve()),
            "--settings",
            str(settings.resolve()),
            "--output",
            str(scored.resolve()),
        )
        done = subprocess.run(command, cwd=root, env=graph.environment(), stdout=sys.stderr)
        if done.returncode != 0:
            raise CompareError(f"version {manifest['version']} could not be scored again on today's test split")
    return pq.read_table(scored / "items.parquet")


def _scores(metric: str, row: dict[str, Any]) -> str:
    number = _format(metric)
    return f"{metric} {number(row['candidate'])} against {number(row['champion'])}"


def _interval(metric: str, row: dict[str, Any]) -> str:
    number = _format(metric)
    return f"{number(row['low'], '+')} to {number(row['high'], '+')}"


def _format(metric: str) -> Any:
    digits = 1 if metric == "bleu" else 3
    return lambda value, sign="": f"{value:{sign}.{digits}f}"
