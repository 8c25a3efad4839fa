"""The contents of the evaluation report: scores, differences, tasks and (shortened, redacted) texts of the systems."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.data.data_report import excerpt
from pipeline.registry.significance import binary_test
from pipeline.report.tables import VERDICTS, Row
from pipeline.scoring import resampling
from pipeline.scoring.resampling import METRICS, metric_items

EXAMPLES = 10  # most improved answers, and as many most worsened ones
MAX_SLICES = 20  # the largest; the others are in scores.json


@dataclass(frozen=True)
class System:
    name: str  # a key of tables.SYSTEMS, or of Contents.labels
    metrics: dict[str, Any]  # see pipeline/evaluate.py
    items: pa.Table

    def slice_score(self, kind: str, name: str, metric: str) -> dict[str, float] | None:
        return self.metrics.get(kind, {}).get(name, {}).get(metric)


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
    verdict: str = ""  # a value of tables.VERDICTS, if the gate has decided

    @property
    def gain(self) -> tuple[float, float, float]:
        """Low, difference and high, where more is better, as shares of the scale (perplexity: of the old value)."""
        metric = self.metric.removeprefix("general_")
        scale = self.old if metric in resampling.RELATIVE else 100 if metric in resampling.PERCENT else 1
        low, difference, high = self.low / scale, self.difference / scale, self.high / scale
        return (-high, -difference, -low) if metric in resampling.LOWER_IS_BETTER else (low, difference, high)

    @property
    def direction(self) -> str:
        """What the interval shows, in words."""
        low, _, high = self.gain
        return "better" if low > 0 else "worse" if high < 0 else "not clearly different"


@dataclass(frozen=True)
class Difference:
    """Two systems' answers to one test item."""

    task: str
    turns: list[tuple[str, str]]  # of the prompt: role and text
    reference: str
    new: str
    old: str
    scores: list[tuple[str, float, float]]  # metric, old, new

    @property
    def prompt(self) -> str:
        """The text of the last turn."""
        return self.turns[-1][1]

    @property
    def changed_score(self) -> tuple[str, float, float]:
        """The first score that changed."""
        return next((score for score in self.scores if score[1] != score[2]), self.scores[0])


@dataclass(frozen=True)
class Contents:
    about: dict[str, str]  # model, version, dates
    title: str  # the decision
    verdict: str  # the reason, in one or two sentences
    decision: str  # promoted | forced | refused | undecided | proposed | open | compared
    systems: list[System]  # the last is the new one
    old: str  # name of the system that the new one is compared with
    changes: list[Change]
    better: int  # number of items on which the new system is better
    worse: int
    best: list[Difference]
    worst: list[Difference]
    next: str = ""  # what to do now
    curve: list[dict[str, float]] = field(default_factory=list)  # step, and loss and validation_loss if measured
    facts: dict[str, dict[str, str]] = field(default_factory=dict)  # heading → name → value
    notes: list[str] = field(default_factory=list)
    prompts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # `evaluate.prompts` → system and answer
    labels: dict[str, str] = field(default_factory=dict)  # names of systems that are not in tables.SYSTEMS
    tables: dict[str, list[Row]] = field(default_factory=dict)  # heading → rows about other sets than the test split

    @classmethod
    def compare(cls, systems: list[System], old: System, params: dict[str, Any], **fields: Any) -> "Contents":
        """The last of `systems` against `old`, compared with the `evaluate` parameters `params`."""
        new = systems[-1]
        changes = fields.pop("changes", None) or compare_items(new, old, params["bootstrap_samples"], params["seed"])
        better, worse, best, worst = find_differences(new, old)
        fields |= {"better": better, "worse": worse, "best": best, "worst": worst}
        return cls(systems=systems, old=old.name, changes=changes, **fields)

    @property
    def new(self) -> str:
        return self.systems[-1].name

    @property
    def items(self) -> int:
        return int(self.systems[-1].metrics["num_samples"])

    @property
    def same(self) -> int:
        """Number of items on which both systems score the same."""
        return self.items - self.better - self.worse

    def slices(self, kind: str) -> list[tuple[str, int, str, int]]:
        """The slices by_task, by_language or by_length, largest first: name, items, metric to show, items it counts.

        The metric is accuracy if most items have one right answer and some system finds one, else rougeL.
        """
        new = self.systems[-1]
        # A manifest's scores have no slices.
        parts = resampling.slices_of(new.items, kind) if kind in new.metrics else {}
        result = []
        for name in sorted(parts, key=lambda name: (-len(parts[name]), name))[:MAX_SLICES]:
            # rougeL counts no item if the answers are tool calls, and says no more than accuracy about classes.
            exact, texts = (resampling.num_counted(metric_items(parts[name], m)) for m in ("accuracy", "rougeL"))
            accuracies = [system.slice_score(kind, name, "accuracy") for system in self.systems]
            are_classes = parts[name].column("label").null_count == 0
            informative = are_classes or any(score and score["score"] for score in accuracies)
            show_accuracy = exact and (not texts or (2 * exact >= len(parts[name]) and informative))
            metric, counted = ("accuracy", exact) if show_accuracy else ("rougeL", texts)
            result.append((name, len(parts[name]), metric, counted))
        return result


def compare_items(new: System, old: System, resamples: int, seed: int) -> list[Change]:
    """Every metric that both systems have, `new` against `old`."""
    changes, groups = [], resampling.group_of(new.items)
    for metric in METRICS:
        if new.metrics.get(metric) and old.metrics.get(metric):
            items = metric_items(new.items, metric), metric_items(old.items, metric)
            score = resampling.paired_difference(*items, resamples, seed, groups)
            low, high = score["low"], score["high"]
            if metric in resampling.BINARY:  # the interval that the gate uses for right or wrong items
                test = binary_test(*items, groups, 0.0)
                low, high = test.low, test.high
            scores = (new.metrics[metric]["score"], old.metrics[metric]["score"], score["score"])
            changes.append(Change(metric, *scores, low, high))
    return changes


def gate_changes(comparison: dict[str, Any]) -> list[Change]:
    """The gate's own rows, of the metrics that count some item."""
    keys = ("difference", "low", "high", "needed")
    return [
        Change(metric, row["candidate"], row["champion"], **{k: row[k] for k in keys}, verdict=VERDICTS[row["verdict"]])
        for metric, row in comparison.items()
        if row["items"]
    ]


def find_differences(new: System, old: System) -> tuple[int, int, list[Difference], list[Difference]]:
    """How many items `new` answers better and worse, and the most improved and most worsened answers."""
    pairs = list(zip(new.items.to_pylist(), old.items.to_pylist(), strict=True))

    def rank(sign: int) -> list[int]:
        """Rows whose scores changed in one direction, largest change first; equal changes alternate between tasks."""
        ranks: list[tuple[float, float, int, int]] = []
        earlier: Counter[tuple[float, float, str]] = Counter()  # rows of the same task with the same change
        for row, (new_item, old_item) in enumerate(pairs):
            accuracy, rouge = (sign * ((new_item[m] or 0) - (old_item[m] or 0)) for m in ("accuracy", "rougeL"))
            if (accuracy, rouge) < (0, 0):
                key = (accuracy, rouge, new_item["task"])
                ranks.append((accuracy, rouge, earlier[key], row))
                earlier[key] += 1
        return [row for *_, row in sorted(ranks)]

    better, worse = rank(-1), rank(1)
    best, worst = ([_difference(*pairs[row]) for row in rows[:EXAMPLES]] for rows in (better, worse))
    return len(better), len(worse), best, worst


def _difference(new_item: dict[str, Any], old_item: dict[str, Any]) -> Difference:
    scores = [
        (metric, float(old_item[metric]), float(new_item[metric]))
        for metric in ("accuracy", "rougeL")
        if new_item[metric] is not None and old_item[metric] is not None
    ]
    # A classifier's items have no messages.
    messages = json.loads(new_item.get("messages") or "[]") or [{"role": "prompt", "content": new_item["prompt"]}]
    turns = [(str(turn["role"]), excerpt(turn.get("content") or turn.get("tool_calls") or "")) for turn in messages]
    reference, new, old = (excerpt(text) for text in (new_item["reference"], new_item["answer"], old_item["answer"]))
    return Difference(new_item["task"], turns, reference, new, old, scores)
