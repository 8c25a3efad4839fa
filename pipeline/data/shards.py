"""The shards of a data snapshot: Parquet files of validated conversations, cut where their content says so.

A shard is named by a digest of its bytes. Rows added at the end of a source leave all its shards but the last as they
are, byte for byte, so that DVC stores, and `prepare` works on, what is new. A row's line is part of its shard: rows put
in the middle of a file change the shards from there on.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.files import read_json, sha256_file
from pipeline.data.conversion import SCHEMA
from pipeline.data.json_text import FormatError
from pipeline.data.records import Rejected

SHARD_SCHEMA = SCHEMA.remove(SCHEMA.get_field_index("content"))
MIN_ROWS, MAX_ROWS = 2048, 32768
CUT_EVERY = 6144  # a row in so many, chosen by its content, ends a shard: with MIN_ROWS 8,192 rows at the mean
MAX_BYTES = 64 << 20  # of messages


class ShardWriter:
    """Writes the rows it is given to shards `NAME-DIGEST.parquet` in `folder`; `close` returns their names in order."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, re.sub(r"[^\w.-]+", "-", name).strip("-.") or "rows"
        self.held: list[pa.Table] = []
        self.rows = self.bytes = 0  # in `held`
        self.shards: list[str] = []

    def add(self, table: pa.Table) -> None:
        """Take a table of `conversion.SCHEMA`; how rows are spread over calls does not change the shards."""
        ends = np.flatnonzero(table["content"].to_numpy() % CUT_EVERY == 0) + 1  # a shard may end before these rows
        sizes = np.cumsum(pc.binary_length(table["messages"]).to_numpy().astype(np.int64))
        start = 0
        while start < len(table):
            before = int(sizes[start - 1]) if start else 0
            natural = ends[ends >= start + max(MIN_ROWS - self.rows, 1)]
            full = int(np.searchsorted(sizes, before + MAX_BYTES - self.bytes)) + 1
            end = min([*natural[:1].tolist(), start + MAX_ROWS - self.rows, full])
            part = table.slice(start, end - start)
            self.held.append(part)
            self.rows += len(part)
            self.bytes += int(sizes[start + len(part) - 1]) - before
            if end <= len(table):
                self._write()
            start = end

    def close(self) -> list[str]:
        if self.rows:
            self._write()
        return self.shards

    def _write(self) -> None:
        table = pa.concat_tables(self.held).select(SHARD_SCHEMA.names).combine_chunks()
        partial = self.folder / f"{self.name}.partial"
        pq.write_table(
            table.cast(SHARD_SCHEMA),
            partial,
            compression="zstd",
            row_group_size=MAX_ROWS,
            use_dictionary=["task", "group", "scoring", "tools"],
            write_statistics=False,  # the least and the greatest message would be kept whole
        )
        shard = f"{self.name}-{sha256_file(partial)[:12]}.parquet"
        partial.replace(self.folder / shard)
        self.shards.append(shard)
        self.held, self.rows, self.bytes = [], 0, 0


def is_shard(path: Path) -> bool:
    """Whether `path` is a shard that `retune ingest` wrote."""
    if path.suffix != ".parquet":
        return False
    try:
        return bool(pq.read_schema(path).equals(SHARD_SCHEMA))
    except (OSError, pa.ArrowException):
        return False


def read_shard(path: Path) -> pa.Table:
    """All rows of a shard, with the columns of `SHARD_SCHEMA`; `messages` is JSON text.

    Raises:
        FormatError: it is damaged, or no shard.
    """
    try:
        table = pq.read_table(path, memory_map=False, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is damaged: {error}; `dvc checkout --force data.dvc` puts it back") from None
    if not table.schema.equals(SHARD_SCHEMA):
        raise FormatError(f"{path} has columns {', '.join(table.column_names)}; expected a shard of `retune ingest`")
    return table


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
