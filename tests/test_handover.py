"""A stage handed to a worker in a clone of its own: only a git server and a DVC remote are shared."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import environment, make_project
from ruamel.yaml import YAML

from pipeline import graph, handover
from pipeline.files import read_json
from pipeline.params import Params


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True, text=True).stdout


@pytest.fixture
def places(tmp_path: Path, base: Path, params: Params) -> tuple[Path, Path]:
    """A parent's project after `prepare`, and a worker's clone without any data."""
    parent, worker, server = tmp_path / "parent", tmp_path / "worker", tmp_path / "server.git"
    make_project(parent, base, params)
    run(parent, sys.executable, "-m", "dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    run(parent, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "remote")
    run(tmp_path, "git", "init", "-q", "--bare", str(server))
    run(parent, "git", "remote", "add", "origin", str(server))
    run(parent, "git", "push", "-q", "origin", "HEAD")
    run(tmp_path, "git", "clone", "-q", str(server), str(worker))
    run(parent, sys.executable, "-m", "dvc", "repro", "-q", "prepare")
    return parent, worker


def test_a_worker_without_our_disk_runs_the_stage_and_its_entry_is_merged(places: tuple[Path, Path]) -> None:
    parent, worker = places
    status, head = run(parent, "git", "status", "--porcelain"), run(parent, "git", "rev-parse", "HEAD")
    commit = handover.ask("train", "origin", parent)
    assert run(parent, "git", "status", "--porcelain") == status  # index, branch and files are as they were
    assert run(parent, "git", "rev-parse", "HEAD") == head
    lines: list[str] = []
    handover.work("train", commit, "origin", lines.append, worker)
    assert any("Running stage 'train'" in line for line in lines)
    assert not (worker / "artifacts" / "merged").exists()
    handover.take("train", commit, "origin", parent)
    assert (parent / "artifacts" / "adapter" / "adapter_model.safetensors").exists()
    assert "train" not in graph.stale(parent)
    assert "Running stage" not in run(parent, sys.executable, "-m", "dvc", "repro", "--single-item", "train")
    assert "retune" not in run(parent, "git", "ls-remote", "origin")
    before = (parent / "dvc.lock").read_text()

    # The same again is taken from the run cache, and an answer for other inputs is refused.
    commit = handover.ask("train", "origin", parent)
    lines.clear()
    handover.work("train", commit, "origin", lines.append, worker)
    assert not any("Running stage 'train'" in line for line in lines)
    changed = (parent / "params.yaml").read_text().replace("lora_r: 8", "lora_r: 4")
    (parent / "params.yaml").write_text(changed)
    with pytest.raises(handover.HandoverError, match="on other inputs than those here"):
        handover.take("train", commit, "origin", parent)
    assert (parent / "dvc.lock").read_text() == before
    assert YAML(typ="safe").load(before)["stages"]["prepare"]
    assert read_json(parent / "artifacts" / "adapter" / "training.json")


def test_a_remote_that_is_not_there_is_one_sentence(places: tuple[Path, Path]) -> None:
    with pytest.raises(handover.HandoverError, match="git push"):
        handover.ask("train", "nowhere", places[0])


def test_one_gpu_is_held_by_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"test-{tmp_path.name}")
    order: list[str] = []

    def second() -> None:
        with handover.only_on_gpu(lambda _: order.append("waits")):
            order.append("second")

    with handover.only_on_gpu(lambda _: order.append("never")) as path:
        thread = threading.Thread(target=second)
        thread.start()
        while "waits" not in order:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    path.unlink()
    assert order == ["waits", "first", "second"]
