"""`retune up`, `status` and `down` with their real processes, which are looked for in /proc."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, change_params, make_project, retune, with_
from local_servers import free_port, give_database, read, wait_until

from pipeline.params import Params
from pipeline.services import server, stack
from pipeline.services.server import ServerError
from pipeline.settings import load_params


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Iterator[Path]:
    deep = "a-folder-with-a-longer-path-than-a-unix-socket-may-have" * 2
    folder = make_project(tmp_path_factory.mktemp("stack") / deep / "project", base, params)
    give_database(folder)
    yield folder
    retune(folder, "down")


def up(root: Path, *services: str) -> dict[str, Any]:
    change_params(root, operations={"services": list(services)})
    done = retune(root, "up", "--port", str(free_port()), "--mlflow-port", str(free_port()), "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def rows(known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in known["services"]}


def listening(processes: list[psutil.Process]) -> set[str]:
    addresses = (each.laddr for process in processes for each in process.net_connections() if each.status == "LISTEN")
    return {address.ip for address in addresses}


def test_a_taken_port_is_one_sentence_and_leaves_nothing(root: Path) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        done = retune(root, "up", "--port", str(taken))
    assert done.returncode == 1
    assert f"port {taken} for prefect-server is used by another program" in done.stderr
    assert stack.marked(root) == []
    assert "nothing was running" in retune(root, "down").stdout


@pytest.mark.parametrize("health", ["ok", "{}"])
def test_another_program_that_answers_is_no_prefect_server(tmp_path: Path, health: str) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "health").write_text(health)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert not server.answers(f"{url}/api/health")
        other.shutdown()


@pytest.mark.parametrize(("statuses", "answer", "asked"), [([503, 503, 201], {"id": 1}, 3), ([422, 201], None, 1)])
def test_a_busy_prefect_server_is_asked_again_and_one_that_refuses_is_not(
    statuses: list[int], answer: Any, asked: int
) -> None:
    left = iter(statuses)
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(next(left))
            self.end_headers()
            self.wfile.write(b'{"id": 1}')

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as busy:
        threading.Thread(target=busy.serve_forever, daemon=True).start()
        assert server.post(f"http://127.0.0.1:{busy.server_port}", "flows/", {"name": "retrain"}) == answer
        busy.shutdown()
    assert [json.loads(body) for body in bodies] == [{"name": "retrain"}] * asked


def test_a_killed_supervisor_takes_every_process_with_it(root: Path) -> None:
    known = up(root, "cpu")
    assert json.loads(retune(root, "up", "--json").stdout)["url"] == known["url"]
    moved = retune(root, "up", "--port", str(free_port()))
    assert moved.returncode == 1
    assert known["url"] in moved.stderr
    with pytest.raises(ServerError, match="no-such-service"):
        stack._ask(root, "startProcess", "no-such-service", False)
    processes = stack.marked(root)
    assert listening(processes) == {"127.0.0.1"}
    shown = json.loads(retune(root, "status", "--json").stdout)
    assert {row["pid"] for row in shown["services"]} < {process.pid for process in processes}
    states = {name: row["state"] for name, row in rows(shown).items()}
    assert states.pop("prefect-server") == "healthy"
    assert states.pop("cpu-worker") in ("starting", "running") and not states
    assert all((root / row["log"]).is_file() for row in shown["services"])
    supervisor(processes).kill()
    wait_until(lambda: not any(process.is_running() for process in processes), 30)
    assert stack.marked(root) == []
    assert json.loads(retune(root, "status", "--json").stdout)["dashboard"] is None


@pytest.mark.faults
def test_the_whole_stack_restarts_what_dies_and_goes_down_without_a_rest(root: Path) -> None:
    known = up(root, "cpu", "gpu", "mlflow")
    before = rows(known)
    assert set(before) == {"prefect-server", "mlflow", "cpu-worker", "gpu-worker"}
    assert listening(stack.marked(root)) == {"127.0.0.1"}
    assert read(known["url"], "work_pools/gpu")["concurrency_limit"] == 1
    for victim in ("gpu-worker", "mlflow", "prefect-server"):
        os.kill(before[victim]["pid"], signal.SIGKILL)
        wait_until(lambda victim=victim: rows(stack.state(root))[victim]["pid"] not in (0, before[victim]["pid"]), 30)
    wait_until(lambda: rows(stack.state(root))["prefect-server"]["state"] == "healthy", 60)
    assert retune(root, "up", "--json").stdout  # answers with the one that runs
    processes = stack.marked(root)
    assert retune(root, "down").returncode == 0
    assert stack.marked(root) == []
    assert not any(process.is_running() for process in processes)


def supervisor(processes: list[psutil.Process]) -> psutil.Process:
    [supervisor] = [process for process in processes if "supervisor.supervisord" in process.cmdline()]
    return supervisor


def test_a_process_that_ignores_the_signal_of_its_parents_death_is_killed() -> None:
    child = (
        "import signal, time; from pipeline.core.processes import end_with_parent; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "end_with_parent(signal.SIGTERM, grace=2); print('ready', flush=True); time.sleep(600)"
    )
    start = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", start, sys.executable, "-c", child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 15)


def test_a_registry_elsewhere_gets_no_second_server(params: Params) -> None:
    elsewhere = with_(
        params, operations={"services": ["mlflow"]}, publish={"tracking_uri": "https://mlflow.example.org"}
    )
    assert "mlflow" not in {service.name for service in stack.services(elsewhere)}
    assert stack.services(load_params(ROOT / "params.yaml"))[0].name == "prefect-server"


def test_a_stack_that_runs_is_not_moved_to_other_ports(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = {"prefect-server": "http://127.0.0.1:4200", "mlflow": "http://127.0.0.1:5000", "cpu-worker": None}
    running = {"services": [{"name": name, "url": url} for name, url in urls.items()]}
    monkeypatch.setattr(server, "known_stack", lambda root: running)
    assert stack.with_ports(params, 4200, 5000).operations.prefect_port == 4200
    for ports, named in (((5000, None), "prefect-server to port 5000"), ((None, 4300), "mlflow to port 4300")):
        with pytest.raises(ServerError, match=named):
            stack.with_ports(params, *ports)
