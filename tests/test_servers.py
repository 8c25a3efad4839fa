"""The servers of a team as infra/compose.yaml configures them, run without containers: no route answers without
credentials, and a run goes over all of them from its trigger to a promotion, also when the GPU's machine dies.

Real PostgreSQL, Redis, Prefect (API and services apart), MLflow with its users, S3; two workers that share no folder.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import team_servers
from conftest import ROOT, change_params, dvc, git, make_project, sample_rows
from local_servers import wait_until
from team_servers import Team
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from pipeline.params import Params
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.stores import open_store
from pipeline.services import stack
from pipeline.settings import load_params

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

# Routes that answer without a password, and why they may. All others must refuse.
OPEN = {
    "prefect": {
        "/api/health": "probes; says true",
        "/api/ready": "probes; says whether the database answers",
        "/ui-settings": "tells the login page which kind of login there is",
        "/{file}": "the dashboard's files, the same on every server of this version",
        "/v2/{file}": "the files of the second dashboard",
        "/docs": "a page that shows openapi.json",
        "/docs/oauth2-redirect": "an empty page of /docs",
        "/redoc": "another page that shows openapi.json",
        "/openapi.json": "the calls of the API, the same on every server of this version",
    },
    "mlflow": {
        "/health": "probes; says OK",
        "/static-files/<path:path>": "the pages' files, the same on every server of this version",
        "/api/3.0/mlflow/server-info": "tells clients what the server can do, before they log in",
        "/ajax-api/3.0/mlflow/server-info": "the same, for the pages",
    },
}
MIN_ROUTES = {"prefect": 150, "mlflow": 150}  # a shorter list is not the server's


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Iterator[Team]:
    missing = team_servers.why_not()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("team")
    with team_servers.start(folder, s3) as started:
        yield started
    assert stack.marked(folder) == []


@pytest.mark.parametrize("service", ["prefect", "mlflow"])
def test_no_http_route_answers_without_credentials(team: Team, service: str) -> None:
    routes = [(method, path) for kind, method, path in team_servers.routes(team, service) if kind == "http"]
    assert len(routes) > MIN_ROUTES[service]
    answered: dict[str, str] = {}
    closed = []
    with httpx.Client(base_url=team.url(service), timeout=60) as stranger, team.client(service) as user:
        for method, path in routes:
            answer = stranger.request(method, filled(path))
            if answer.status_code not in (401, 403):
                answered[path] = f"{method} {answer.status_code} {answer.text[:80]}"
            elif method == "GET" and user.get(filled(path)).status_code == 401:
                closed.append(path)  # it refuses everybody, so the refusal above proves nothing
        assert stranger.get(filled(path), auth=("admin", "wrong")).status_code in (401, 403)
    assert {path: answer for path, answer in answered.items() if path not in OPEN[service]} == {}
    assert set(OPEN[service]) <= set(answered), "a route that refuses is not an exemption"
    assert closed == []


def filled(path: str) -> str:
    """A path for the route, with a number or an id for each parameter."""
    return re.sub(r"\{[^}]*\}|<[^>]*>", "00000000-0000-0000-0000-000000000000", re.sub(r"<int:[^>]*>", "1", path))


def test_no_websocket_says_anything_before_it_has_seen_the_password(team: Team) -> None:
    paths = [path for kind, _, path in team_servers.routes(team, "prefect") if kind == "websocket"]
    assert {"/api/events/in", "/api/events/out", "/api/logs/out"} <= set(paths)
    for path in paths:
        url = team.url("prefect").replace("http://", "ws://") + filled(path)
        with pytest.raises(InvalidStatus) as refused:
            connect(url)
        assert refused.value.response.status_code == 403
        for first in ({"type": "auth"}, {"type": "auth", "token": "admin:wrong"}, {"type": "filter", "filter": {}}):
            with connect(url, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
                socket.send(json.dumps(first))
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(timeout=20)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        with connect(url, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            with pytest.raises(TimeoutError):
                socket.recv(timeout=0.3)
            socket.send(json.dumps({"type": "auth", "token": team.secret("prefect_auth")}))
            assert json.loads(socket.recv(timeout=20)) == {"type": "auth_success"}


def test_mlflow_has_no_websocket(team: Team) -> None:
    assert {kind for kind, _, _ in team_servers.routes(team, "mlflow")} == {"http"}
    for path in ("/", "/api/2.0/mlflow/experiments/search", "/gateway/x/mlflow/invocations"):
        with pytest.raises(InvalidStatus) as refused:
            connect(team.url("mlflow").replace("http://", "ws://") + path)
        assert refused.value.response.status_code == 403


def ship(team: Team, s3: str, folder: Path, base: Path, params: Params, name: str, **train: Any) -> Path:
    """A team's project before its first start, pushed to git, with its data in the DVC remote; returns git's folder."""
    root = make_project(folder / "people", base, params)
    shutil.copy(ROOT / "prefect.yaml", root)
    publish = {"artifact_store": f"s3://retune/{name}", "endpoint_url": s3, "addressing_style": "path"}
    publish |= {"tracking_uri": team.url("mlflow"), "registered_model_name": name}
    change_params(root, publish=publish, operations={"train_pool": "gpu", "services": []}, train=train)
    bare = folder / "project.git"
    git(folder, "init", "-q", "--bare", "-b", "main", str(bare))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "for the team")
    git(root, "push", "-q", str(bare), "HEAD:main")
    dvc(root, "remote", "add", "--local", "team", "s3://retune/dvc")
    dvc(root, "remote", "modify", "--local", "team", "endpointurl", s3)
    dvc(root, "push", "-q", "-r", "team", "data.dvc")
    return bare


@contextmanager
def workers(team: Team, folder: Path, bare: Path) -> Iterator[tuple[Path, Path]]:
    """Set up bucket, user, pools and deployments, and start a worker for each pool; yields their clones."""
    cpu, gpu = folder / "cpu-worker", folder / "gpu-worker"
    values = team.worker_values("setup", cpu, bare)
    setup = [sys.executable, str(team_servers.INFRA / "docker" / "setup.py")]
    team.run("setup", ["sh", str(team_servers.WORKER), *setup], values)
    try:
        team.worker("cpu", cpu, bare)
        team.worker("gpu", gpu, bare)
        yield cpu, gpu
    finally:
        for root in (cpu, gpu):
            stack.end_marked(root, grace=20)
    assert stack.marked(cpu) + stack.marked(gpu) == []


def flow_runs(prefect: httpx.Client) -> dict[str, dict[str, Any]]:
    runs = prefect.post("/api/flow_runs/filter", json={"sort": "START_TIME_ASC"}).raise_for_status().json()
    return {run["name"]: run for run in runs if run["state_name"] != "Scheduled"}


def ended(prefect: httpx.Client, name: str, seconds: float) -> dict[str, Any]:
    """The run whose name begins with `name` (its decision is appended), once it has ended."""

    def ended_runs() -> list[dict[str, Any]]:
        runs = [run for run_name, run in flow_runs(prefect).items() if run_name.startswith(name)]
        return [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]

    return wait_until(ended_runs, seconds)[0]


def trainings(prefect: httpx.Client) -> list[dict[str, Any]]:
    """Runs on the gpu pool, in the order of their start."""
    return [run for run in flow_runs(prefect).values() if run["work_pool_name"] == "gpu"]


def log_lines(prefect: httpx.Client, run: dict[str, Any]) -> str:
    query = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_DESC", "limit": 60}
    return "\n".join(line["message"] for line in reversed(prefect.post("/api/logs/filter", json=query).json()))


def assert_shipped(team: Team, s3: str, clone: Path, other: Path) -> None:
    """Check that log and MLflow have the same champion, and that its files are in S3, not in the clones."""
    publish = load_params(clone / "params.yaml").publish
    version = champion(read_log(open_store(publish), publish.registered_model_name))
    assert version is not None
    query = {"name": publish.registered_model_name, "alias": "champion"}
    as_worker = ("retune", team.secret("mlflow_worker_password"))
    answer = httpx.get(f"{team.url('mlflow')}/api/2.0/mlflow/registered-models/alias", params=query, auth=as_worker)
    entry = answer.raise_for_status().json()["model_version"]
    assert {"key": "version_id", "value": version} in entry["tags"]
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    for prefix in (f"{publish.registered_model_name}/versions/{version}/manifest.json", "dvc/files/md5/", "mlflow/"):
        assert client.list_objects_v2(Bucket="retune", Prefix=prefix)["KeyCount"] > 0, prefix
    assert not [name for root in (clone, other) for name in ("store", "mlflow.db") if (root / name).exists()]
    assert (other / "artifacts" / "adapter").exists() and not (other / "artifacts" / "merged").exists()
    merged = sorted(path.name for path in (clone / "artifacts" / "merged").iterdir())
    assert "model.safetensors" in merged


def test_a_run_of_the_schedule_goes_from_its_trigger_to_a_promotion(
    team: Team, s3: str, tmp_path: Path, base: Path, params: Params
) -> None:
    bare = ship(team, s3, tmp_path, base, params, "by-schedule")
    with workers(team, tmp_path, bare) as (cpu, gpu), team.client("prefect") as prefect:
        before = trainings(prefect)
        deployment = prefect.get("/api/deployments/name/retrain/retrain").raise_for_status().json()["id"]
        # Prefect reads new schedules once a minute, so a busy machine could miss one that is due sooner.
        due = (datetime.now(UTC) + timedelta(seconds=90)).isoformat()
        schedule = {"schedule": {"interval": 86400, "anchor_date": due}, "active": True}
        schedules = [schedule | {"parameters": {"trigger": "seconds-ahead"}}]
        prefect.post(f"/api/deployments/{deployment}/schedules", json=schedules).raise_for_status()
        run = ended(prefect, "retrain-seconds-ahead", 600)
        assert run["state_name"] == "Promoted", log_lines(prefect, run)
        assert run["auto_scheduled"]
        assert [run["state_name"] for run in trainings(prefect)[len(before) :]] == ["Trained"]
        assert_shipped(team, s3, cpu, gpu)


def test_a_gpu_machine_that_dies_loses_neither_the_run_nor_its_slot(
    team: Team, s3: str, tmp_path: Path, base: Path, params: Params
) -> None:
    bare = ship(team, s3, tmp_path, base, params, "by-event", num_train_epochs=30.0, save_steps=20)
    (tmp_path / "rows.json").write_text(json.dumps(sample_rows(700)[400:]))
    with workers(team, tmp_path, bare) as (cpu, gpu), team.client("prefect") as prefect:
        before = trainings(prefect)
        ingest = ["sh", str(team_servers.WORKER), "retune", "ingest", str(tmp_path / "rows.json"), "--json"]
        output = team.run("ingest", ingest, team.worker_values("cpu-worker", cpu, bare))
        assert json.loads(output.splitlines()[-1])["told"], "the server did not accept the event"
        wait_until(lambda: list(gpu.glob(".retune/checkpoints/*/checkpoint-*/digests.json")), 400)  # a whole one
        processes = stack.marked(gpu)
        for process in processes:  # the worker, its run, DVC, the training: as if the power failed
            process.kill()
        died = time.monotonic()
        assert processes and not (gpu / "artifacts" / "adapter").exists()
        team.worker("gpu", gpu, bare)
        run = ended(prefect, "retrain-new-data", 900)
        assert run["state_name"] == "Promoted", log_lines(prefect, run)
        assert time.monotonic() - died > 60  # it was detected by missed heartbeats
        assert [run["state_name"] for run in trainings(prefect)[len(before) :]] == ["Crashed", "Trained"]
        assert "continuing from step" in team.log("gpu-worker").read_text()
        assert_shipped(team, s3, cpu, gpu)

        # Pool and deployment take one run at a time; neither counts the dead one any more.
        deployment = prefect.get("/api/deployments/name/retrain/retrain").raise_for_status().json()["id"]
        new_run = {"parameters": {"trigger": "afterwards"}, "state": {"type": "SCHEDULED"}}
        prefect.post(f"/api/deployments/{deployment}/create_flow_run", json=new_run).raise_for_status()
        assert ended(prefect, "retrain-afterwards", 120)["state_name"] == "Unchanged"
        unfinished = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
        assert prefect.post("/api/flow_runs/filter", json=unfinished).json() == []
