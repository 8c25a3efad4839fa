"""Which format a file of instruction data has, and its records as conversations of one shape.

Every record becomes a `Row`, or a `Rejected` with the reason. A file that fits no format, or two, is refused with a
question that lists what was seen: a wrong guess is worse.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.data.columns import as_option, columns_read, guess_columns, named_columns, note_unread
from pipeline.data.known_formats import FORMATS, KNOWN_FORMATS, SHARD_COLUMNS, Converter, converter, is_dialogue
from pipeline.data.readers import KNOWN, FormatError, class_names, read_records, split_name
from pipeline.data.records import Rejected, Row
from pipeline.params import ColumnsParams

NOTES = ("snapshot.json", "rejected.jsonl")  # of `retune ingest`, next to its shards
SAMPLE = 1000  # records at the start of a file by which its format is recognised


class UnclearFormatError(FormatError):
    """A file fits no format or several: a person has to say which, or which of its columns is what."""

    def __init__(self, what: str, formats: list[str], columns: ColumnsParams | None) -> None:
        super().__init__(what)
        self.formats = formats  # those that it could be; empty: any
        self.columns = columns  # a guess, where there are texts to guess from


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
    """The file `path` with its format, and its rows as `read_rows` gives them.

    Args:
        name: what the file is called in `Row.source`; by default its file name.
        ask: answers what an `UnclearFormatError` asks.
    """
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
    every = chain(first, records)
    unused: set[str] = set()
    convert = converter(known, columns, class_names(path))
    rows = _convert(best_paths(every) if known == "openassistant" else every, known, columns, convert, unused)
    return RowFile(known, rows, unused)


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
            raise _unclear(what, records)
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
    candidates = [_formats_of(record) for record in records]
    if any("preference" in formats for formats in candidates):
        raise FormatError(
            f"{path} holds preference pairs (chosen, rejected); Retune trains on single answers: take the chosen ones "
            "with --columns prompt=prompt,response=chosen (texts), or write them to a file of messages"
        )
    certain = sorted({formats[0] for formats in candidates if len(formats) == 1})
    if len(certain) == 1:
        return certain[0]
    possible = certain or next((formats for formats in candidates if len(formats) > 1), [])
    readable = next((record for record in records if not isinstance(record, Rejected)), records[0])
    columns_seen = ", ".join(seen) or type(readable).__name__
    which = f"looks like {' and '.join(possible)}" if possible else "is of no known format"
    raise _unclear(f"{path} has {columns_seen} and {which}", records, possible)


def _unclear(what: str, records: list[Any], formats: list[str] | None = None) -> UnclearFormatError:
    """The question which format or columns are meant, with a mapping that could be."""
    columns = guess_columns(records)
    guess = "template=…,response=…" if columns is None else as_option(columns)
    known = "; ".join(f"{name} ({KNOWN_FORMATS[name]})" for name in FORMATS if str(KNOWN_FORMATS[name]))
    question = (
        f"{what}; `retune ingest` reads it with its columns mapped, perhaps --columns {guess}, or with the name of its "
        f"format, --format: {known}"
    )
    return UnclearFormatError(question, formats or [], columns)


def _convert(
    records: Iterable[tuple[str, Any]],
    format: str,
    columns: ColumnsParams | None,
    convert: Converter,
    unused: set[str],
) -> Iterator[Row | Rejected]:
    """Every record as rows or rejections (one record of self-instruct can be several)."""
    reads = columns_read(format, columns)
    for source, record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}, not an object")
            if not reads.issuperset(record):
                note_unread(record, format, reads, unused)
            rows = convert(record, source, unused)
        except ValueError as error:
            yield Rejected(source, str(error), record)
            continue
        yield from rows if isinstance(rows, list) else [rows]


def best_paths(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The best conversation of each tree of OpenAssistant's flat files, in which a message a record names its parent.

    That is, from the first message on, the answer with the lowest rank: (source, {path, left_out}) with the messages
    that are not in it counted. A message that no first message leads to is a `Rejected`. All messages of a file are in
    memory at once: those of a tree may stand anywhere in it.
    """
    waiting: dict[str, list[tuple[str, Any]]] = defaultdict(list)  # by the id of their parent; "" begins a tree
    for source, record in records:
        if isinstance(record, dict):
            waiting[str(record.get("parent_id") or "")].append((source, record))
        else:
            yield source, record
    for source, first in waiting.pop("", []):
        tree, replies = [first], dict[str, list[Any]]()
        for message in tree:  # grows on the way; what was taken once is not waiting any more, so no circle is endless
            taken = [reply for _, reply in waiting.pop(str(message.get("message_id")), [])]
            replies.setdefault(str(message.get("message_id")), taken)
            tree += taken
        path: list[dict[str, Any]] = []
        answers = [first]
        while usable := [message for message in answers if _is_usable(message)]:
            path.append(min(usable, key=_rank))
            answers = replies.pop(str(path[-1].get("message_id")), [])
        yield source, {"path": path, "left_out": len(tree) - len(path)}
    for source, record in chain(*waiting.values()):
        text = json.dumps(record, ensure_ascii=False, default=str)
        yield source, Rejected(source, "answers a message that is not in the file", text)


def _is_usable(message: dict[str, Any]) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")
