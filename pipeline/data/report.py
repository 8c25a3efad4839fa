"""What became of every row: counted while `prepare` streams, written as JSON, Markdown and HTML.

Memory is bounded whatever the data. The same data gives the same bytes: the report is part of a DVC output, so it holds
no time, no path and nothing of an earlier version.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pipeline.core.files import write_json, write_text
from pipeline.data.default_scoring import Choice
from pipeline.data.personal_data import mask_text
from pipeline.data.report_pages import BINS, SPLITS, render

EXAMPLES = 5  # kept for each reason, kind of repair and kind of duplicate
EXCERPT = 300  # characters of an example
MOST_KEYS = 1000  # distinct tasks, files, reasons … counted one by one; further ones count as OTHER
OTHER = "(other)"


class DataReportError(RuntimeError):
    """The counts do not add up: a defect of Retune, not of the data."""


class Example(TypedDict):
    source: str  # file and line
    text: str  # excerpt, personal data masked


class Pair(TypedDict):
    source: str  # of the row that was dropped
    of: str  # of the row that stays, or of the benchmark item
    similarity: float  # 0 to 1
    text: str
    of_text: str


class Tokens(TypedDict):
    total: int
    trained: int  # tokens that carry loss
    median_per_row: int
    max_per_row: int


class Report(TypedDict):
    """`report.json`: see the module. Counts are rows unless they say otherwise; splits are train, validation, test."""

    rows_in: int
    rows: dict[str, int]  # split → rows
    rewritten_conversations: int  # conversations with a row for each answer: the template rewrites earlier turns
    untrained_answers: int  # answers of kept rows that are marked as not trained (weight 0)
    more_rows: int  # rows that came of these conversations and of splitting long ones
    tasks: dict[str, dict[str, int]]  # split → task → rows
    languages: dict[str, dict[str, int]]  # split → ISO code or "und" → rows, of the rows that were looked at
    formats: dict[str, int]  # of rows that came in
    sources: dict[str, int]  # file → rows that came in
    dropped: dict[str, int]  # reason → rows, most first
    dropped_examples: dict[str, list[Example]]
    repaired: dict[str, int]  # kind of repair → rows
    repaired_examples: dict[str, list[Example]]
    duplicates: dict[str, int]  # kind (exact, near, in the test split, …) → rows
    duplicate_pairs: dict[str, list[Pair]]
    crowded: int  # rows with so many likely near copies that one may have been missed
    train_tokens: Tokens
    max_length: int  # tokens, prepare.max_length
    lengths: dict[str, dict[str, int]]  # split → upper edge of the bin, tokens → rows
    trained_lengths: dict[str, int]  # the same for trained tokens of training rows
    scoring: dict[str, Choice]  # task → how its rows are scored that do not say it, and by what
    test_sha256: str
    example: str  # a training row as the model sees it
    example_segments: list[tuple[str, bool]]  # the same, cut where loss begins and ends: text, carries loss


@dataclass
class Tally:
    """Rows by reason, with the first few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, reason: str) -> list[Any] | None:
        """Count one row; returns the list that an example of it goes to while that is not full."""
        name = _bounded(self.counts, reason)
        self.counts[name] += 1
        kept = self.examples.setdefault(name, [])
        return kept if len(kept) < EXAMPLES else None


class DataStats:
    """Everything the report says of the rows, counted one by one."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.tasks: dict[str, Counter[str]] = {}
        self.languages: dict[str, Counter[str]] = {}
        self.lengths: dict[str, Counter[int]] = {}  # exact: at most max_length different ones
        self.trained: Counter[int] = Counter()
        self.dropped = Tally()
        self.repaired = Tally()
        self.duplicates = Tally()
        self.split = 0  # rows that came of splitting others
        self.untrained = 0  # answers that their rows mark as not trained
        self.rewritten = 0  # conversations of which the template makes a row an answer, since it rewrites earlier turns

    def add_read(self, format: str, source: str, rows: int) -> None:
        """`rows` records, usable or not, were read from the file `source` in `format`."""
        self.formats[_bounded(self.formats, format)] += rows
        self.sources[_bounded(self.sources, source)] += rows

    def add_split(self, more: int) -> None:
        """Splitting long rows made so many more of them."""
        self.split += more

    def add_rewritten(self, conversations: int, more: int) -> None:
        """So many conversations became `more` rows more: one an answer."""
        self.rewritten += conversations
        self.split += more

    def add_kept(
        self,
        split: str,
        tasks: Sequence[str],
        lengths: Iterable[int],
        trained: Iterable[int] = (),
        languages: Iterable[str] = (),
    ) -> None:
        """Rows that go into `split`, by column: tasks, tokens, tokens with loss, languages.

        `trained` is counted of the training split alone. `languages` may be of fewer rows: telling them costs time.
        """
        self.rows[split] += len(tasks)
        _add(self.tasks.setdefault(split, Counter()), Counter(tasks))
        _add(self.languages.setdefault(split, Counter()), Counter(languages))
        self.lengths.setdefault(split, Counter()).update(lengths)
        if split == "train":
            self.trained.update(trained)

    def add_dropped(self, reason: str, source: str, record: Any) -> None:
        """A row that goes nowhere; `record` is its messages, or the raw record."""
        if (kept := self.dropped.add(reason)) is not None:
            kept.append(Example(source=source, text=excerpt(record)))

    def add_repaired(self, repairs: Iterable[str], source: str, record: Any) -> None:
        """A row that was changed on its way, and how."""
        for repair in repairs:
            if (kept := self.repaired.add(repair)) is not None:
                kept.append(Example(source=source, text=excerpt(record)))

    def add_duplicate(self, kind: str, source: str, of: str, similarity: float, record: Any, of_record: Any) -> None:
        """Why the row at `source` counts as a copy of the one at `of`; `add_dropped` counts it among the dropped."""
        if (kept := self.duplicates.add(kind)) is not None:
            kept.append(
                Pair(source=source, of=of, similarity=similarity, text=excerpt(record), of_text=excerpt(of_record))
            )

    def report(
        self,
        max_length: int,
        test_sha256: str,
        example: Sequence[tuple[str, bool]],
        crowded: int = 0,
        scoring: dict[str, Choice] | None = None,
    ) -> Report:
        """The finished report; `example` is a training row's text in parts, each with whether it carries loss.

        Raises:
            DataReportError: a row that came in is neither kept nor dropped, or is both.
        """
        came, kept, dropped = (sum(counts.values()) for counts in (self.formats, self.rows, self.dropped.counts))
        if came + self.split != kept + dropped:
            raise DataReportError(
                f"{came} rows came in, but {kept} are kept and {dropped} dropped; a row was lost or counted twice"
            )
        tokens = self.lengths.get("train", Counter())
        segments = [(mask_text(text)[0], trained) for text, trained in example]
        return {
            "rows_in": came,
            "rows": {split: self.rows[split] for split in SPLITS},
            "rewritten_conversations": self.rewritten,
            "untrained_answers": self.untrained,
            "more_rows": self.split,
            "tasks": {split: _sorted(counts) for split, counts in self.tasks.items()},
            "languages": {split: _ranked(counts) for split, counts in self.languages.items() if counts},
            "formats": _ranked(self.formats),
            "sources": _sorted(self.sources),
            "dropped": _ranked(self.dropped.counts),
            "dropped_examples": self.dropped.examples,
            "repaired": _ranked(self.repaired.counts),
            "repaired_examples": self.repaired.examples,
            "duplicates": _ranked(self.duplicates.counts),
            "duplicate_pairs": self.duplicates.examples,
            "crowded": crowded,
            "train_tokens": {
                "total": _sum(tokens),
                "trained": _sum(self.trained),
                "median_per_row": _median(tokens),
                "max_per_row": max(tokens, default=0),
            },
            "max_length": max_length,
            "lengths": {split: _binned(counts) for split, counts in self.lengths.items()},
            "trained_lengths": _binned(self.trained),
            "scoring": scoring or {},
            "test_sha256": test_sha256,
            "example": "".join(text for text, _ in segments),
            "example_segments": segments,
        }


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` to `folder`."""
    write_json(folder / "report.json", report)
    for name in ("report.md", "report.html"):
        write_text(folder / name, render(report, name))


def excerpt(record: Any) -> str:
    """The beginning of a row for people: its turns in short, personal data masked."""
    if isinstance(record, list) and all(isinstance(turn, dict) and "role" in turn for turn in record) and record:
        room = max(60, EXCERPT // len(record))
        return "\n".join(f"{turn['role']}: {_short(turn.get('content') or turn, room)}" for turn in record)[
            : 2 * EXCERPT
        ]
    return _short(record, EXCERPT)


def _short(value: Any, room: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(mask_text(text[:2000])[0].split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= room else text[: room - 1] + "…"


def _bounded(counts: Counter[str], key: str) -> str:
    return key if key in counts or len(counts) < MOST_KEYS else OTHER


def _add(counts: Counter[str], more: Mapping[str, int]) -> None:
    for key, rows in more.items():
        counts[_bounded(counts, key)] += rows


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _sum(counts: Counter[int]) -> int:
    return sum(value * rows for value, rows in counts.items())


def _median(counts: Counter[int]) -> int:
    """The upper median of values with their counts."""
    left = sum(counts.values()) // 2
    for value, rows in sorted(counts.items()):
        left -= rows
        if left < 0:
            return value
    return 0


def _binned(counts: Counter[int]) -> dict[str, int]:
    values = np.array(sorted(counts), dtype=np.int64)
    places = np.minimum(np.searchsorted(BINS, values), len(BINS) - 1)
    bins: Counter[int] = Counter()
    for place, value in zip(places, values, strict=True):
        bins[BINS[place]] += counts[int(value)]
    return {str(edge): bins[edge] for edge in sorted(bins)}
