"""The project's run lock: one run, ingest or look at what is stale at a time, held by the kernel for a process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.files import WORK_DIR


class RunUnderWay(RuntimeError):
    """Another process holds the project's run lock."""


@contextmanager
def only_run() -> Iterator[int]:
    """Hold the project's run lock: two runs would write the same artifacts, or read data that changes under them.

    Yields the lock's file descriptor: a child that inherits it can let go of the lock for both.
    """
    WORK_DIR.mkdir(exist_ok=True)
    with (WORK_DIR / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunUnderWay(f"a run is under way here (process {lock.read().strip() or '?'})") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock.fileno()
