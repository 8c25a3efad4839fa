"""One data snapshot put in the place of another: `data/instructions` and `data.dvc` change together or not at all.

A journal outlives a kill. What it finds half-done is undone by `recover`, which every later ingest and run calls: the
old snapshot is back, unless `data.dvc` had named the new one already.
"""

import re
import shutil
from pathlib import Path

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json, write_json, write_text

SCRATCH = WORK_DIR / "ingest"  # not in data/: what a kill leaves there would count as a change of the snapshot
JOURNAL = WORK_DIR / "ingest.json"
INSTRUCTIONS = Path("data/instructions")


def replace_instructions(new: Path, root: Path) -> bool:
    """Put the folder `new` (on the same file system) in the place of `data/instructions` and record it.

    Returns:
        Whether `data.dvc` now names another snapshot.

    Raises:
        GraphError: DVC could not record it; the old snapshot is back in its place.
    """
    target, old, journal = root / INSTRUCTIONS, root / SCRATCH / "old", root / JOURNAL
    before = _recorded(root)
    write_json(journal, {"data.dvc": before, "had_instructions": target.exists()})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        new.rename(target)
        graph.add_data(root)
    except BaseException:
        recover(root)
        raise
    changed = _recorded(root) != before
    journal.unlink()  # before `old` goes: from here on nothing is put back
    shutil.rmtree(root / SCRATCH)
    return changed


def recover(root: Path = Path(".")) -> bool:
    """Undo what a killed ingest left half-done; returns whether there was anything.

    What a kill leaves of DVC's own list of its processes goes too: the next command of DVC would fail on it.
    """
    graph.remove_truncated_locks(root)
    target, old, journal = root / INSTRUCTIONS, root / SCRATCH / "old", root / JOURNAL
    interrupted = journal.exists()
    if interrupted:
        was = read_json(journal)
        now = _recorded(root)
        if now == was["data.dvc"] or not _is_whole(now):
            if old.exists():
                shutil.rmtree(target, ignore_errors=True)
                old.rename(target)
            elif not was["had_instructions"]:
                shutil.rmtree(target, ignore_errors=True)
            if now != was["data.dvc"] and was["data.dvc"] is not None:
                write_text(root / "data.dvc", was["data.dvc"])
            elif was["data.dvc"] is None:
                (root / "data.dvc").unlink(missing_ok=True)
        journal.unlink()
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    return interrupted


def _recorded(root: Path) -> str | None:
    path = root / "data.dvc"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _is_whole(text: str | None) -> bool:
    """Whether DVC wrote `data.dvc` to its end, in place, with the path last; one that still has its remote is not."""
    return bool(text and re.search(r"md5: [0-9a-f]{32}\.dir\n", text) and text.endswith("path: data\n"))
