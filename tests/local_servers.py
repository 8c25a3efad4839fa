"""A Prefect server for the tests of one file, what it answers, and waiting for what others do."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
from conftest import ROOT, change_params, once, retune
from s3_sink import serving

from pipeline.core.files import WORK_DIR, write_json
from pipeline.core.processes import end_group, identity
from pipeline.services import server


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """The URL of a server that keeps its data in `folder`; `use_server` points projects to it."""
    give_database(folder)
    port = free_port()
    child = server._start(folder, port)
    try:
        yield f"http://{server.HOST}:{port}"
    finally:
        end_group(child, grace=10)


def give_database(root: Path) -> None:
    """Prefect's database as it makes it itself: a server of this project finds it and has to make none."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env=os.environ | {"PREFECT_HOME": str(folder)}, check=True, capture_output=True)

    shutil.copytree(once("prefect-home", make), root / WORK_DIR / "prefect", dirs_exist_ok=True)


@contextmanager
def whole_stack(root: Path, **sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `retune up --json` says of the project's servers and workers with the changed parameters, until they end."""
    (root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    change_params(root, **sections)
    up = retune(root, "up", "--port", str(free_port()), "--json")
    assert up.returncode == 0, up.stderr
    try:
        yield json.loads(up.stdout)
    finally:
        retune(root, "down")


def use_server(root: Path, url: str) -> None:
    """As if `retune up` had started it there; for the supervisor stands this process."""
    write_json(root / server.STATE, {"process": identity(), "url": url})


def api(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers to `body`; without one, to a filter that takes all."""
    answer = server.post(url, path, body or {})
    assert answer is not None, f"{url} rejected {path}"
    return answer


def read(url: str, path: str) -> Any:
    """What the server answers to a GET; while it is busy (503), it is asked again, as Prefect's own client does."""

    def ask() -> httpx.Response | None:
        answer = httpx.get(f"{url}/api/{path}")
        return None if answer.status_code == server.BUSY else answer.raise_for_status()

    return wait_until(ask, 30).json()


def ended(url: str, **fields: str) -> list[dict[str, Any]]:
    """Runs that have ended, whose fields begin so: to the name is added what was decided."""
    runs = api(url, "flow_runs/filter")
    runs = [run for run in runs if all(run[key].startswith(value) for key, value in fields.items())]
    return [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]


def start(url: str, deployment: str, **parameters: Any) -> str:
    """Run a deployment as the dashboard does; returns the id of the flow run."""
    number = read(url, f"deployments/name/{deployment}")["id"]
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return str(api(url, f"deployments/{number}/create_flow_run", body)["id"])


@contextmanager
def posted_to(status: Callable[[BaseHTTPRequestHandler], int]) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    """A server on loopback: its address, and its status for each POST with the JSON that was posted."""
    posts: list[tuple[int, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posts.append((status(self), body))
            self.send_response(posts[-1][0])
            self.send_header("Location", "/elsewhere/200")
            self.end_headers()
            self.wfile.write(b"" if posts[-1][0] == 204 else b'{"id": 1}')

    with serving(Handler) as url:
        yield url, posts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return value
