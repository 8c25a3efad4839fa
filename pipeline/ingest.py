"""ingest: reads data sources and replaces the snapshot in `data/`; the only writer of that folder.

A snapshot has shards of validated conversations (see `shards`), `rejected.jsonl` with every record that could not be
used, and `snapshot.json`, which says where each row came from. A source that cannot be read changes nothing.
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
from pipeline.data.formats import Ask, is_complete, open_rows
from pipeline.data.readers import FormatError, container_of
from pipeline.data.records import Rejected
from pipeline.data.shards import SCHEMA, read_rejected, read_snapshot, tabulate, write_shards
from pipeline.data.snapshot import INSTRUCTIONS, SCRATCH, recover, replace_instructions
from pipeline.data.sources import Source, fetch, without_secrets
from pipeline.params import IngestParams, SourceParams

RECORD_CHARACTERS = 4096  # longer rejected records are cut
MIN_SHARE = 0.5  # of the previous snapshot's rows; fewer are probably a mistake
MAX_REASONS = 20  # listed per source in snapshot.json; all others are counted together


class IngestError(ValueError):
    """The sources cannot become a snapshot; the message says which source and why."""


@dataclass(frozen=True)
class IngestResult:
    files: list[dict[str, Any]]  # as in snapshot.json
    rows: int
    rejected: dict[str, int]  # reason → records
    repaired: dict[str, int]  # repair → rows
    left_out: int  # rows left out by a weight or a cap
    changed: bool  # whether data.dvc now names another snapshot


@dataclass
class _File:
    path: Path
    name: str
    source: SourceParams
    stat: tuple[int, int, int]
    spool: Path  # holds all its rows, until weights and caps decide which ones stay
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    # Set by `_convert`, `_choose_rows` and `write_snapshot`:
    format: str = field(init=False)
    unused: set[str] = field(init=False)  # columns and message keys with a value that were not read
    hashes: NDArray[np.uint64] = field(init=False)  # (N,) of the rows' contents
    kept: NDArray[np.bool_] = field(init=False)  # (N,) by weight and cap
    shards: list[str] = field(init=False)

    def notes(self) -> dict[str, Any]:
        """Its entry in `snapshot.json`."""
        return {
            "name": self.name,
            "sha256": sha256_file(self.path),
            "container": container_of(Path(self.name)),
            "format": self.format,
            "rows": len(self.hashes),
            "rejected": self.rejected.total(),
            "not_used": sorted(self.unused),
            "shards": self.shards,
        }


def ingest(
    params: IngestParams,
    uris: Sequence[str] = (),
    root: Path = Path("."),
    replace: bool = False,
    ask: Ask | None = None,
) -> IngestResult:
    """Replace `data/instructions` by the rows of all sources and record the snapshot in `data.dvc`.

    The `uris` are read with `params.format` and `params.columns`; without any, `params.sources` are read. `replace`
    skips the checks for too many rejected records and too few rows. Raises FormatError, SourceError, IngestError or
    GraphError if a file, a source, all together, or DVC is at fault.
    """
    recover(root)
    scratch = root / SCRATCH
    try:
        notes = write_snapshot(params, uris, scratch / "new", scratch, ask)
        if not replace:
            _require_plausible(notes, params.max_rejected_fraction, scratch / "new", root)
        changed = replace_instructions(scratch / "new", root)
    finally:
        recover(root)
    files = [file for source in notes["sources"] for file in source["files"]]
    rejected, repaired = _totals(notes, "rejected"), _totals(notes, "repaired")
    return IngestResult(files, notes["rows"], rejected, repaired, notes["left_out"], changed)


def write_snapshot(
    params: IngestParams, uris: Sequence[str], new: Path, scratch: Path, ask: Ask | None = None
) -> dict[str, Any]:
    """Write shards, `rejected.jsonl` and `snapshot.json` to the folder `new`; returns what `snapshot.json` contains."""
    sources = [SourceParams(uri=uri) for uri in uris] or params.sources
    if not sources:
        raise IngestError("no source is given: use `retune ingest SOURCE`, or set ingest.sources in params.yaml")
    sources = [_with_defaults(source, params) for source in sources]
    fetched = [fetch(source.uri, params, scratch / "fetched" / str(i)) for i, source in enumerate(sources)]
    new.mkdir(parents=True)
    files: list[_File] = []
    names: set[str] = set()
    for source, fetched_source in zip(sources, fetched, strict=True):
        for path, name in fetched_source.files:
            unique, copy = name, 2
            while unique in names:  # `Row.source` contains it
                unique, copy = f"{copy}/{name}", copy + 1
            names.add(unique)
            files.append(_File(path, unique, source, _stat(path), scratch / f"{len(files)}.arrow"))
    _convert(files, new / "rejected.jsonl", ask)
    if not any(len(file.hashes) for file in files):
        reasons = sum((file.rejected for file in files), Counter[str]())
        reason, records = reasons.most_common(1)[0]
        shown = ", ".join(source.uri for source in fetched)
        raise FormatError(f"no usable row in {shown}: {reason} ({records} of {reasons.total()})")
    _choose_rows(sources, files)
    for file in files:
        file.shards = write_shards(_kept_rows(file), new, file.name)
    notes = _notes(sources, fetched, files)
    for file in files:  # after `_notes`, which reads them once more
        if _stat(file.path) != file.stat:
            raise IngestError(f"{file.path} changed while it was read; try again when nobody writes to it")
    write_json(new / "snapshot.json", notes)
    return notes


def _with_defaults(source: SourceParams, params: IngestParams) -> SourceParams:
    """`source` with `params.format` and `params.columns` if it has none of its own that would contradict them."""
    format = params.format if source.format == "auto" and not is_complete(source.columns) else source.format
    columns = source.columns or (params.columns if source.format in ("auto", "classification") else None)
    return source.model_copy(update={"format": format, "columns": columns})


def _stat(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _convert(files: list[_File], rejected_lines: Path, ask: Ask | None) -> None:
    """Spool the rows of all files, and write the records that cannot be used to `rejected_lines`."""
    progress = Progress("ingest", max(sum(file.stat[1] for file in files) >> 20, 1), "MiB", every=2.0)
    done = 0
    with rejected_lines.open("w", encoding="utf-8") as lines:
        for file in files:
            source = file.source
            row_file = open_rows(file.path, source.format, source.columns, file.name, ask)
            hashes = [np.array([], np.uint64)]
            with pa.OSFile(str(file.spool), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as spool:
                rejected: list[Rejected] = []
                for table in tabulate(row_file.rows, rejected):
                    spool.write_table(table)
                    hashes.append(table["content"].to_numpy())
                    file.repaired.update(table["repairs"].combine_chunks().flatten().to_pylist())
                    file.rejected.update(row.reason for row in rejected)
                    lines.writelines(_rejected_line(row) + "\n" for row in rejected)
                    rejected.clear()
                    progress.update(done >> 20, f"{sum(map(len, hashes)):,} rows of {file.name}")
            file.format, file.unused, file.hashes = row_file.format, row_file.unused, np.concatenate(hashes)
            done += file.stat[1]


def _choose_rows(sources: list[SourceParams], files: list[_File]) -> None:
    """Apply weights and caps: keep the rows with the lowest hashes, so that new rows change the choice little.

    The source with the fewest rows for its weight is kept whole, and the others in proportion to it.
    """
    groups = [[file for file in files if file.source is source] for source in sources]
    hashes = [np.concatenate([file.hashes for file in group]) for group in groups]
    limits = [min(len(rows), source.cap or len(rows)) for source, rows in zip(sources, hashes, strict=True)]
    weighted = [(i, source.weight) for i, source in enumerate(sources) if source.weight is not None]
    for i, _ in weighted:
        if limits[i] == 0:
            raise IngestError(
                f"{without_secrets(sources[i].uri)} has a weight but no usable row, so no other weighted source could "
                "keep any; remove it from ingest.sources"
            )
    scale = min((limits[i] / weight for i, weight in weighted), default=0.0)
    for i, weight in weighted:
        limits[i] = max(int(scale * weight + 1e-9), 1)
    for group, row_hashes, limit in zip(groups, hashes, limits, strict=True):
        kept = np.zeros(len(row_hashes), dtype=bool)
        kept[np.argsort(row_hashes, kind="stable")[:limit]] = True
        ends = np.cumsum([len(file.hashes) for file in group])
        for file, kept_of_file in zip(group, np.split(kept, ends[:-1]), strict=True):
            file.kept = kept_of_file


def _kept_rows(file: _File) -> Iterator[pa.Table]:
    start = 0
    with pa.OSFile(str(file.spool)) as source, pa.ipc.open_stream(source) as spool:
        for batch in spool:
            kept = file.kept[start : start + len(batch)]
            yield pa.Table.from_batches([batch]).filter(pa.array(kept))
            start += len(batch)
    file.spool.unlink()


def _rejected_line(row: Rejected) -> str:
    entry = {"source": row.source, "reason": row.reason}
    try:
        text = json.dumps(row.record, allow_nan=False)
        if len(text) <= RECORD_CHARACTERS:
            return json.dumps(entry | {"record": row.record})
    except (ValueError, TypeError):  # NaN, a date, …
        text = repr(row.record)
    return json.dumps(entry | {"record": text[:RECORD_CHARACTERS], "record_characters": len(text)})


def _notes(sources: list[SourceParams], fetched: list[Source], files: list[_File]) -> dict[str, Any]:
    """The content of `snapshot.json`. It has no timestamp, so the same sources give the same snapshot."""
    entries: list[dict[str, Any]] = []
    for source, fetched_source in zip(sources, fetched, strict=True):
        source_files = [file for file in files if file.source is source]
        rejected = sum((file.rejected for file in source_files), Counter[str]())
        reasons = dict(rejected.most_common(MAX_REASONS))
        others = rejected.total() - sum(reasons.values())
        entries.append(
            {
                "uri": fetched_source.uri,
                "pinned": fetched_source.pinned,
                "weight": source.weight,
                "cap": source.cap,
                "columns": source.columns.model_dump(exclude_none=True) if source.columns else None,
                "rows": sum(int(file.kept.sum()) for file in source_files),
                "left_out": sum(int((~file.kept).sum()) for file in source_files),
                "rejected": reasons | ({"other reasons": others} if others else {}),
                "repaired": dict(sum((file.repaired for file in source_files), Counter[str]()).most_common()),
                "files": [file.notes() for file in source_files],
            }
        )
    counts = {key: sum(entry[key] for entry in entries) for key in ("rows", "left_out")}
    counts["rejected"] = sum(file.rejected.total() for file in files)
    shards = [shard for file in files for shard in file.shards]
    return counts | {"records": sum(counts.values()), "shards": shards, "sources": entries}


def _totals(notes: dict[str, Any], key: str) -> dict[str, int]:
    return dict(sum((Counter(source[key]) for source in notes["sources"]), Counter[str]()).most_common())


def _require_plausible(notes: dict[str, Any], max_fraction: float, new: Path, root: Path) -> None:
    if notes["rejected"] > max_fraction * notes["records"]:
        first = next(read_rejected(new)).source
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(_totals(notes, "rejected").items())[:3])
        raise IngestError(
            f"{notes['rejected']:,} of {notes['records']:,} records cannot be used, more than "
            f"ingest.max_rejected_fraction ({max_fraction:g}) allows: {reasons}. The first is {first}; `retune "
            "inspect` shows them. Nothing was changed: fix the files, or use --replace to ingest the other records"
        )
    before = (read_snapshot(root / INSTRUCTIONS) or {"rows": 0})["rows"]
    if notes["rows"] < MIN_SHARE * before:
        raise IngestError(
            f"the sources have {notes['rows']:,} rows and would replace {before:,}. Nothing was changed: give all "
            "sources at once, or use --replace to keep only these rows"
        )
