"""Files of instruction data as Arrow tables of validated conversations, made by all cores and given back in order.

Memory is bounded by the blocks under way; data of a few thousand rows stays in this process, where it is done sooner
than a second one has started.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import orjson
import pyarrow as pa
import xxhash

from pipeline.core.environment import collect_rarely
from pipeline.core.workers import Workers
from pipeline.data.columns import SHARD_COLUMNS
from pipeline.data.containers import Block, from_ipc, to_ipc
from pipeline.data.formats import Recipe, convert, recognised_blocks
from pipeline.data.records import Rejected
from pipeline.params import ColumnsParams

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in SHARD_COLUMNS if name != "repairs"),
        ("repairs", pa.list_(pa.string())),
        ("content", pa.uint64()),  # xxHash of what the row says, its source apart; shards are cut and sampled by it
    ]
)
T = TypeVar("T")
Packed = tuple[bytes, list[Rejected], frozenset[str]]
ALONE = 4  # blocks up to which no other process is started


@dataclass(frozen=True)
class Batch:
    """What came of one block: its rows as a table of `SCHEMA`, and the records that are none, with the reason."""

    table: pa.Table
    rejected: list[Rejected]
    recipe: Recipe
    position: int  # bytes of the file read so far
    unused: frozenset[str]  # columns and message keys that say something and were not read


def read_batches(path: Path, format: str = "auto", columns: ColumnsParams | None = None) -> Iterator[Batch]:
    """The rows of one file as tables, in order; what `read_rows` gives, faster.

    Raises:
        FormatError: as `read_rows`.
        WorkerError: a process was killed, most likely for want of memory.
    """
    return (batch for _, batch in convert_blocks((path, *pair) for pair in recognised_blocks(path, format, columns)))


def convert_blocks(blocks: Iterable[tuple[T, Block, Recipe]]) -> Iterator[tuple[T, Batch]]:
    """Convert each block, in order; what it is tagged with comes back beside it.

    Raises:
        FormatError, WorkerError: as `read_batches`.
    """
    coming = iter(blocks)
    first = list(islice(coming, ALONE + 1))
    if len(first) <= ALONE:
        for tag, block, recipe in first:
            yield tag, _batch(block, recipe)
        return
    under_way: deque[tuple[T, Block, Recipe, Future[Packed]]] = deque()
    with Workers(collect_rarely) as workers:
        for tag, block, recipe in chain(first, coming):
            under_way.append((tag, block, recipe, workers.submit(_packed_batch, block, recipe)))
            if len(under_way) > 3 * workers.count:
                yield _done(*under_way.popleft())
        while under_way:
            yield _done(*under_way.popleft())


def _done(tag: T, block: Block, recipe: Recipe, future: Future[Packed]) -> tuple[T, Batch]:
    table, rejected, unused = future.result()
    return tag, Batch(from_ipc(table), rejected, recipe, block.position, unused)


def _packed_batch(block: Block, recipe: Recipe) -> Packed:
    batch = _batch(block, recipe)
    return to_ipc(batch.table), batch.rejected, batch.unused


def _batch(block: Block, recipe: Recipe) -> Batch:
    columns: list[list[object]] = [[] for _ in SCHEMA]
    source, messages, tools, task, group, scoring, repairs, content = (column.append for column in columns)
    rejected = []
    unused: set[str] = set()
    for row in convert(block, recipe, unused):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        text = orjson.dumps(row.messages)
        source(row.source)
        messages(text)
        tools(row.tools)
        task(row.task)
        group(row.group)
        scoring(row.scoring)
        repairs(row.repairs)
        labels = f"\0{row.tools}\0{row.task}\0{row.group}\0{row.scoring}".encode()
        content(xxhash.xxh3_64_intdigest(text + labels))
    # orjson writes nothing but UTF-8: letting pyarrow find that out again would take longer than all the other columns.
    texts = pa.array(columns[1], type=pa.binary()).view(pa.string())
    columns[1] = []
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    arrays[1] = texts
    return Batch(pa.Table.from_arrays(arrays, schema=SCHEMA), rejected, recipe, block.position, frozenset(unused))
