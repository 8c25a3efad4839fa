"""Files of records, read as a stream: JSON, JSONL, CSV, TSV (also in gzip or zstd), Parquet and Arrow.

A file that is cut off, not UTF-8, or not what its name says is refused with file and line. A record whose meaning is
not plain (a key given twice, a CSV row of another width than its header) is a `Rejected`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import charset_normalizer
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import KeyTwiceError, unique_keys
from pipeline.data.records import Rejected

CONTAINERS = {
    ".json": "JSON",
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".json, .jsonl, .csv or .tsv (also with .gz or .zst), .parquet or .arrow"
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",;\t|"
BATCH_ROWS = 2048  # of a Parquet or Arrow file that are Python objects at once
LEGACY = ["cp1252", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "latin_1"]  # spreadsheets still write these
MAX_RECORD_BYTES = 32 << 20  # a longer record is no conversation
MAX_JSON_BYTES = 1 << 30  # of a .json file, which is read whole; .jsonl has no limit
BEGIN = re.compile(r"\s*+\[[ \t\n\r]*+")  # of a list
BETWEEN = re.compile(r"[ \t\n\r]*+(?:,[ \t\n\r]*+(?!\])|(?=\]))")  # what may stand behind a record of a list
STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


class FormatError(ValueError):
    """A file that cannot be read as instruction data; the message names file, line and way out."""


def split_name(path: Path) -> tuple[str, str, str]:
    """(stem, container suffix, packing suffix) of a file name; the suffixes are "" where they are not known ones."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKINGS else ""
    inner = Path(path.name[: len(path.name) - len(packing)])
    suffix = inner.suffix.lower()
    if suffix not in CONTAINERS or (packing and suffix in (".parquet", ".arrow")):
        return path.name, "", ""
    return inner.stem, suffix, packing


def container_of(path: Path) -> str:
    """Name of the container for people, such as `JSONL, gzip`; "" when the file name has no known ending."""
    _, suffix, packing = split_name(path)
    return ", ".join(part for part in (CONTAINERS.get(suffix, ""), PACKINGS.get(packing, "")) if part)


def read_records(path: Path, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(source, record) of each record of `path`, in order; a record whose meaning is not plain is a `Rejected`.

    The source is name:line, or name:[index]. Records before a fault of the file (FormatError) have come out already.
    """
    _, suffix, packing = split_name(path)
    if not suffix:
        raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected {KNOWN}")
    try:
        for place, record in _places(path, suffix, packing):
            source = f"{name or path.name}:{place}"
            yield source, replace(record, source=source) if isinstance(record, Rejected) else record
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is cut off, damaged or not a {container_of(path)} file: {error}") from None


def _places(path: Path, suffix: str, packing: str) -> Iterator[tuple[int | str, Any]]:
    """Each record with its place in the file: a line, or [an index]."""
    if suffix in (".parquet", ".arrow"):
        records = (record for batch in _batches(path, suffix) for record in batch.to_pylist())
        for number, record in enumerate(records):
            yield f"[{number}]", {key: _without_nulls(value) for key, value in record.items()}
        return
    unpacked: Any = pa.input_stream(str(path), compression=PACKINGS.get(packing))
    with io.BufferedReader(unpacked, 1 << 20) as stream:
        head = stream.peek(4096)[:4096]
        if b"\x00" in head:
            raise FormatError(f"{path} is not UTF-8 text but binary, or UTF-16; convert it, e.g. with `iconv -t UTF-8`")
        if head.startswith(BOM):
            stream.read(len(BOM))
        match suffix:
            case ".json":
                yield from _json_records(path, stream)
            case ".csv" | ".tsv":
                yield from _csv_records(path, stream, "," if suffix == ".csv" else "\t")
            case _:
                yield from _line_records(path, stream)


def class_names(path: Path) -> dict[str, list[str]]:
    """Names of the classes that Hugging Face's `datasets` wrote into a Parquet or Arrow file, by column."""
    suffix = split_name(path)[1]
    if suffix not in (".parquet", ".arrow"):
        return {}
    try:
        schema = pq.read_schema(path) if suffix == ".parquet" else _open_arrow(path).schema
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError, OSError, pa.ArrowException):
        return {}


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            limit = MAX_RECORD_BYTES >> 20
            raise FormatError(f"{path}, line {number}: the record is longer than {limit} MiB, which no conversation is")
        yield _decoded(path, line, number)


def _decoded(path: Path, data: bytes, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        likely = charset_normalizer.from_bytes(data[:65536], cp_isolation=LEGACY).best()
        raise FormatError(
            f"{path}, line {line}: not UTF-8; convert the file, perhaps with "
            f"`iconv -f {likely.encoding if likely else 'ITS_ENCODING'} -t UTF-8`"
        ) from None


def _line_records(path: Path, stream: BinaryIO) -> Iterator[tuple[int | str, Any]]:
    for number, line in enumerate(_lines(path, stream), start=1):
        if line.strip():
            record, end = _parsed(path, line, len(line) - len(line.lstrip()), number)
            if line[end:].strip():
                raise _not_json(path, line, end, "more than one record in a line", number)
            yield number, record


def _json_records(path: Path, stream: BinaryIO) -> Iterator[tuple[int | str, Any]]:
    """The elements of one list, or the records of a file that has one a line in spite of its name."""
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{path} is larger than {MAX_JSON_BYTES >> 30} GiB; write one record a line (.jsonl)")
    if not re.match(rb"\s*\[", data):
        yield from _line_records(path, io.BytesIO(data))
        return
    text = _decoded(path, data, 1)
    number, at = 0, BEGIN.match(text).end()  # type: ignore[union-attr]
    while text[at : at + 1] != "]":
        record, end = _parsed(path, text, at)
        yield f"[{number}]", record
        after = BETWEEN.match(text, end)
        if after is None:
            raise _not_json(path, text, end, "expecting ',' or ']' behind this record")
        number, at = number + 1, after.end()
    if text[at + 1 :].strip():
        raise _not_json(path, text, at + 1, "more behind the list")


def _parsed(path: Path, text: str, at: int, line: int | None = None) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends; `line` is the text's own where it is not the file's."""
    try:
        try:
            return STRICT_JSON.raw_decode(text, at)
        except KeyTwiceError as error:
            _, end = json.JSONDecoder().raw_decode(text, at)
            return Rejected("", f"gives the key {error.key!r} twice", text[at:end]), end
    except json.JSONDecodeError as error:
        raise _not_json(path, text, error.pos, error.msg, line) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, a thousand brackets
        raise _not_json(path, text, at, str(error), line) from None


def _not_json(path: Path, text: str, at: int, fault: str, line: int | None = None) -> FormatError:
    line, column = line or text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return FormatError(
        f"{path}, line {line}, column {column}: not JSON: {fault}; correct the file there (it holds a list of records, "
        "or one record a line), or copy it again if it is cut off"
    )


def _csv_records(path: Path, stream: BinaryIO, delimiter: str) -> Iterator[tuple[int | str, Any]]:
    lines = _lines(path, stream)
    first = next(lines, "")
    if delimiter not in first:
        delimiter = max(DELIMITERS, key=first.count)
    csv.field_size_limit(MAX_RECORD_BYTES)  # the library's own limit of 128 KiB is one long answer
    rows, line = csv.reader(chain([first], lines), delimiter=delimiter, strict=True), 1
    try:
        header = next(rows, [])
        twice = {column for column in header if header.count(column) > 1}
        if twice:
            raise FormatError(f"{path} has the column {min(twice)!r} twice; rename one")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                yield line, Rejected("", f"has {len(row)} fields where the header has {len(header)}", json.dumps(row))
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise FormatError(
            f"{path}, line {line}: not CSV ({delimiter!r} between fields): {error}; correct the record that begins "
            "there (a quote may not be closed), or copy the file again if it is cut off"
        ) from None


def _batches(path: Path, suffix: str) -> Iterator[pa.RecordBatch]:
    if suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)
        return
    reader = _open_arrow(path)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
    for batch in batches:
        yield from (batch.slice(start, BATCH_ROWS) for start in range(0, len(batch), BATCH_ROWS))


def _open_arrow(path: Path) -> Any:
    """A reader of the file or of the stream that `path` holds; both are written as .arrow."""
    file = pa.OSFile(str(path))
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def _without_nulls(value: Any) -> Any:
    """`value` without the null keys of its objects: a table gives every object the keys of all others in its column.

    So a null that was written in the row is lost, too; the table does not tell the two apart.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
