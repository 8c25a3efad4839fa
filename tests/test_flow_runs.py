"""A real Prefect server that asks for a password: our own requests are taken, and runs that nobody runs are closed."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from conftest import ROOT
from local_servers import prefect_server, use_server
from prefect import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import gpu
from flows.lines import why_failed
from flows.setup import pools_and_automations
from pipeline.core.processes import identity, lives
from pipeline.services import flow_runs, server
from pipeline.services.events import emit, record_unchanged

PASSWORD = "admin:secret"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose server is up and asks for a password."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", PASSWORD)
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_server(folder) as url:
            use_server(folder, url)
            yield folder


@pytest.fixture(scope="module")
def url(root: Path) -> str:
    up = server.running(root)
    assert up is not None
    return up


def of_server(url: str) -> AbstractContextManager[Any]:
    """Prefect's client in this process is one of the server at `url`."""
    return temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_API_AUTH_STRING: PASSWORD})


def begin(url: str, state: str, process: str | None, deployment: str | None = None) -> str:
    flow = server.post(url, "flows/", {"name": "retrain"})["id"]
    run = server.post(url, "flow_runs/", {"flow_id": flow, "deployment_id": deployment, "state": {"type": state}})
    if process is not None:
        auth = ("admin", "secret")
        httpx.patch(
            f"{url}/api/flow_runs/{run['id']}", json={"infrastructure_pid": process}, auth=auth
        ).raise_for_status()
    return str(run["id"])


def states(url: str) -> dict[str, str]:
    return {run["id"]: run["state_name"] for run in server.post(url, "flow_runs/filter", {})}


def test_our_own_requests_carry_the_password_of_the_server(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert emit("dataset.updated", "retune.dataset", {}, root)
    assert record_unchanged("version v1", root)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "team:other")  # of another server
    assert server.environment(root, url)["PREFECT_API_AUTH_STRING"] == PASSWORD
    with server.for_one_run(root) as used_url:
        assert used_url == url
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING")  # now another shell's
    assert not emit("dataset.updated", "retune.dataset", {}, root)
    with pytest.raises(server.ServerError, match="PREFECT_API_AUTH_STRING"), server.for_one_run(root):
        pass
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    assert emit("dataset.updated", "retune.dataset", {}, root)


def test_pools_automations_and_deployments_are_made_once_and_prefects_client_lists_them(root: Path, url: str) -> None:
    command, settings = [sys.executable, "-m", "flows.setup"], server.environment(root, url)
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    deployments = server.post(url, "deployments/filter", {})
    assert len(deployments) == 7
    steps = [str(deployment["pull_steps"]) for deployment in deployments]
    assert all("RETUNE_ROOT" in step for step in steps)  # the worker's, not this machine's
    with of_server(url):
        asyncio.run(pools_and_automations())  # again
        with get_client(sync_client=True) as client:  # newer FastAPIs answer its limit of null with 422
            assert len(client.read_deployments()) == 7
            pools = {pool.name: pool.concurrency_limit for pool in client.read_work_pools()}
    assert pools == {"cpu": None, "gpu": 1}
    names = [automation["name"] for automation in server.post(url, "automations/filter", {})]
    assert len(names) == len(set(names)) == 3


def test_a_training_that_no_worker_takes_is_reported_at_once_and_cancelled(url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.2)
    lines: list[str] = []

    def request_training() -> str:
        deployments = server.post(url, "deployments/filter", {})
        [train] = [deployment["id"] for deployment in deployments if deployment["name"] == "train"]
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"commit": "0" * 40}}
        return str(server.post(url, f"deployments/{train}/create_flow_run", body)["id"])

    with of_server(url):
        run = request_training()
        with pytest.raises(gpu.TrainingFailed, match="worker_wait_minutes, 0.02;"):
            gpu._wait(UUID(run), 0.02, lines.append)
        assert len(lines) == 1 and "no worker polls the work pool gpu; waiting 0.02 minutes" in lines[0]
        assert states(url)[run] == "Cancelled"  # no worker that comes later begins it
        server.post(url, "work_pools/gpu/workers/heartbeat", {"name": "busy"})  # there is one, with other work
        run, state = request_training(), {"type": "COMPLETED", "name": "Trained"}
        path, body = f"flow_runs/{run}/set_state", {"state": state, "force": True}
        threading.Timer(3, lambda: server.post(url, path, body)).start()
        assert gpu._wait(UUID(run), 0.02, lines.append).state.name == "Trained"  # after more than 1.2 seconds
    assert len(lines) == 1


def test_runs_whose_process_is_gone_are_closed_and_living_and_waiting_ones_stay(root: Path, url: str) -> None:
    killed = subprocess.Popen(["sleep", "60"])
    gone, later = identity(killed.pid), f"{os.getpid()}:1.5"
    killed.kill()
    killed.wait()
    assert not lives(gone) and not lives(later) and not lives(None) and lives(identity())
    deployment = server.post(url, "deployments/filter", {})[0]["id"]
    lost = [begin(url, "RUNNING", gone), begin(url, "RUNNING", later), begin(url, "PENDING", None)]
    mine, waiting = begin(url, "RUNNING", identity()), begin(url, "PAUSED", gone)
    deployed = [begin(url, state, "1", deployment) for state in ("RUNNING", "PENDING", "PAUSED")]
    with pytest.raises(server.ServerError, match=str(os.getpid())):
        flow_runs.refuse_runs_by_hand(url)
    flow_runs.close_lost_runs(url)
    now = states(url)
    assert [now[run] for run in lost] == ["Crashed"] * 3
    assert (now[mine], now[waiting]) == ("Running", "Paused")
    assert [now[run] for run in deployed] == ["Running", "Pending", "Paused"]
    flow_runs.close_stack_runs(url)
    now = states(url)
    assert [now[run] for run in deployed] == ["Crashed"] * 3
    assert now[mine] == "Running"
    flow_runs._end(url, [{"id": mine}], "COMPLETED", "done")
    flow_runs.refuse_runs_by_hand(url)  # those that are over need nothing


def test_runs_of_a_stack_that_goes_down_are_cancelled_with_the_reason(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_runs, "KILL_SECONDS", 1)  # no worker is there to end it
    deployment = server.post(url, "deployments/filter", {})[0]["id"]
    run, ended = begin(url, "RUNNING", "1", deployment), begin(url, "COMPLETED", "1", deployment)
    flow_runs.cancel_stack_runs(url, "somebody said so")
    now: dict[str, Any] = {run["id"]: run["state"] for run in server.post(url, "flow_runs/filter", {})}
    assert (now[run]["type"], now[run]["message"]) == ("CANCELLED", "somebody said so")
    assert now[ended]["type"] == "COMPLETED"


def test_the_reason_of_a_failed_stage_is_its_own_error_before_pythons_and_dvcs() -> None:
    dvc = "ERROR: failed to reproduce 'train': failed to run: retune stage train, exited with 1"
    assert why_failed(["train 5%", "error: the loss is nan at step 3", dvc]) == "the loss is nan at step 3"
    assert why_failed(["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory", dvc]) == (
        "torch.OutOfMemoryError: CUDA out of memory"
    )
    assert why_failed([dvc]) == dvc.removeprefix("ERROR: ")
    assert why_failed(["killed"]) is None
