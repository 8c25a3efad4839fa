"""Processes that each do one call at a time, for work that Python does on one core only.

`ProcessPoolExecutor` and loky wait for ever when a process is killed half-way through a long answer, as the
out-of-memory killer does. Here each process has a pipe of its own, so that its end is seen whatever it was doing.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from pipeline.core.processes import end_with_parent

P = ParamSpec("P")
T = TypeVar("T")


class WorkerError(RuntimeError):
    """A process ended without an answer."""


class Workers:
    """`count` processes, by default one for each core that this process may use; `prepare` is called in each first.

    Raises:
        WorkerError: from the future of `submit`: the process was killed, most likely for want of memory.
    """

    def __init__(self, prepare: Callable[[], None], count: int | None = None) -> None:
        self.count = count or available_cores()
        # A fork would copy this process's threads and locks half-way; spawned ones are clean.
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self.count)
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, prepare, os.getpid()), daemon=True)
            process.start()
            self._processes.append(process)
            theirs.close()
            self._idle.put(ours)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have `function` called by the next process that is free; what it raises comes back with the future."""
        return self._threads.submit(self._call, function, args, kwargs)

    def _call(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        connection = self._idle.get()
        try:
            connection.send((function, args, kwargs))
            value, error = connection.recv()
        except (EOFError, OSError):
            raise WorkerError(
                "a worker process was killed, most likely because memory ran out; free some and try again"
            ) from None
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes at once, calls under way included."""
        for process in self._processes:
            process.kill()
            process.join()
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()


def available_cores() -> int:
    """Cores that this process may use; fewer than the machine has under taskset, a batch system or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(connection: Connection, prepare: Callable[[], None], parent: int) -> None:
    end_with_parent(parent=parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    prepare()
    while True:
        function, args, kwargs = connection.recv()
        answer: tuple[object, Exception | None]
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:
            error.add_note(traceback.format_exc())  # whence it comes does not travel with it
            answer = None, error
        try:
            connection.send(answer)
        except OSError:
            raise  # the parent is gone
        except Exception as error:
            connection.send((None, WorkerError(f"{function.__name__} answered what cannot be sent: {error}")))
