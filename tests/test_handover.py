"""A stage runs on a worker with its own clone; only a git server and a DVC remote are shared."""

import json
import os
import signal
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT, change_params, dvc, git, make_project, retune
from local_servers import ended, free_port, start, wait_until

from pipeline.core import graph, handover
from pipeline.core.run_lock import only_on_gpus
from pipeline.params import Params
from pipeline.services import stack


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
def test_when_a_gpu_worker_is_killed_the_run_continues_from_its_checkpoint(
    places: tuple[Path, Path],
) -> None:
    root, _ = places
    (root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    git(root, "add", "-A")
    git(root, "commit", "-qm", "deployments")
    change_params(
        root,
        operations={"services": ["cpu", "gpu"], "train_pool": "gpu"},
        train={"num_train_epochs": 60.0, "save_steps": 20},
    )
    up = retune(root, "up", "--port", str(free_port()), "--json")
    assert up.returncode == 0, up.stderr
    state = json.loads(up.stdout)
    clone, url = root / stack.CLONE, state["url"]
    try:
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
    finally:
        retune(root, "down")
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
