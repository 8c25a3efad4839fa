"""Files of every container, whole or broken: the same records, or one sentence with file and line."""

import csv
import gzip
import io
import json
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data import containers, json_text
from pipeline.data.containers import container_of, read_blocks, records_of
from pipeline.data.formats import read_rows
from pipeline.data.json_text import FormatError, Unreadable
from pipeline.data.records import Row

ROWS = [{"instruction": f"Frage {i}: 你好", "input": "a\nb" if i % 2 else "", "output": f"„{i}“"} for i in range(5)]


def records(path: Path) -> list[Any]:
    return [record for block in read_blocks(path) for _, record in records_of(block)]


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


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_blocks_of_any_size_give_the_same_records_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    whole = list(read_rows(tmp_path / name))
    for size in (1, 7, 64):
        monkeypatch.setattr(containers, "BLOCK_BYTES", size)
        monkeypatch.setattr(json_text, "WINDOW_BYTES", size)
        assert list(read_rows(tmp_path / name)) == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["}", "],[", '"', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("containers")


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.lists(JSON, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_a_list_read_through_a_window_is_the_list(
    folder: Path, values: list[Any], indent: int | None, ascii_only: bool, size: int
) -> None:
    path = folder / "list.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "BLOCK_BYTES", size)
        patch.setattr(json_text, "WINDOW_BYTES", size)
        # By repr: NaN equals nothing. A number too large for orjson comes back as the nearest float.
        assert repr(records(path)) == repr([json_text.parse(json.dumps(v).encode(), "", 0, False) for v in values])


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.text('[]{}",:1 \n\\', max_size=14), st.integers(1, 9))
@example("[1,]", 3)
@example("[1 2]", 3)
@example("[]]", 3)
@example("[1", 3)
@example("[", 3)
def test_what_json_refuses_is_refused_and_the_rest_is_not(folder: Path, text: str, size: int) -> None:
    path = folder / "any.json"
    path.write_text(text)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "BLOCK_BYTES", size)
        patch.setattr(json_text, "WINDOW_BYTES", size)
        try:
            read = records(path)
        except FormatError:
            # Also refused: what is JSON but no list.
            assert not isinstance(value, list)
        else:
            assert value == read or not text.strip() or (text.lstrip()[0] == "{" and "\n" in text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"instruction": "Q", "output": "A", "output": "B"}', "output"),
        ('{"instruction": "Q", "output": "A", "meta": {"a": 1, "a": 1}}', "a"),
        ('{"instruction": "\\":", "x" : 1, "x"\t: 2}', "x"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_given_twice_makes_its_record_unreadable(tmp_path: Path, name: str, text: str, key: str) -> None:
    good = json.dumps(ROWS[0])
    (tmp_path / name).write_text(f"{good}\n{text}\n" if name.endswith("l") else f"[{good}, {text}]")
    whole, twice = records(tmp_path / name)
    assert whole == ROWS[0]
    assert isinstance(twice, Unreadable)
    assert twice.reason == f"gives the key {key!r} twice"


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
    st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.sampled_from([(", ", ": "), (",", ":"), (" ,", "\t :")])
)
def test_a_record_without_a_key_twice_is_read_whatever_it_holds(record: Any, separators: tuple[str, str]) -> None:
    text = json.dumps(record, separators=separators)
    read = json_text.parse(text.encode(), "", 0, False)
    assert not isinstance(read, Unreadable)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.json", gzip.compress(b"[]", mtime=0), r"rows.json is gzip data; name it \.gz"),
        ("rows.jsonl", b"PAR1" + b"\x00" * 20, r"is a Parquet file; name it \.parquet"),
        ("rows.json", b"\x7fELF\x02\x01\x00\x00\x00" + bytes(range(256)), "is not UTF-8 text .*binary"),
        ("rows.json", b"PK\x03\x04rest", "is a zip archive; unpack it"),
        ("rows.jsonl", JSONL.decode().encode("utf-16"), "is not UTF-8 but UTF-16"),
        ("rows.jsonl", JSONL + '{"a": "größer"}\n'.encode("cp1252"), "is not UTF-8 .line 6, .*cp1252"),
        ("rows.csv", "instruction,output\nQ,größer\n".encode("cp1252"), "is not UTF-8 .line 2"),
        ("rows.jsonl", JSONL[:-20], "line 5, column .* the file seems cut off"),
        ("rows.jsonl", JSONL[:150] + b"\n" + JSONL, "line 3, column .*; correct or remove that line"),
        ("rows.json", FILES["rows.json"][:-30], "line .* seems cut off"),
        ("rows.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-12], "rows.jsonl.gz is (cut off|damaged)"),
        ("rows.jsonl.gz", JSONL, "is damaged or no gzip file"),
        (
            "rows.jsonl.zst",
            pa.compress(JSONL * 9, codec="zstd", asbytes=True)[:-9],
            "rows.jsonl.zst is (cut off|damaged)",
        ),
        ("rows.parquet", as_parquet()[:-20], "is cut off or no Parquet file"),
        ("rows.parquet", b"", "is cut off or no Parquet file"),
        ("file.arrow", as_arrow(pa.ipc.new_file)[:-300], "is cut off or no Arrow file"),
        ("rows.csv", b'instruction,output\nQ,A\nQ,"A', "line 3: not CSV .*: a quote is opened and never closed"),
        ("rows.csv", b'instruction,output\nQ,A\n"Q, cut ', "line 3: not CSV .*: a quote is opened and never closed"),
        ("rows.csv", b'instruction,output\nQ,A\n"he said ""', "line 3: not CSV .*: a quote is opened and never closed"),
        ("rows.csv", b'instruction,output\nQ,A\n"he said "', "line 3: not CSV .*: the last record lacks fields"),
        ("rows.csv", b"output,output\nQ,A\n", "has the column 'output' twice"),
        ("rows.json", b'{"a": 1}\n{"a": 2', "holds several objects|not JSON"),
        ("rows.txt", b"Q", r"ends in \.txt; expected \.json"),
        ("rows.parquet.gz", b"Q", r"ends in \.gz; expected \.json"),
    ],
)
def test_a_broken_file_is_refused_with_one_sentence(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=what) as error:
        records(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_of_another_width_than_the_header_is_unreadable_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('instruction,output\nQ,A\n\nQ,"a\nb",C\nQ,B\n')
    block = next(read_blocks(tmp_path / "rows.csv"))
    (one, first), (two, wide), (three, last) = records_of(block)
    assert (one, two, three) == ("rows.csv:2", "rows.csv:4", "rows.csv:6")
    assert isinstance(wide, Unreadable) and wide.reason == "has 3 fields where the header has 2"
    assert (first["output"], last["output"]) == ("A", "B")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
def test_the_delimiter_is_recognised_whatever_the_file_is_called(tmp_path: Path, delimiter: str, name: str) -> None:
    data = b"\xef\xbb\xbf" + as_csv(delimiter)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert records(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("instruction;output\nName two, please;A, B\nOne;C\n", ["A, B", "C"]),
        ('instruction,output\n"a;b;c",d;e\nq,"x|y|z"\n', ["d;e", "x|y|z"]),
        ("instruction\toutput\na;b,c\td\n", ["d"]),
    ],
)
def test_delimiters_inside_of_texts_divide_nothing(tmp_path: Path, text: str, answers: list[str]) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert [row.messages[-1]["content"] for row in read_rows(tmp_path / "rows.csv") if isinstance(row, Row)] == answers


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])  # the csv library's own limit is 128 KiB
def test_a_long_line_or_cell_below_the_limit_is_a_row(tmp_path: Path, name: str) -> None:
    row = {"instruction": "Q", "output": "A" * 5_000_000}
    (tmp_path / name).write_text(
        json.dumps(row) if name == "rows.jsonl" else "\n".join(map(",".join, (row, row.values())))
    )
    assert records(tmp_path / name) == [row]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_line_of_100_megabytes_is_refused_before_it_is_in_memory(tmp_path: Path, name: str) -> None:
    head = {"rows.jsonl": JSONL + b'{"instruction": "', "rows.json": b'[{"a": 1},\n{"instruction": "'}
    with (tmp_path / name).open("wb") as file:
        file.write(head.get(name, b"instruction,output\nQ,"))
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=rf"{name}, .*line \d.* is longer than 32 MiB"):
        records(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst"])
def test_an_archive_that_unpacks_to_an_absurd_size_is_refused_on_the_way(tmp_path: Path, name: str) -> None:
    data = (json.dumps(ROWS[0]) + "\n").encode() * 3_000_000  # 200 MB
    (tmp_path / name).write_bytes(packed(name, data))
    sizes: list[int] = []
    with pytest.raises(FormatError, match=f"{name} unpacks to .* MB and more from"):
        sizes.extend(len(block.lines or b"") for block in read_blocks(tmp_path / name))
    assert sum(sizes) < 80_000_000


def test_the_names_of_classes_come_with_the_file(tmp_path: Path) -> None:
    features = {
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["bad"], "label": [0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert next(read_blocks(tmp_path / "rows.parquet")).labels == {"label": ["neg", "pos"]}
