"""The shards of a data snapshot: Parquet files of validated conversations, each named after a digest of its bytes.

Rows appended to a source change only its last shard; rows inserted in the middle change all shards from there on,
because a shard contains the rows' line numbers.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
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
# `content` is the xxHash of a row without its source; weights and caps choose rows by it.
SCHEMA = SHARD_SCHEMA.append(pa.field("content", pa.uint64()))
BATCH_ROWS = 2048  # rows that are Python objects at once
SHARD_ROWS, SHARD_BYTES = 8192, 64 << 20  # a shard ends with the row that reaches either; bytes of messages


def tabulate(rows: Iterator[Row | Rejected], rejected: list[Rejected]) -> Iterator[pa.Table]:
    """Tables of `SCHEMA` with the rows in order. The rejections of a batch are in `rejected` before its table comes."""
    while batch := list(islice(rows, BATCH_ROWS)):
        rejected += [row for row in batch if isinstance(row, Rejected)]
        records = []
        for row in (row for row in batch if isinstance(row, Row)):
            messages = json.dumps(row.messages, ensure_ascii=False, separators=(",", ":"))
            content = f"{messages}\0{row.tools}\0{row.task}\0{row.group}\0{row.scoring}"
            records.append(vars(row) | {"messages": messages, "content": xxhash.xxh3_64_intdigest(content.encode())})
        yield pa.Table.from_pylist(records, schema=SCHEMA)


@dataclass(frozen=True)
class Shard:
    path: Path
    file: str  # the file that its rows come from
    format: str


Rejection = tuple[Rejected, str, str]  # with file and format


def write_shards(tables: Iterable[pa.Table], folder: Path, name: str) -> list[str]:
    """Write tables of `SCHEMA`, however divided, to shards `NAME-DIGEST.parquet` in `folder`; returns their names."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "rows"
    shards: list[str] = []
    pending = SCHEMA.empty_table()  # rows that are not in a shard yet
    for table in tables:
        pending = pa.concat_tables([pending, table])
        while True:
            sizes = np.cumsum(pc.binary_length(pending["messages"]).to_numpy().astype(np.int64))
            rows = min(SHARD_ROWS, int(np.searchsorted(sizes, SHARD_BYTES)) + 1)  # of a full shard
            if rows > len(pending):
                break
            shards.append(_write_shard(pending.slice(0, rows), folder, stem))
            pending = pending.slice(rows)
    return [*shards, _write_shard(pending, folder, stem)] if len(pending) else shards


def _write_shard(rows: pa.Table, folder: Path, stem: str) -> str:
    partial = folder / f"{stem}.partial"
    pq.write_table(
        rows.select(SHARD_SCHEMA.names).combine_chunks(),
        partial,
        compression="zstd",
        row_group_size=SHARD_ROWS,
        use_dictionary=["task", "group", "scoring", "tools"],
        write_statistics=False,  # statistics would repeat two whole messages per row group
    )
    shard = f"{stem}-{sha256_file(partial)[:12]}.parquet"
    partial.replace(folder / shard)
    return shard


def is_shard(path: Path) -> bool:
    """Whether `path` is a shard that `retune ingest` wrote."""
    try:
        return path.suffix == ".parquet" and bool(pq.read_schema(path).equals(SHARD_SCHEMA))
    except (OSError, pa.ArrowException):
        return False


def read_shard(path: Path) -> pa.Table:
    """All rows of a shard, with the columns of `SHARD_SCHEMA`; `messages` is JSON text."""
    try:
        return pq.read_table(path, memory_map=False, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is damaged: {error}; restore it with `dvc checkout --force data.dvc`") from None


def read_snapshot(folder: Path) -> dict[str, Any] | None:
    """The `snapshot.json` of `retune ingest`; None for a folder of other files."""
    path = folder / "snapshot.json"
    return read_json(path) if path.exists() else None


def read_rejected(folder: Path) -> Iterator[Rejected]:
    """The records that `retune ingest` could not use, with the reason; long ones are cut."""
    path = folder / "rejected.jsonl"
    with path.open(encoding="utf-8") if path.exists() else nullcontext(()) as lines:
        for entry in map(json.loads, lines):
            yield Rejected(entry["source"], entry["reason"], entry["record"])


def canonical_shards(data: Path, scratch: Path) -> tuple[list[Shard], list[Rejection]]:
    """The shards in `data`, followed by those made in `scratch` from other data files; and the rejected records."""
    snapshot = read_snapshot(data) or {"sources": [], "shards": []}
    files = [file for source in snapshot["sources"] for file in source["files"]]
    origin = {shard: (file["name"], file["format"]) for file in files for shard in file["shards"]}
    formats = {file["name"]: file["format"] for file in files}
    names_and_rows = ((row.source.rpartition(":")[0], row) for row in read_rejected(data))
    rejected: list[Rejection] = [(row, name, formats.get(name, "unknown")) for name, row in names_and_rows]
    shards: list[Shard] = []
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in find_files(data):
        name = path.name if path == data else path.relative_to(data).as_posix()
        if is_shard(path):
            shards.append(Shard(path, *origin.get(path.name, (name, "messages"))))
            continue
        file = open_rows(path)
        unusable: list[Rejected] = []
        names = write_shards(tabulate(file.rows, unusable), scratch, name)
        shards += [Shard(scratch / shard, name, file.format) for shard in names]
        rejected += [(row, name, file.format) for row in unusable]
    order = {shard: number for number, shard in enumerate(snapshot["shards"])}
    return sorted(shards, key=lambda shard: order.get(shard.path.name, len(order))), rejected
