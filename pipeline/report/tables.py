"""Tables of scores as people read them: the one place for terminal, dashboard and reports.

In come the metrics of systems on the same test items; out go rows of text, one for each metric that was measured.
"""

from typing import Any

from rich.table import Table

from pipeline.scoring.resampling import ITEMS_OF_A_CLASS, METRICS, PERCENT

# Keys of metrics.json, and what people call these systems.
SYSTEMS = {
    "base": "base",
    "champion": "champion",
    "adapter": "candidate before merge",
    "merged": "candidate (merged)",
}
Row = dict[str, str]


def score_rows(
    systems: dict[str, dict[str, Any]],
    counts: dict[str, int] | None = None,
    items: int = 0,
    names: dict[str, str] = SYSTEMS,
) -> list[Row]:
    """A row for each metric that some system has: `metric`, then the name of each system and its score.

    Args:
        systems: by key of `names`: the metrics.
        counts: how many of the `items` each metric counts, where that is known; said where it is not all of them.
    """
    measured = [metric for metric in METRICS if any(scores.get(metric) for scores in systems.values())]
    if "accuracy" in measured and "macro_f1" not in measured:  # classes may be there, with too few items
        measured.insert(measured.index("accuracy") + 1, "macro_f1")
    return [
        {"metric": metric + _few(metric, systems, (counts or {}).get(metric, items), items)}
        | {names[system]: interval(metric, scores.get(metric)) for system, scores in systems.items()}
        for metric in measured
    ]


def _few(metric: str, systems: dict[str, dict[str, Any]], count: int, items: int) -> str:
    if not any(scores.get(metric) for scores in systems.values()):
        return f" (needs {ITEMS_OF_A_CLASS} items per class)"
    return f" ({count:,} of {items:,} items)" if count < items else ""


def number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.{1 if metric in PERCENT else 3}f}"


def interval(metric: str, score: dict[str, float] | None) -> str:
    """A score and its 95 % interval as text; the score alone where there is no interval."""
    if score is None:
        return "–"
    if "low" not in score:
        return number(metric, score["score"])
    return f"{number(metric, score['score'])} ({number(metric, score['low'])} to {number(metric, score['high'])})"


def markdown(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    if not rows:
        return []
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def terminal(rows: list[Row], title: str | None = None) -> Table:
    table = Table(*(rows[0] if rows else ()), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    return table


WIDTH = 118  # columns of tables, on a terminal and in a file


def verdict_lines(title: str, why: str, todo: str) -> list[str]:
    """What was decided, why, and what to do next."""
    return [f"Verdict  {title}.", f"Why      {why}.", *([f"Next     {todo}."] if todo else [])]


def verdict_table(comparison: dict[str, Any], first: bool) -> Table:
    from pipeline.registry.verdict import verdict_rows
    from pipeline.report.tables import terminal

    return terminal(verdict_rows(comparison, first))
