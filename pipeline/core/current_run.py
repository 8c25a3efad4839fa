"""Progress of the current run, in a file that its flow writes and `retune status` reads."""

import getpass
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.core.processes import identity
from pipeline.core.progress import LINE

FILE = WORK_DIR / "run.json"
ETA = re.compile(r"ETA ([\d:]+)")


@contextmanager
def recorded(trigger: str) -> Iterator[None]:
    """Record who started a run, why and when; the record is valid while the run's process lives."""
    begun = {"process": identity(), "trigger": trigger, "by": getpass.getuser(), "since": time.time()}
    write_json(FILE, begun | {"stage": None, "percent": None, "eta": None, "line": ""})
    try:
        yield
    finally:
        FILE.unlink(missing_ok=True)


def record_stage(stage: str, line: str = "") -> None:
    """Record the run's current stage and last line of progress; does nothing outside of a run."""
    with suppress(OSError, ValueError):
        progress, eta = LINE.match(line), ETA.search(line)
        now = {"stage": stage, "percent": int(progress["percent"]) if progress else None, "line": line}
        write_json(FILE, read_json(FILE) | now | {"eta": eta[1] if eta else None})
