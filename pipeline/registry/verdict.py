"""A decision in words: what was decided, why, and what to do next; below these lines, the gate's table.

Terminal, dashboard, report and webhooks all take their words from here. In comes a comparison of `gate`, with the
names of the versions; nothing is decided here.
"""

import math
from typing import Any

from pipeline.registry.gate import Comparison, decision_on
from pipeline.registry.manifest import Manifest
from pipeline.registry.significance import ALPHA, POWER
from pipeline.scoring.resampling import LOWER_IS_BETTER, PERCENT

COLUMNS = ("metric", "candidate", "champion", "difference", "95 % interval", "needed", "p", "verdict")
WORDS = {
    "passed": "passed",
    "failed": "refused",
    "open": "not shown",
    "unmeasured": "not measured",
    "uninformative": "not informative",
}
P_NOTE = (
    f"p is one-sided and corrected for all metrics together (Holm); a metric passes at {ALPHA:g} or less. This is "
    "stricter than the 95 % interval of one metric: an interval can exclude the limit while p does not pass."
)
FORCE = '`retune promote {} --force --reason "…"`'


def title(word: str, name: str, champion: str | None) -> str:
    """What was decided on the version `name`; `champion` is the name of the one that serves now."""
    stays = f"{champion} stays champion" if champion else "there is no champion yet"
    match word:
        case "promoted":
            return f"Promoted: {name} is the champion now"
        case "forced":
            return f"Forced: {name} is the champion now, against the gate"
        case "refused":
            return f"Refused: {name} does not become champion; {stays}"
        case "undecided":
            return f"Undecided: it cannot be told yet whether {name} is better; {stays}"
        case "proposed":
            return f"Proposed: {name} passes the gate and waits for a person; {stays}"
        case "open":
            return f"Not decided yet: {name} is published, and the gate has not been asked"
    return f"Unchanged: there is nothing to decide about {name}"


def why(comparison: Comparison, against: str) -> str:
    """The gate's reason in a sentence; `against` names what the candidate was compared with."""
    decision = decision_on(comparison)
    metric, primary = next(iter(comparison.items()))
    if decision == "promoted":
        guards = [name for name, row in comparison.items() if row is not primary and row["passed"]]
        kept = f"; {_and(guards)} lost no more than allowed" if guards else ""
        return f"{_moved(metric, primary, against)}{kept}"
    if any(row["verdict"] == "failed" for row in comparison.values()):
        failed = [(name, row) for name, row in comparison.items() if row["verdict"] == "failed"]
        return "; ".join(_failed(name, row, against) for name, row in failed)
    return "; ".join(
        _open(name, row, primary, against, decision) for name, row in comparison.items() if row["verdict"] == "open"
    )


def in_short(comparison: Comparison) -> str:
    """The metric that decided, with both scores; nothing for a decision without numbers."""
    if not comparison:
        return ""
    failed = [metric for metric, row in comparison.items() if verdict_of(row) == "failed"]
    metric = failed[0] if failed else next(iter(comparison))
    row, number = comparison[metric], _format(metric)
    return f"{metric} {number(row['candidate'])} against {number(row['champion'])}"


def next_step(word: str, name: str, comparison: Comparison, manifest: Manifest | None, first: bool = False) -> str:
    """What a person can do after the decision `word`.

    Args:
        name: by which commands take the version: v4, or its id.
        first: whether it was compared with the base model, for want of a champion.
    """
    overrule = f"overrule the gate: {FORCE.format(name)}"
    match word:
        case "promoted" | "forced":
            back = "" if first else "; `retune rollback` puts the champion before it back"
            return f"Talk to it with `retune chat`{back}"
        case "proposed":
            return 'Agree with `retune promote --approve`, or refuse with `retune promote --reject --reason "…"`'
        case "refused":
            looked = "Read its worst answers in artifacts/report.html, change data or parameters and `retune run`"
            return f"{looked}; or {overrule}"
        case "undecided":
            return f"{_more_items(comparison, manifest, first)}; or {overrule}"
        case "open":
            return f"`retune promote {name}` asks the gate"
    return ""


def verdict_rows(comparison: Comparison, first: bool = False) -> list[dict[str, str]]:
    """The comparison as text, one dictionary with `COLUMNS` as keys for each metric; `first` as for `next_step`."""
    columns = ["base" if first and column == "champion" else column for column in COLUMNS]
    rows = []
    for metric, row in comparison.items():
        number = _format(metric)
        verdict = verdict_of(row)
        scored, tested = verdict != "unmeasured", verdict not in ("unmeasured", "uninformative")
        cells = [
            number(row["candidate"]) if scored else "–",
            number(row["champion"]) if scored else "–",
            number(row["difference"], "+") if tested else "–",
            _interval(metric, row) if tested else "–",
            row["needed"],
            _p(row) if tested else "–",
            WORDS[verdict],
        ]
        rows.append(dict(zip(columns, [metric, *cells], strict=True)))
    return rows


def verdict_of(row: dict[str, Any]) -> str:
    """A key of `WORDS`. Records of the log from before the tests know only whether a metric passed."""
    return str(row.get("verdict") or {True: "passed", False: "failed", None: "unmeasured"}[row["passed"]])


def _more_items(comparison: Comparison, manifest: Manifest | None, first: bool) -> str:
    """How a test set gets large enough to decide on: rows to add, or a parameter to change."""
    primary = next(iter(comparison.values()))
    needed = primary.get("gate_rows")
    if needed is None or manifest is None:
        return "No number of rows would decide it with these margins: allow more in promote.guard_metrics"
    have = max(row["items"] for metric, row in comparison.items() if not metric.startswith("general_"))
    limit = manifest["evaluation"]["params"].get("max_samples")
    if limit is not None and have >= limit:
        return f"Raise evaluate.max_samples from {limit} to about {_rounded(needed)} and `retune run`"
    fraction, rows = manifest["params"]["prepare"]["test_fraction"], sum(manifest["data"]["rows"].values())
    advice = f"Add about {_rounded((needed - have) / fraction):,} rows (`retune ingest`, then `retune run`)"
    share = math.ceil(100 * needed / rows) / 100
    # Beside a champion this would be unfair: it was trained on the rows that would become test items.
    if first and fraction < share <= 0.5:
        advice += f"; or raise prepare.test_fraction from {fraction:g} to {share:g}"
    return advice


def _rounded(value: float) -> int:
    """Upwards, to two digits."""
    step = 10 ** max(0, len(str(math.ceil(value))) - 2)
    return max(1, math.ceil(value / step) * step)


def _moved(metric: str, row: dict[str, Any], against: str = "") -> str:
    """By how much the metric is better or worse, with the scores and the interval."""
    number, change = _format(metric), row["difference"]
    size = number(abs(change))
    better = (change < 0) == (metric.removeprefix("general_") in LOWER_IS_BETTER)
    than = f" than that of {against}" if against else ""
    moved = (
        f"{size} {'better' if better else 'worse'}{than}"
        if float(size)
        else f"the same{than and f' as that of {against}'}"
    )
    scores = f"{number(row['candidate'])} against {number(row['champion'])}"
    return f"{metric} is {moved} ({scores} on {row['items']:,} test items, 95 % interval {_interval(metric, row)})"


def _failed(metric: str, row: dict[str, Any], against: str) -> str:
    if row["margin"] is not None:
        where = "promote.max_forgetting" if metric.startswith("general_") else "promote.guard_metrics"
        return f"{_moved(metric, row, against)}, and {where} asks for {row['needed']}"
    declared = row.get("declared")
    ruled_out = f"; {declared:g} better (promote.declared_effect) is ruled out" if declared else ""
    return f"{_moved(metric, row, against)}, and {row['needed']} is needed{ruled_out}"


def _open(metric: str, row: dict[str, Any], primary: dict[str, Any], against: str, decision: str) -> str:
    items = f"{row['items']:,} test items"
    if row["margin"] is None and "independent" in row["needed"]:
        return f"{_moved(metric, row, against)}, but they are too few to tell: needed {row['needed']}"
    if decision == "undecided":
        what = "to tell" if row["margin"] is None else f"to tell whether more than allowed was lost ({row['needed']})"
        return f"{_moved(metric, row, against)}, but {items} are too few {what}"
    if row["margin"] is None:
        shown = f"{items} would have shown an improvement of {primary['declared']:g} (promote.declared_effect)"
        return f"{_moved(metric, row, against)}, which can be chance; {shown} with a probability of {POWER:g} or more"
    return f"{_moved(metric, row, against)}, and it is not shown that no more than allowed was lost ({row['needed']})"


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _interval(metric: str, row: dict[str, Any]) -> str:
    number = _format(metric)
    return f"{number(row['low'], '+')} to {number(row['high'], '+')}"


def _p(row: dict[str, Any]) -> str:
    p = row.get("p_adjusted")
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _format(metric: str) -> Any:
    digits = 1 if metric in PERCENT else 3
    return lambda value, sign="": f"{value:{sign}.{digits}f}"
