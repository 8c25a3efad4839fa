"""ingest: outside data in, a new immutable snapshot in `data/` and its `data.dvc` out. The only writer of `data/`.

The source's bytes are kept as they are; what cannot be read as instruction data is refused before anything changes.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline import graph
from pipeline.files import WORK_DIR, whole_directory
from pipeline.formats import FormatError, Rejected, find_files, read_rows
from pipeline.params import IngestParams


@dataclass(frozen=True)
class Ingested:
    files: list[str]
    rows: int
    rejected: dict[str, int]  # reason → rows; prepare drops these, with its own limit
    changed: bool  # whether data.dvc now names another snapshot


def ingest(params: IngestParams, source: Path, root: Path = Path(".")) -> Ingested:
    """Replace `data/instructions` by the files at `source` and record the snapshot in `data.dvc`.

    Args:
        source: a .json or .jsonl file, or a folder of them.
        root: the project's top folder.

    Raises:
        FormatError: a file is unreadable, of no known format, or holds no usable row; `data/` stays as it was.
        GraphError: DVC could not record the snapshot; `dvc checkout --force data.dvc` restores the old one.
    """
    files = find_files(source)
    rows, rejected = 0, Counter[str]()
    for file in files:
        for row in read_rows(file, params.format):
            if isinstance(row, Rejected):
                rejected[row.reason] += 1
            else:
                rows += 1
    if rows == 0:
        reason, count = rejected.most_common(1)[0]
        raise FormatError(f"{source} holds no usable row: {count} of {rejected.total()} because a row {reason}")
    before = (root / "data.dvc").read_bytes() if (root / "data.dvc").exists() else b""
    names = [
        _marked(Path(file.name) if source.is_file() else file.relative_to(source), params.format) for file in files
    ]
    if len(set(names)) < len(names):
        raise FormatError(f"{source} holds files whose names become the same with their format; rename one of them")
    # Not made in data/: what a kill leaves there would count as a change of the snapshot.
    with whole_directory(root / "data" / "instructions", scratch=root / WORK_DIR) as folder:
        for file, name in zip(files, names, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    graph.add_data(root)
    changed = (root / "data.dvc").read_bytes() != before
    return Ingested(files=names, rows=rows, rejected=dict(rejected), changed=changed)


def _marked(name: Path, format: str) -> str:
    """`name` with the format a person named in it (rows.json → rows.alpaca.json), where `read_rows` looks for it."""
    if format == "auto" or name.stem.endswith(f".{format}"):
        return str(name)
    return str(name.with_suffix(f".{format}{name.suffix}"))
