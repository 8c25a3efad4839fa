"""Shards: rows added at the end change the last one alone, and what is read is what was written."""

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
from pipeline.data.shards import SCHEMA, SHARD_SCHEMA, is_shard, read_shard, tables, write_shards


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


def test_rows_added_at_the_end_change_the_last_shard_alone_however_they_arrive(tmp_path: Path) -> None:
    old, whole = write(tmp_path / "old", table(30_000)), table(30_500)
    sizes = [1, 7, 1000, 9000, 15_000, len(whole)]
    new = write(tmp_path / "new", *(whole.slice(start, end - start) for start, end in pairwise([0, *sizes])))
    assert len(old) == 4 and new[:3] == old[:3]
    for name in old[:3]:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    rows = pa.concat_tables(read_shard(tmp_path / "new" / name) for name in new)
    assert rows.equals(whole.drop(["content"]).cast(SHARD_SCHEMA))


def test_no_shard_passes_its_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    for name in write(tmp_path / "bytes", table(2000, size=1000), table(100, 2000, size=200_000)):
        assert pq.read_metadata(tmp_path / "bytes" / name).num_rows < 100


def test_a_shard_reads_as_the_rows_it_was_made_of(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": '
        '[{"id": "1", "function": {"name": "f", "arguments": {"长": 1}}}]}, {"role": "tool", "content": "12"},'
        '{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}], "tools": [{"name": "f"}], '
        '"group": 7}\n'
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "scoring": "exact"}\n'
    )
    names = write(tmp_path / "shards", *tables(read_rows(source), []))
    [path] = [tmp_path / "shards" / name for name in names]
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows)
    assert rows == list(read_rows(source))
    assert is_shard(path)


def test_a_damaged_shard_is_refused_and_a_forged_one_checked_row_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    assert not is_shard(tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match="is damaged"):
        read_shard(tmp_path / "broken.parquet")
    forged = {"source": "s", "messages": '[{"role": "assistant"}]', "task": "t", "repairs": []}
    pq.write_table(pa.Table.from_pylist([forged], schema=SHARD_SCHEMA), tmp_path / "forged.parquet")
    assert [type(row) for row in read_rows(tmp_path / "forged.parquet")] == [Rejected]
