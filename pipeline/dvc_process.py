"""DVC in a process of its own, loaded once for as many commands as it is given: loading it takes longer than most.

It ends with its parent, kill -9 included, and takes a stage's processes with it. A DVC that was killed leaves its name
on the list of who is at work on which path; what only the dead are at work on is free here.
"""

import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pipeline.process import end_group, environment, python_ending_with_parent

PATIENCE = 5.0  # seconds for another DVC to be done with a path; for the whole repository DVC itself waits three
BUSY = ("is busy", "Unable to read RWLock-file")  # of DVC's messages


class DvcError(RuntimeError):
    """DVC said no; the message is its own."""


class DvcProcess:
    """A DVC process in the project `root`, started with its first command. One command at a time, from one thread."""

    def __init__(self, root: Path = Path(".")) -> None:
        self.root = root.resolve()
        self._child: subprocess.Popen[str] | None = None
        self._end = ""  # what the line begins with that ends the lines of a command

    def __enter__(self) -> "DvcProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Have it load while other work is done."""
        if self._child is not None and self._child.poll() is None:
            return
        self.close()  # of one that was killed, its group may live
        self._end = secrets.token_hex(16)
        self._child = subprocess.Popen(
            python_ending_with_parent("pipeline.dvc_process", self._end),
            cwd=self.root,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(self, arguments: list[str], on_line: Callable[[str], None]) -> int:
        """Do one command, each line that it or its stage prints passed to `on_line`; returns its exit status.

        When this call is left early (cancellation, Ctrl-C, an error in `on_line`) every process of it gets SIGTERM, and
        SIGKILL after half a minute.
        """
        status = int(self._do(arguments, False, on_line)["status"])
        self._end_leftovers()
        return status

    def ask(self, *arguments: str) -> str:
        """What one command prints to its standard output.

        Raises:
            DvcError: the command failed.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            lines: list[str] = []
            answer = self._do(list(arguments), True, lines.append)
            if answer["status"] == 0:
                return str(answer["output"])
            said = "\n".join(lines)
            if time.monotonic() > deadline or not any(words in said for words in BUSY):
                raise DvcError(f"`dvc {' '.join(arguments)}` failed: {said.strip()}")
            time.sleep(0.2)

    def close(self) -> None:
        """End it, and whatever it started that still runs."""
        if self._child is not None:
            end_group(self._child, grace=30.0)
            for stream in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):  # a command that it did not take any more
                    stream.close()  # type: ignore[union-attr]
            self._child = None

    def _end_leftovers(self) -> None:
        """End what a stage left running: the next one may need its memory."""
        if self._child is None:
            return
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != self._child.pid and os.getpgid(process.pid) == self._child.pid:
                    process.terminate()
                    left.append(process)
        for process in psutil.wait_procs(left, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _do(self, arguments: list[str], captured: bool, on_line: Callable[[str], None]) -> dict[str, Any]:
        self.start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has just been killed, which its status says
                child.stdin.write(json.dumps({"arguments": arguments, "captured": captured}) + "\n")
                child.stdin.flush()
            for line in child.stdout:
                text, end, answer = line.rstrip("\n").partition(self._end)
                if not end:
                    on_line(text)
                    continue
                if text:  # printed without an end of line
                    on_line(text)
                found: dict[str, Any] = json.loads(answer)
                return found
            status = child.wait()
            self.close()
            return {"status": status, "output": ""}
        except BaseException:
            self.close()  # what it would say next is of this command
            raise


def forget_the_dead(root: Path) -> None:
    """Take processes that do not live from DVC's list of who reads and writes what, `.dvc/tmp/rwlock`.

    DVC does so itself for a process id that nobody has. It waits for ever for one that a killed process keeps because
    nobody asks for its status (in a container without an init), for one that another process has been given since
    (after a restart), and for a list that a kill cut short.
    """
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return
    hardlink = Config(str(root / ".dvc"))["core"].get("hardlink_lock", False)
    guard = make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent), hardlink_lock=hardlink)
    with contextlib.suppress(LockError), guard:  # who cannot have it in three seconds leaves the list as it is
        written = path.stat().st_mtime
        try:
            held = json.loads(path.read_bytes())
            left = {
                "write": {name: one for name, one in held.get("write", {}).items() if _lives(one["pid"], written)},
                "read": {
                    name: living
                    for name, readers in held.get("read", {}).items()
                    if (living := [one for one in readers if _lives(one["pid"], written)])
                },
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            held, left = None, {}
        left = {mode: names for mode, names in left.items() if names}
        if left != held:
            path.write_text(json.dumps(left), encoding="utf-8")


def _lives(pid: int, written: float) -> bool:
    """Whether the process that was `pid` when the list was written, in seconds since 1970, may still be it.

    Another one is younger than the list, and no DVC: clocks alone can be set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() < written + 5 or "dvc" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def main() -> None:
    """Do the commands that standard input holds, one a line; after each, a line with its status and its output."""
    end = sys.argv[1]
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # a stage that reads its input must not read the commands
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)  # DVC's lines and its stage's come in their order
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    from dvc.cli import main as dvc

    for line in commands:
        asked = json.loads(line)
        forget_the_dead(Path.cwd())
        sys.argv = ["dvc", *asked["arguments"]]  # what DVC says of itself to others who wait for it
        # By its descriptor: DVC restores sys.stdout for some lines, and drops all output once a pipe broke in it.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as kept:
            if asked["captured"]:
                os.dup2(kept.fileno(), 1)
            status = dvc(asked["arguments"])
            sys.stdout.flush()
            os.dup2(answers.fileno(), 1)
            kept.seek(0)
            print(f"{end}{json.dumps({'status': status, 'output': kept.read()})}", file=answers, flush=True)


if __name__ == "__main__":
    main()
