"""Tables of scores and verdicts for terminal, dashboard and reports."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.registry.gate import BASE, Comparison
from pipeline.registry.significance import ALPHA
from pipeline.registry.wording import number, span
from pipeline.scoring.resampling import ITEMS_OF_A_CLASS, METRICS

# Keys of scores.json → names for people.
SYSTEMS = {"base": "base", "champion": "champion", "adapter": "candidate before merge", "merged": "candidate (merged)"}
VERDICTS = {
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
WIDTH = 118  # columns of tables, on a terminal and in a file
Row = dict[str, str]


def score_rows(
    systems: dict[str, dict[str, Any]],
    counts: dict[str, int] | None = None,
    items: int = 0,
    names: dict[str, str] = SYSTEMS,
) -> list[Row]:
    """A row for each metric that some system has: `metric`, then each system's name and score.

    `systems`: the metrics by key of `names`. `counts`: how many of the `items` each metric counts, if it is known.
    """
    measured = [metric for metric in METRICS if any(scores.get(metric) for scores in systems.values())]
    notes = {metric: f" ({count:,} of {items:,} items)" for metric, count in (counts or {}).items() if count < items}
    if "accuracy" in measured and "macro_f1" not in measured:  # perhaps too few items per class
        measured.insert(measured.index("accuracy") + 1, "macro_f1")
        notes["macro_f1"] = f" (needs {ITEMS_OF_A_CLASS} items per class)"
    return [
        {"metric": metric + notes.get(metric, "")}
        | {names[system]: interval(metric, scores.get(metric)) for system, scores in systems.items()}
        for metric in measured
    ]


def interval(metric: str, score: dict[str, float] | None) -> str:
    """A score and, if it has one, its 95 % interval as text."""
    if score is None:
        return "–"
    return number(metric, score["score"]) + (f" ({span(metric, score, '')})" if "low" in score else "")


def verdict_rows(comparison: Comparison, first: bool = False) -> list[Row]:
    """The comparison as text, one row for each metric; `first`: with the base model, because there is no champion."""
    rows = []
    for metric, row in comparison.items():
        verdict = row["verdict"]
        scored, tested = verdict != "unmeasured", verdict not in ("unmeasured", "uninformative")
        p = row.get("p_adjusted") if tested else None
        rows.append(
            {
                "metric": metric,
                "candidate": number(metric, row["candidate"]) if scored else "–",
                "base" if first else "champion": number(metric, row["champion"]) if scored else "–",
                "difference": number(metric, row["difference"], "+") if tested else "–",
                "95 % interval": span(metric, row) if tested else "–",
                "needed": row["needed"],
                "p": "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
                "verdict": VERDICTS[verdict],
            }
        )
    return rows


def in_short(comparison: Comparison) -> str:
    """The metric that decided, with both scores; empty for a decision without numbers."""
    if not comparison:
        return ""
    failed = [metric for metric, row in comparison.items() if row["verdict"] == "failed"]
    metric = failed[0] if failed else next(iter(comparison))
    row = comparison[metric]
    return f"{metric} {number(metric, row['candidate'])} against {number(metric, row['champion'])}"


def markdown(rows: list[Row]) -> list[str]:
    """The lines of a Markdown table."""
    if not rows:
        return []
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def show_table(rows: list[Row], title: str | None = None) -> None:
    """Print a table on the terminal."""
    table = Table(*(rows[0] if rows else ()), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    Console(width=WIDTH, highlight=False, markup=False).print(table)


def show_verdict(comparison: Comparison, first: bool) -> None:
    """Print the gate's table, if it compared anything."""
    if comparison:
        show_table(verdict_rows(comparison, first))
        print(P_NOTE)


def show_decision(decision: dict[str, Any]) -> None:
    """Print a decision: verdict, reason, next step, what readers must know, and the gate's table."""
    print(f"Verdict  {decision['title']}.\nWhy      {decision['reason']}.")
    if decision["next"]:
        print(f"Next     {decision['next']}.")
    for line in [*decision["notes"], *decision["warnings"]]:
        print(f"         {line}.")
    show_verdict(decision["comparison"], decision["against"] == BASE)
