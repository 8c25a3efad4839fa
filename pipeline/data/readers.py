"""Reads files of records as a stream: JSON, JSONL, CSV, TSV (also in gzip or zstd), Parquet and Arrow.

A file that is cut off, not UTF-8, or not of the type that its name says raises a FormatError with file and line. An
ambiguous record (a repeated key, a CSV row with more or fewer fields than the header) becomes a `Rejected`.
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

TABLES = {".parquet": "Parquet", ".arrow": "Arrow"}
CONTAINERS = {".json": "JSON", ".jsonl": "JSONL", ".ndjson": "JSONL", ".csv": "CSV", ".tsv": "TSV"} | TABLES
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".json, .jsonl, .csv or .tsv (also with .gz or .zst), .parquet or .arrow"
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",;\t|"
BATCH_ROWS = 2048  # rows of a Parquet or Arrow file that are converted to Python objects at once
LEGACY_ENCODINGS = ["cp1252", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "latin_1"]  # used by spreadsheets
MAX_RECORD_BYTES = 32 << 20  # a longer record is not a conversation
MAX_JSON_BYTES = 1 << 30  # a .json file is read whole; .jsonl has no limit
LIST_START = re.compile(r"\s*+\[[ \t\n\r]*+")
AFTER_ITEM = re.compile(r"[ \t\n\r]*+(?:,[ \t\n\r]*+(?!\])|(?=\]))")  # what may follow an item of a list
STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


class FormatError(ValueError):
    """A file cannot be read as instruction data; the message names file and line, and says what to do."""


def split_name(path: Path) -> tuple[str, str, str]:
    """(stem, container suffix, packing suffix) of a file name; unknown suffixes are ""."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKINGS else ""
    inner = Path(path.name[: len(path.name) - len(packing)])
    suffix = inner.suffix.lower()
    if suffix not in CONTAINERS or (packing and suffix in TABLES):
        return path.name, "", ""
    return inner.stem, suffix, packing


def container_of(path: Path) -> str:
    """Name of the container to show, such as `JSONL, gzip`."""
    _, suffix, packing = split_name(path)
    return ", ".join(part for part in (CONTAINERS.get(suffix, ""), PACKINGS.get(packing, "")) if part)


def read_records(path: Path, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(source, record) of each record of `path`, in order; the source is name:line, or name:[index]."""
    _, suffix, packing = split_name(path)
    if not suffix:
        raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected {KNOWN}")
    try:
        for position, record in _numbered_records(path, suffix, packing):
            source = f"{name or path.name}:{position}"
            yield source, replace(record, source=source) if isinstance(record, Rejected) else record
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is cut off, damaged or not a {container_of(path)} file: {error}") from None


def _numbered_records(path: Path, suffix: str, packing: str) -> Iterator[tuple[int | str, Any]]:
    """Each record with its position in the file: a line number, or [an index]."""
    if suffix in TABLES:
        for number, record in enumerate(record for batch in _batches(path, suffix) for record in batch.to_pylist()):
            yield f"[{number}]", {key: _without_nulls(value) for key, value in record.items()}
        return
    unpacked: Any = pa.input_stream(str(path), compression=PACKINGS.get(packing))
    with io.BufferedReader(unpacked, 1 << 20) as stream:
        head = stream.peek(4096)[:4096]
        if b"\x00" in head:
            raise FormatError(f"{path} is binary or UTF-16, not UTF-8; convert it, e.g. with `iconv -t UTF-8`")
        if head.startswith(BOM):
            stream.read(len(BOM))
        match suffix:
            case ".json":
                yield from _json_records(path, stream)
            case ".csv" | ".tsv":
                yield from _csv_records(path, stream, "," if suffix == ".csv" else "\t")
            case _:
                yield from _line_records(path, stream)


def read_class_names(path: Path) -> dict[str, list[str]]:
    """Class names by column, as Hugging Face's `datasets` writes them to Parquet and Arrow files."""
    suffix = split_name(path)[1]
    if suffix not in TABLES:
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
    for number, line in enumerate(iter(lambda: stream.readline(MAX_RECORD_BYTES + 1), b""), start=1):
        if len(line) > MAX_RECORD_BYTES:
            limit = MAX_RECORD_BYTES >> 20
            raise FormatError(f"{path}, line {number}: the record is longer than {limit} MiB; shorten or remove it")
        yield _decode(path, line, number)


def _decode(path: Path, data: bytes, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        likely = charset_normalizer.from_bytes(data[:65536], cp_isolation=LEGACY_ENCODINGS).best()
        command = f"iconv -f {likely.encoding if likely else 'ITS_ENCODING'} -t UTF-8"
        raise FormatError(f"{path}, line {line}: not UTF-8; convert the file, perhaps with `{command}`") from None


def _line_records(path: Path, stream: BinaryIO) -> Iterator[tuple[int | str, Any]]:
    for number, line in enumerate(_lines(path, stream), start=1):
        if line.strip():
            record, end = _parse(path, line, len(line) - len(line.lstrip()), number)
            if line[end:].strip():
                raise _not_json(path, line, end, "more than one record on a line", number)
            yield number, record


def _json_records(path: Path, stream: BinaryIO) -> Iterator[tuple[int | str, Any]]:
    """The items of one list, or the lines of a JSONL file that is called .json."""
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{path} is larger than {MAX_JSON_BYTES >> 30} GiB; write one record per line (.jsonl)")
    if not re.match(rb"\s*\[", data):
        yield from _line_records(path, io.BytesIO(data))
        return
    text = _decode(path, data, 1)
    number, start = 0, LIST_START.match(text).end()  # type: ignore[union-attr]
    while text[start : start + 1] != "]":
        record, end = _parse(path, text, start)
        yield f"[{number}]", record
        separator = AFTER_ITEM.match(text, end)
        if separator is None:
            raise _not_json(path, text, end, "expecting ',' or ']' after this record")
        number, start = number + 1, separator.end()
    if text[start + 1 :].strip():
        raise _not_json(path, text, start + 1, "text after the end of the list")


def _parse(path: Path, text: str, start: int, line: int | None = None) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and its end; `line` is the line number if `text` is one line of a file."""
    try:
        try:
            return STRICT_JSON.raw_decode(text, start)
        except KeyTwiceError as error:
            _, end = json.JSONDecoder().raw_decode(text, start)
            return Rejected("", f"has the key {error.key!r} twice", text[start:end]), end
    except json.JSONDecodeError as error:
        raise _not_json(path, text, error.pos, error.msg, line) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, a thousand brackets
        raise _not_json(path, text, start, str(error), line) from None


def _not_json(path: Path, text: str, position: int, fault: str, line: int | None = None) -> FormatError:
    line, column = line or text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return FormatError(
        f"{path}, line {line}, column {column}: not JSON: {fault}; correct the file there (expected a list of records, "
        "or one record per line), or copy it again if it is cut off"
    )


def _csv_records(path: Path, stream: BinaryIO, delimiter: str) -> Iterator[tuple[int | str, Any]]:
    lines = _lines(path, stream)
    first = next(lines, "")
    if delimiter not in first:
        delimiter = max(DELIMITERS, key=first.count)
    csv.field_size_limit(MAX_RECORD_BYTES)  # the default of 128 KiB is one long answer
    rows, line = csv.reader(chain([first], lines), delimiter=delimiter, strict=True), 1
    try:
        header = next(rows, [])
        if repeated := {column for column in header if header.count(column) > 1}:
            raise FormatError(f"{path} has the column {min(repeated)!r} twice; rename one")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                yield line, Rejected("", f"has {len(row)} fields; the header has {len(header)}", json.dumps(row))
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise FormatError(
            f"{path}, line {line}: not CSV with {delimiter!r} between fields: {error}; correct the record that begins "
            "there (perhaps a quote is not closed), or copy the file again if it is cut off"
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
    """A reader for Arrow's file format or stream format; both use the suffix .arrow."""
    file = pa.OSFile(str(path))
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def _without_nulls(value: Any) -> Any:
    """`value` without the null keys that a table gives each object, because other objects of its column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
