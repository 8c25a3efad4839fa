"""The data report: what became of every row, as JSON, Markdown and one HTML file.

The report is part of a DVC output, so it has no timestamps and no paths: the same data gives the same bytes. Text from
the data cannot act as markup: Jinja escapes it, and the page's policy forbids scripts.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json, write_text
from pipeline.core.pages.templates import environment
from pipeline.core.redaction import redact
from pipeline.data.default_scoring import explain_choice

EXAMPLES = 5  # per reason, kind of repair and kind of duplicate
EXCERPT = 300  # characters of an example
SPLITS = ("train", "validation", "test")
MAX_LINES = 12  # in a table by task or language; the smallest ones are summed up in one more line


class DataReportError(RuntimeError):
    """The counts do not add up: a bug in Retune, not in the data."""


class Tally:
    """Counts of rows by reason, with the first few examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}

    def add(self, name: str, **example: Any) -> None:
        """Count one row, and keep it as an example (as excerpts of its texts) if there are fewer than EXAMPLES."""
        self.counts[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < EXAMPLES:
            texts = {key: excerpt(value) for key, value in example.items() if key in ("text", "of_text")}
            examples.append(example | texts)


class DataStats:
    """The counts for the report, collected row by row."""

    def __init__(self) -> None:
        self.formats, self.sources = Counter[str](), Counter[str]()  # of all rows read, usable or not
        self.dropped, self.repaired, self.duplicates = Tally(), Tally(), Tally()
        self.tasks = {split: Counter[str]() for split in SPLITS}
        self.languages = {split: Counter[str]() for split in SPLITS}
        self.lengths = Counter[int]()  # tokens of a training row → rows
        self.trained_tokens = 0  # in the training split: tokens with loss
        self.added = 0  # rows made by splitting long rows, or for templates that need one row per answer
        self.rewritten = 0  # conversations with one row per answer
        self.untrained = 0  # answers marked as not trained

    def add_read(self, format: str, source: str, rows: int) -> None:
        """Count `rows` records, usable or not, of the file `source`."""
        self.formats[format] += rows
        self.sources[source] += rows

    def report(self, example: Sequence[tuple[str, bool]], **facts: Any) -> dict[str, Any]:
        """The content of `report.json`; counts are of rows unless named otherwise.

        `example` is one training row as parts (text, has loss); `facts` are further entries: max_length, test_sha256,
        crowded (rows for which a near copy may have been missed) and scoring (task → `Choice`).
        """
        rows = {split: counts.total() for split, counts in self.tasks.items()}
        rows_in, kept, dropped = self.formats.total(), sum(rows.values()), self.dropped.counts.total()
        if rows_in + self.added != kept + dropped:
            raise DataReportError(
                f"{rows_in} rows were read and {self.added} added, but {kept} were kept and {dropped} dropped; this is "
                "a bug in Retune"
            )
        lengths = sorted(self.lengths.elements())
        bins = Counter(1 << max(tokens - 1, 0).bit_length() for tokens in lengths)
        return {
            "rows_in": rows_in,
            "rows": rows,
            "rewritten_conversations": self.rewritten,
            "untrained_answers": self.untrained,
            "more_rows": self.added,
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
            "train_tokens": {
                "total": sum(lengths),
                "trained": self.trained_tokens,
                "median_per_row": lengths[len(lengths) // 2] if lengths else 0,
                "max_per_row": lengths[-1] if lengths else 0,
            },
            # Training rows by number of tokens; the keys are upper bounds of the bins, powers of two.
            "lengths": {str(bound): rows for bound, rows in sorted(bins.items())},
            "example_segments": [(redact(text), has_loss) for text, has_loss in example],
            **facts,
        }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` to `folder`."""
    write_json(folder / "report.json", report)
    values = {
        "report": report,
        "summary": summary(report),
        "kept": sum(report["rows"].values()),
        "dropped": sum(report["dropped"].values()),
        "languages": sum_over_splits(report["languages"]),
        "mixes": [("Tasks", table(report["tasks"])), ("Languages", table(report["languages"]))],
    }
    for name in ("report.md", "report.html"):
        pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
        pages.filters |= {"ranked": _ranked, "reason": explain_choice}
        write_text(folder / name, pages.get_template(f"data_{name}.jinja").render(values))


def excerpt(record: Any) -> str:
    """The start of a row to show to people: its turns, shortened and without secrets."""
    if isinstance(record, list) and record and all(isinstance(turn, dict) and "role" in turn for turn in record):
        width = max(60, EXCERPT // len(record))
        lines = (f"{turn['role']}: {_shorten(turn.get('content') or turn, width)}" for turn in record)
        return "\n".join(lines)[: 2 * EXCERPT]
    return _shorten(record, EXCERPT)


def _shorten(value: Any, width: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(redact(text[:2000]).split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def summary(report: Mapping[str, Any]) -> str:
    """One sentence: how many rows were read, kept, repaired and dropped, and the most frequent reason."""
    dropped = sum(report["dropped"].values())
    splits = ", ".join(f"{count:,} {split}" for split, count in report["rows"].items())
    counts = {
        "conversations with one row per answer (the template needs that)": report["rewritten_conversations"],
        "answers not trained": report["untrained_answers"],
        "repairs": sum(report["repaired"].values()),
    }
    sentence = f"{report['rows_in']:,} rows were read, {sum(report['rows'].values()):,} kept ({splits})"
    sentence += "".join(f", {count:,} {label}" for label, count in counts.items() if count)
    if not dropped:
        return f"{sentence}; none was dropped."
    reason, count = _ranked(report["dropped"])[0]
    frequency = "" if count == dropped else f", most often ({count:,})"
    return f"{sentence}; {dropped:,} ({dropped / report['rows_in']:.1%}) dropped{frequency}: {reason}."


def table(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, dict[str, tuple[int, float]]]]:
    """Table lines (name, {split: (rows, percentage of the split)}) from counts by split and name, the largest first."""
    names = [name for name, _ in sum_over_splits(counts)]
    groups = [(name, [name]) for name in names[:MAX_LINES]]
    if smallest := names[MAX_LINES:]:
        groups.append((f"{len(smallest)} more", smallest))
    lines = []
    for label, group in groups:
        rows = {split: sum(split_counts.get(name, 0) for name in group) for split, split_counts in counts.items()}
        lines.append((label, {split: (n, 100 * n / (sum(counts[split].values()) or 1)) for split, n in rows.items()}))
    return lines


def sum_over_splits(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, int]]:
    """(name, rows in all splits), the largest first."""
    return _ranked(sum(map(Counter, counts.values()), Counter[str]()))


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
