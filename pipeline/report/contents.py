"""What the evaluation report says: scores, differences, tasks and texts, from the items that systems were scored on.

`Contents` holds plain values in the order in which a reader asks for them, from the metrics and items of two to four
systems. Texts are cut, and secrets in them are hidden.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.report import excerpt
from pipeline.registry.significance import binary_test
from pipeline.report.tables import WORDS, Row
from pipeline.scoring.resampling import (
    BINARY,
    LOWER_IS_BETTER,
    METRICS,
    PERCENT,
    group_of,
    metric_items,
    num_groups,
    paired_difference,
    slices_of,
)

Metrics = dict[str, Any]  # see pipeline/evaluate.py
EXAMPLES = 10  # of the best differences, and of the worst
MOST_TASKS = 20  # the largest; the others are in scores.json


@dataclass(frozen=True)
class System:
    name: str  # a key of tables.SYSTEMS, or of Contents.labels
    metrics: Metrics
    items: pa.Table

    def slice_score(self, kind: str, name: str, metric: str) -> dict[str, float] | None:
        score: dict[str, float] | None = self.metrics.get(kind, {}).get(name, {}).get(metric)
        return score


@dataclass(frozen=True)
class Change:
    """One metric of two systems: `new` minus `old`, paired by item, with its 95 % interval."""

    metric: str
    new: float
    old: float
    difference: float
    low: float
    high: float
    needed: str = ""
    verdict: str = ""  # one of tables.WORDS, where the gate has decided

    @property
    def gain(self) -> tuple[float, float, float]:
        """Low, difference and high as shares of the scale, where more is better; of perplexity relative to the old."""
        if self.metric.removeprefix("general_") in LOWER_IS_BETTER:
            return -self.high / self.old, -self.difference / self.old, -self.low / self.old
        scale = 100 if self.metric in PERCENT else 1
        return self.low / scale, self.difference / scale, self.high / scale

    @property
    def words(self) -> str:
        """Whether the interval shows a change."""
        low, _, high = self.gain
        return "better" if low > 0 else "worse" if high < 0 else "not clearly different"


@dataclass(frozen=True)
class Difference:
    """What two systems answered to one test item."""

    task: str
    turns: list[tuple[str, str]]  # of the prompt: who, and what they say
    reference: str
    new: str
    old: str
    scores: list[tuple[str, float, float]]  # metric, old, new

    @property
    def prompt(self) -> str:
        """What the last turn asks."""
        return self.turns[-1][1]

    @property
    def most(self) -> tuple[str, float, float]:
        """The first score that changed."""
        return next((score for score in self.scores if score[1] != score[2]), self.scores[0])


@dataclass(frozen=True)
class Contents:
    about: dict[str, str]  # model, version, date: what the page is about
    title: str  # what was decided
    verdict: str  # why, in one or two sentences
    decision: str  # promoted | forced | refused | undecided | proposed | open | compared
    systems: list[System]  # the last is the new one
    old: str  # name of the system that it is compared with
    changes: list[Change]
    better: int  # items on which the new one is better
    worse: int
    best: list[Difference]
    worst: list[Difference]
    next: str = ""  # what to do now
    curve: list[dict[str, float]] = field(default_factory=list)  # step, and loss and validation_loss where measured
    facts: dict[str, dict[str, str]] = field(default_factory=dict)  # heading → what, and its value
    notes: list[str] = field(default_factory=list)
    # Of `evaluate.prompts`: each system and what it answered.
    prompts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # what systems are called, where tables.SYSTEMS does not say
    tables: dict[str, list[Row]] = field(default_factory=dict)  # heading → more rows, of other sets than the test split

    @classmethod
    def of(cls, systems: list[System], old: System, params: dict[str, Any], **words: Any) -> "Contents":
        """The last of `systems` against `old`, compared by the `evaluate` parameters `params`; `words` is the rest."""
        new = systems[-1]
        changes = words.pop("changes", None) or compare_items(new, old, params["bootstrap_samples"], params["seed"])
        better, worse, best, worst = differences(new, old)
        words |= {"better": better, "worse": worse, "best": best, "worst": worst}
        return cls(systems=systems, old=old.name, changes=changes, **words)

    @property
    def new(self) -> str:
        return self.systems[-1].name

    @property
    def items(self) -> int:
        return int(self.systems[-1].metrics["num_samples"])

    @property
    def same(self) -> int:
        """Items on which both score the same."""
        return self.items - self.better - self.worse

    def slices(self, kind: str) -> list[tuple[str, int, str, int]]:
        """Of by_task, by_language or by_length, the largest first: name, items, and the metric that its bars show with
        the items that it counts.

        Accuracy where most items have one right answer and some system finds one; else rougeL, since zeros against
        zeros of answers in free text say nothing.
        """
        shown = self.systems[-1]
        parts = slices_of(shown.items, kind) if kind in shown.metrics else {}  # a manifest's scores have no slices
        result = []
        for name in sorted(parts, key=lambda name: (-len(parts[name]), name))[:MOST_TASKS]:
            items, exact = len(parts[name]), num_groups(metric_items(parts[name], "accuracy"))
            accuracies = [system.slice_score(kind, name, "accuracy") for system in self.systems]
            classes = parts[name].column("label").null_count == 0  # whose rougeL would say nothing more
            speaks = classes or any(score and score["score"] for score in accuracies)
            texts = num_groups(metric_items(parts[name], "rougeL"))  # none where the answers are calls
            accuracy = exact and (not texts or (2 * exact >= items and speaks))
            result.append((name, items, "accuracy", exact) if accuracy else (name, items, "rougeL", texts))
        return result


def compare_items(new: System, old: System, resamples: int, seed: int) -> list[Change]:
    """Every metric that counts for some item, `new` against `old`."""
    changes = []
    for metric in METRICS:
        if not new.metrics.get(metric) or not old.metrics.get(metric):
            continue
        ours, theirs = metric_items(new.items, metric), metric_items(old.items, metric)
        groups = group_of(new.items)
        score = paired_difference(ours, theirs, resamples, seed, groups)
        low, high = score["low"], score["high"]
        if metric in BINARY:  # the interval by which the gate judges right or wrong items
            counting = ~np.isnan(ours)
            tested = binary_test(ours[counting], theirs[counting], groups[counting], 0.0)
            low, high = tested.low, tested.high
        scores = (new.metrics[metric]["score"], old.metrics[metric]["score"], score["score"])
        changes.append(Change(metric, *scores, low, high))
    return changes


def gate_changes(comparison: dict[str, Any]) -> list[Change]:
    """The gate's own rows, of those metrics that some item counts for."""
    keys = ("difference", "low", "high", "needed")
    return [
        Change(metric, row["candidate"], row["champion"], **{k: row[k] for k in keys}, verdict=WORDS[row["verdict"]])
        for metric, row in comparison.items()
        if row["items"]
    ]


def differences(new: System, old: System) -> tuple[int, int, list[Difference], list[Difference]]:
    """Items on which `new` is better and worse, and the ten that differ most each way; among equals one a task."""
    ranked = []
    seen: Counter[tuple[Any, str]] = Counter()
    for place, (ours, theirs) in enumerate(zip(new.items.to_pylist(), old.items.to_pylist(), strict=True)):
        change = tuple((ours[metric] or 0) - (theirs[metric] or 0) for metric in ("accuracy", "rougeL"))
        if change != (0, 0):
            ranked.append((change, seen[change, ours["task"]], place, ours, theirs))
            seen[change, ours["task"]] += 1
    better = [entry for entry in ranked if entry[0] > (0, 0)]
    worse = [entry for entry in ranked if entry[0] < (0, 0)]
    better.sort(key=lambda entry: (-entry[0][0], -entry[0][1], *entry[1:3]))
    worse.sort(key=lambda entry: entry[:3])
    best, worst = ([_difference(*entry[3:]) for entry in side[:EXAMPLES]] for side in (better, worse))
    return len(better), len(worse), best, worst


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> Difference:
    scores = [
        (metric, float(theirs[metric]), float(ours[metric]))
        for metric in ("accuracy", "rougeL")
        if ours[metric] is not None and theirs[metric] is not None
    ]
    # What a classifier is given has no turns.
    messages = json.loads(ours.get("messages") or "[]") or [{"role": "prompt", "content": ours["prompt"]}]
    turns = [(str(turn["role"]), excerpt(turn.get("content") or turn.get("tool_calls") or "")) for turn in messages]
    reference, new, old = excerpt(ours["reference"]), excerpt(ours["answer"]), excerpt(theirs["answer"])
    return Difference(ours["task"], turns, reference, new, old, scores)
