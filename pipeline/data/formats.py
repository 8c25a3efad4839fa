"""Which format a file of instruction data has, and its records as conversations of one shape.

Every record becomes a `Row`, or a `Rejected` with the reason. A file that fits no format, or two, is refused with a
question that lists what was seen: a wrong guess is worse.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.data.columns import as_option, guess_columns, named_columns, note_unread
from pipeline.data.known_formats import FORMATS, KNOWN_FORMATS, SHARD_COLUMNS, Format, Records, reading
from pipeline.data.messages import is_dialogue
from pipeline.data.readers import KNOWN, FormatError, class_names, read_records, split_name
from pipeline.data.records import Rejected, Row
from pipeline.params import ColumnsParams

NOTES = ("snapshot.json", "rejected.jsonl")  # of `retune ingest`, next to its shards
SAMPLE = 1000  # records at the start of a file by which its format is recognised


class UnclearFormatError(FormatError):
    """A file fits no format or several: a person has to say which, or which of its columns is what."""

    def __init__(self, what: str, records: list[Any], formats: Sequence[str] = ()) -> None:
        self.formats = formats  # those that it could be; empty: any
        self.columns = guess_columns(records)  # where there are texts to guess from
        guess = "template=…,response=…" if self.columns is None else as_option(self.columns)
        known = "; ".join(f"{name} ({KNOWN_FORMATS[name]})" for name in FORMATS if str(KNOWN_FORMATS[name]))
        super().__init__(
            f"{what}; `retune ingest` reads it with its columns mapped, perhaps --columns {guess}, or with the name of "
            f"its format, --format: {known}"
        )


Ask = Callable[[UnclearFormatError], tuple[str, ColumnsParams | None]]  # the format and columns that a person names


@dataclass(frozen=True)
class RowFile:
    """A file whose format is known; `rows` can be read once."""

    format: str
    rows: Iterator[Row | Rejected]
    unused: set[str] = field(default_factory=set)  # columns and message keys that say something and were not read


def find_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or all with a known ending below it in name order.

    What `retune ingest` keeps next to its shards (snapshot.json, rejected.jsonl) is not data.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    notes = {file.parent / name for file in files for name in NOTES if file.name == "snapshot.json"}
    files = [file for file in files if split_name(file)[1] and file not in notes]
    if not files:
        fault = f"holds no file that ends in {KNOWN}" if path.exists() else "does not exist"
        raise FormatError(f"{path} {fault}")
    return files


def read_rows(
    path: Path, format: str = "auto", columns: ColumnsParams | None = None, ask: Ask | None = None
) -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order, as a `Row` or a `Rejected`: none is left out.

    Raises:
        FormatError: the file is unreadable (see `readers`), empty, of no known format or of two, or lacks a column
            that `columns` names.
    """
    yield from open_rows(path, format, columns, ask=ask).rows


def open_rows(
    path: Path,
    format: str = "auto",
    columns: ColumnsParams | None = None,
    name: str | None = None,
    ask: Ask | None = None,
) -> RowFile:
    """The file `path`, called `name` in `Row.source`, with its format, and its rows as `read_rows` gives them."""
    records = read_records(path, name)
    first = list(islice(records, SAMPLE))
    if not first:
        raise FormatError(f"{path} holds no records")
    _, dot, suffix = split_name(path)[0].rpartition(".")
    if format == "auto" and dot and suffix in FORMATS and not maps(columns):  # as in rows.sharegpt.jsonl
        format = suffix
    while True:
        try:
            known = recognise(path, [record for _, record in first], format, columns)
            break
        except UnclearFormatError as error:
            if ask is None:
                raise
            format, columns = ask(error)
    unused: set[str] = set()
    reads = reading(known, columns, class_names(path))
    return RowFile(known, _rows(reads.spread(chain(first, records)), known, reads, unused), unused)


def maps(columns: ColumnsParams | None) -> bool:
    """Whether `columns` says by itself how records are read, so that no format is needed."""
    return columns is not None and columns.response is not None


def recognise(path: Path, records: list[Any], format: str, columns: ColumnsParams | None) -> str:
    """The format of a file that begins with `records`; `columns` where they are read by a mapping."""
    seen = sorted({key for record in records if isinstance(record, dict) for key in record})
    if split_name(path)[1] == ".parquet" and sorted(SHARD_COLUMNS) == seen:
        return "shard"
    if columns is not None:
        if missing := sorted(set(named_columns(columns)) - set(seen)):
            what = f"{path} has no column {', '.join(missing)}, which the mapping names; it has {', '.join(seen)}"
            raise UnclearFormatError(what, records)
        if format == "auto" and maps(columns):
            return "columns"
    if format == "auto":
        format = _guess(path, records, seen)
    if columns is not None and format != "classification":
        raise FormatError(
            f"{path} has a mapping of columns and the format {format}; with a mapping the format is classification, or "
            "auto with a response and a prompt or template"
        )
    if format in ("alpaca", "belle"):
        # One converter for both: whether an instruction holds a dialogue is seen row by row.
        dialogue = any(isinstance(record, dict) and is_dialogue(record.get("instruction")) for record in records)
        format = "belle" if dialogue else format
    return format


def _formats_of(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    formats = [name for name, known in KNOWN_FORMATS.items() if known.looks_like(record)]
    # A rendered prompt as `text` next to the columns it was made of counts where nothing else does.
    return [name for name in formats if name != "text"] or formats


def _guess(path: Path, records: list[Any], seen: list[str]) -> str:
    if any(isinstance(record, dict) and record.keys() >= {"chosen", "rejected"} for record in records):
        raise FormatError(
            f"{path} holds preference pairs (chosen, rejected); Retune trains on single answers: take the chosen ones "
            "with --columns prompt=prompt,response=chosen (texts), or write them to a file of messages"
        )
    candidates = [_formats_of(record) for record in records]
    certain = sorted({formats[0] for formats in candidates if len(formats) == 1})
    if len(certain) == 1:
        return certain[0]
    possible = certain or next((formats for formats in candidates if len(formats) > 1), [])
    readable = next((record for record in records if not isinstance(record, Rejected)), records[0])
    columns_seen = ", ".join(seen) or type(readable).__name__
    which = f"looks like {' and '.join(possible)}" if possible else "is of no known format"
    raise UnclearFormatError(f"{path} has {columns_seen} and {which}", records, possible)


def _rows(records: Records, format: str, known: Format, unused: set[str]) -> Iterator[Row | Rejected]:
    """Every record as a row or a rejection."""
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
