"""The data report as pages for people: Markdown, and one HTML file that needs nothing else.

Nothing from the data can act: Jinja escapes it, and the HTML page forbids every script by its own policy.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.pages.templates import environment
from pipeline.data.default_scoring import reason

BINS = sorted({round(2 ** (k / 4)) for k in range(81)})  # upper edges of histograms, tokens: four an octave, to 2^20
SPLITS = ("train", "validation", "test")
MOST_ROWS = 12  # of a table by task or language; the smaller ones become one


def render(report: Mapping[str, Any], name: str, diff: Mapping[str, Any] | None = None) -> str:
    """The page `name`: report.md, report.html, or diff.md (of `diff` alone)."""
    pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
    pages.filters |= {"ranked": _ranked, "reason": reason}
    if name == "diff.md":
        return pages.get_template("data_diff.md.jinja").render(diff=diff)
    all_tokens, trained = report["lengths"].get("train", {}), report["trained_lengths"]
    languages = _ranked(_over_splits(report["languages"]))
    return pages.get_template(f"data_{name}.jinja").render(
        report={"scoring": {}} | dict(report),  # an earlier release wrote none
        diff=diff,
        rows_of=_in_order(report["rows"]),
        verdict=verdict(report),
        kept=sum(report["rows"].values()),
        dropped=sum(report["dropped"].values()),
        languages=languages,
        looked_at=sum(rows for _, rows in languages),
        lengths=Histogram(all_tokens, report["max_length"], trained),
        trained_lengths=Histogram(trained, report["max_length"], all_tokens),
        mixes=[("Tasks", table(report["tasks"])), ("Languages", table(report["languages"]))],
    )


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: how many rows came in, what became of them, and the commonest reason for dropping one."""
    rows, dropped = report["rows"], sum(report["dropped"].values())
    splits = ", ".join(f"{count:,} {split}" for split, count in _in_order(rows).items())
    sentence = f"{report['rows_in']:,} rows came in, {sum(rows.values()):,} go on ({splits})"
    if conversations := report.get("rewritten_conversations", 0):
        sentence += (
            f", {conversations:,} conversation{'s' * (conversations != 1)} with a row for each answer, since the chat "
            "template rewrites earlier turns"
        )
    if untrained := report.get("untrained_answers", 0):
        sentence += f", {untrained:,} answer{'s' * (untrained != 1)} marked as not trained"
    if repaired := sum(report["repaired"].values()):
        sentence += f" with {repaired:,} repair{'s' * (repaired != 1)}"
    if not dropped:
        return f"{sentence}; none is dropped."
    reason, count = _ranked(report["dropped"])[0]
    why = "because" if count == dropped else f"most often ({count:,}) because"
    return f"{sentence}; {dropped:,} ({dropped / report['rows_in']:.1%}) are dropped, {why}: {reason}."


class Histogram:
    """Bars of rows by tokens on a logarithmic axis that has room for all of `others`, and where `limit` tokens lie."""

    def __init__(self, counts: Mapping[str, int], limit: int, *others: Mapping[str, int]) -> None:
        used = [i for i, edge in enumerate(BINS) if any(each.get(str(edge)) for each in (counts, *others))] or [0]
        end = next((i for i, edge in enumerate(BINS) if edge >= limit), len(BINS) - 1)
        # The limit is shown unless it is so far off (two octaves) that it would squeeze the bars into a corner.
        first = used[0]
        last = max(used[-1], min(end, used[-1] + 8), min(first + 7, len(BINS) - 1))
        highest = max(counts.values(), default=1)
        self.bars = [
            {"place": place, "least": _edge(i - 1) + 1, "most": BINS[i], "rows": rows, "height": 100 * rows / highest}
            for place, i in enumerate(range(first, last + 1))
            for rows in [counts.get(str(BINS[i]), 0)]
        ]
        self._first = first
        powers = [edge for edge in BINS[first : last + 1] if edge & (edge - 1) == 0]
        self.ticks = [(edge, self._percent(edge)) for edge in powers[:: math.ceil(len(powers) / 7)]]
        self.limit = self._percent(limit) if end <= last else None
        self.highest = highest if counts else 0

    def _percent(self, tokens: int) -> float:
        """Where `tokens` lie on the axis, from the left."""
        i = next(i for i, edge in enumerate(BINS) if edge >= tokens)
        place = i - self._first + (tokens - _edge(i - 1)) / (BINS[i] - _edge(i - 1))
        return 100 * place / len(self.bars)


def table(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, dict[str, tuple[int, float]]]]:
    """Rows of a table, the largest first: a name, and for each split its rows and their percentage of the split."""
    total = _over_splits(counts)
    names = [name for name, _ in _ranked(total)]
    groups = [(name, [name]) for name in names[:MOST_ROWS]]
    if rest := names[MOST_ROWS:]:
        groups.append((f"{len(rest)} more", rest))
    cells = {split: sum(of.values()) or 1 for split, of in counts.items()}
    return [
        (
            label,
            {
                split: (n := sum(counts[split].get(name, 0) for name in group), 100 * n / cells[split])
                for split in counts
            },
        )
        for label, group in groups
    ]


def _in_order(rows: Mapping[str, int]) -> dict[str, int]:
    return {split: rows.get(split, 0) for split in SPLITS}


def _edge(i: int) -> int:
    return BINS[i] if i >= 0 else 0


def _over_splits(counts: Mapping[str, Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for split in counts.values():
        total.update(split)
    return total


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
