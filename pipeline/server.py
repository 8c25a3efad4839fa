"""The local Prefect server: started for the length of a run, or kept up with its dashboard (`retune up`)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.files import WORK_DIR, read_json, write_json
from pipeline.process import end_group, python_ending_with_parent

HOST = "127.0.0.1"
STARTUP_SECONDS = 120
STATE = WORK_DIR / "server.json"
LOG = WORK_DIR / "logs" / "prefect-server.log"


class ServerError(RuntimeError):
    """The server cannot be started or stopped; the message says why."""


@dataclass(frozen=True)
class Server:
    pid: int
    url: str  # of the dashboard; the API is at url/api


def environment(root: Path, url: str) -> dict[str, str]:
    """This process's environment with Prefect pointed at the server at `url`, its home in the project, no telemetry."""
    return os.environ | {
        "PREFECT_HOME": str((root / WORK_DIR / "prefect").resolve()),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        # Runs killed with -9 must not keep a concurrency slot; the default storage forgets leases with the server.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_CLI_COLORS": "false",
        # A page in the user's browser can reach loopback: it may not read this server, nor send it JSON.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},{url.replace(HOST, 'localhost')}",
    }


def running(root: Path = Path(".")) -> Server | None:
    """The server that `retune up` started here, if its process lives and answers."""
    server = _recorded(root)
    return server if server is not None and healthy(server.url) else None


def _recorded(root: Path) -> Server | None:
    """The server of `retune up` if its process lives; another process with its number does not count."""
    try:
        state = read_json(root / STATE)
        alive = psutil.Process(state["pid"]).create_time() == state["create_time"]
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return Server(state["pid"], state["url"]) if alive else None


def up(port: int, root: Path = Path(".")) -> Server:
    """Start the server in the background, or answer with the one that runs.

    Raises:
        ServerError: the port is taken, or the server did not become healthy.
    """
    server = running(root)
    if server is not None:
        return server
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ServerError(f"port {port} is taken by another program; choose one with `retune up --port`") from None
    child = _start(root, port, outlives_us=True)
    write_json(
        root / STATE,
        {"pid": child.pid, "url": f"http://{HOST}:{port}", "create_time": psutil.Process(child.pid).create_time()},
    )
    return Server(child.pid, f"http://{HOST}:{port}")


def down(root: Path = Path(".")) -> bool:
    """Stop the server of `retune up` and everything it started; False when none was running."""
    server = _recorded(root)
    if server is None:
        (root / STATE).unlink(missing_ok=True)
        return False
    leader = psutil.Process(server.pid)
    family = [leader, *leader.children(recursive=True)]
    os.killpg(leader.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=15)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)
    (root / STATE).unlink(missing_ok=True)
    return True


@contextmanager
def for_one_run(root: Path = Path(".")) -> Iterator[Server]:
    """The server that is up, or one that lives as long as this block and dies with this process, kill -9 included."""
    server = running(root)
    if server is not None:
        yield server
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    child = _start(root, port, outlives_us=False)
    try:
        yield Server(child.pid, f"http://{HOST}:{port}")
    finally:
        end_group(child, grace=10)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5) as answer:
            return bool(json.load(answer) is True)
    except (OSError, ValueError):
        return False


def _start(root: Path, port: int, outlives_us: bool) -> subprocess.Popen[str]:
    log = root / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    url = f"http://{HOST}:{port}"
    arguments = ("prefect", "server", "start", "--host", HOST, "--port", str(port))
    command = [sys.executable, "-m", *arguments] if outlives_us else python_ending_with_parent(*arguments)
    with log.open("a") as output:
        child = subprocess.Popen(
            command,
            cwd=root,
            env=environment(root, url),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    deadline = time.monotonic() + STARTUP_SECONDS
    try:
        while not healthy(url):
            if child.poll() is not None:
                raise ServerError(f"the Prefect server ended with status {child.returncode}; its log is {log}")
            if time.monotonic() > deadline:
                raise ServerError(f"the Prefect server was not healthy after {STARTUP_SECONDS} s; its log is {log}")
            time.sleep(0.2)
    except BaseException:
        end_group(child, grace=5)
        raise
    return child
