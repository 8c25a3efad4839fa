"""Files of records, whatever they are packed in: JSON, JSONL, CSV, TSV (also in gzip or zstd), Parquet and Arrow.

A file is read as a stream of blocks of records, each small enough for another process. Other encodings than UTF-8,
broken or cut off files, oversized records, archives that unpack to absurd sizes and names that contradict the bytes are
refused with file and line.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.csv_text import csv_records, delimiter_of
from pipeline.data.json_text import MAX_RECORD_BYTES, FormatError, list_elements, parse, too_long

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
BLOCK_BYTES = 1 << 20  # of text a block; about 1,200 Alpaca rows
BLOCK_ROWS = 2048
MAX_UNPACKED_BYTES = 64 << 30
MAX_RATIO = 200  # unpacked / packed; text packs 3 to 20 times, a bomb a thousand times and more
RATIO_FROM_BYTES = 64 << 20  # small files may be as repetitive as they like
MAGIC = {
    b"\x1f\x8b": "gzip data; name it .gz after its own ending",
    b"\x28\xb5\x2f\xfd": "zstd data; name it .zst after its own ending",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; name it .arrow",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF": "a PDF; expected records",
    b"\x89PNG": "a picture; expected records",
    b"SQLite format 3": "a SQLite database; export its rows",
}


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file: JSON lines (bytes), JSON texts, decoded records, or an Arrow table (IPC)."""

    path: str
    name: str  # of the file in `Row.source`
    first: int  # line or index of the first record
    lines: bytes | None = None
    texts: list[str] | None = None
    records: Sequence[tuple[int | str, Any]] | None = None  # (line or [index], record)
    table: bytes | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)  # class names by column, where the file declares them
    position: int = 0  # bytes of the file read so far, for progress


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


def read_blocks(path: Path, name: str | None = None) -> Iterator[Block]:
    """The records of `path` in order, a block at a time.

    Args:
        name: what the file is called in `Row.source`; by default its file name.

    Raises:
        FormatError: see the module's first lines; blocks before the fault may have come out already.
    """
    _, suffix, packing = split_name(path)
    name = name or path.name
    if suffix == ".parquet":
        yield from _parquet_blocks(path, name)
        return
    if suffix == ".arrow":
        yield from _arrow_blocks(path, name)
        return
    if not suffix:
        raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected {KNOWN}")
    with pa.OSFile(str(path)) as file:
        head = _unpacking(path, file, packing)(BLOCK_BYTES)
    _refuse_binary(path, head)
    with pa.OSFile(str(path)) as file:
        read = _unpacking(path, file, packing)
        match CONTAINERS[suffix]:
            case "JSON" if not _is_lines(head):
                yield from _json_blocks(path, name, read, file)
            case "JSON" | "JSONL":
                yield from _line_blocks(path, name, read, file)
            case kind:
                delimiter = delimiter_of(head, "," if kind == "CSV" else "\t")
                yield from _csv_blocks(path, name, read, file, delimiter)


def records_of(block: Block) -> Iterator[tuple[str, Any]]:
    """(source, record) of each record in `block`; the record is an `Unreadable` where its meaning is not plain.

    Raises:
        FormatError: a JSON line is not JSON, or not UTF-8.
    """
    if block.lines is not None:
        lines = block.lines.split(b"\n")
        for line_number, line in enumerate(lines, start=block.first):
            if line and not line.isspace():
                # A block's text ends with the end of a line, but for a file whose last line has none.
                cut_off = line_number - block.first == len(lines) - 1
                yield f"{block.name}:{line_number}", parse(line, block.path, line_number, cut_off)
    elif block.texts is not None:
        for index, text in enumerate(block.texts, start=block.first):
            yield f"{block.name}:[{index}]", parse(text.encode(), block.path, 0, False)
    elif block.records is not None:
        for number, record in block.records:
            yield f"{block.name}:{number}", record
    elif block.table is not None:
        try:
            table = from_ipc(block.table)
            records = table.to_pylist()
            if any(_has_fields(column.type) for column in table.schema):
                records = [{key: _without_nulls(value) for key, value in record.items()} for record in records]
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise FormatError(f"{block.path}, rows from {block.first} on cannot be read: {error}") from None
        for index, record in enumerate(records, start=block.first):
            yield f"{block.name}:[{index}]", record


def _has_fields(type: pa.DataType) -> bool:
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return _has_fields(type.value_type)
    return bool(pa.types.is_struct(type))


def _without_nulls(value: Any) -> Any:
    """`value` without the null keys of its objects: a table gives every object the keys of all others in its column.

    So a null that was written in the row is lost, too; the table does not tell the two apart.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _unpacking(path: Path, file: Any, packing: str) -> Callable[[int], bytes]:
    """A function that reads the next so many bytes of `file`, unpacked; b"" at its end."""
    if not packing:
        return file.read
    stream = pa.CompressedInputStream(file, PACKINGS[packing])
    done = 0

    def read(size: int) -> bytes:
        nonlocal done
        try:
            data: bytes = stream.read(size)
        except (OSError, pa.ArrowException) as error:
            what = "is cut off" if "runcated" in str(error) else "is damaged"
            raise FormatError(f"{path} {what} or no {PACKINGS[packing]} file: {error}") from None
        done += len(data)
        packed = max(file.tell(), 1)
        if done > MAX_UNPACKED_BYTES or (done > RATIO_FROM_BYTES and done > MAX_RATIO * packed):
            raise FormatError(
                f"{path} unpacks to {done / 1e6:,.0f} MB and more from {packed / 1e6:,.1f} MB; past {MAX_RATIO} times "
                f"or {MAX_UNPACKED_BYTES >> 30} GiB that is no instruction data: unpack it yourself if it is"
            )
        return data

    return read


def _refuse_binary(path: Path, head: bytes) -> None:
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise FormatError(f"{path} is {what}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FormatError(f"{path} is not UTF-8 but UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
    if b"\x00" in head:
        zeros = head[:4096].count(0) / len(head[:4096])
        what = "perhaps UTF-16 or UTF-32; convert it with iconv" if 0.2 < zeros < 0.8 else "it is binary"
        raise FormatError(f"{path} is not UTF-8 text (byte {head.index(0)} is zero): {what}")


def _is_lines(head: bytes) -> bool:
    """Whether a .json file holds one record a line: a whole object, the line's end, and more."""
    first, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _line_pieces(path: Path, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The text without its byte order mark in pieces of whole lines; only the last may lack its line end."""
    parts: list[bytes] = []
    held, line = 0, 1
    chunk = read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
    while chunk:
        cut = chunk.rfind(b"\n") + 1
        if cut:
            piece = b"".join([*parts, chunk[:cut]])
            yield piece
            line += piece.count(b"\n")
            parts, held = [], 0
        parts.append(chunk[cut:])
        held += len(chunk) - cut
        if held > MAX_RECORD_BYTES:
            raise too_long(path, f"line {line}")
        chunk = read(BLOCK_BYTES)
    if held:
        yield b"".join(parts)


def _line_blocks(path: Path, name: str, read: Callable[[int], bytes], file: Any) -> Iterator[Block]:
    line = 1
    for piece in _line_pieces(path, read):
        yield Block(str(path), name, line, lines=piece, position=file.tell())
        line += piece.count(b"\n")


def _csv_blocks(path: Path, name: str, read: Callable[[int], bytes], file: Any, delimiter: str) -> Iterator[Block]:
    records: list[tuple[int | str, Any]] = []
    size = first = 0
    for line, fields, record in csv_records(path, _line_pieces(path, read), delimiter):
        first = first or line
        records.append((line, record))
        size += fields
        if size > BLOCK_BYTES or len(records) >= BLOCK_ROWS:
            yield Block(str(path), name, first, records=records, position=file.tell())
            records, size, first = [], 0, 0
    if records:
        yield Block(str(path), name, first, records=records, position=file.tell())


def _json_blocks(path: Path, name: str, read: Callable[[int], bytes], file: Any) -> Iterator[Block]:
    texts: list[str] = []
    size = done = 0
    for text in list_elements(path, read):
        texts.append(text)
        size += len(text)
        if size > BLOCK_BYTES:
            yield Block(str(path), name, done, texts=texts, position=file.tell())
            done += len(texts)
            texts, size = [], 0
    if texts:
        yield Block(str(path), name, done, texts=texts, position=file.tell())


def _parquet_blocks(path: Path, name: str) -> Iterator[Block]:
    try:
        with pq.ParquetFile(path) as file:
            labels, done = _labels(file.schema_arrow), 0
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                table = pa.Table.from_batches([batch])
                yield Block(str(path), name, done, table=to_ipc(table), labels=labels)
                done += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is cut off or no Parquet file: {error}") from None


def _arrow_blocks(path: Path, name: str) -> Iterator[Block]:
    try:
        with pa.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            labels, done = _labels(reader.schema), 0
            for batch in batches:
                for start in range(0, len(batch), BLOCK_ROWS):
                    table = pa.Table.from_batches([batch.slice(start, BLOCK_ROWS)])
                    yield Block(str(path), name, done, table=to_ipc(table), labels=labels, position=file.tell())
                    done += len(table)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} is cut off or no Arrow file: {error}") from None


def _labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the classes that Hugging Face's `datasets` wrote into the schema, by column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
