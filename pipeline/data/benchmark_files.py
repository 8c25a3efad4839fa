"""The benchmark files that `prepare.decontaminate` names, ready to be searched for, and what of them cannot be."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Message
from pipeline.data.contamination import Benchmark, benchmark
from pipeline.data.formats import read_rows
from pipeline.data.json_text import FormatError
from pipeline.data.records import Rejected, Row

SHOWN = 5  # items and records named in a line


@dataclass(frozen=True)
class BenchmarkFile:
    name: str  # the file's, or its path where another has the same
    known: Benchmark
    items: int
    unsearchable: list[str]  # sources of items without a phrase of their own
    unusable: list[Rejected]  # records that are no conversations

    def as_json(self) -> dict[str, Any]:
        unusable = {row.source: row.reason for row in self.unusable}
        return {"items": self.items, "unsearchable": self.unsearchable, "unusable": unusable}

    def warnings(self) -> list[str]:
        """A line for what is not searched for."""
        lines = []
        if self.unsearchable:
            what = f"{len(self.unsearchable):,} of {self.items:,} items have no phrase of their own and cannot be found"
            lines.append(f"{self.name}: {what}: {_some(self.unsearchable)}")
        if self.unusable:
            what = f"{len(self.unusable):,} records are not conversations and are not searched for"
            lines.append(f"{self.name}: {what}: {_some([f'{row.source} {row.reason}' for row in self.unusable])}")
        return lines


def read_benchmark_files(names: Sequence[str], text: Callable[[list[Message]], str]) -> list[BenchmarkFile]:
    """Each file once, in order; `text` is what rows are compared by.

    Raises:
        FormatError: a file is not there, in no known format, or without a usable row.
    """
    names = list(dict.fromkeys(names))
    same = Counter(Path(name).name for name in names)
    files = []
    for name in names:
        records = list(read_rows(Path(name)))
        rows = [row for row in records if isinstance(row, Row)]
        if not rows:
            raise FormatError(f"prepare.decontaminate names {name}, which holds no usable row")
        known = benchmark([text(row.messages) for row in rows])
        files.append(
            BenchmarkFile(
                name if same[Path(name).name] > 1 else Path(name).name,
                known,
                len(rows),
                [rows[item].source for item in known.unsearchable],
                [row for row in records if isinstance(row, Rejected)],
            )
        )
    return files


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
