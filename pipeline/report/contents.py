"""What the evaluation report says: scores, differences, tasks and texts, from the items that systems were scored on.

`Contents` holds plain values in the order in which a reader asks for them, from the metrics and items of two to four
systems. Texts are cut and personal data in them is masked.
"""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.files import read_json
from pipeline.data.report import excerpt
from pipeline.registry.significance import binary_test
from pipeline.registry.verdict import WORDS, verdict_of
from pipeline.report.tables import SYSTEMS, Row, interval, number
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
    name: str  # a key of tables.SYSTEMS, or what a version is called
    metrics: Metrics
    items: pa.Table


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
    verdict: str = ""  # one of the gate's WORDS, where it has decided

    @property
    def gain(self) -> tuple[float, float, float]:
        """Low, difference and high as shares of the scale, where more is better; of perplexity relative to the old."""
        values = (self.low, self.difference, self.high)
        if self.metric.removeprefix("general_") in LOWER_IS_BETTER:
            low, middle, high = (-value / self.old for value in reversed(values))
        else:
            low, middle, high = (value / (100 if self.metric in PERCENT else 1) for value in values)
        return low, middle, high

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
class Asked:
    """One of the user's own prompts (`evaluate.prompts`) and what each system answered."""

    prompt: str
    answers: list[tuple[str, str]]  # system, answer


@dataclass(frozen=True)
class Contents:
    about: dict[str, str]  # model, version, date: what the page is about
    title: str  # what was decided
    verdict: str  # why, in one or two sentences
    decision: str  # promoted | forced | refused | undecided | proposed | open | compared
    systems: list[System]
    new: str  # names of the two that are compared
    old: str
    changes: list[Change]
    better: int  # items on which the new one is better
    worse: int
    best: list[Difference]
    worst: list[Difference]
    curve: list[dict[str, float]]  # step, and loss and validation_loss where they were measured
    facts: dict[str, dict[str, str]]  # data, training, evaluation, template contract, cost: what, and its value
    next: str = ""  # what to do now
    notes: list[str] = field(default_factory=list)
    prompts: list[Asked] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # what systems are called, where tables.SYSTEMS does not say
    tables: dict[str, list[Row]] = field(default_factory=dict)  # heading → more rows, of other sets than the test split

    @property
    def same(self) -> int:
        """Items on which both score the same."""
        return int(self.systems[-1].metrics["num_samples"]) - self.better - self.worse

    def slices(self, kind: str) -> list[tuple[str, int, str, int]]:
        """Of by_task, by_language or by_length, the largest first: name, items, and the metric that its bars show with
        the items that it counts.

        Accuracy where most items have one right answer and some system finds one; else rougeL, since zeros against
        zeros of answers in free text say nothing.
        """
        shown = self.systems[-1]
        scores = shown.metrics.get(kind, {})  # versions of before there were slices have none
        ranked = sorted(scores, key=lambda name: (-scores[name]["num_samples"], name))
        parts = slices_of(shown.items, kind) if ranked else {}
        result = []
        for name in ranked[:MOST_TASKS]:
            items, exact = len(parts[name]), num_groups(metric_items(parts[name], "accuracy"))
            found = any(
                (s.metrics.get(kind, {}).get(name, {}).get("accuracy") or {"score": 0})["score"] for s in self.systems
            )
            speaks = found or kind_of(parts[name]) == "classification"
            texts = num_groups(metric_items(parts[name], "rougeL"))  # none where the answers are calls
            accuracy = exact and (not texts or (2 * exact >= items and speaks))
            result.append((name, items, "accuracy", exact) if accuracy else (name, items, "rougeL", texts))
        return result


def kind_of(items: pa.Table) -> str:
    """`classification` where every item has a label, whose rougeL would say nothing more."""
    return "classification" if items.column("label").null_count == 0 else "answers"


def compare_items(new: System, old: System, resamples: int, seed: int) -> list[Change]:
    """Every metric that counts for some item, `new` against `old`."""
    changes = []
    for metric in METRICS:
        if not new.metrics.get(metric) or not old.metrics.get(metric):
            continue
        ours, theirs = metric_items(new.items, metric), metric_items(old.items, metric)
        groups = group_of(new.items)
        score = paired_difference(ours, theirs, resamples, seed, groups)
        low, high = score.low, score.high
        if metric in BINARY:  # the interval by which the gate judges right or wrong items
            counting = ~np.isnan(ours)
            tested = binary_test(ours[counting], theirs[counting], groups[counting], 0.0)
            low, high = tested.low, tested.high
        points = (new.metrics[metric]["score"], old.metrics[metric]["score"])
        changes.append(Change(metric, *points, score.score, low, high))
    return changes


def gate_changes(comparison: dict[str, Any]) -> list[Change]:
    """The gate's own rows, of those metrics that some item counts for."""
    return [
        Change(
            metric,
            row["candidate"],
            row["champion"],
            row["difference"],
            row["low"],
            row["high"],
            row["needed"],
            WORDS[verdict_of(row)],
        )
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


def read_prompts(answered: dict[str, tuple[Path, str]]) -> list[Asked]:
    """The candidate's prompts (of `adapter`) with the answers of all; of a system that was not asked one, that is said.

    Args:
        answered: of each system its evaluation folder and what it is called there (base | adapter).
    """
    found: dict[str, dict[str, str]] = {}
    for system, (folder, name) in answered.items():
        path = folder / "prompts.json"  # a classifier has none
        found[system] = {one["prompt"]: _said(one[name]) for one in (read_json(path) if path.is_file() else [])}
    return [
        Asked(prompt, [(system, answers.get(prompt, "(was not asked)")) for system, answers in found.items()])
        for prompt in found["adapter"]
    ]


def read_other_sets(evaluation: Path) -> dict[str, list[Row]]:
    """Candidate before merge against base on the general set and before the judge, where they were asked for."""
    found: dict[str, list[Row]] = {}
    if (evaluation / "general.json").is_file():
        general = read_json(evaluation / "general.json")
        found["General set: what was forgotten"] = [
            _of_set(
                metric,
                interval(metric, general["base"][metric]),
                interval(metric, general["adapter"][metric]),
                f"{100 * lost:+.1f} %" if metric in LOWER_IS_BETTER else number(metric, -lost, "+"),
            )
            for metric, lost in general["lost"].items()
            if lost is not None
        ]
    if (evaluation / "judge.json").is_file():
        judged = read_json(evaluation / "judge.json")
        rows = [_rated("rating", judged["base"]["rating"], judged["adapter"]["rating"])]
        for kind in ("by_language", "by_category"):
            rows += [
                _rated(name, judged["base"][kind][name], rating) for name, rating in judged["adapter"][kind].items()
            ]
        pairs = judged["pairwise"]
        rate = "–" if pairs["win_rate"] is None else f"{100 * pairs['win_rate']['score']:.0f} %"
        counts = f"{pairs['wins']}, {pairs['ties']}, {pairs['losses']}"
        rows.append(_of_set("the candidate wins, ties, loses", counts, rate, ""))
        found["Judge: ratings from 1 to 10"] = rows
    return found


def read_curve(table: str) -> list[dict[str, float]]:
    """The rows of `loss.csv`: step, and those of loss and validation_loss that were measured and are numbers."""
    curve = []
    for row in csv.DictReader(table.splitlines()):
        values = {key: float(row[key]) for key in ("step", "loss", "validation_loss") if row.get(key)}
        curve.append({key: value for key, value in values.items() if math.isfinite(value)})
    return curve


def data_facts(report: dict[str, Any]) -> dict[str, str]:
    """Of the dataset's `report.json`."""
    return {
        "rows": ", ".join(f"{count:,} {split}" for split, count in report["rows"].items()),
        "test split": report["test_sha256"][:16],
    }


def training_facts(training: dict[str, Any]) -> dict[str, str]:
    """Of the adapter's `training.json`."""
    params = training["params"]
    facts = {
        "base model": training["base_model"]["name_or_path"],
        "base digest": str(training["base_model"]["digest"])[:16],
        "steps": f"{training['steps']:,}",
        "trained parameters": f"{training['trainable_parameters']:,}",
        "trained on": training["device"],
    }
    return facts | {key: _plain(value) for key, value in sorted(params.items())}


def evaluation_facts(settings: dict[str, Any]) -> dict[str, str]:
    """Of `evaluation.json`: decoding, parameters and signatures of the metrics."""
    facts = {"decoding": settings["decoding"]}
    facts |= {key: _plain(value) for key, value in sorted(settings["params"].items())}
    return facts | settings["signatures"]


def contract_facts(contract: dict[str, Any]) -> dict[str, str]:
    if "labels" in contract:
        facts = {"classes": ", ".join(contract["labels"])}
    else:
        facts = {"chat template": contract.get("chat_template_name") or "the tokenizer's own"}
    facts |= {key: contract[key][:16] for key in ("chat_template_sha256", "tokenizer_sha256") if key in contract}
    return facts | {
        key: _plain(contract[key])
        for key in ("stop_ids", "train_on", "on_control_tokens", "max_length")
        if key in contract
    }


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> Difference:
    scores = [
        (metric, float(theirs[metric]), float(ours[metric]))
        for metric in ("accuracy", "rougeL")
        if ours[metric] is not None and theirs[metric] is not None
    ]
    return Difference(
        task=ours["task"],
        turns=_turns(ours),
        reference=excerpt(ours["reference"]),
        new=excerpt(ours["answer"]),
        old=excerpt(theirs["answer"]),
        scores=scores,
    )


def _turns(item: dict[str, Any]) -> list[tuple[str, str]]:
    """The turns of the prompt; of items scored before they kept them, the prompt's text with its control tokens."""
    messages = json.loads(item["messages"]) if item.get("messages") else None
    if not messages:
        return [("prompt", excerpt(item["prompt"]))]
    return [(str(turn["role"]), excerpt(turn.get("content") or turn.get("tool_calls") or "")) for turn in messages]


def _said(answer: dict[str, Any]) -> str:
    return excerpt(answer["answer"]) + (" (cut off)" if answer["cut_off"] else "")


def _rated(name: str, old: dict[str, float] | None, new: dict[str, float] | None) -> Row:
    change = f"{new['score'] - old['score']:+.2f}" if old and new else "–"
    before, after = (
        f"{one['score']:.2f} ({one['low']:.2f} to {one['high']:.2f})" if one else "–" for one in (old, new)
    )
    return _of_set(name, before, after, change)


def _of_set(what: str, base: str, candidate: str, difference: str) -> Row:
    return {"": what, SYSTEMS["base"]: base, SYSTEMS["adapter"]: candidate, "difference": difference}


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
