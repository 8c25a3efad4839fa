"""Which rows contain an item of a benchmark: by the phrases of the item that the row has, too.

A phrase is 8 words or 13 characters of a script written without spaces, case and punctuation folded as in `shingles`.
GPT-3 (Brown et al. 2020, appendix C) took 8 to 13 words, ignored n-grams that too many documents have, and acted on one
match; one match is often a quotation, so as in Tülu 3 (Lambert et al. 2024) a share of the item must be there. An item
too short for one phrase is found where it is the whole text, and those without any are named.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Message
from pipeline.data.formats import read_rows
from pipeline.data.readers import FormatError
from pipeline.data.records import Rejected, Row
from pipeline.data.shingles import shingles

WORDS, CHARACTERS = 8, 13  # tokens of a phrase
COMMON = 10  # a phrase that more items have is the benchmark's own and tells nothing
SHOWN = 5  # items and records named in a line


@dataclass(frozen=True)
class Benchmark:
    owners: dict[str, list[int]]  # phrase → the items that have it
    sizes: Counter[int]  # item → its phrases
    unsearchable: tuple[int, ...]  # items that have no phrase but the benchmark's own


@dataclass(frozen=True)
class Contamination:
    row: int  # place in the texts
    item: int  # the item of the benchmark of which the row has most
    share: float  # of the item's phrases, 0–1


@dataclass(frozen=True)
class BenchmarkFile:
    """A file that `prepare.decontaminate` names, ready to be searched for."""

    name: str  # the file's, or its path where another has the same
    known: Benchmark
    items: int
    unsearchable: list[str]  # sources of items without a phrase of their own
    unusable: dict[str, str]  # source → reason, of records that are no conversations

    def as_json(self) -> dict[str, Any]:
        return {"items": self.items, "unsearchable": self.unsearchable, "unusable": self.unusable}

    def warnings(self) -> list[str]:
        """A line for what is not searched for."""
        unusable = [f"{source} {reason}" for source, reason in self.unusable.items()]
        lines = (
            (self.unsearchable, f"of {self.items:,} items have no phrase of their own and cannot be found"),
            (unusable, "records are not conversations and are not searched for"),
        )
        return [f"{self.name}: {len(names):,} {what}: {_some(names)}" for names, what in lines if names]


def read_benchmark_files(names: Sequence[str], text: Callable[[list[Message]], str]) -> list[BenchmarkFile]:
    """Each file once, in order; `text` is what rows are compared by.

    Raises:
        FormatError: a file is not there, in no known format, or without a usable row.
    """
    same = Counter(Path(name).name for name in set(names))
    files = []
    for name in dict.fromkeys(names):
        records = list(read_rows(Path(name)))
        rows = [row for row in records if isinstance(row, Row)]
        if not rows:
            raise FormatError(f"prepare.decontaminate names {name}, which holds no usable row")
        known = benchmark([text(row.messages) for row in rows])
        unusable = {row.source: row.reason for row in records if isinstance(row, Rejected)}
        unsearchable = [rows[item].source for item in known.unsearchable]
        shown = name if same[Path(name).name] > 1 else Path(name).name
        files.append(BenchmarkFile(shown, known, len(rows), unsearchable, unusable))
    return files


def benchmark(items: Sequence[str]) -> Benchmark:
    """Index the items; of equal ones the first stands for all."""
    firsts: dict[frozenset[str], int] = {}
    for item, text in enumerate(items):
        firsts.setdefault(frozenset(shingles(text, WORDS, CHARACTERS)), item)
    owners: dict[str, list[int]] = defaultdict(list)
    for phrases, item in firsts.items():
        for phrase in phrases:
            owners[phrase].append(item)
    owners = {phrase: items_with_it for phrase, items_with_it in owners.items() if len(items_with_it) <= COMMON}
    sizes = Counter(item for items_with_it in owners.values() for item in items_with_it)
    return Benchmark(owners, sizes, tuple(item for item in firsts.values() if item not in sizes))


def contaminated(texts: Sequence[str], known: Benchmark, min_share: float) -> list[Contamination]:
    """The texts that have at least `min_share` (above 0, up to 1) of an item's phrases, ascending."""
    hits = []
    for row, text in enumerate(texts):
        shared = Counter(item for phrase in shingles(text, WORDS, CHARACTERS) for item in known.owners.get(phrase, ()))
        if not shared:
            continue
        share, item = max((count / known.sizes[item], -item) for item, count in shared.items())
        if share >= min_share:
            hits.append(Contamination(row, -item, share))
    return hits


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
