"""What became of every row: counted while `prepare` streams, written as JSON, Markdown and one HTML file.

The same data gives the same bytes: the report is part of a DVC output, so it holds no time, no path and nothing of an
earlier version. Nothing from the data can act: Jinja escapes it, and the HTML page forbids every script by its policy.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json, write_text
from pipeline.core.pages.templates import environment
from pipeline.core.redaction import redact
from pipeline.data.default_scoring import Choice, reason

EXAMPLES = 5  # kept for each reason, kind of repair and kind of duplicate
EXCERPT = 300  # characters of an example
SPLITS = ("train", "validation", "test")
MOST_LINES = 12  # of a table by task or language; the smaller ones become one


class DataReportError(RuntimeError):
    """The counts do not add up: a defect of Retune, not of the data."""


class Tally:
    """Rows by reason, with the first few examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}

    def add(self, name: str, **example: Any) -> None:
        """Count one row and keep it as an example while there are few; records become excerpts."""
        self.counts[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < EXAMPLES:
            texts = {key: excerpt(value) for key, value in example.items() if key in ("text", "of_text")}
            examples.append(example | texts)


class DataStats:
    """Everything the report says of the rows, counted one by one."""

    def __init__(self) -> None:
        self.formats, self.sources = Counter[str](), Counter[str]()  # of the rows that came in, usable or not
        self.dropped, self.repaired, self.duplicates = Tally(), Tally(), Tally()
        self.tasks = {split: Counter[str]() for split in SPLITS}
        self.languages = {split: Counter[str]() for split in SPLITS}
        self.lengths = Counter[int]()  # tokens of a training row → rows; at most max_length different ones
        self.trained_tokens = 0  # of the training split, those that carry loss
        self.more = 0  # rows that came of splitting others, and of templates that need a row an answer
        self.rewritten = 0  # conversations of such templates
        self.untrained = 0  # answers that their rows mark as not trained

    def add_read(self, format: str, source: str, rows: int) -> None:
        """`rows` records, usable or not, were read from the file `source` in `format`."""
        self.formats[format] += rows
        self.sources[source] += rows

    def report(
        self,
        max_length: int,
        test_sha256: str,
        example: Sequence[tuple[str, bool]],
        crowded: int,
        scoring: dict[str, Choice],
    ) -> dict[str, Any]:
        """`report.json`; counts are rows unless they say otherwise. `example` is a training row in parts (text, loss).

        Raises:
            DataReportError: a row that came in is neither kept nor dropped, or is both.
        """
        rows = {split: counts.total() for split, counts in self.tasks.items()}
        rows_in, kept, dropped = self.formats.total(), sum(rows.values()), self.dropped.counts.total()
        if rows_in + self.more != kept + dropped:
            raise DataReportError(
                f"{rows_in} rows came in, but {kept} are kept and {dropped} dropped; a row was lost or counted twice"
            )
        lengths = sorted(self.lengths.elements())
        bins = Counter(1 << max(tokens - 1, 0).bit_length() for tokens in lengths)
        return {
            "rows_in": rows_in,
            "rows": rows,
            "rewritten_conversations": self.rewritten,  # with a row for each answer
            "untrained_answers": self.untrained,
            "more_rows": self.more,
            "tasks": self.tasks,
            "languages": self.languages,
            "formats": self.formats,
            "sources": self.sources,
            "dropped": dict(self.dropped.counts.most_common()),
            "dropped_examples": self.dropped.examples,
            "repaired": self.repaired.counts,
            "repaired_examples": self.repaired.examples,
            "duplicates": self.duplicates.counts,
            "duplicate_pairs": self.duplicates.examples,
            "crowded": crowded,  # rows with so many likely near copies that one may have been missed
            "train_tokens": {
                "total": sum(lengths),
                "trained": self.trained_tokens,
                "median_per_row": lengths[len(lengths) // 2] if lengths else 0,
                "max_per_row": lengths[-1] if lengths else 0,
            },
            "max_length": max_length,
            # Training rows by tokens: powers of two, of which each counts the rows up to it and above the one before.
            "lengths": {str(most): rows for most, rows in sorted(bins.items())},
            "scoring": scoring,  # task → choice
            "test_sha256": test_sha256,
            "example_segments": [(redact(text), has_loss) for text, has_loss in example],
        }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` to `folder`."""
    write_json(folder / "report.json", report)
    values = {
        "report": report,
        "summary": summary(report),
        "kept": sum(report["rows"].values()),
        "dropped": sum(report["dropped"].values()),
        "languages": over_splits(report["languages"]),
        "mixes": [("Tasks", table(report["tasks"])), ("Languages", table(report["languages"]))],
    }
    for name in ("report.md", "report.html"):
        pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
        pages.filters |= {"ranked": _ranked, "reason": reason}
        write_text(folder / name, pages.get_template(f"data_{name}.jinja").render(values))


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


def summary(report: Mapping[str, Any]) -> str:
    """One sentence: how many rows came in, what became of them, and the commonest reason for dropping one."""
    rows, dropped = report["rows"], sum(report["dropped"].values())
    splits = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    counts = {
        "conversations with a row for each answer as the template needs it": report["rewritten_conversations"],
        "answers marked as not trained": report["untrained_answers"],
        "repairs": sum(report["repaired"].values()),
    }
    parts = [f"{report['rows_in']:,} rows came in", f"{sum(rows.values()):,} go on ({splits})"]
    sentence = ", ".join([*parts, *(f"{count:,} {what}" for what, count in counts.items() if count)])
    if not dropped:
        return f"{sentence}; none is dropped."
    reason, count = _ranked(report["dropped"])[0]
    why = "because" if count == dropped else f"most often ({count:,}) because"
    return f"{sentence}; {dropped:,} ({dropped / report['rows_in']:.1%}) are dropped, {why}: {reason}."


def table(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, dict[str, tuple[int, float]]]]:
    """Rows of a table, the largest first: a name, and for each split its rows and their percentage of the split."""
    names = [name for name, _ in over_splits(counts)]
    groups = [(name, [name]) for name in names[:MOST_LINES]]
    if rest := names[MOST_LINES:]:
        groups.append((f"{len(rest)} more", rest))
    lines = []
    for label, group in groups:
        rows = {split: sum(of_split.get(name, 0) for name in group) for split, of_split in counts.items()}
        cells = {split: (n, 100 * n / (sum(counts[split].values()) or 1)) for split, n in rows.items()}
        lines.append((label, cells))
    return lines


def over_splits(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, int]]:
    """The rows of all splits together by name, the most first."""
    return _ranked(sum(map(Counter, counts.values()), Counter[str]()))


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
