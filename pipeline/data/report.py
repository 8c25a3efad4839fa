"""What became of every row: counted while `prepare` streams, written as JSON, Markdown and one HTML file.

Memory is bounded whatever the data. The same data gives the same bytes: the report is part of a DVC output, so it holds
no time, no path and nothing of an earlier version. Nothing from the data can act: Jinja escapes it, and the HTML page
forbids every script by its own policy.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.files import write_json, write_text
from pipeline.core.pages.templates import environment
from pipeline.core.redaction import redact
from pipeline.data.default_scoring import Choice, reason

EXAMPLES = 5  # kept for each reason, kind of repair and kind of duplicate
EXCERPT = 300  # characters of an example
MOST_KEYS = 1000  # distinct tasks, files, reasons … counted one by one; further ones count as OTHER
OTHER = "(other)"
BINS = sorted({round(2 ** (k / 4)) for k in range(81)})  # upper edges of histograms, tokens: four an octave, to 2^20
SPLITS = ("train", "validation", "test")
MOST_LINES = 12  # of a table by task or language; the smaller ones become one


class DataReportError(RuntimeError):
    """The counts do not add up: a defect of Retune, not of the data."""


class Tally:
    """Rows by name (a task, a file, a reason), with the first few examples of each where examples are given."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}

    def add(self, name: str, rows: int = 1) -> str:
        """Count rows; returns the name they are counted by."""
        name = name if name in self.counts or len(self.counts) < MOST_KEYS else OTHER
        self.counts[name] += rows
        return name

    def add_example(self, name: str, **example: Any) -> None:
        """Count one row and keep it as an example while there are few; records become excerpts."""
        examples = self.examples.setdefault(self.add(name), [])
        if len(examples) < EXAMPLES:
            texts = {key: excerpt(value) for key, value in example.items() if key in ("text", "of_text")}
            examples.append(example | texts)


class DataStats:
    """Everything the report says of the rows, counted one by one."""

    def __init__(self) -> None:
        self.formats, self.sources = Tally(), Tally()  # of the rows that came in
        self.dropped, self.repaired, self.duplicates = Tally(), Tally(), Tally()
        self.rows: Counter[str] = Counter()  # by split
        self.tasks: dict[str, Tally] = {}
        self.languages: dict[str, Tally] = {}
        self.lengths: dict[str, Counter[int]] = {}  # exact: at most max_length different ones
        self.trained: Counter[int] = Counter()
        self.more = 0  # rows that came of splitting others, and of templates that need a row an answer
        self.rewritten = 0  # conversations of such templates
        self.untrained = 0  # answers that their rows mark as not trained

    def add_read(self, format: str, source: str, rows: int) -> None:
        """`rows` records, usable or not, were read from the file `source` in `format`."""
        self.formats.add(format, rows)
        self.sources.add(source, rows)

    def add_kept(
        self,
        split: str,
        tasks: Sequence[str],
        lengths: Iterable[int],
        trained: Iterable[int] = (),
        languages: Iterable[str] = (),
    ) -> None:
        """Rows that go into `split`, by column: tasks, tokens, tokens with loss (of the training split), languages."""
        self.rows[split] += len(tasks)
        for tallies, names in ((self.tasks, tasks), (self.languages, languages)):
            tally = tallies.setdefault(split, Tally())
            for name, rows in Counter(names).items():
                tally.add(name, rows)
        self.lengths.setdefault(split, Counter()).update(lengths)
        if split == "train":
            self.trained.update(trained)

    def report(
        self,
        max_length: int,
        test_sha256: str,
        example: Sequence[tuple[str, bool]],
        crowded: int = 0,
        scoring: dict[str, Choice] | None = None,
    ) -> dict[str, Any]:
        """`report.json`; counts are rows unless they say otherwise. `example` is a training row in parts (text, loss).

        Raises:
            DataReportError: a row that came in is neither kept nor dropped, or is both.
        """
        rows_in, dropped = self.formats.counts.total(), self.dropped.counts.total()
        if rows_in + self.more != self.rows.total() + dropped:
            raise DataReportError(
                f"{rows_in} rows came in, but {self.rows.total()} are kept and {dropped} dropped; a row was lost or "
                "counted twice"
            )
        lengths, trained = _values(self.lengths.get("train", Counter())), _values(self.trained)
        segments = [(redact(text), has_loss) for text, has_loss in example]
        return {
            "rows_in": rows_in,
            "rows": {split: self.rows[split] for split in SPLITS},
            "rewritten_conversations": self.rewritten,  # with a row for each answer
            "untrained_answers": self.untrained,
            "more_rows": self.more,
            "tasks": {split: tally.counts for split, tally in self.tasks.items()},
            "languages": {split: tally.counts for split, tally in self.languages.items() if tally.counts},
            "formats": self.formats.counts,
            "sources": self.sources.counts,
            "dropped": dict(self.dropped.counts.most_common()),
            "dropped_examples": self.dropped.examples,
            "repaired": self.repaired.counts,
            "repaired_examples": self.repaired.examples,
            "duplicates": self.duplicates.counts,
            "duplicate_pairs": self.duplicates.examples,
            "crowded": crowded,  # rows with so many likely near copies that one may have been missed
            "train_tokens": {
                "total": int(lengths.sum()),
                "trained": int(trained.sum()),  # tokens that carry loss
                "median_per_row": int(np.sort(lengths)[len(lengths) // 2]) if len(lengths) else 0,
                "max_per_row": int(lengths.max(initial=0)),
            },
            "max_length": max_length,
            "lengths": {split: _binned(counts) for split, counts in self.lengths.items()},  # upper edge → rows
            "trained_lengths": _binned(self.trained),
            "scoring": scoring or {},  # task → choice
            "test_sha256": test_sha256,
            "example": "".join(text for text, _ in segments),  # a training row as the model sees it
            "example_segments": segments,
        }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` to `folder`."""
    write_json(folder / "report.json", report)
    for name in ("report.md", "report.html"):
        write_text(folder / name, render(report, name))


def excerpt(record: Any) -> str:
    """The beginning of a row for people: its turns in short, without secrets."""
    if isinstance(record, list) and record and all(isinstance(turn, dict) and "role" in turn for turn in record):
        room = max(60, EXCERPT // len(record))
        lines = (f"{turn['role']}: {_short(turn.get('content') or turn, room)}" for turn in record)
        return "\n".join(lines)[: 2 * EXCERPT]
    return _short(record, EXCERPT)


def _short(value: Any, room: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(redact(text[:2000]).split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= room else text[: room - 1] + "…"


def _values(counts: Counter[int]) -> NDArray[np.int64]:
    return np.repeat(np.array([*counts], dtype=np.int64), np.array([*counts.values()], dtype=np.int64))


def _binned(counts: Counter[int]) -> dict[str, int]:
    bins: Counter[int] = Counter()
    for value, rows in counts.items():
        bins[BINS[min(int(np.searchsorted(BINS, value)), len(BINS) - 1)]] += rows
    return {str(edge): bins[edge] for edge in sorted(bins)}


def render(report: Mapping[str, Any], name: str) -> str:
    """The page `name`: report.md or report.html."""
    pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
    pages.filters |= {"ranked": _ranked, "reason": reason}
    all_tokens, trained = report["lengths"].get("train", {}), report["trained_lengths"]
    languages = _ranked(over_splits(report["languages"]))
    return pages.get_template(f"data_{name}.jinja").render(
        report=report,
        rows_of=_in_order(report["rows"]),
        summary=summary(report),
        kept=sum(report["rows"].values()),
        dropped=sum(report["dropped"].values()),
        languages=languages,
        looked_at=sum(rows for _, rows in languages),
        lengths=Histogram(all_tokens, report["max_length"], trained),
        trained_lengths=Histogram(trained, report["max_length"], all_tokens),
        mixes=[("Tasks", table(report["tasks"])), ("Languages", table(report["languages"]))],
    )


def summary(report: Mapping[str, Any]) -> str:
    """One sentence: how many rows came in, what became of them, and the commonest reason for dropping one."""
    rows, dropped = report["rows"], sum(report["dropped"].values())
    splits = ", ".join(f"{count:,} {split}" for split, count in _in_order(rows).items())
    sentence = f"{report['rows_in']:,} rows came in, {sum(rows.values()):,} go on ({splits})"
    if conversations := report["rewritten_conversations"]:
        sentence += (
            f", {conversations:,} conversation{'s' * (conversations != 1)} with a row for each answer, since the chat "
            "template rewrites earlier turns"
        )
    if untrained := report["untrained_answers"]:
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
    names = [name for name, _ in _ranked(over_splits(counts))]
    groups = [(name, [name]) for name in names[:MOST_LINES]]
    if rest := names[MOST_LINES:]:
        groups.append((f"{len(rest)} more", rest))
    lines = []
    for label, group in groups:
        rows = {split: sum(of_split.get(name, 0) for name in group) for split, of_split in counts.items()}
        cells = {split: (n, 100 * n / (sum(counts[split].values()) or 1)) for split, n in rows.items()}
        lines.append((label, cells))
    return lines


def _in_order(rows: Mapping[str, int]) -> dict[str, int]:
    return {split: rows.get(split, 0) for split in SPLITS}


def _edge(i: int) -> int:
    return BINS[i] if i >= 0 else 0


def over_splits(counts: Mapping[str, Mapping[str, int]]) -> Counter[str]:
    """The rows of all splits together, by name."""
    return sum((Counter(of_split) for of_split in counts.values()), Counter[str]())


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
