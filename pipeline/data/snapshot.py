"""Replaces one data snapshot by another: `data/instructions` and `data.dvc` change together or not at all.

A journal survives a kill; with it, `recover` restores the old snapshot, unless `data.dvc` already named the new one.
"""

import re
import shutil
from pathlib import Path

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json, write_json, write_text

SCRATCH = WORK_DIR / "ingest"  # outside data/, where leftovers of a kill would count as a change of the snapshot
JOURNAL = WORK_DIR / "ingest.json"
INSTRUCTIONS = Path("data/instructions")


def replace_instructions(new: Path, root: Path) -> bool:
    """Replace `data/instructions` by the folder `new` (on the same file system) and record it with DVC.

    Returns whether `data.dvc` now names another snapshot. Raises GraphError if DVC could not record it.
    """
    target, old, journal = root / INSTRUCTIONS, root / SCRATCH / "old", root / JOURNAL
    before = _read_data_dvc(root)
    write_json(journal, {"data.dvc": before, "had_instructions": target.exists()})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        new.rename(target)
        graph.add_data(root)
    except BaseException:
        (root / "data.dvc").unlink(missing_ok=True)  # it may name rows that DVC could not store; `recover` restores it
        recover(root)
        raise
    changed = _read_data_dvc(root) != before
    journal.unlink()  # before `old` is deleted: without a journal nothing is restored
    shutil.rmtree(root / SCRATCH)
    return changed


def recover(root: Path = Path(".")) -> bool:
    """Undo what a killed ingest left unfinished; returns whether there was anything."""
    graph.remove_truncated_locks(root)
    target, old, journal = root / INSTRUCTIONS, root / SCRATCH / "old", root / JOURNAL
    interrupted = journal.exists()
    if interrupted:
        before = read_json(journal)
        now = _read_data_dvc(root)
        # DVC writes the file in place, the path last; one that names a remote is the old one.
        complete = now and re.search(r"md5: [0-9a-f]{32}\.dir\n", now) and now.endswith("path: data\n")
        if now == before["data.dvc"] or not complete:
            if old.exists() or not before["had_instructions"]:
                shutil.rmtree(target, ignore_errors=True)
            if old.exists():
                old.rename(target)
            if before["data.dvc"] is None:
                (root / "data.dvc").unlink(missing_ok=True)
            elif now != before["data.dvc"]:
                write_text(root / "data.dvc", before["data.dvc"])
        journal.unlink()
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    return interrupted


def _read_data_dvc(root: Path) -> str | None:
    path = root / "data.dvc"
    return path.read_text(encoding="utf-8") if path.exists() else None
