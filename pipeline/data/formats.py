"""Which format a file of instruction data has, and its records as conversations of one shape.

Comes in: records of a file (see `containers`). Goes out: for every record a `Row`, or a `Rejected` with the reason. A
file that fits no format, or two, is refused with a question that lists what was seen: a wrong guess is worse.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.containers import CONTAINERS, KNOWN, Block, read_blocks, records_of, split_name
from pipeline.data.json_text import FormatError, Unreadable
from pipeline.data.records import SHARD_COLUMNS, Rejected, Row, converter, is_dialogue
from pipeline.params import ColumnsParams

SAMPLE = 1000  # records at the start of a file by which its format is recognised


@dataclass(frozen=True)
class Recipe:
    """How the records of one file become rows; small, so that it travels to other processes."""

    format: str
    columns: ColumnsParams | None = None
    guessed: bool = False  # whether nobody named the format: a record of another one then stops the file


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def _turns_have(record: dict[str, Any], key: str, part: str) -> bool:
    turns = record.get(key)
    if isinstance(turns, str):
        return f'"{part}"' in turns
    return isinstance(turns, list) and (not turns or not isinstance(turns[0], dict) or part in turns[0])


SIGNATURES: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "alpaca": ("instruction, output", lambda r: "instruction" in r and "output" in r),
    "self-instruct": ("instruction, instances", lambda r: "instruction" in r and _is_list(r.get("instances"))),
    "sharegpt": (
        "conversations with from and value",
        lambda r: _is_list(r.get("conversations")) and _turns_have(r, "conversations", "from"),
    ),
    "messages": (
        "messages with role and content",
        lambda r: (
            _is_list(r.get("messages"))
            or (_turns_have(r, "conversations", "role") and not _turns_have(r, "conversations", "from"))
        ),
    ),
    "prompt-completion": ("prompt, completion", lambda r: "prompt" in r and "completion" in r),
    "openorca": ("system_prompt, question, response", lambda r: {"system_prompt", "question", "response"} <= r.keys()),
    "ultrachat": (
        "data, a list of texts",
        lambda r: isinstance(r.get("data"), list) and all(isinstance(turn, str) for turn in r["data"]),
    ),
    "classification": ("text, label", lambda r: "text" in r and "label" in r),
    "preference": ("chosen, rejected", lambda r: "chosen" in r and "rejected" in r),
}
FORMATS = (*(name for name in SIGNATURES if name != "preference"), "belle", "text")


def _formats_of(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    found = [name for name, (_, fits) in SIGNATURES.items() if fits(record)]
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


def read_rows(path: Path, format: str = "auto", columns: ColumnsParams | None = None) -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order, as a `Row` or a `Rejected`: none is left out.

    Raises:
        FormatError: the file is unreadable (see `containers`), empty, of no known format or of two, or lacks a column
            that `columns` names.
    """
    for block, recipe in recognised_blocks(path, format, columns):
        yield from convert(block, recipe)


def recognised_blocks(
    path: Path, format: str = "auto", columns: ColumnsParams | None = None, name: str | None = None
) -> Iterator[tuple[Block, Recipe]]:
    """The blocks of `path`, each with the recipe by which `convert` makes rows of it.

    Raises:
        FormatError: as `read_rows`; a block's own faults show when it is converted.
    """
    stem = split_name(path)[0]
    _, dot, marked = stem.rpartition(".")
    if format == "auto" and dot and marked in FORMATS:
        format = marked
    recipe: Recipe | None = None
    for block in read_blocks(path, name):
        if recipe is None:
            records = [record for _, record in islice(records_of(block), SAMPLE)]
            if not records:
                continue
            recipe = recognise(path, records, format, columns)
        yield block, recipe
    if recipe is None:
        raise FormatError(f"{path} holds no records")


def recognise(path: Path, records: list[Any], format: str, columns: ColumnsParams | None) -> Recipe:
    """The recipe for a file that begins with `records`.

    Raises:
        FormatError: as `read_rows`.
    """
    seen = sorted({key for record in records if isinstance(record, dict) for key in record})
    if split_name(path)[1] == ".parquet" and sorted(SHARD_COLUMNS) == seen:
        return Recipe("shard")
    guessed = format == "auto" and (columns is None or columns.response is None)
    if columns is not None:
        missing = sorted({name for name in _named(columns) if name not in seen})
        if missing:
            raise FormatError(
                f"{path} has no column {', '.join(missing)}, which ingest.columns names; "
                f"it has {', '.join(seen) or 'none'}"
            )
        if columns.response is not None:
            if format not in ("auto", "classification"):
                raise FormatError(f"ingest.columns names a response, so ingest.format must be auto; it is {format}")
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
    named = {name for record in records for name in [detect_format(record)] if name}
    if named == {"preference"}:
        raise FormatError(
            f"{path} holds preference pairs (chosen, rejected); Retune trains on single answers: take one with "
            "ingest.columns, e.g. {prompt: prompt, response: chosen}"
        )
    if named == {"text"}:
        raise FormatError(
            f"{path} has text and no prompt ({', '.join(seen)}); expected prompts with answers: --format text trains "
            "on it as plain text, ingest.columns with a template and response: text gives it a prompt"
        )
    if len(named) == 1:
        return named.pop()
    if named:
        what = f"looks like {' and '.join(sorted(named))}"
    elif both := next((found for record in records if len(found := _formats_of(record)) > 1), None):
        what = f"looks like {' and '.join(both)} at once, with {', '.join(seen)}"
    else:
        readable = next((r for r in records if not isinstance(r, Unreadable)), records[0])
        what = f"has {', '.join(seen) if seen else type(readable).__name__}"
    known = "; ".join(f"{name} ({keys})" for name, (keys, _) in SIGNATURES.items() if name != "preference")
    raise FormatError(
        f"{path} {what}; expected one of {known}: name it with --format, map its columns in ingest.columns of "
        "params.yaml, or split the file"
    )


def convert(block: Block, recipe: Recipe) -> Iterator[Row | Rejected]:
    """Every record of `block` as rows or rejections (one record of self-instruct can be several).

    Raises:
        FormatError: a line is not JSON, or a guessed format turns out to be one of two.
    """
    make = converter(recipe.format, recipe.columns, block.labels)
    for source, record in records_of(block):
        try:
            if not isinstance(record, dict):
                if isinstance(record, Unreadable):
                    yield Rejected(source, record.reason, record.text)
                    continue
                raise ValueError(f"is a {type(record).__name__}, not an object")
            made = make(record, source)
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


def _named(columns: ColumnsParams) -> list[str]:
    """The columns that a mapping reads."""
    names = [value for key, value in columns.model_dump().items() if key != "template" and value is not None]
    return names + [name for _, name, _, _ in string.Formatter().parse(columns.template or "") if name]
