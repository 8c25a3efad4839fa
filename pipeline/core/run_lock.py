"""Locks that the kernel releases when a process dies: one per project (run, ingest, status), one per GPU."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core.files import WORK_DIR


class RunUnderWay(RuntimeError):
    """Another process holds the project's run lock."""


@contextmanager
def only_run(root: Path = Path(".")) -> Iterator[int]:
    """Hold the project's run lock; yields its descriptor, with which a child that inherits it can release the lock."""
    (root / WORK_DIR).mkdir(exist_ok=True)
    with (root / WORK_DIR / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "?"
            raise RunUnderWay(f"a run is under way here (process {holder}); see `retune status`") from None
        name_holder(lock.fileno())
        yield lock.fileno()


def name_holder(lock: int) -> None:
    """Write this process's number into the lock file: that of the flow, which inherits the lock from `retune run`."""
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


@contextmanager
def only_on_gpus(gpus: Iterable[str], on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the machine-wide lock of each of `gpus` (UUIDs), in one order; waits for trainings of other projects."""
    with ExitStack() as stack:
        for gpu in sorted(gpus):
            path = Path(tempfile.gettempdir()) / f"retune-gpu-{gpu}.lock"
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except PermissionError:  # another user's file; read access is enough to lock it
                lock = os.open(path, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait(f"another training uses the GPU {gpu} ({path}); waiting for it to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
