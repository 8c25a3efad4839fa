"""The shards of a data snapshot: Parquet files of validated conversations, each named by a digest of its bytes.

Rows added at the end of a source leave all its shards but the last as they are, byte for byte, so that DVC stores, and
`prepare` works on, what is new. A row's line is part of its shard: rows put in the middle of a file change the shards
from there on.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.core.files import read_json, sha256_file
from pipeline.data.formats import find_files, open_rows
from pipeline.data.known_formats import SHARD_COLUMNS
from pipeline.data.readers import FormatError
from pipeline.data.records import Rejected, Row

SHARD_SCHEMA = pa.schema(
    [(name, pa.list_(pa.string()) if name == "repairs" else pa.string()) for name in SHARD_COLUMNS]
)
# xxHash of what a row says, its source apart: weights and caps choose rows by it.
SCHEMA = SHARD_SCHEMA.append(pa.field("content", pa.uint64()))
BATCH_ROWS = 2048  # that are Python objects at once
SHARD_ROWS, SHARD_BYTES = 8192, 64 << 20  # a shard ends with the row that reaches either; bytes are those of messages


def tables(rows: Iterator[Row | Rejected], rejected: list[Rejected]) -> Iterator[pa.Table]:
    """The rows in order in tables of `SCHEMA`; the rejections among the rows of a table are in `rejected` before it."""
    while batch := list(islice(rows, BATCH_ROWS)):
        rejected += [row for row in batch if isinstance(row, Rejected)]
        records = []
        for row in (row for row in batch if isinstance(row, Row)):
            messages = json.dumps(row.messages, ensure_ascii=False, separators=(",", ":"))
            said = f"{messages}\0{row.tools}\0{row.task}\0{row.group}\0{row.scoring}"
            records.append(vars(row) | {"messages": messages, "content": xxhash.xxh3_64_intdigest(said.encode())})
        yield pa.Table.from_pylist(records, schema=SCHEMA)


@dataclass(frozen=True)
class Part:
    """A canonical shard, and the file that its rows come from."""

    shard: Path
    file: str
    format: str


Rejection = tuple[Rejected, str, str]  # with file and format


def write_shards(tables: Iterable[pa.Table], folder: Path, name: str) -> list[str]:
    """Write the rows of tables of `SCHEMA` to shards `NAME-DIGEST.parquet` in `folder`; returns their names in order.

    How rows are spread over tables does not change the shards.
    """
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "rows"
    shards: list[str] = []
    rows = SCHEMA.empty_table()  # that are in no shard yet
    for table in tables:
        rows = pa.concat_tables([rows, table])
        while len(rows) >= (full := _rows_of_a_shard(rows)):
            shards.append(_write_shard(rows.slice(0, full), folder, stem))
            rows = rows.slice(full)
    return [*shards, _write_shard(rows, folder, stem)] if len(rows) else shards


def _rows_of_a_shard(rows: pa.Table) -> int:
    """How many of the rows fill the next shard; more than there are where these do not."""
    sizes = np.cumsum(pc.binary_length(rows["messages"]).to_numpy().astype(np.int64))
    return min(SHARD_ROWS, int(np.searchsorted(sizes, SHARD_BYTES)) + 1)


def _write_shard(rows: pa.Table, folder: Path, stem: str) -> str:
    partial = folder / f"{stem}.partial"
    pq.write_table(
        rows.select(SHARD_SCHEMA.names).combine_chunks(),
        partial,
        compression="zstd",
        row_group_size=SHARD_ROWS,
        use_dictionary=["task", "group", "scoring", "tools"],
        write_statistics=False,  # the least and the greatest message would be kept whole
    )
    shard = f"{stem}-{sha256_file(partial)[:12]}.parquet"
    partial.replace(folder / shard)
    return shard


def is_shard(path: Path) -> bool:
    """Whether `path` is a shard that `retune ingest` wrote."""
    if path.suffix != ".parquet":
        return False
    try:
        return bool(pq.read_schema(path).equals(SHARD_SCHEMA))
    except (OSError, pa.ArrowException):
        return False


def read_shard(path: Path) -> pa.Table:
    """All rows of a shard, with the columns of `SHARD_SCHEMA`; `messages` is JSON text."""
    try:
        return pq.read_table(path, memory_map=False, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is damaged: {error}; `dvc checkout --force data.dvc` puts it back") from None


def read_snapshot(folder: Path) -> dict[str, Any] | None:
    """What `retune ingest` noted about the snapshot in `folder`; None where the files were put by hand."""
    path = folder / "snapshot.json"
    return read_json(path) if path.exists() else None


def read_rejected(folder: Path) -> Iterator[Rejected]:
    """The records that `retune ingest` could not use, with the reason; of a long one, the start of its text."""
    path = folder / "rejected.jsonl"
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield Rejected(entry["source"], entry["reason"], entry["record"])


def canonical_shards(data: Path, scratch: Path) -> tuple[list[Part], list[Rejection]]:
    """The shards that `retune ingest` wrote to `data`, and those made in `scratch` of files put there by hand."""
    snapshot = (read_snapshot(data) if data.is_dir() else None) or {"sources": [], "shards": []}
    files = [file for source in snapshot["sources"] for file in source["files"]]
    origin = {shard: (file["name"], file["format"]) for file in files for shard in file["shards"]}
    formats = {file["name"]: file["format"] for file in files}
    parts: list[Part] = []
    rejected: list[Rejection] = []
    for row in read_rejected(data):
        name = row.source.rpartition(":")[0]
        rejected.append((row, name, formats.get(name, "unknown")))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in find_files(data):
        name = path.name if path == data else path.relative_to(data).as_posix()
        if is_shard(path):
            parts.append(Part(path, *origin.get(path.name, (name, "messages"))))
            continue
        file = open_rows(path)
        unusable: list[Rejected] = []
        shards = write_shards(tables(file.rows, unusable), scratch, name)
        parts += [Part(scratch / shard, name, file.format) for shard in shards]
        rejected += [(row, name, file.format) for row in unusable]
    order = {shard: number for number, shard in enumerate(snapshot["shards"])}
    return sorted(parts, key=lambda part: order.get(part.shard.name, len(order))), rejected
