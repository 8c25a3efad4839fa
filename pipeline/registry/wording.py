"""A decision in words: what was decided, why, and what to do next; for terminal, dashboard, report and webhooks."""

import math
from typing import Any

from pipeline.core.combinations import CLASSIFICATION
from pipeline.registry.decisions import Record
from pipeline.registry.gate import Comparison, decide
from pipeline.registry.manifest import Manifest
from pipeline.scoring.resampling import LOWER_IS_BETTER, PERCENT

TITLES = {
    "promoted": "Promoted: {name} is the champion now",
    "forced": "Forced: {name} is the champion now, because a person decided so",
    "refused": "Refused: {name} does not become champion; {stays}",
    "undecided": "Undecided: there are too few test items to tell whether {name} is better; {stays}",
    "proposed": "Proposed: {name} passes the gate and waits for a person; {stays}",
    "open": "Not decided yet: {name} is published, but the gate has not run",
    "unchanged": "Unchanged: there is nothing to decide about {name}",
}


def title(word: str, name: str, champion: str | None) -> str:
    """The decision about the version `name`, in a sentence; `champion` is the champion's name now."""
    return TITLES[word].format(
        name=name, stays=f"{champion} stays champion" if champion else "there is no champion yet"
    )


def why(comparison: Comparison, against: str) -> str:
    """The gate's reason in a sentence; `against` is a name for what the candidate was compared with."""
    decision = decide(comparison)
    metric, primary = next(iter(comparison.items()))
    if decision == "promoted":
        guards = [name for name, row in comparison.items() if row is not primary and row["passed"]]
        passed = f"; {' and '.join(guards)} lost no more than allowed" if guards else ""
        return f"{_difference(metric, primary, against)}{passed}"
    verdicts = {row["verdict"] for row in comparison.values()}
    decisive = "failed" if "failed" in verdicts else "open"
    return "; ".join(
        _why_not(name, row, against, primary, decision)
        for name, row in comparison.items()
        if row["verdict"] == decisive
    )


def next_step(record: Record, name: str, manifest: Manifest) -> str:
    """What a person can do after the decision `record` about the version that commands know as `name`."""
    force = f'`retune promote {name} --force --reason "…"`'
    match record.word:
        case "promoted" | "forced":
            rollback = "; `retune rollback` restores the previous champion" if record.previous else ""
            classifies = manifest["params"]["train"]["task"] == CLASSIFICATION
            use = "Classify texts with `retune classify TEXT`" if classifies else "Talk to it with `retune chat`"
            return f"{use}{rollback}"
        case "proposed":
            return 'Agree with `retune promote --approve`, or refuse with `retune promote --reject --reason "…"`'
        case "refused" if record.proposal:  # a person's answer
            return f"To promote it after all: {force}"
        case "refused":
            improve = "Read its worst answers in artifacts/report.html, change data or parameters and `retune run`"
            return f"{improve}; or overrule the gate: {force}"
        case "undecided":
            return f"{_more_items(record.comparison, manifest)}; or overrule the gate: {force}"
        case "open":
            return f"`retune promote {name}` runs the gate"
    return ""


def number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}z.{1 if metric in PERCENT else 3}f}"


def span(metric: str, row: dict[str, Any], sign: str = "+") -> str:
    """The 95 % interval of a score or, with a sign, of a difference."""
    return f"{number(metric, row['low'], sign)} to {number(metric, row['high'], sign)}"


def _more_items(comparison: Comparison, manifest: Manifest) -> str:
    """How to get a test set that is large enough: rows to add, or a parameter to change."""
    needed = next(iter(comparison.values())).get("gate_rows")
    if needed is None:
        return "No number of rows would decide it with these margins: allow more in promote.guard_metrics"
    have = max(row["items"] for metric, row in comparison.items() if not metric.startswith("general_"))
    limit = manifest["evaluation"]["params"].get("max_samples")
    if limit is not None and have >= limit:
        return f"Raise evaluate.max_samples from {limit} to about {_rounded(needed)} and `retune run`"
    missing = (needed - have) / manifest["params"]["prepare"]["test_fraction"]
    return f"Add about {_rounded(missing):,} rows (`retune ingest`, then `retune run`)"


def _rounded(value: float) -> int:
    """`value` rounded up to two digits."""
    step = 10 ** max(0, len(str(math.ceil(value))) - 2)
    return max(1, math.ceil(value / step) * step)


def _difference(metric: str, row: dict[str, Any], against: str) -> str:
    """By how much the metric is better or worse, with the scores and the interval."""
    size = number(metric, abs(row["difference"]))
    better = (row["difference"] < 0) == (metric.removeprefix("general_") in LOWER_IS_BETTER)
    change = f"{size} {'better' if better else 'worse'} than that" if float(size) else "the same as that"
    scores = f"{number(metric, row['candidate'])} against {number(metric, row['champion'])}"
    items = f"{row['items']:,} test items"
    return f"{metric} is {change} of {against} ({scores} on {items}, 95 % interval {span(metric, row)})"


def _why_not(metric: str, row: dict[str, Any], against: str, primary: dict[str, Any], decision: str) -> str:
    """Why the metric failed, or why it is open."""
    is_guard, items = row["margin"] is not None, f"{row['items']:,} test items"
    declared = f"an improvement of {primary['declared']:g} (promote.declared_effect)"
    if row["verdict"] == "failed" and is_guard:
        where = "promote.max_forgetting" if metric.startswith("general_") else "promote.guard_metrics"
        return f"{_difference(metric, row, against)}, and {where} asks for {row['needed']}"
    if row["verdict"] == "failed":
        problem = f"and {declared} is ruled out"
    elif decision == "undecided":
        problem = f"but {items} are too few to tell"
    elif is_guard:
        problem = "and a larger loss than allowed cannot be ruled out"
    else:
        problem = f"which can be chance; {items} would have shown {declared}"
    return f"{_difference(metric, row, against)}, {problem} (needed: {row['needed']})"
