"""ingest: outside data in, a new snapshot of validated conversations in `data/` and its `data.dvc` out.

The only writer of `data/`. Whatever the sources are, the snapshot has one form: shards (see `shards`), `rejected.jsonl`
with every record that could not be used, and `snapshot.json` that says where each row came from. What cannot be read as
instruction data is refused before anything changes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.files import sha256_file, write_json
from pipeline.core.progress import Progress
from pipeline.data.formats import Ask, maps, open_rows
from pipeline.data.readers import FormatError, container_of
from pipeline.data.records import Rejected
from pipeline.data.shards import SCHEMA, read_rejected, read_snapshot, tables, write_shards
from pipeline.data.snapshot import INSTRUCTIONS, SCRATCH, recover, replace_instructions
from pipeline.data.sources import Source, fetch, public
from pipeline.params import IngestParams, SourceParams

RECORD_CHARACTERS = 4096  # of a rejected record that are kept
CLASSES = ("auto", "classification")  # formats with which columns can be named
LEAST_SHARE = 0.5  # of the rows before; fewer are taken for a mistake
REASONS = 20  # kept apart in the notes; the rest are counted together


class IngestError(ValueError):
    """The sources cannot become a snapshot; the message says which one and why."""


@dataclass(frozen=True)
class Ingested:
    files: list[dict[str, Any]]  # name, container, format, rows, rejected: as in snapshot.json
    rows: int
    rejected: dict[str, int]  # reason → records; prepare counts them against its own limit
    repaired: dict[str, int]  # repair → rows
    left_out: int  # rows that a weight or a cap keeps out
    changed: bool  # whether data.dvc now names another snapshot


@dataclass
class _File:
    """One file on its way into the snapshot."""

    path: Path
    name: str
    source: SourceParams
    stat: tuple[int, int, int]
    spool: Path  # where its rows wait until it is known which of them stay
    format: str = ""
    contents: NDArray[np.uint64] = field(default_factory=lambda: np.array([], np.uint64))  # (N,) the hash of each row
    kept: NDArray[np.bool_] = field(default_factory=lambda: np.array([], bool))  # (N,) by weight and cap
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)  # columns and message keys that say something and were not read
    shards: list[str] = field(default_factory=list)


def ingest(
    params: IngestParams,
    sources: Sequence[str] = (),
    root: Path = Path("."),
    replace: bool = False,
    ask: Ask | None = None,
) -> Ingested:
    """Replace `data/instructions` by what `sources` hold and record the snapshot in `data.dvc`.

    Args:
        sources: URIs, read with `params.format` and `params.columns`; none: those of `params.sources`.
        replace: also where so many records are rejected, or so few rows come, that something seems wrong.
        ask: answers which format or columns a file has that fits none or several.

    Raises:
        FormatError, SourceError, IngestError, GraphError: a file, a source, all of them together or DVC is at fault;
            `data/` is as it was.
    """
    recover(root)
    scratch = root / SCRATCH
    try:
        notes = collect(params, sources, scratch / "new", scratch, ask)
        if not replace:
            _require_plausible(notes, params.max_rejected_fraction, scratch / "new", root)
        changed = replace_instructions(scratch / "new", root)
    finally:
        recover(root)
    return Ingested(
        files=[file for source in notes["sources"] for file in source["files"]],
        rows=notes["rows"],
        rejected=_totals(notes, "rejected"),
        repaired=_totals(notes, "repaired"),
        left_out=notes["left_out"],
        changed=changed,
    )


def collect(
    params: IngestParams, sources: Sequence[str], new: Path, scratch: Path, ask: Ask | None = None
) -> dict[str, Any]:
    """Write shards, `rejected.jsonl` and `snapshot.json` to the folder `new`; returns what `snapshot.json` holds."""
    named = [SourceParams(uri=uri) for uri in sources] or params.sources
    if not named:
        raise IngestError("no source is named: `retune ingest SOURCE`, or list them in ingest.sources of params.yaml")
    named = [_with_defaults(source, params) for source in named]
    fetched = [fetch(source.uri, params, scratch / "fetched" / str(i)) for i, source in enumerate(named)]
    new.mkdir(parents=True)
    files: list[_File] = []
    names: set[str] = set()
    for source, read in zip(named, fetched, strict=True):
        for path, name in read.files:
            files.append(_File(path, _unique(name, names), source, _stat(path), scratch / f"{len(files)}.arrow"))
    _convert(files, new / "rejected.jsonl", ask)
    if not any(len(file.contents) for file in files):
        reasons = sum((file.rejected for file in files), Counter[str]())
        reason, count = reasons.most_common(1)[0]
        uris = ", ".join(source.uri for source in fetched)
        raise FormatError(f"{uris} holds no usable row: {reason} ({count} of {reasons.total()})")
    _choose(named, files)
    for file in files:
        file.shards = write_shards(_kept_rows(file), new, file.name)
    notes = _notes(named, fetched, files)
    for file in files:  # their digests were read last
        if _stat(file.path) != file.stat:
            raise IngestError(f"{file.path} changed while it was read; try again when nobody writes to it")
    write_json(new / "snapshot.json", notes)
    return notes


def _with_defaults(source: SourceParams, params: IngestParams) -> SourceParams:
    """`source` with the format and columns of all; what it says itself is not mixed with what is said for all."""
    format = params.format if source.format == "auto" and not maps(source.columns) else source.format
    columns = source.columns or (params.columns if source.format in CLASSES else None)
    return source.model_copy(update={"format": format, "columns": columns})


def _unique(name: str, names: set[str]) -> str:
    """`name`, told apart from those that other files have, since rows are known by it."""
    unique, copy = name, 2
    while unique in names:
        unique, copy = f"{copy}/{name}", copy + 1
    names.add(unique)
    return unique


def _stat(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _convert(files: list[_File], rejected_lines: Path, ask: Ask | None) -> None:
    """Spool the rows of all files, and write the records that are none to `rejected_lines`."""
    progress = Progress("ingest", max(sum(file.stat[1] for file in files) >> 20, 1), "MiB", every=2.0)
    done = 0
    with rejected_lines.open("w", encoding="utf-8") as lines:
        for file in files:
            source = file.source
            reading = open_rows(file.path, source.format, source.columns, file.name, ask)
            contents = [file.contents]
            with pa.OSFile(str(file.spool), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as spool:
                rejected: list[Rejected] = []
                for table in tables(reading.rows, rejected):
                    spool.write_table(table)
                    contents.append(table["content"].to_numpy())
                    file.repaired.update(table["repairs"].combine_chunks().flatten().to_pylist())
                    file.rejected.update(row.reason for row in rejected)
                    lines.writelines(_rejection(row) + "\n" for row in rejected)
                    rejected.clear()
                    progress.update(done >> 20, f"{sum(map(len, contents)):,} rows of {file.name}")
            file.format, file.unused, file.contents = reading.format, reading.unused, np.concatenate(contents)
            done += file.stat[1]


def _choose(named: list[SourceParams], files: list[_File]) -> None:
    """Decide which rows of each source stay: those whose content hashes lowest, so that a choice survives new rows.

    A weight repeats no row. The source that is scarcest for its weight stays whole, and the others in proportion to it.
    """
    groups = [[file for file in files if file.source is source] for source in named]
    contents = [np.concatenate([file.contents for file in group]) for group in groups]
    most = [min(len(rows), source.cap or len(rows)) for source, rows in zip(named, contents, strict=True)]
    for i, source in enumerate(named):
        if source.weight is not None and most[i] == 0:
            raise IngestError(
                f"{public(source.uri)} has no usable row, so that its weight leaves none of the others; remove it"
            )
    scale = min((most[i] / source.weight for i, source in enumerate(named) if source.weight is not None), default=0.0)
    for i, source in enumerate(named):
        if source.weight is not None:
            most[i] = max(int(scale * source.weight + 1e-9), 1)
        kept = np.zeros(len(contents[i]), dtype=bool)
        kept[np.argsort(contents[i], kind="stable")[: most[i]]] = True
        ends = np.cumsum([len(file.contents) for file in groups[i]])
        for file, part in zip(groups[i], np.split(kept, ends[:-1]), strict=True):
            file.kept = part


def _kept_rows(file: _File) -> Iterator[pa.Table]:
    start = 0
    with pa.OSFile(str(file.spool)) as source, pa.ipc.open_stream(source) as spool:
        for batch in spool:
            kept = file.kept[start : start + len(batch)]
            yield pa.Table.from_batches([batch]).filter(pa.array(kept))
            start += len(batch)
    file.spool.unlink()


def _rejection(row: Rejected) -> str:
    entry = {"source": row.source, "reason": row.reason}
    try:
        text = json.dumps(row.record, allow_nan=False)
    except (ValueError, TypeError):
        text = ""
    if not text or len(text) > RECORD_CHARACTERS:
        # NaN, a date or a very long record: the start of its text, which is what a person looks at
        shown = text or repr(row.record)
        return json.dumps(entry | {"record": shown[:RECORD_CHARACTERS], "record_characters": len(shown)})
    return json.dumps(entry | {"record": row.record})


def _notes(named: list[SourceParams], fetched: list[Source], files: list[_File]) -> dict[str, Any]:
    """`snapshot.json`; it holds no time, so that the same sources make the same snapshot."""
    sources: list[dict[str, Any]] = []
    for source, read in zip(named, fetched, strict=True):
        of_source = [file for file in files if file.source is source]
        rejected = sum((file.rejected for file in of_source), Counter[str]())
        reasons = dict(rejected.most_common(REASONS))
        others = rejected.total() - sum(reasons.values())
        sources.append(
            {
                "uri": read.uri,
                "pinned": read.pinned,
                "weight": source.weight,
                "cap": source.cap,
                "columns": source.columns.model_dump(exclude_none=True) if source.columns else None,
                "rows": sum(int(file.kept.sum()) for file in of_source),
                "left_out": sum(int((~file.kept).sum()) for file in of_source),
                "rejected": reasons | ({"other reasons": others} if others else {}),
                "repaired": dict(sum((file.repaired for file in of_source), Counter[str]()).most_common()),
                "files": [
                    {
                        "name": file.name,
                        "sha256": sha256_file(file.path),
                        "container": container_of(Path(file.name)),
                        "format": file.format,
                        "rows": len(file.contents),
                        "rejected": file.rejected.total(),
                        "not_used": sorted(file.unused),
                        "shards": file.shards,
                    }
                    for file in of_source
                ],
            }
        )
    kept, left_out = (sum(source[key] for source in sources) for key in ("rows", "left_out"))
    rejected_records = sum(file.rejected.total() for file in files)
    return {
        "rows": kept,
        "left_out": left_out,
        "records": kept + left_out + rejected_records,
        "rejected": rejected_records,
        "shards": [shard for file in files for shard in file.shards],
        "sources": sources,
    }


def _totals(notes: dict[str, Any], key: str) -> dict[str, int]:
    return dict(sum((Counter(source[key]) for source in notes["sources"]), Counter[str]()).most_common())


def _require_plausible(notes: dict[str, Any], most: float, new: Path, root: Path) -> None:
    if notes["rejected"] > most * notes["records"]:
        first = next(read_rejected(new)).source
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(_totals(notes, "rejected").items())[:3])
        raise IngestError(
            f"{notes['rejected']:,} of {notes['records']:,} records cannot be used, more than "
            f"ingest.max_rejected_fraction ({most:g}) allows: {reasons}. The first is {first}; `retune inspect` shows "
            "each. Nothing was changed: mend the files, or insist with --replace"
        )
    before = (read_snapshot(root / INSTRUCTIONS) or {"rows": 0})["rows"]
    if notes["rows"] < LEAST_SHARE * before:
        raise IngestError(
            f"the sources hold {notes['rows']:,} rows and would replace {before:,}. Nothing was changed: name all "
            "sources at once, or insist with --replace"
        )
