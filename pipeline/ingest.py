"""ingest: outside data in, a new snapshot of validated conversations in `data/` and its `data.dvc` out.

The only writer of `data/`. Whatever the sources are, the snapshot has one form: shards (see `shards`), `rejected.jsonl`
with every record that could not be used, and `snapshot.json` that says where each row came from. What cannot be read as
instruction data is refused before anything changes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.core.files import sha256_file, write_json
from pipeline.core.progress import Progress
from pipeline.data.containers import Block, container_of
from pipeline.data.conversion import SCHEMA, Batch, convert_blocks
from pipeline.data.formats import Ask, Recipe, maps, recognised_blocks
from pipeline.data.json_text import FormatError
from pipeline.data.records import Rejected
from pipeline.data.shards import ShardWriter, read_rejected, read_snapshot
from pipeline.data.snapshot import INSTRUCTIONS, SCRATCH, recover, replace_instructions
from pipeline.data.sources import Source, fetch, public
from pipeline.params import IngestParams, SourceParams

RECORD_CHARACTERS = 4096  # of a rejected record that are kept
CLASSES = ("auto", "classification")  # formats beside which columns can be named
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
    source: int  # index of the source it belongs to
    format: str = ""
    rows: int = 0
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
        root: the project's top folder.
        replace: also where so many records are rejected, or so few rows come, that something seems wrong.
        ask: answers which format or columns a file has that fits none or several.

    Raises:
        FormatError: a file is unreadable, of no known format, or the sources hold no usable row.
        SourceError: a source is not pinned or cannot be had.
        IngestError: no source is named, a file changed while it was read, too many records are rejected, or far fewer
            rows come than there were.
        WorkerError: a process that converts rows was killed.
        GraphError: DVC could not record the snapshot.
        After any of them `data/` is as it was.
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
    rejected, repaired = (
        sum((Counter(source[key]) for source in notes["sources"]), Counter[str]()) for key in ("rejected", "repaired")
    )
    return Ingested(
        files=[file for source in notes["sources"] for file in source["files"]],
        rows=notes["rows"],
        rejected=dict(rejected.most_common()),
        repaired=dict(repaired.most_common()),
        left_out=notes["left_out"],
        changed=changed,
    )


def _require_plausible(notes: dict[str, Any], most: float, new: Path, root: Path) -> None:
    rejected = sum((Counter(source["rejected"]) for source in notes["sources"]), Counter[str]())
    if notes["rejected"] > most * notes["records"]:
        first = next(read_rejected(new)).source
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in rejected.most_common(3))
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


def collect(
    params: IngestParams, sources: Sequence[str], new: Path, scratch: Path, ask: Ask | None = None
) -> dict[str, Any]:
    """Write shards, `rejected.jsonl` and `snapshot.json` to the folder `new`; returns what `snapshot.json` holds.

    Args:
        scratch: a folder for downloads and for rows that wait.

    Raises:
        FormatError, SourceError, IngestError, WorkerError: as `ingest`.
    """
    wanted = [SourceParams(uri=uri) for uri in sources] or params.sources
    if not wanted:
        raise IngestError("no source is named: `retune ingest SOURCE`, or list them in ingest.sources of params.yaml")
    wanted = [
        source.model_copy(
            update={
                # What a source says itself is not mixed with what is said for all.
                "format": params.format if source.format == "auto" and not maps(source.columns) else source.format,
                "columns": source.columns or (params.columns if source.format in CLASSES else None),
            }
        )
        for source in wanted
    ]
    fetched = [fetch(each.uri, params, scratch / "fetched" / str(i)) for i, each in enumerate(wanted)]
    new.mkdir(parents=True)
    files = _files(fetched)
    states = [_state(file.path) for file in files]
    left_out = _write_rows(files, wanted, new, scratch, ask)
    if not any(file.rows for file in files):
        reason, count = (rejected := sum((file.rejected for file in files), Counter[str]())).most_common(1)[0]
        uris = ", ".join(source.uri for source in fetched)
        raise FormatError(f"{uris} holds no usable row: {reason} ({count} of {rejected.total()})")
    notes = _notes(files, fetched, wanted, left_out)  # reads the files once more, for their digests
    for file, state in zip(files, states, strict=True):
        if _state(file.path) != state:
            raise IngestError(f"{file.path} changed while it was read; try again when nobody writes to it")
    write_json(new / "snapshot.json", notes)
    return notes


def _files(fetched: list[Source]) -> list[_File]:
    """Every file of every source; a name that another file has already is told apart, since rows are known by it."""
    files: list[_File] = []
    names: set[str] = set()
    for number, source in enumerate(fetched):
        for path, name in source.files:
            unique, copy = name, 2
            while unique in names:
                unique, copy = f"{copy}/{name}", copy + 1
            names.add(unique)
            files.append(_File(path, unique, number))
    return files


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _write_rows(files: list[_File], wanted: list[SourceParams], new: Path, scratch: Path, ask: Ask | None) -> list[int]:
    """Write all shards and `rejected.jsonl`; returns how many rows of each source its weight or cap keeps out."""
    thinned = {i for i, source in enumerate(wanted) if source.weight is not None or source.cap is not None}
    contents: dict[int, list[np.ndarray[Any, Any]]] = {i: [] for i in thinned}
    spools: list[tuple[_File, Path]] = []
    with (new / "rejected.jsonl").open("w", encoding="utf-8") as rejections:
        by_name = {file.name: file for file in files}
        for name, batches in groupby(_converted(files, wanted, ask), key=lambda pair: pair[0].name):
            file = by_name[name]
            spool = scratch / f"{len(spools)}.arrow" if file.source in thinned else None
            if spool is None:
                writer = ShardWriter(new, file.name)
                for _, batch in batches:
                    _count(file, batch, rejections)
                    writer.add(batch.table)
                file.shards = writer.close()
                continue
            # How much of a source is kept is known when all are read: its rows wait on the disk.
            spools.append((file, spool))
            with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
                for _, batch in batches:
                    _count(file, batch, rejections)
                    stream.write_table(batch.table)
                    contents[file.source].append(batch.table["content"].to_numpy())
    kept = _kept(wanted, {i: np.concatenate(parts) if parts else np.array([]) for i, parts in contents.items()})
    left_out = [0] * len(wanted)
    at = Counter[int]()
    for file, spool in spools:
        writer = ShardWriter(new, file.name)
        with pa.OSFile(str(spool)) as rows, pa.ipc.open_stream(rows) as stream:
            for part in stream:
                mask = kept[file.source][at[file.source] : at[file.source] + len(part)]
                at[file.source] += len(part)
                writer.add(pa.Table.from_batches([part]).filter(pa.array(mask)))
                left_out[file.source] += int((~mask).sum())
        file.shards = writer.close()
        spool.unlink()
    return left_out


def _converted(files: list[_File], wanted: list[SourceParams], ask: Ask | None) -> Iterator[tuple[_File, Batch]]:
    """The batches of all files in order, with a line of progress every two seconds."""
    sizes = [max(file.path.stat().st_size, 1) for file in files]
    progress = Progress("ingest", max(sum(sizes) >> 20, 1), "MiB", every=2.0)
    before = dict(zip(map(id, files), [0, *np.cumsum(sizes).tolist()], strict=False))

    def blocks() -> Iterator[tuple[_File, Block, Recipe]]:
        for file in files:
            source = wanted[file.source]
            for pair in recognised_blocks(file.path, source.format, source.columns, file.name, ask):
                yield file, *pair

    rows = 0
    for file, batch in convert_blocks(blocks()):
        rows += len(batch.table)
        progress.update((before[id(file)] + batch.position) >> 20, f"{rows:,} rows, {file.name}")
        yield file, batch


def _kept(wanted: list[SourceParams], contents: dict[int, np.ndarray[Any, Any]]) -> dict[int, np.ndarray[Any, Any]]:
    """Which rows of each thinned source stay: those whose content hashes lowest, so that a choice survives new rows.

    A weight repeats no row. The source that is scarcest for its weight stays whole, and the others in proportion to it.
    """
    most = {i: min(len(rows), wanted[i].cap or len(rows)) for i, rows in contents.items()}
    weights = {i: weight for i in contents if (weight := wanted[i].weight) is not None}
    if weights:
        scale = min(most[i] / weight for i, weight in weights.items())
        if scale == 0:
            empty = next(wanted[i].uri for i in weights if most[i] == 0)
            raise IngestError(
                f"{public(empty)} has no usable row, so that its weight leaves none of the others; remove it"
            )
        most |= {i: max(int(scale * weight + 1e-9), 1) for i, weight in weights.items()}
    kept = {}
    for i, rows in contents.items():
        kept[i] = np.zeros(len(rows), dtype=bool)
        kept[i][np.argsort(rows, kind="stable")[: most[i]]] = True
    return kept


def _count(file: _File, batch: Batch, rejections: IO[str]) -> None:
    file.format = batch.recipe.format
    file.rows += len(batch.table)
    file.repaired.update(batch.table["repairs"].combine_chunks().flatten().to_pylist())
    file.unused |= batch.unused
    for row in batch.rejected:
        file.rejected[row.reason] += 1
        rejections.write(_rejection(row) + "\n")


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


def _notes(
    files: list[_File], fetched: list[Source], wanted: list[SourceParams], left_out: list[int]
) -> dict[str, Any]:
    """`snapshot.json`; it holds no time, so that the same sources make the same snapshot."""
    sources = []
    for number, (source, named) in enumerate(zip(fetched, wanted, strict=True)):
        own = [file for file in files if file.source == number]
        sources.append(
            {
                "uri": source.uri,
                "pinned": source.pinned,
                "weight": named.weight,
                "cap": named.cap,
                "columns": named.columns.model_dump(exclude_none=True) if named.columns else None,
                "rows": sum(file.rows for file in own) - left_out[number],
                "left_out": left_out[number],
                "rejected": _counts(sum((file.rejected for file in own), Counter[str]())),
                "repaired": dict(sum((file.repaired for file in own), Counter[str]()).most_common()),
                "files": [
                    {
                        "name": file.name,
                        "sha256": sha256_file(file.path),
                        "container": container_of(Path(file.name)),
                        "format": file.format,
                        "rows": file.rows,
                        "rejected": file.rejected.total(),
                        "not_used": sorted(file.unused),
                        "shards": file.shards,
                    }
                    for file in own
                ],
            }
        )
    rejected = sum(file.rejected.total() for file in files)
    rows = sum(file.rows for file in files) - sum(left_out)
    return {
        "records": rows + rejected + sum(left_out),
        "rows": rows,
        "rejected": rejected,
        "left_out": sum(left_out),
        "shards": [shard for file in files for shard in file.shards],
        "sources": sources,
    }


def _counts(reasons: Counter[str]) -> dict[str, int]:
    counts = dict(reasons.most_common(REASONS))
    others = reasons.total() - sum(counts.values())
    return counts | ({"other reasons": others} if others else {})
