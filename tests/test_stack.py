"""`retune up`, `status` and `down` with real processes; a stage that runs on a worker with its own clone."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, change_params, dvc, git, make_project, retune, with_
from local_servers import ended, free_port, give_database, posted_to, read, start, wait_until, whole_stack
from s3_sink import serving

from pipeline.core import graph, handover
from pipeline.core.http_client import MAX_ANSWER, send
from pipeline.core.run_lock import only_on_gpus
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
def test_another_program_that_answers_is_no_prefect_server(health: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(health.encode())

    with serving(Other) as url:
        assert not server.answers(f"{url}/api/health")


def test_an_answer_without_end_is_cut() -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"a" * 2**16)

    with serving(Endless) as url:
        assert MAX_ANSWER < len(send(url)) < 2 * MAX_ANSWER


@pytest.mark.parametrize(("statuses", "answer", "asked"), [([503, 503, 201], {"id": 1}, 3), ([422, 201], None, 1)])
def test_a_busy_prefect_server_is_asked_again_and_one_that_refuses_is_not(
    statuses: list[int], answer: Any, asked: int
) -> None:
    left = iter(statuses)
    with posted_to(lambda request: next(left)) as (url, posts):
        assert server.post(url, "flows/", {"name": "retrain"}) == answer
    assert posts == [(status, {"name": "retrain"}) for status in statuses[:asked]]


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


@pytest.fixture
def places(tmp_path: Path, base: Path, params: Params) -> tuple[Path, Path]:
    """A parent's project after `prepare`, and a worker's clone without any data."""
    parent, worker, server = tmp_path / "parent", tmp_path / "worker", tmp_path / "server.git"
    make_project(parent, base, params)
    dvc(parent, "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    git(parent, "commit", "-qam", "remote")
    git(tmp_path, "init", "-q", "--bare", str(server))
    git(parent, "remote", "add", "origin", str(server))
    git(parent, "push", "-q", "origin", "HEAD")
    handover.make_clone(worker, "origin", parent)
    dvc(parent, "repro", "-q", "prepare")
    return parent, worker


def test_a_worker_without_a_shared_disk_runs_the_stage_and_its_entry_is_merged(places: tuple[Path, Path]) -> None:
    parent, worker = places
    (parent / "notes.txt").write_text("untracked")
    status, head = git(parent, "status", "--porcelain"), git(parent, "rev-parse", "HEAD")
    commit = handover.request("train", "origin", parent)
    assert "notes.txt" not in git(parent, "ls-tree", "--name-only", commit)
    assert "dvc.lock" in git(parent, "ls-tree", "--name-only", commit)  # though untracked
    assert git(parent, "status", "--porcelain") == status  # index, branch and files are as they were
    assert git(parent, "rev-parse", "HEAD") == head
    lines: list[str] = []
    with pytest.raises(handover.HandoverError, match="not marked as a worker's clone"):
        handover.answer("train", commit, "origin", lines.append, parent)
    handover.answer("train", commit, "origin", lines.append, worker)
    assert any("Running stage 'train'" in line for line in lines)
    assert not (worker / "artifacts" / "merged").exists()
    handover.accept("train", commit, "origin", parent)
    assert (parent / "artifacts" / "adapter" / "adapter_model.safetensors").exists()
    assert "train" not in graph.stale(parent)
    assert "Running stage" not in dvc(parent, "repro", "--single-item", "train")
    # An answer for other inputs than the parent's is refused.
    lock, params = (parent / "dvc.lock").read_text(), (parent / "params.yaml").read_text()
    (parent / "params.yaml").write_text(params.replace("lora_r: 8", "lora_r: 4"))
    with pytest.raises(handover.HandoverError, match="on other inputs than this project"):
        handover.accept("train", commit, "origin", parent)
    assert (parent / "dvc.lock").read_text() == lock
    (parent / "params.yaml").write_text(params)
    assert "retune" in git(parent, "ls-remote", "origin")
    for _ in range(2):
        handover.forget(commit, "origin", parent)
    assert "retune" not in git(parent, "ls-remote", "origin")

    # The request of a killed run is deleted.
    killed = handover.request("train", "origin", parent)
    time.sleep(1)  # a commit's second is part of its name
    handover.request("train", "origin", parent)
    assert [killed in line for line in git(parent, "ls-remote", "origin", "refs/retune/*").splitlines()] == [False]
    (parent / "pipeline" / "training" / "own_loss.py").touch()
    with pytest.raises(handover.HandoverError, match="pipeline/training/own_loss.py"):
        handover.request("train", "origin", parent)


@pytest.mark.faults
def test_when_a_gpu_worker_is_killed_the_run_continues_from_its_checkpoint(places: tuple[Path, Path]) -> None:
    root, _ = places
    (root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    git(root, "add", "-A")
    git(root, "commit", "-qm", "deployments")
    operations = {"services": ["cpu", "gpu"], "train_pool": "gpu"}
    with whole_stack(root, operations=operations, train={"num_train_epochs": 60.0, "save_steps": 20}) as state:
        clone, url = root / stack.CLONE, state["url"]
        start(url, "retrain/retrain", trigger="far")
        wait_until(lambda: list(clone.glob(".retune/checkpoints/*/checkpoint-*")), 240)
        worker = next(service["pid"] for service in state["services"] if service["name"] == "gpu-worker")
        os.kill(worker, signal.SIGKILL)
        [retraining] = wait_until(lambda: ended(url, name="retrain-far"), 400)
        assert retraining["state_name"] in ("Promoted", "Refused"), retraining["state"]
        trainings = [run["state_name"] for run in ended(url) if run["name"].startswith("train-")]
        assert sorted(trainings) == ["Crashed", "Trained"]
        log = (root / ".retune" / "logs" / "gpu-worker.log").read_text()
        assert "continuing from step" in log
    assert stack.marked(root) == []


def test_only_one_training_at_a_time_uses_a_gpu() -> None:
    order: list[str] = []
    gpu, other = f"test-{uuid.uuid4()}", f"test-{uuid.uuid4()}"

    def second() -> None:
        with only_on_gpus([gpu], lambda _: order.append("waits")):
            order.append("second")

    with only_on_gpus([other, gpu], lambda _: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while "waits" not in order:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    for name in (gpu, other):
        (Path(tempfile.gettempdir()) / f"retune-gpu-{name}.lock").unlink()
    assert order == ["waits", "first", "second"]
