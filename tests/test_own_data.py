"""Own rows stay out of the sample's remote; `retune doctor` names what is broken; the guide's chapter works."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, change_params, dvc, environment, git, make_project, retune
from ruamel.yaml import YAML

from pipeline import settings
from pipeline.chat.template import load_template
from pipeline.cli import doctor
from pipeline.cli.doctor import Check
from pipeline.core import graph
from pipeline.core.graph import GraphError, SnapshotMissing
from pipeline.core.run_lock import only_run
from pipeline.params import Params
from pipeline.settings import load_params


def checks(root: Path) -> dict[str, Check]:
    return {"data": Check("data", *doctor._data(root)), "dvc remote": Check("dvc remote", *doctor._remote(root))}


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "-qm", "change")


def clone_of(project: Path, name: str) -> Path:
    git(project.parent, "clone", "-q", str(project), name)
    return project.parent / name


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sample lies in a remote within git, as this one's."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    root = make_project(folder / "project", folder / "base", load_params(ROOT / "params.yaml"))
    dvc(root, "remote", "add", "sample", "infra/sample-remote")
    with (root / "data.dvc").open("a") as file:
        file.write("  remote: sample\n")
    dvc(root, "push", "-q", "data.dvc")
    commit(root)
    return root


@pytest.fixture(scope="module")
def own(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows of its own, not committed yet."""
    root = shutil.copytree(sample, tmp_path_factory.mktemp("own") / "project", symlinks=True)
    assert "dvc remote add -d" in ingest(root)
    return root


@pytest.fixture
def project(own: Path, tmp_path: Path) -> Path:
    return shutil.copytree(own, tmp_path / "project", symlinks=True)


def ingest(root: Path) -> str:
    (root.parent / "own.jsonl").write_text('{"prompt": "What is one plus one?", "completion": "2"}\n')
    done = retune(root, "ingest", "../own.jsonl")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_rows_are_never_pushed_into_the_samples_remote(project: Path) -> None:
    before = sorted((project / "infra").rglob("*"))
    assert graph.snapshot(project).get("remote") is None
    with pytest.raises(AssertionError, match="returncode=1"):
        dvc(project, "push", "-q")
    assert sorted((project / "infra").rglob("*")) == before
    results = checks(project)
    assert results["data"].passed and results["dvc remote"].passed is None


def test_a_clone_without_the_rows_names_the_snapshot_and_ingests_them_again(project: Path) -> None:
    commit(project)
    clone, named = clone_of(project, "clone"), graph.snapshot(project)["md5"]
    with pytest.raises(SnapshotMissing, match=named[:8]):
        graph.pull_data(clone)
    check = checks(clone)["data"]
    assert check.passed is False and named[:8] in check.detail
    assert "base model" in ingest(clone)
    assert graph.snapshot(clone)["md5"] == named  # base and rows are those of the lost snapshot
    assert git(clone, "status", "--porcelain") == ""


def test_data_that_the_cache_lacks_is_stored_unless_it_was_edited(project: Path) -> None:
    recorded = (project / "data.dvc").read_text()
    shutil.rmtree(project / ".dvc" / "cache")
    assert checks(project)["data"].passed is None
    assert not graph.pull_data(project)
    assert checks(project)["data"].passed and not graph.stale(project).get("data.dvc")
    shutil.rmtree(project / ".dvc" / "cache")
    (project / "data" / "instructions" / "edited").touch()
    with pytest.raises(SnapshotMissing):
        graph.pull_data(project)
    assert (project / "data.dvc").read_text() == recorded


def test_a_clone_fetches_own_rows_from_the_teams_remote(project: Path, tmp_path: Path) -> None:
    dvc(project, "remote", "add", "-d", "team", str(tmp_path / "team"))
    assert graph.team_remote(project) == "team"
    check = checks(project)["dvc remote"]
    assert check.passed is False and "dvc push" in check.advice
    commit(project)
    dvc(project, "push", "-q", "data.dvc")
    clone = clone_of(project, "clone")
    assert checks(clone)["data"].passed is None
    assert graph.pull_data(clone)
    assert checks(clone)["data"].passed and checks(clone)["dvc remote"].passed


def test_the_sample_needs_no_remote_of_ones_own_and_data_changed_by_hand_is_not_run_on(sample: Path) -> None:
    clone = clone_of(sample, "clone")
    assert {check.passed for check in doctor.doctor(clone) if check.name in ("data", "base model")} == {None}
    assert graph.pull_data(clone)
    assert (clone / "data" / "base" / "config.json").exists()
    changed = clone / "data" / "instructions" / "rows.json"
    changed.unlink()
    changed.write_text("[]")
    with pytest.raises(GraphError, match="edited by hand"):
        graph.pull_data(clone)
    assert changed.read_text() == "[]"


def examined(root: Path) -> dict[str, dict[str, Any]]:
    command = retune(root, "doctor", "--json")
    answer = json.loads(command.stdout)
    assert answer["passed"] == (command.returncode == 0) == all(c["passed"] is not False for c in answer["checks"])
    return {check["name"]: check for check in answer["checks"]}


def test_a_healthy_project_passes_and_each_fault_of_a_broken_one_is_named(
    tmp_path: Path, base: Path, params: Params
) -> None:
    root = make_project(tmp_path / "project", base, params)
    results = examined(root)
    assert [check for check in results.values() if check["passed"] is False] == []
    assert load_template(params.prepare)[1]["digest"][:12] in results["base model"]["detail"]
    assert results["base model"]["passed"]
    assert results["dvc remote"]["passed"] is None  # the tests' projects have no remote

    rows = root / "data" / "instructions" / "rows.json"
    rows.unlink()
    rows.write_text("[]")
    change_params(root, publish={"artifact_store": "file:///proc/no/store"}, prepare={"chat_template": "no"})
    results = examined(root)
    failed = {name for name, check in results.items() if check["passed"] is False}
    assert failed == {"data", "base model", "artifact store"}
    assert results["git"]["detail"] == "1 uncommitted change"
    assert "retune ingest" in results["data"]["advice"]
    assert "prepare.chat_template is no" in results["base model"]["detail"]
    with only_run(root):  # while a run writes data are not checked
        assert checks(root)["data"].passed is None and "retune status" in checks(root)["data"].detail


def test_with_invalid_parameters_nothing_else_is_checked(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("ingest: {}\n")
    [wrong] = doctor.doctor(tmp_path)
    assert wrong.name == "parameters" and wrong.passed is False and "ingest.format is missing" in wrong.detail


WHO = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


def blocks(team: Path) -> list[tuple[str, str]]:
    """Kind and text of each fenced block of the chapter; the team's folder is one of this test."""
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").replace("/mnt/team", str(team))
    chapter = text.split("\n## Your own data\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", chapter, re.M | re.S)


def run_commands(commands: str, folder: Path, last: Path) -> tuple[str, Path]:
    """What the commands print, and the folder that they end in; each has to succeed."""
    done = subprocess.run(
        ["bash", "-euc", f"{commands}pwd > {last}"],
        cwd=folder, env=environment() | WHO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(f"{commands}\n{done.stdout}")
    assert done.returncode == 0
    return done.stdout, Path(last.read_text().strip())


def numbers(line: str) -> list[str]:
    """The numbers in a line; versions' ids depend on the processor."""
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"\b[0-9a-f]{6}(…|\b)", "", line))


@pytest.mark.integration
@pytest.mark.timeout(3600)
def test_the_own_data_chapter_works_as_it_is_written(tmp_path: Path) -> None:
    project = folder = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    printed: list[list[str]] = []
    for kind, text in blocks(tmp_path / "team"):
        match kind:
            case "python":
                (tmp_path / "tickets.py").write_text(text)
            case "yaml":
                tree = YAML(typ="safe").load(text)
                values = {f"{section}.{key}": value for section in tree for key, value in tree[section].items()}
                settings.change_params(values, folder / "params.yaml")
            case "sh":
                output, folder = run_commands(text, folder, tmp_path / "last")
                printed = [numbers(line) for line in output.splitlines()]
            case _:
                assert [line for line in text.splitlines() if numbers(line) not in [[], *printed]] == []
    decisions = json.loads(retune(project, "history", "--json").stdout)
    assert [each["decision"] for each in decisions] == ["promoted", "promoted", "rollback", "rollback"]
    first, second, *_ = decisions
    assert second["previous"] == first["champion"] and decisions[-1]["champion"] == second["champion"]
    assert folder == tmp_path / "colleague"
    assert graph.version_id(folder) == second["champion"]
    assert json.loads(retune(folder, "status", "--json").stdout)["champion"] == second["champion"]
