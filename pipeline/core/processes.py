"""Starting child processes that end with their parent, and ending them with everything they started."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def environment() -> dict[str, str]:
    """The environment for stage commands: this process's, with the interpreter's own folder first on the PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def identity(pid: int | None = None) -> str:
    """A name for this process, or the one with `pid`, that no later process with the same number has."""
    process = psutil.Process(pid)
    return f"{process.pid}:{process.create_time()}"


def lives(named: str | None) -> bool:
    """Whether the process with this `identity` is still running."""
    try:
        pid = int((named or "").partition(":")[0])
        return identity(pid) == named and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.NoSuchProcess):
        return False


def available_cores() -> int:
    """Cores that this process may use; fewer than the machine has under taskset, a batch system or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(signal_number: int = signal.SIGKILL, parent: int | None = None, grace: float | None = None) -> None:
    """Ask the kernel to send this process `signal_number` when its parent dies, kill -9 included.

    Linux only, except for `grace`: elsewhere a child outlives a killed parent until it next writes to the closed pipe.
    For the kernel the parent is the *thread* that started this process: it must live long enough. `parent`: its process
    id if known; it may be dead by now. `grace`: seconds after its death until SIGKILL, if `signal_number` did not help.
    """
    parent = os.getppid() if parent is None else parent
    if grace is not None:
        threading.Thread(target=_kill_after_parent, args=(parent, grace), daemon=True).start()
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal_number)


def end_with_worker() -> None:
    """End this flow run with its worker, by SIGKILL after 45 s: Prefect may retry a report to a server that is dead."""
    end_with_parent(signal.SIGTERM, grace=45)


def _kill_after_parent(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def start_logged(command: Sequence[str], log: Path, root: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a server in its own session, without input, appending its output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        return subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, text=True,
        )  # fmt: skip


def ending_with_parent(command: Sequence[str], parent: int | None = None) -> list[str]:
    """`command`, wrapped so that the child dies with the thread that starts it (of this process or of `parent`)."""
    code = (
        "import os, sys; from pipeline.core.processes import end_with_parent; "
        "end_with_parent(parent=int(sys.argv[1]) or None); os.execvp(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", code, str(os.getpid() if parent is None else parent), *command]


def python_ending_with_parent(module: str, *arguments: str) -> list[str]:
    """`python -m module arguments…`, unbuffered, wrapped in the same way."""
    return ending_with_parent([sys.executable, "-u", "-m", module, *arguments])


def run_forwarding_sigterm(command: list[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> int:
    """Run `command` and return its exit status; SIGTERM and Ctrl-C are passed on, and its end awaited (143, 130)."""
    child = subprocess.Popen(command, env=dict(env), pass_fds=pass_fds)
    previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        status = 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return status if status >= 0 else 128 - status


def end_group(leader: subprocess.Popen[str], grace: float) -> None:
    """Send SIGTERM to the process group of `leader`, and SIGKILL to what is left after `grace` seconds."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                leader.poll()  # a zombie would keep its group alive
                os.killpg(leader.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            leader.wait()
            return
    leader.wait()
