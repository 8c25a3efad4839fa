"""Forks of a process that has imported everything, for the commands and functions that tests ask for.

Python takes ten seconds to import PyTorch, transformers, PEFT and MLflow. So `retune`, `dvc` and flows of a test are
forks of one process that did it once (`preloaded_server.py`): processes with their own folder, environment, output and
exit status. `RETUNE_TESTS_REAL=1` starts real ones. As a program: whoever started it sees such a fork as its child.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_SECONDS = 180
FOLDER = Path(os.environ["RETUNE_TESTS_CACHE"]) / "preloaded"  # conftest makes it; one for all workers of a test run
ADDRESS = FOLDER / "socket"
INTERPRETER = FOLDER / "venv" / "bin" / "python"  # beside which `retune` is such a fork, whatever starts it
REAL = INTERPRETER.with_name("python3")
SERVER = Path(__file__).with_name("preloaded_server.py")
# `python -m` of these, as tests and the product start them, alone or behind the line of `ending_with_parent`, are
# forks; all else is Python.
PYTHON = f"""\
module= skipped=
if [ "$1" = -m ]; then module=$2 skipped=2; fi
if [ "$1 $2" = "-u -m" ]; then module=$3 skipped=3; fi
if [ "$1 $5 $6" = "-c -u -m" ]; then module=$7 skipped=7; fi
case $module in
    dvc | flows | flows.setup | pipeline | pipeline.train) shift $skipped; exec {REAL} -IS {__file__} $module "$@";;
esac
exec {REAL} "$@\""""


@dataclass(frozen=True)
class Ended:
    status: int  # as subprocess has it: minus the number of the signal that killed it
    events: int  # see `preloaded_server.count_events`
    answer: Any  # of a function that was not killed

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Child:
    """A forked command or function; it is killed when this process ends before it."""

    def __init__(self, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        self._socket = _connect()
        socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], descriptors)
        self._lines = self._socket.makefile()
        self.pid = int(self._lines.readline())

    def wait(self) -> int:
        with self._socket, self._lines:
            return int(self._lines.readline())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def run(
    program: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], typed: str = ""
) -> "subprocess.CompletedProcess[str]":
    """`retune` or `dvc` with these arguments and `typed` as its input, to its end."""
    with ExitStack() as stack:
        inputs, output, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        inputs.write(typed)
        inputs.seek(0)
        request = {"program": program, "arguments": list(arguments), "folder": str(folder)}
        descriptors = [inputs.fileno(), output.fileno(), errors.fileno()]
        status = Child(request | {"environment": dict(environment)}, descriptors).wait()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([program, *arguments], status, output.read(), errors.read())


def call(
    function: Callable[..., Any],
    *arguments: Any,
    kill_at: int = 0,
    started: Callable[[Child], None] = lambda child: None,
) -> Ended:
    """`function(*arguments)`, of paths and what JSON can hold, in a fork; its answer as JSON gives it back.

    Args:
        kill_at: the event at which it is killed; 0: none.
        started: is given the child, for a test that kills it at a moment of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        request = {
            "function": f"{function.__module__}:{function.__qualname__}",
            "arguments": [str(each) if isinstance(each, Path) else each for each in arguments],
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "report": str(report),
            "kill_at": kill_at,
        }
        with open(os.devnull) as nothing, (Path(folder) / "log").open("w+") as log:
            child = Child(request, [nothing.fileno(), log.fileno(), log.fileno()])
            started(child)
            status = child.wait()
            log.seek(0)
            assert status in (0, -signal.SIGKILL), log.read()
        told = json.loads(report.read_text()) if status == 0 else {"events": 0, "answer": None}
        return Ended(status, **told)


def _connect() -> socket.socket:
    """To the process, which is started now if nobody did that before."""
    FOLDER.mkdir(exist_ok=True)
    with locked(FOLDER / "socket.lock"):
        if not ADDRESS.exists():
            make_interpreter()
            with (FOLDER / "log").open("w") as log:
                command = [str(INTERPRETER), str(SERVER), str(ADDRESS), os.environ["RETUNE_TESTS_OWNER"]]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            deadline = time.monotonic() + READY_SECONDS
            while not ADDRESS.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((FOLDER / "log").read_text())
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(ADDRESS))
    return connection


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_interpreter() -> None:
    """The virtual environment that runs the tests, with this as its `retune`."""
    FOLDER.mkdir(exist_ok=True)
    with locked(FOLDER / "venv.lock"):
        if INTERPRETER.exists():
            return
        own, programs = Path(sys.prefix), INTERPRETER.parent
        programs.mkdir(parents=True)
        (programs.parent / "lib").symlink_to(own / "lib")
        (programs.parent / "pyvenv.cfg").write_bytes((own / "pyvenv.cfg").read_bytes())
        for name, text in (("python", PYTHON), ("retune", f'exec {REAL} -IS {__file__} pipeline "$@"')):
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        for program in (own / "bin").iterdir():
            if program.name not in ("python", "retune"):
                target = program.resolve() if program.name.startswith("python") else program
                (programs / program.name).symlink_to(target)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with whoever started it
    umask = os.umask(0)
    command = {"program": sys.argv[1], "arguments": sys.argv[2:], "umask": umask}
    command |= {"folder": os.getcwd(), "environment": dict(os.environ)}
    lock = os.environ.get("RETUNE_RUN_LOCK") if sys.argv[1] == "flows" else None  # a descriptor that it inherits
    status = Child(command, [0, 1, 2, *([int(lock)] if lock else [])]).wait()
    if status < 0:
        os.kill(os.getpid(), -status)  # it ended by this signal, and so do we
    sys.exit(status)
