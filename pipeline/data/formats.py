"""Recognises the format of a data file and reads its records as rows, each a `Row`, or a `Rejected` with the reason.

A file that fits no format, or more than one, is refused with a suggestion, because a wrong guess would be worse.
"""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.data.columns import correct_columns, format_columns, guess_columns, named_columns, note_unread
from pipeline.data.known_formats import FORMATS, KNOWN_FORMATS, SHARD_COLUMNS, Format, Records, configure_format
from pipeline.data.messages import is_dialogue
from pipeline.data.readers import KNOWN, FormatError, read_class_names, read_records, split_name
from pipeline.data.records import Rejected, Row
from pipeline.params import ColumnsParams

NOTES = ("snapshot.json", "rejected.jsonl")  # written by `retune ingest` next to its shards
SAMPLE = 1000  # records at the start of a file that its format is recognised by


class UnclearFormatError(FormatError):
    """A file fits no format or several: a person must name the format, or map the columns."""

    def __init__(
        self, fault: str, records: list[Any], formats: list[str], corrected: ColumnsParams | None = None
    ) -> None:
        self.formats = formats  # those that fit; empty if none does
        self.columns = corrected or (guess_columns(records) if len(formats) != 1 else None)
        columns = "template=…,response=…" if self.columns is None else shlex.quote(format_columns(self.columns))
        known = "; ".join(f"{name} ({KNOWN_FORMATS[name]})" for name in FORMATS if str(KNOWN_FORMATS[name]))
        hint = (
            f"map its columns for `retune ingest`, perhaps with --columns {columns}, or name its format with --format: "
        )
        if corrected is not None:
            super().__init__(f"{fault}; did you mean --columns {columns}?")
        elif len(formats) == 1:
            super().__init__(f"{fault}; leave the mapping out: the file is of the format {formats[0]}")
        else:
            super().__init__(f"{fault}; {hint}{known}")


Ask = Callable[[UnclearFormatError], tuple[str, ColumnsParams | None]]  # gets format and columns from a person


@dataclass(frozen=True)
class RowFile:
    """A file of a known format; `rows` can be read once."""

    format: str
    rows: Iterator[Row | Rejected]
    unused: set[str] = field(default_factory=set)  # columns and message keys with a value that were not read


def find_files(path: Path) -> list[Path]:
    """The data files at `path`, itself or a folder, in name order; not the notes that `retune ingest` writes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    notes = {file.parent / name for file in files for name in NOTES if file.name == "snapshot.json"}
    files = [file for file in files if split_name(file)[1] and file not in notes]
    if not files:
        fault = f"contains no file that ends in {KNOWN}" if path.exists() else "does not exist"
        raise FormatError(f"{path} {fault}")
    return files


def read_rows(
    path: Path, format: str = "auto", columns: ColumnsParams | None = None, ask: Ask | None = None
) -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order; FormatError if the file is broken, empty or of an unclear format."""
    yield from open_rows(path, format, columns, ask=ask).rows


def open_rows(
    path: Path,
    format: str = "auto",
    columns: ColumnsParams | None = None,
    name: str | None = None,
    ask: Ask | None = None,
) -> RowFile:
    """The format of the file, and its rows as from `read_rows`; `name` replaces the file name in `Row.source`."""
    records = read_records(path, name)
    first = list(islice(records, SAMPLE))
    if not first:
        raise FormatError(f"{path} contains no records")
    _, dot, suffix = split_name(path)[0].rpartition(".")
    if format == "auto" and dot and suffix in FORMATS and not is_complete(columns):  # as in rows.sharegpt.jsonl
        format = suffix
    recognised = None
    while recognised is None:
        try:
            recognised = recognise(path, [record for _, record in first], format, columns)
        except UnclearFormatError as error:
            if ask is None:
                raise
            format, columns = ask(error)
    unused: set[str] = set()
    known = configure_format(recognised, columns, read_class_names(path))
    return RowFile(recognised, _rows(known.spread(chain(first, records)), recognised, known, unused), unused)


def is_complete(columns: ColumnsParams | None) -> bool:
    """Whether a mapping says by itself how records are read; one for classification may name no response."""
    return columns is not None and columns.response is not None


def recognise(path: Path, records: list[Any], format: str, columns: ColumnsParams | None) -> str:
    """The format of a file that starts with `records`; "columns" if a mapping alone says how they are read."""
    names = sorted({key for record in records if isinstance(record, dict) for key in record})
    if split_name(path)[1] == ".parquet" and sorted(SHARD_COLUMNS) == names:
        return "shard"
    if columns is not None:
        if missing := sorted(set(named_columns(columns)) - set(names)):
            fault = f"{path} has no column {', '.join(missing)}, which the mapping names; it has {', '.join(names)}"
            fitting = sorted({name for record in records for name in _formats_of(record)})
            raise UnclearFormatError(fault, records, fitting, correct_columns(columns, names))
        if format == "auto" and is_complete(columns):
            return "columns"
    if format == "auto":
        format = _guess(path, records, names)
    if columns is not None and format != "classification":
        raise FormatError(
            f"{path} has a column mapping and the format {format}; with a mapping, the format must be classification, "
            "or auto with a response and a prompt or template"
        )
    # Both have the same converter, which looks for dialogues in each row.
    has_dialogue = any(isinstance(record, dict) and is_dialogue(record.get("instruction")) for record in records)
    return "belle" if format == "alpaca" and has_dialogue else format


def _formats_of(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    formats = [name for name, known in KNOWN_FORMATS.items() if known.looks_like(record)]
    # `text` may be a rendered prompt next to the columns it was made from: it counts only if no other format fits.
    return [name for name in formats if name != "text"] or formats


def _guess(path: Path, records: list[Any], names: list[str]) -> str:
    if any(isinstance(record, dict) and record.keys() >= {"chosen", "rejected"} for record in records):
        raise FormatError(
            f"{path} contains preference pairs (chosen, rejected), and Retune trains on single answers; select the "
            "chosen ones with --columns prompt=prompt,response=chosen (texts), or write them to a file of messages"
        )
    candidates = [_formats_of(record) for record in records]
    certain = sorted({formats[0] for formats in candidates if len(formats) == 1})
    if len(certain) == 1:
        return certain[0]
    possible = certain or next((formats for formats in candidates if len(formats) > 1), [])
    readable = next((record for record in records if not isinstance(record, Rejected)), records[0])
    contents = f"the columns {', '.join(names)}" if names else f"records of type {type(readable).__name__}"
    verdict = f"looks like {' and '.join(possible)}" if possible else "is not of a known format"
    raise UnclearFormatError(f"{path} has {contents} and {verdict}", records, possible)


def _rows(records: Records, format: str, known: Format, unused: set[str]) -> Iterator[Row | Rejected]:
    for source, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}, not an object")
            if not known.reads.issuperset(record):
                note_unread(record, format, known.reads, unused)
            yield known.row(record, source, unused)
        except ValueError as error:
            yield Rejected(source, str(error), record)
