"""Appended rows change only the last shard, and a shard is read back as the rows that were written."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline.data import shards
from pipeline.data.formats import read_rows
from pipeline.data.readers import FormatError
from pipeline.data.records import Rejected, Row
from pipeline.data.shards import SCHEMA, SHARD_SCHEMA, is_shard, read_shard, tabulate, write_shards


def table(number: int, first: int = 0, size: int = 10) -> pa.Table:
    records = []
    for i in range(first, first + number):
        text = f'[{{"role":"user","content":"Q{i}"}},{{"role":"assistant","content":"{"A" * size}"}}]'
        content = xxhash.xxh3_64_intdigest(text.encode())
        row = {"source": f"rows.jsonl:{i + 1}", "messages": text, "task": "default", "repairs": [], "content": content}
        records.append(row)
    return pa.Table.from_pylist(records, schema=SCHEMA)


def write(folder: Path, *tables: pa.Table) -> list[str]:
    folder.mkdir()
    names = write_shards(tables, folder, "rows.jsonl")
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    return names


def test_appended_rows_change_only_the_last_shard_however_they_are_divided_into_tables(tmp_path: Path) -> None:
    old, rows = write(tmp_path / "old", table(30_000)), table(30_500)
    bounds = [0, 1, 7, 1000, 9000, 15_000, len(rows)]
    new = write(tmp_path / "new", *(rows.slice(start, end - start) for start, end in pairwise(bounds)))
    assert len(old) == 4 and new[:3] == old[:3]
    for name in old[:3]:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    read = pa.concat_tables(read_shard(tmp_path / "new" / name) for name in new)
    assert read.equals(rows.drop(["content"]).cast(SHARD_SCHEMA))


def test_a_shard_ends_at_its_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    for name in write(tmp_path / "bytes", table(2000, size=1000), table(100, 2000, size=200_000)):
        assert pq.read_metadata(tmp_path / "bytes" / name).num_rows < 100


def test_a_shard_is_read_as_the_rows_that_were_written(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": '
        '[{"id": "1", "function": {"name": "f", "arguments": {"长": 1}}}]}, {"role": "tool", "content": "12"},'
        '{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}], "tools": [{"name": "f"}], '
        '"group": 7}\n'
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "scoring": "exact"}\n'
    )
    names = write(tmp_path / "shards", *tabulate(read_rows(source), []))
    [path] = [tmp_path / "shards" / name for name in names]
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows)
    assert rows == list(read_rows(source))
    assert is_shard(path)


def test_a_damaged_shard_is_refused_and_the_rows_of_a_forged_one_are_checked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    assert not is_shard(tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match="is damaged"):
        read_shard(tmp_path / "broken.parquet")
    forged = {"source": "s", "messages": '[{"role": "assistant"}]', "task": "t", "repairs": []}
    pq.write_table(pa.Table.from_pylist([forged], schema=SHARD_SCHEMA), tmp_path / "forged.parquet")
    assert [type(row) for row in read_rows(tmp_path / "forged.parquet")] == [Rejected]
