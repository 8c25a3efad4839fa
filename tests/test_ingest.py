"""An ingest replaces the snapshot completely or not at all; appended rows change only its last shard."""

import json
import secrets
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import PYTHON, change_params, environment, files_up_to, make_project, retune, sample_rows
from typer.testing import CliRunner

from pipeline.cli import datasets, main
from pipeline.core import graph
from pipeline.core.files import read_json, sha256_file
from pipeline.core.graph import NotCopied
from pipeline.data import shards, snapshot
from pipeline.data.formats import find_files, read_rows
from pipeline.data.readers import FormatError
from pipeline.data.records import Rejected, Row
from pipeline.data.shards import SCHEMA, SHARD_SCHEMA, is_shard, read_rejected, read_shard, tabulate, write_shards
from pipeline.data.snapshot import recover
from pipeline.ingest import IngestError, ingest, write_snapshot
from pipeline.params import ColumnsParams, IngestParams, Params, SourceParams

AUTO = IngestParams(
    format="auto", columns=None, sources=None, s3_endpoint_url=None, max_download_gib=1.0, max_rejected_fraction=0.05
)


@pytest.fixture(autouse=True)
def path_of_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", environment()["PATH"])


@pytest.fixture
def project(tmp_path: Path, base: Path, params: Params) -> Path:
    return make_project(tmp_path / "project", base, params)


def state(root: Path) -> dict[str, str]:
    files = [root / "data.dvc", *(path for path in (root / "data").rglob("*") if path.is_file())]
    return {str(path.relative_to(root)): sha256_file(path) for path in files}


def source(folder: Path, *rows: dict[str, Any], name: str = "new.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def rows_of(folder: Path) -> list[Row]:
    files = find_files(folder)
    rows = [row for file in files for row in read_rows(file)]
    assert all(isinstance(row, Row) for row in rows)
    return rows  # type: ignore[return-value]


def test_new_data_replaces_the_rows_and_keeps_the_base_model(project: Path, tmp_path: Path) -> None:
    before = state(project)
    new = source(tmp_path / "new", *sample_rows(20), {"instruction": "q", "output": ""}).parent
    (new / "sub").mkdir()
    (new / "sub" / "new.jsonl").write_text(json.dumps(sample_rows(1)[0]))
    result = ingest(AUTO, [str(new)], project)
    after = state(project)
    assert (result.rows, result.changed, result.rejected) == (21, True, {"output is empty": 1})
    assert [(file["name"], file["rows"]) for file in result.files] == [("new.jsonl", 20), ("sub/new.jsonl", 1)]
    assert after["data.dvc"] != before["data.dvc"]
    assert {name: after[name] for name in after if "/base/" in name} == {n: before[n] for n in before if "/base/" in n}
    assert sorted(row.source for row in rows_of(project / "data/instructions")) == sorted(
        ["sub/new.jsonl:1", *(f"new.jsonl:{i + 1}" for i in range(20))]
    )
    [rejected] = read_rejected(project / "data/instructions")
    assert (rejected.source, rejected.reason) == ("new.jsonl:21", "output is empty")
    assert rejected.record == {"instruction": "q", "output": ""}
    notes = read_json(project / "data/instructions/snapshot.json")
    assert (notes["records"], notes["rows"], notes["rejected"]) == (22, 21, 1)
    again = ingest(AUTO, [str(new)], project)
    assert not again.changed
    assert state(project) == after
    assert not graph.stale(project).get("data.dvc")


def test_bad_data_leaves_the_snapshot_unchanged(project: Path, tmp_path: Path) -> None:
    before = state(project)
    bad = source(tmp_path / "bad", *sample_rows(2)).parent
    for content in ('[{"instruction": "q"', "[]", '[{"question": "q"}]', '[{"instruction": "q", "output": null}]'):
        (bad / "zz.json").write_text(content)
        target = bad if "null" not in content else bad / "zz.json"
        with pytest.raises(FormatError, match=r"zz\.json"):
            ingest(AUTO, [str(target)], project)
        assert state(project) == before
        assert not (project / snapshot.SCRATCH).exists()


def test_too_many_rejected_records_and_far_fewer_rows_than_before_need_replace(project: Path, tmp_path: Path) -> None:
    empty_answer = {"instruction": "q", "output": ""}
    mixed = source(tmp_path / "new", *sample_rows(37), *[empty_answer] * 3, name="mixed.jsonl")
    few = source(tmp_path / "new", *sample_rows(18), name="few.jsonl")
    before = state(project)
    with pytest.raises(IngestError, match=r"3 of 40 .*0.05.*3 × output is empty.*mixed.jsonl:38.*--replace"):
        ingest(AUTO, [str(mixed)], project)
    assert state(project) == before
    assert ingest(AUTO, [str(mixed)], project, replace=True).rows == 37
    before = state(project)
    with pytest.raises(IngestError, match=r"18 rows .* 37.*--replace"):
        ingest(AUTO, [str(few)], project)
    assert state(project) == before


def test_rows_that_dvc_cannot_store_leave_the_old_snapshot(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, add_data = state(project), graph.add_data

    def add_to_full_cache(root: Path) -> None:
        with files_up_to(10**6):
            add_data(root)

    monkeypatch.setattr(sys, "executable", PYTHON)  # a fork of `preloaded` would not inherit the limit
    monkeypatch.setattr(graph, "add_data", add_to_full_cache)
    big = source(tmp_path / "new", *sample_rows(20), {"instruction": "q", "output": secrets.token_hex(2 * 10**6)})
    with pytest.raises(NotCopied):
        ingest(AUTO, [str(big)], project)
    assert state(project) == before
    assert not graph.stale(project).get("data.dvc")


def test_format_and_columns_apply_to_every_source_without_its_own(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    both = source(tmp_path / "new", *(row | {"conversations": talk} for row in sample_rows(10)), name="both.jsonl")
    other = source(tmp_path / "new", {"q": "Q", "a": "A"}, name="other.jsonl")
    alpaca = AUTO.model_copy(update={"format": "alpaca"})
    notes = write_snapshot(alpaca, [str(both)], tmp_path / "one", tmp_path)
    assert notes["sources"][0]["files"][0]["format"] == "alpaca"
    mapped = SourceParams(uri=str(other), columns=ColumnsParams(prompt="q", response="a"))
    mixed = alpaca.model_copy(update={"sources": [SourceParams(uri=str(both), format="sharegpt"), mapped]})
    notes = write_snapshot(mixed, (), tmp_path / "two", tmp_path)
    assert [entry["files"][0]["format"] for entry in notes["sources"]] == ["sharegpt", "columns"]
    assert {row.messages[-1]["content"] for row in rows_of(tmp_path / "two")} == {"a", "A"}
    with pytest.raises(IngestError):
        write_snapshot(AUTO, (), tmp_path / "three", tmp_path)


def test_unused_columns_are_noted_by_file_and_repairs_by_source(tmp_path: Path) -> None:
    talk = [{"role": role, "content": "x", "id": 1} for role in ("user", "user", "assistant")]
    one = source(tmp_path / "new", {"messages": talk, "lang": "en"}, {"messages": talk[1:]}, name="one.jsonl")
    two = source(tmp_path / "new", *sample_rows(3), name="two.jsonl")
    notes = write_snapshot(AUTO, [str(one), str(two)], tmp_path / "snapshot", tmp_path)
    files = [file for entry in notes["sources"] for file in entry["files"]]
    assert [file["not_used"] for file in files] == [["lang", "messages[].id"], []]
    assert [entry["repaired"] for entry in notes["sources"]] == [{"consecutive user turns joined": 1}, {}]


def mix(folder: Path, sizes: dict[str, int], **settings: tuple[float | None, int | None]) -> list[Row]:
    """The rows kept from sources of these sizes, with (weight, cap) by source."""
    sources = []
    for name, size in sizes.items():
        rows = ({"instruction": f"{name} {i}", "output": "A"} for i in range(size))
        uri = str(source(folder, *rows, name=f"{name}.jsonl"))
        weight, cap = settings[name]
        sources.append(SourceParams(uri=uri, weight=weight, cap=cap))
    notes = write_snapshot(AUTO.model_copy(update={"sources": sources}), (), folder / "snapshot", folder)
    kept = rows_of(folder / "snapshot")
    assert len(kept) == notes["rows"]
    assert notes["rows"] + notes["left_out"] == notes["records"] == sum(sizes.values())
    return kept


def test_weights_thin_sources_in_proportion_and_repeat_no_row(tmp_path: Path) -> None:
    sizes = {"a": 300, "b": 100, "c": 50, "d": 40}
    kept = mix(tmp_path / "mix", sizes, a=(1.0, None), b=(2.0, 80), c=(None, None), d=(None, 7))
    names = [row.source.split(".")[0] for row in kept]
    assert {name: names.count(name) for name in sizes} == {"a": 40, "b": 80, "c": 50, "d": 7}
    assert len({row.source for row in kept}) == len(kept)


def test_a_weighted_source_without_usable_rows_is_refused(tmp_path: Path) -> None:
    empty = source(tmp_path / "new", {"instruction": "q", "output": ""}, name="empty.jsonl")
    full = source(tmp_path / "new", *sample_rows(5), name="full.jsonl")
    sources = [SourceParams(uri=str(path), weight=1.0) for path in (empty, full)]
    with pytest.raises(IngestError, match=r"empty\.jsonl"):
        write_snapshot(AUTO.model_copy(update={"sources": sources}), (), tmp_path / "snapshot", tmp_path)


def test_a_cap_keeps_the_same_rows_when_a_few_are_added(tmp_path: Path) -> None:
    before, after = (
        {row.messages[0]["content"] for row in mix(tmp_path / str(size), {"a": size}, a=(None, 100))}
        for size in (300, 303)
    )
    assert len(before) == len(after) == 100
    assert len(before & after) >= 97


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import ingest as module

    path = source(tmp_path / "new", *sample_rows(5))
    tabulate = module.tabulate

    def change_file(*arguments: Any) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return tabulate(*arguments)

    monkeypatch.setattr(module, "tabulate", change_file)
    with pytest.raises(IngestError, match=r"new\.jsonl changed"):
        write_snapshot(AUTO, [str(path)], tmp_path / "snapshot", tmp_path)


def test_a_rejected_record_is_kept_as_json_or_as_the_start_of_its_text(tmp_path: Path) -> None:
    records: list[Any] = [float("nan"), "x" * 100_000, {"instruction": "q", "output": float("inf")}, [["q"]]]
    write_snapshot(AUTO, [str(source(tmp_path / "new", *sample_rows(3), *records))], tmp_path / "snapshot", tmp_path)
    text = (tmp_path / "snapshot" / "rejected.jsonl").read_text()
    assert len(text) < 10_000
    rejected = list(read_rejected(tmp_path / "snapshot"))
    assert [row.source for row in rejected] == [f"new.jsonl:{number}" for number in (4, 5, 6, 7)]
    assert [isinstance(row.record, str) for row in rejected] == [True, True, True, False]


def test_the_same_sources_give_the_same_snapshot_which_can_be_ingested_again(tmp_path: Path) -> None:
    paths = [str(source(tmp_path / name, *sample_rows(5), {"instruction": "q", "output": ""})) for name in "ab"]
    for name in ("one", "two"):
        assert write_snapshot(AUTO, paths, tmp_path / name, tmp_path)["rows"] == 10  # from two files of one name
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert {*read_json(tmp_path / "one" / "snapshot.json")["shards"], "snapshot.json", "rejected.jsonl"} == {*files[0]}
    notes = write_snapshot(AUTO, [str(tmp_path / "one")], tmp_path / "three", tmp_path)
    assert (notes["rows"], notes["rejected"]) == (10, 0)
    assert rows_of(tmp_path / "three") == rows_of(tmp_path / "one")


def test_the_command_reports_each_file_and_its_format_option_overrides_the_columns_of_params(
    project: Path, tmp_path: Path
) -> None:
    change_params(project, ingest={"columns": {"prompt": "question", "response": "answer"}})
    path = source(tmp_path / "new", *(row | {"id": 7} for row in sample_rows(20)), {"instruction": "q", "output": ""})
    refused = retune(project, "ingest", str(path))
    assert refused.returncode == 1 and "has no column answer, question" in refused.stderr
    output = retune(project, "ingest", str(path), "--format", "alpaca").stdout
    assert "ingest: 20 rows from 1 file\n  new.jsonl: alpaca, JSONL, 20 rows, 1 rejected; not used: id\n" in output
    assert "1 cannot be used: output is empty" in output
    assert "data.dvc now points to the new snapshot" in output


@pytest.mark.parametrize("command", ["ingest", "inspect"])
def test_a_file_of_an_unknown_format_is_read_with_columns_from_an_option_or_a_prompt(
    project: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    path = source(tmp_path / "new", *({"q": f"Q{i}", "customer": f"A{i}"} for i in range(20)), name="other.jsonl")
    app = CliRunner()
    with_option = app.invoke(main.app, [command, str(path), "--columns", "prompt=q,response=customer", "--json"])
    assert with_option.exit_code == 0, with_option.output
    monkeypatch.setattr(datasets, "_terminal", lambda: datasets._ask)
    prompted = app.invoke(main.app, [command, str(path)], input="nonsense\nprompt=q,response=customer\n")
    assert prompted.exit_code == 0, prompted.output
    assert "nonsense is not a format" in prompted.output and "[prompt=q,response=customer]" in prompted.output


def test_a_truncated_lock_file_of_dvc_is_removed_and_a_complete_one_stays(project: Path) -> None:
    path = project / ".dvc" / "tmp" / "rwlock"
    path.write_text('{"read": {}}')
    recover(project)
    assert path.read_text() == '{"read": {}}'
    path.write_text('{"write": {"/so')
    recover(project)
    assert graph.stale(project).get("data.dvc") is None


def rows_table(number: int, first: int = 0, size: int = 10) -> pa.Table:
    records = []
    for i in range(first, first + number):
        text = f'[{{"role":"user","content":"Q{i}"}},{{"role":"assistant","content":"{"A" * size}"}}]'
        content = xxhash.xxh3_64_intdigest(text.encode())
        row = {"source": f"rows.jsonl:{i + 1}", "messages": text, "task": "default", "repairs": [], "content": content}
        records.append(row)
    return pa.Table.from_pylist(records, schema=SCHEMA)


def write_tables(folder: Path, *tables: pa.Table) -> list[str]:
    folder.mkdir()
    names = write_shards(tables, folder, "rows.jsonl")
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    return names


def test_appended_rows_change_only_the_last_shard_however_they_are_divided_into_tables(tmp_path: Path) -> None:
    old, rows = write_tables(tmp_path / "old", rows_table(30_000)), rows_table(30_500)
    bounds = [0, 1, 7, 1000, 9000, 15_000, len(rows)]
    new = write_tables(tmp_path / "new", *(rows.slice(start, end - start) for start, end in pairwise(bounds)))
    assert len(old) == 4 and new[:3] == old[:3]
    for name in old[:3]:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    read = pa.concat_tables(read_shard(tmp_path / "new" / name) for name in new)
    assert read.equals(rows.drop(["content"]).cast(SHARD_SCHEMA))


def test_a_shard_ends_at_its_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    for name in write_tables(tmp_path / "bytes", rows_table(2000, size=1000), rows_table(100, 2000, size=200_000)):
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
    names = write_tables(tmp_path / "shards", *tabulate(read_rows(source), []))
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
