"""Files of every container give the same records, or are refused with file and line; unread columns are reported."""

import csv
import gzip
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data import readers
from pipeline.data.columns import format_columns, parse_columns
from pipeline.data.formats import UnclearFormatError, open_rows, read_rows
from pipeline.data.readers import FormatError, container_of, read_records
from pipeline.data.records import Rejected, Row
from pipeline.params import ColumnsParams

ROWS = [{"instruction": f"Frage {i}: 你好", "input": "a\nb" if i % 2 else "", "output": f"„{i}“"} for i in range(5)]


def records(path: Path) -> list[Any]:
    return [record for _, record in read_records(path)]


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_arrow(new: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
FILES = {
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": JSONL,
    "rows.jsonl": JSONL,
    "rows.ndjson": JSONL,
    "rows.csv": as_csv(","),
    "rows.tsv": as_csv("\t"),
    "rows.parquet": as_parquet(),
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
}


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return pa.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data


@pytest.mark.parametrize("name", [*FILES, *(f"{n}{p}" for n in list(FILES)[:6] for p in (".gz", ".zst"))])
def test_every_container_gives_the_same_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(packed(name, FILES[name.removesuffix(".gz").removesuffix(".zst")]))
    assert records(tmp_path / name) == ROWS
    assert container_of(Path(name))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text('[]{}",:1 \n\\', max_size=14))
@example("[1,]")
@example("[1 2]")
@example("[]]")
@example("[1")
@example("[")
def test_lists_are_read_as_by_the_json_module_which_refuses_the_same_ones(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(text)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    try:
        read = records(path)
    except FormatError:
        assert not isinstance(value, list)
    else:
        assert value == read or not text.lstrip().startswith("[")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"instruction": "Q", "output": "A", "output": "B"}', "output"),
        ('{"instruction": "Q", "output": "A", "meta": {"a": 1, "a": 1}}', "a"),
        ('{"instruction": "\\":", "x" : 1, "x"\t: 2}', "x"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_record_with_a_repeated_key_is_rejected(tmp_path: Path, name: str, text: str, key: str) -> None:
    good = json.dumps(ROWS[0])
    (tmp_path / name).write_text(f"{good}\n{text}\n" if name.endswith("l") else f"[{good}, {text}]")
    source = "rows.jsonl:2" if name.endswith("l") else "rows.json:[1]"
    assert records(tmp_path / name) == [ROWS[0], Rejected(source, f"has the key {key!r} twice", text)]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("rows.json", gzip.compress(b"[]", mtime=0), "not UTF-8"),
        ("rows.jsonl", b"PAR1" + b"\x00" * 20, "binary"),
        ("rows.json", b"PK\x03\x04\x80rest", "not UTF-8"),
        ("rows.csv", "instruction,output\nQ,A\n".encode("utf-16-le"), "UTF-16"),
        ("rows.jsonl", JSONL + '{"a": "größer"}\n'.encode("cp1252"), "line 6.*cp1252"),
        ("rows.csv", "instruction,output\nQ,größer\n".encode("cp1252"), "line 2"),
        ("rows.jsonl", JSONL[:150] + b"\n" + JSONL, "line 3, column "),
        ("rows.jsonl", b'{"a": 1} {"a": 2}\n', "line 1, column 9"),
        ("rows.json", FILES["rows.json"][:-30], "line 25, column "),
        ("rows.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-12], "cut off"),
        ("rows.jsonl.gz", JSONL, "not a JSONL, gzip file"),
        ("rows.jsonl.zst", pa.compress(JSONL * 9, codec="zstd", asbytes=True)[:-9], "cut off"),
        ("rows.parquet", as_parquet()[:-20], "cut off"),
        ("file.arrow", as_arrow(pa.ipc.new_file)[:-300], "cut off"),
        ("rows.csv", b'instruction,output\nQ,A\nQ,"A', "line 3"),
        ("rows.csv", b"output,output\nQ,A\n", "'output' twice"),
        ("rows.json", b'{"a": 1}\n{"a": 2', "line 2"),
        ("rows.json", b'{\n"a": 1}', "line 1, column 1: "),
        ("rows.json", b"[" * 100_000, "line 1"),
        ("rows.json", b'[{"a": ' + b"9" * 5000 + b"}]", "line 1"),
        ("rows.txt", b"Q", "ends in .txt"),
        ("rows.parquet.gz", b"Q", "ends in .gz"),
    ],
)
def test_a_broken_file_is_refused_with_one_sentence(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=where) as error:
        records(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_csv_row_with_too_many_fields_is_rejected_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('instruction,output\nQ,A\n\nQ,"a\nb",C\nQ,B\n')
    (one, first), (two, wide), (three, last) = read_records(tmp_path / "rows.csv")
    assert (one, two, three) == ("rows.csv:2", "rows.csv:4", "rows.csv:6")
    assert isinstance(wide, Rejected) and "3 fields" in wide.reason
    assert (first["output"], last["output"]) == ("A", "B")


@pytest.mark.parametrize(("delimiter", "name"), [(";", "rows.csv"), ("|", "rows.csv"), (",", "rows.tsv.gz")])
def test_the_delimiter_is_recognised_whatever_the_suffix_is(tmp_path: Path, delimiter: str, name: str) -> None:
    (tmp_path / name).write_bytes(packed(name, b"\xef\xbb\xbf" + as_csv(delimiter)))
    assert records(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("instruction;output\nName two, please;A, B\n", "A, B"),
        ('instruction,output\nq,"x|y|z"\n', "x|y|z"),
        ("instruction\toutput\na;b,c\td\n", "d"),
    ],
)
def test_other_delimiters_inside_texts_do_not_split_fields(tmp_path: Path, text: str, answer: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert [record["output"] for record in records(tmp_path / "rows.csv")] == [answer]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("megabytes", [5, 40])
def test_a_record_of_5_mib_is_read_and_one_of_40_mib_refused(tmp_path: Path, name: str, megabytes: int) -> None:
    row = {"instruction": "Q", "output": "A" * (megabytes << 20)}
    text = json.dumps(row) if name == "rows.jsonl" else "\n".join(map(",".join, (row, row.values())))
    (tmp_path / name).write_text(text)
    if megabytes == 5:
        assert records(tmp_path / name) == [row]
        return
    with pytest.raises(FormatError, match=rf"{name}, .*line \d.* 32 MiB"):
        records(tmp_path / name)


def test_a_json_list_larger_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_bytes(FILES["rows.json"])
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 100)
    with pytest.raises(FormatError, match=r"rows.json .*larger .*\.jsonl"):
        records(tmp_path / "rows.json")


TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def write(folder: Path, *records: Any) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, {"category"}),
        ({"instruction": "Q", "output": "A", "id": None, "extra": "", "tags": []}, set()),
        ({"messages": [TALK[0] | {"name": "Ada", "id": 3}, TALK[1]]}, {"messages[].name", "messages[].id"}),
        ({"messages": [TALK[0] | {"thinking": "T"}, TALK[1]]}, {"messages[].thinking"}),
        ({"messages": TALK, "conversations": [{"role": "user", "content": "Q"}]}, {"conversations"}),
        ({"conversations": [{"from": "human", "value": "Q", "n": 1}, {"from": "gpt", "value": "A"}]},
         {"conversations[].n"}),
        ({"prompt": "Q", "response": "A", "source": "x", "label": 1}, {"source", "label"}),
        ({"conversation": [{"human": "Q", "assistant": "A", "turn": 1}]}, {"conversation[].turn"}),
        ({"instruction": "Q", "instances": [{"input": "", "output": "A", "id": 1}]}, {"id"}),
        ({"text": "Q", "label": "A", "id": 1}, {"id"}),
        ({"messages": TALK, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, {"functions"}),
        ({"q": "Q", "a": "A", "task": "t", "images": ["x.png"], "label": False}, {"images", "label"}),  # mapped
    ],
)  # fmt: skip
def test_columns_and_keys_that_are_not_read_are_reported(
    tmp_path: Path, record: dict[str, Any], unused: set[str]
) -> None:
    columns = ColumnsParams(template="{q}?", response="a") if "q" in record else None
    file = open_rows(write(tmp_path, record), columns=columns)
    assert [type(row) for row in file.rows] == [Row]
    assert file.unused == unused


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"id": "1", "customer_question": "Q?", "agent_answer": "A"},
         {"prompt": "customer_question", "response": "agent_answer"}),
        ({"a": "Q", "b": "A much longer text"}, {"prompt": "a", "response": "b"}),
        ({"passage": "P", "query": "Q", "reply": "A"}, {"template": "{query}\n{passage}", "response": "reply"}),
        ({"title": "T", "summary": "S", "url": "https://example.org"}, {"prompt": "title", "response": "summary"}),
        ({"prompt one": "Q", "yes": "A", "n": 3}, {"prompt": "prompt one", "response": "yes"}),
        ({"Label": "good", "Text": "A long text"}, {"prompt": "Text", "response": "Label"}),
        ({"sentiment_label": "good", "review": "A long text"}, {"prompt": "review", "response": "sentiment_label"}),
    ],
)  # fmt: skip
def test_the_error_about_unknown_columns_suggests_a_mapping_that_works(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str]
) -> None:
    path = write(tmp_path, record)
    with pytest.raises(UnclearFormatError) as error:
        list(read_rows(path))
    guess = error.value.columns
    assert guess is not None and guess.model_dump(exclude_none=True) == columns
    assert shlex.quote(format_columns(guess)) in str(error.value)
    assert all(isinstance(row, Row) for row in read_rows(path, "auto", guess))


@pytest.mark.parametrize(
    ("mapping", "record", "corrected"),
    [
        ("prompt=text,response=LABEL", {"Text": "Q", "Label": "A"}, "prompt=Text,response=Label"),
        ("prompt=text,response=lable", {"text": "Q", "label": "A"}, "prompt=text,response=label"),
        ("template={Ask}? {b},response=a", {"ask": "Q", "b": "B", "a": "A"}, "response=a,template={ask}? {b}"),
    ],
)
def test_a_misspelt_column_of_a_mapping_is_corrected(
    tmp_path: Path, mapping: str, record: dict[str, Any], corrected: str
) -> None:
    path = write(tmp_path, record)
    with pytest.raises(UnclearFormatError) as error:
        open_rows(path, columns=parse_columns(mapping))
    assert error.value.columns == parse_columns(corrected) and f"{shlex.quote(corrected)}?" in str(error.value)
    assert [type(row) for row in open_rows(path, columns=error.value.columns).rows] == [Row]


def test_a_mapping_that_does_not_fit_a_file_of_a_known_format_is_answered_with_the_format(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "Q", "label": "A"})
    with pytest.raises(UnclearFormatError) as error:
        open_rows(path, columns=ColumnsParams(prompt="body", response="verdict"))
    assert (error.value.formats, error.value.columns) == (["classification"], None)
    assert "classification" in str(error.value) and "--columns" not in str(error.value)


LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="=,\\")
NAME = st.text(LETTERS, min_size=1, max_size=8).map(str.strip).filter(bool)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(NAME, NAME)
def test_a_mapping_survives_the_command_line(prompt: str, response: str) -> None:
    template = ColumnsParams(template="Title, {title}\n{body}", response=response)
    for columns in (ColumnsParams(prompt=prompt, response=response), template):
        assert parse_columns(format_columns(columns)) == columns


@pytest.mark.parametrize(
    "text",
    ["", "question", "prompt=", "question=prompt,response=x", "prompt=q", "template={,response=a",
     "template={q.x!r},response=a", "template={},response=a", "prompt=q,response=a,template={q}"],
)  # fmt: skip
def test_an_invalid_mapping_on_the_command_line_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_columns(text)
