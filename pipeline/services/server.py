"""The local Prefect server: the one of `retune up` (`pipeline.services.stack`), or one for a single run."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.files import WORK_DIR, read_of_living
from pipeline.core.http_client import HttpError, send
from pipeline.core.processes import end_group, python_ending_with_parent, start_logged

HOST = "127.0.0.1"
STARTUP_SECONDS = 120
BUSY = 503  # Prefect's answer while another request holds its SQLite database; the request had no effect
BUSY_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds before each retry
STATE = WORK_DIR / "server.json"
LOGS = WORK_DIR / "logs"


class ServerError(RuntimeError):
    """The server cannot be started or stopped; the message says why."""


def environment(root: Path, url: str) -> dict[str, str]:
    """This process's environment, with Prefect using the server at `url`, its home in the project, and no telemetry."""
    password = own_password()
    settings = {
        "PREFECT_HOME": str((root / WORK_DIR / "prefect").resolve()),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        # Runs killed with -9 must not keep a concurrency slot; the default storage loses leases with the server.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # flows.setup recognises dead workers by it
        # Pages in the user's browser can reach loopback; they may not read from this server, nor send it JSON.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},{url.replace(HOST, 'localhost')}",
    }
    return os.environ | settings | ({"PREFECT_API_AUTH_STRING": password} if password else {})


def known_stack(root: Path = Path(".")) -> dict[str, Any]:
    """The stack as `retune up` recorded it; empty if its supervisor is not running."""
    return read_of_living(root / STATE)


def running(root: Path = Path(".")) -> str | None:
    """The address of the server that `retune up` started here, if that answers."""
    url = known_stack(root).get("url")
    return url if url and answers(f"{url}/api/health") else None


@contextmanager
def for_one_run(root: Path = Path(".")) -> Iterator[str]:
    """Yield the address of the running server, or start one that ends with this block or process, kill -9 included."""
    if (url := running(root)) is not None:
        if post(url, "flow_runs/count", {}) is None:
            raise ServerError(
                f"the server at {url} rejects this project's requests; set PREFECT_API_AUTH_STRING to the "
                "user:password that the server was started with (PREFECT_SERVER_API_AUTH_STRING)"
            )
        yield url
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    child = _start(root, port)
    try:
        yield f"http://{HOST}:{port}"
    finally:
        end_group(child, grace=10)


def answers(url: str) -> bool:
    """Whether the health page at `url` says what Prefect's or MLflow's says, and not what any other program may."""
    try:
        return send(url, timeout_s=5).strip() in (b"true", b"OK")
    except HttpError:
        return False


def post(url: str, path: str, body: Any, password: str | None = None) -> Any:
    """The answer of the Prefect server at `url` to `body`; None if it is unreachable or rejects the request."""
    user, _, secret = (password or own_password() or "").partition(":")
    for pause in (0, *BUSY_PAUSES):
        time.sleep(pause)
        try:
            return json.loads(send(f"{url}/api/{path}", body, auth=(user, secret) if user else None) or b"{}")
        except (HttpError, ValueError) as error:
            if getattr(error, "status", None) != BUSY:
                return None
    return None


def own_password() -> str | None:
    """`user:password` of the local server, if it has one: the first variable is what it was started with."""
    return os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or os.environ.get("PREFECT_API_AUTH_STRING")


def wait_for(name: str, answers: Callable[[], bool], has_ended: Callable[[], bool]) -> None:
    """Wait until a server or worker answers."""
    deadline, log = time.monotonic() + STARTUP_SECONDS, LOGS / f"{name}.log"
    while not answers():
        if has_ended():
            raise ServerError(f"{name} has stopped; its log is {log}")
        if time.monotonic() > deadline:
            raise ServerError(f"{name} did not answer within {STARTUP_SECONDS} s; its log is {log}")
        time.sleep(0.2)


def _start(root: Path, port: int) -> subprocess.Popen[str]:
    url = f"http://{HOST}:{port}"
    command = python_ending_with_parent("prefect", "server", "start", "--host", HOST, "--port", str(port))
    child = start_logged(command, root / LOGS / "prefect-server.log", root, environment(root, url))
    try:
        wait_for("prefect-server", lambda: answers(f"{url}/api/health"), lambda: child.poll() is not None)
    except BaseException:
        end_group(child, grace=5)
        raise
    return child
