"""Own rows stay out of the sample's remote in git, and a clone without them says so and keeps the base model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, make_project, retune

from pipeline.cli import doctor
from pipeline.cli.doctor import Check
from pipeline.core import graph
from pipeline.core.graph import SnapshotMissing
from pipeline.settings import load_params

WHO = ("-c", "user.name=t", "-c", "user.email=t@example.org")


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True, text=True).stdout


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


def commit(root: Path) -> None:
    run(root, "git", "add", "--all")
    run(root, "git", *WHO, "commit", "-qm", "change")


def checks(root: Path) -> dict[str, Check]:
    return {"data": Check("data", *doctor._data(root)), "dvc remote": Check("dvc remote", *doctor._remote(root))}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose sample lies in a remote within git, as this one's, and then has rows of its own."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    root = make_project(tmp_path / "project", tmp_path / "base", load_params(ROOT / "params.yaml"))
    dvc(root, "remote", "add", "sample", "infra/sample-remote")
    with (root / "data.dvc").open("a") as file:
        file.write("  remote: sample\n")
    dvc(root, "push", "-q", "data.dvc")
    commit(root)
    (tmp_path / "own.jsonl").write_text('{"prompt": "What is one plus one?", "completion": "2"}\n')
    return root


def ingest(root: Path, *options: str) -> str:
    done = retune(root, "ingest", "../own.jsonl", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_rows_are_never_pushed_into_the_samples_remote(project: Path) -> None:
    before = sorted((project / "infra").rglob("*"))
    assert "dvc remote add -d" in ingest(project)
    assert graph.snapshot(project).get("remote") is None
    with pytest.raises(subprocess.CalledProcessError):
        dvc(project, "push", "-q")
    assert sorted((project / "infra").rglob("*")) == before
    found = checks(project)
    assert found["data"].passed and found["dvc remote"].passed is None


def test_a_clone_without_the_rows_names_the_snapshot_and_ingests_them_again(project: Path, tmp_path: Path) -> None:
    ingest(project)
    commit(project)
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    named = graph.snapshot(project)["md5"]
    with pytest.raises(SnapshotMissing, match=named[:8]):
        graph.pull_data(clone)
    found = checks(clone)["data"]
    assert found.passed is False and named[:8] in found.detail
    assert "base model" in ingest(clone)
    assert graph.snapshot(clone)["md5"] == named  # base and rows are those of the lost snapshot
    assert run(clone, "git", "status", "--porcelain") == ""


def test_a_clone_fetches_own_rows_from_the_teams_remote(project: Path, tmp_path: Path) -> None:
    dvc(project, "remote", "add", "-d", "team", str(tmp_path / "team"))
    assert json.loads(ingest(project, "--json"))["remote"] == "team"
    found = checks(project)["dvc remote"]
    assert found.passed is False and "dvc push" in found.advice
    commit(project)
    dvc(project, "push", "-q", "data.dvc")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    assert checks(clone)["data"].passed is None
    assert graph.pull_data(clone)
    assert checks(clone)["data"].passed and checks(clone)["dvc remote"].passed


def test_the_sample_needs_no_remote_of_ones_own(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    assert graph.pull_data(clone)
    assert (clone / "data" / "base" / "config.json").exists()
