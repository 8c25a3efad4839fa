"""Which format a file of instruction data has, and its records as conversations of one shape.

Every record becomes a `Row`, or a `Rejected` with the reason. A file that fits no format, or two, is refused with a
question that lists what was seen: a wrong guess is worse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.data import trees
from pipeline.data.columns import (
    SHARD_COLUMNS,
    as_option,
    as_yaml,
    corrected,
    guess_columns,
    named_columns,
    note_unread,
)
from pipeline.data.containers import CONTAINERS, KNOWN, Block, read_blocks, records_of, split_name
from pipeline.data.json_text import FormatError, Unreadable
from pipeline.data.known_formats import FORMATS, KNOWN_FORMATS, columns_read, converter
from pipeline.data.records import Rejected, Row, is_dialogue
from pipeline.params import ColumnsParams

SAMPLE = 1000  # records at the start of a file by which its format is recognised
MAPPED = ("columns", "classification", "text")  # formats of which a person, or the task, says which columns count


class UnclearFormatError(FormatError):
    """A file fits no format or several: a person has to say which, or which of its columns is what."""

    def __init__(self, what: str, formats: list[str], columns: ColumnsParams | None) -> None:
        super().__init__(what)
        self.formats = formats  # those that it could be; empty: any
        self.columns = columns  # a guess, where there are texts to guess from


Ask = Callable[[UnclearFormatError], tuple[str, ColumnsParams | None]]  # the format and columns that a person names


@dataclass(frozen=True)
class Recipe:
    """How the records of one file become rows; small, so that it travels to other processes."""

    format: str
    columns: ColumnsParams | None = None
    guessed: bool = False  # whether nobody named the format: a record of another one then stops the file


def _formats_of(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    found = [name for name, known in KNOWN_FORMATS.items() if known.fits(record)]
    # tatsu-lab's Alpaca carries its rendered prompt as `text`: that column counts where nothing else does.
    return ["text"] if not found and "text" in record else found


def detect_format(record: Any) -> str | None:
    """The one format whose keys `record` has, or None when that is not exactly one."""
    found = _formats_of(record)
    return found[0] if len(found) == 1 else None


def find_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or all with a known ending below it in name order.

    What `retune ingest` keeps beside its shards (snapshot.json, rejected.jsonl) is no data.
    """
    if path.is_file():
        if not split_name(path)[1]:
            raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected {KNOWN}")
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path} does not exist; name a file that ends in {KNOWN}, or a folder of them")
    files = sorted(p for p in path.rglob("*") if split_name(p)[1] and p.is_file())
    own = {
        p.with_name(name) for p in files if p.name == "snapshot.json" for name in ("snapshot.json", "rejected.jsonl")
    }
    files = [p for p in files if p not in own]
    if not files:
        raise FormatError(f"{path} holds no file that ends in {', '.join(CONTAINERS)}")
    return files


def read_rows(
    path: Path, format: str = "auto", columns: ColumnsParams | None = None, ask: Ask | None = None
) -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order, as a `Row` or a `Rejected`: none is left out.

    Raises:
        FormatError: the file is unreadable (see `containers`), empty, of no known format or of two, or lacks a column
            that `columns` names.
    """
    for block, recipe in recognised_blocks(path, format, columns, ask=ask):
        yield from convert(block, recipe)


def recognised_blocks(
    path: Path,
    format: str = "auto",
    columns: ColumnsParams | None = None,
    name: str | None = None,
    ask: Ask | None = None,
) -> Iterator[tuple[Block, Recipe]]:
    """The blocks of `path`, each with the recipe by which `convert` makes rows of it.

    Args:
        ask: answers what an `UnclearFormatError` asks.

    Raises:
        FormatError: as `read_rows`; a block's own faults show when it is converted.
    """
    stem = split_name(path)[0]
    _, dot, marked = stem.rpartition(".")
    if format == "auto" and dot and marked in FORMATS and not maps(columns):
        format = marked
    blocks = read_blocks(path, name)
    for block in blocks:
        records = [record for _, record in islice(records_of(block), SAMPLE)]
        if not records:
            continue
        recipe: Recipe | None = None
        while recipe is None:
            try:
                recipe = recognise(path, records, format, columns)
            except UnclearFormatError as error:
                if ask is None:
                    raise
                format, columns = ask(error)
        rest = chain([block], blocks)
        yield from ((each, recipe) for each in (trees.best_paths(rest) if recipe.format == "openassistant" else rest))
        return
    raise FormatError(f"{path} holds no records")


def maps(columns: ColumnsParams | None) -> bool:
    """Whether `columns` says by itself how records are read, so that no format is needed."""
    return columns is not None and columns.response is not None


def recognise(path: Path, records: list[Any], format: str, columns: ColumnsParams | None) -> Recipe:
    """The recipe for a file that begins with `records`.

    Raises:
        FormatError: as `read_rows`.
    """
    seen = sorted({key for record in records if isinstance(record, dict) for key in record})
    if split_name(path)[1] == ".parquet" and sorted(SHARD_COLUMNS) == seen:
        return Recipe("shard")
    guessed = format == "auto" and not maps(columns)
    if columns is not None:
        missing = sorted({name for name in named_columns(columns) if name not in seen})
        if missing:
            what = f"has no column {', '.join(missing)}, which the mapping names; it has {', '.join(seen) or 'none'}"
            raise _unclear(f"{path} {what}", records, columns=corrected(columns, seen))
        if columns.response is not None:
            if format not in ("auto", "classification"):
                raise FormatError(
                    f"{path} has a mapping of columns and the format {format}; expected one of them: with a mapping "
                    "the format is auto, or classification"
                )
            return Recipe("classification" if format == "classification" else "columns", columns)
    if guessed:
        format = _guess(path, records, seen)
    if columns is not None and format != "classification":
        raise FormatError(
            f"{path} is of format {format}; ingest.columns would need a response (and prompt or template)"
        )
    if format in ("alpaca", "belle"):
        # One recipe for both: whether an instruction holds a dialogue is seen row by row.
        dialogue = any(isinstance(r, dict) and is_dialogue(r.get("instruction")) for r in records)
        format = "belle" if dialogue else format
    return Recipe(format, columns, guessed)


def _guess(path: Path, records: list[Any], seen: list[str]) -> str:
    found = [_formats_of(record) for record in records]
    if any("preference" in formats for formats in found):
        raise FormatError(
            f"{path} holds preference pairs (chosen, rejected); Retune trains on single answers: take the chosen ones "
            "with --columns prompt=prompt,response=chosen (texts), or write them to a file of messages"
        )
    named = {formats[0] for formats in found if len(formats) == 1}
    if named == {"text"}:
        raise UnclearFormatError(
            f"{path} has text and no prompt ({', '.join(seen)}); expected prompts with answers: --format text trains "
            "on it as plain text, ingest.columns with a template and response: text gives it a prompt",
            ["text"],
            guess_columns(records),
        )
    if len(named) == 1:
        return named.pop()
    both = next((formats for formats in found if len(formats) > 1), [])
    if named:
        what = f"looks like {' and '.join(sorted(named))}"
    elif both:
        what = f"looks like {' and '.join(both)} at once, with {', '.join(seen)}"
    else:
        readable = next((r for r in records if not isinstance(r, Unreadable)), records[0])
        what = f"has {', '.join(seen) if seen else type(readable).__name__}, which is none of the known formats"
    raise _unclear(f"{path} {what}", records, sorted(named) or both)


def _unclear(
    what: str, records: list[Any], formats: list[str] | None = None, columns: ColumnsParams | None = None
) -> UnclearFormatError:
    """The question which format or columns are meant, with a mapping that could be: `columns`, else a guess."""
    columns = columns or guess_columns(records)
    if columns is not None:
        what += f"; map its columns, perhaps --columns {as_option(columns)} (params.yaml: ingest.columns: "
        what += f"{as_yaml(columns)})"
    known = "; ".join(f"{name} ({KNOWN_FORMATS[name].keys})" for name in FORMATS if KNOWN_FORMATS[name].keys)
    return UnclearFormatError(f"{what}; or name its format with --format: {known}", formats or [], columns)


def convert(block: Block, recipe: Recipe, unused: set[str] | None = None) -> Iterator[Row | Rejected]:
    """Every record of `block` as rows or rejections (one record of self-instruct can be several).

    Args:
        unused: takes up the columns and message keys that say something and are not read.

    Raises:
        FormatError: a line is not JSON, or a guessed format turns out to be one of two.
    """
    make = converter(recipe.format, recipe.columns, block.labels)
    reads, mapped = columns_read(recipe.format, recipe.columns), recipe.format in MAPPED
    unused = set() if unused is None else unused
    for source, record in records_of(block):
        try:
            if not isinstance(record, dict):
                if isinstance(record, Unreadable):
                    yield Rejected(source, record.reason, record.text)
                    continue
                raise ValueError(f"is a {type(record).__name__}, not an object")
            if not reads.issuperset(record):
                note_unread(record, record.keys() - reads, mapped, unused)
            made = make(record, source, unused)
        except ValueError as error:
            other = detect_format(record) if recipe.guessed else None
            if other not in (None, "text", "alpaca" if recipe.format == "belle" else recipe.format):
                raise FormatError(
                    f"{block.path} looks like {recipe.format}, but {source} like {other}: name it with --format or "
                    "split the file"
                ) from None
            yield Rejected(source, str(error), record)
            continue
        if isinstance(made, list):
            yield from made
        else:
            yield made
