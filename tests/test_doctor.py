"""`retune doctor` finds what is broken, says what to do, and continues with the next check."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import change_params, make_project, retune

from pipeline.chat.template import load_template
from pipeline.cli import doctor
from pipeline.core.run_lock import only_run
from pipeline.params import Params


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Path:
    return make_project(tmp_path_factory.mktemp("doctor") / "project", base, params)


def checks(root: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    command = retune(root, "doctor", "--json")
    answer = json.loads(command.stdout)
    assert answer["passed"] == (command.returncode == 0)
    return command.returncode, {check["name"]: check for check in answer["checks"]}


def test_a_healthy_project_passes_and_each_fault_of_a_broken_one_is_named(root: Path, params: Params) -> None:
    status, results = checks(root)
    assert status == 0, [check for check in results.values() if check["passed"] is False]
    _, identity = load_template(params.prepare)
    assert identity["digest"][:12] in results["base model"]["detail"]
    assert results["base model"]["passed"]
    assert results["dvc remote"]["passed"] is None  # the tests' projects have no remote

    rows = root / "data" / "instructions" / "rows.json"
    rows.unlink()
    rows.write_text("[]")
    change_params(root, publish={"artifact_store": "file:///proc/no/store"}, prepare={"chat_template": "no"})
    status, results = checks(root)
    assert status == 1
    failed = {name for name, check in results.items() if check["passed"] is False}
    assert failed == {"data", "base model", "artifact store"}
    assert results["git"]["detail"] == "1 uncommitted change"
    assert "retune ingest" in results["data"]["advice"]
    assert "prepare.chat_template is no" in results["base model"]["detail"]


def test_data_is_not_checked_while_a_run_writes(root: Path) -> None:
    with only_run(root):
        passed, detail = doctor._data(root)[:2]
    assert passed is None and "retune status" in detail


def test_with_invalid_parameters_nothing_else_is_checked(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("ingest: {}\n")
    [wrong] = doctor.doctor(tmp_path)
    assert wrong.name == "parameters" and wrong.passed is False and "ingest.format is missing" in wrong.detail
