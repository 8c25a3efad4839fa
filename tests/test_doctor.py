"""`retune doctor` finds what is broken, says what to do, and goes on to the next check."""

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
    done = retune(root, "doctor", "--json")
    answer = json.loads(done.stdout)
    assert answer["passed"] == (done.returncode == 0)
    return done.returncode, {each["name"]: each for each in answer["checks"]}


def test_a_project_in_order_passes_and_a_broken_one_names_each_fault(root: Path, params: Params) -> None:
    status, found = checks(root)
    assert status == 0, [each for each in found.values() if each["passed"] is False]
    _, identity = load_template(params.prepare)
    assert identity["digest"][:12] in found["base model"]["detail"]
    assert found["base model"]["passed"]
    assert found["dvc remote"]["passed"] is None  # a project of the tests has none

    rows = root / "data" / "instructions" / "rows.json"
    rows.unlink()
    rows.write_text("[]")
    change_params(root, publish={"artifact_store": "file:///proc/no/store"}, prepare={"chat_template": "no"})
    status, found = checks(root)
    assert status == 1
    assert {name for name, each in found.items() if each["passed"] is False} == {"data", "base model", "artifact store"}
    assert "retune ingest" in found["data"]["advice"]
    assert "prepare.chat_template is no" in found["base model"]["detail"]


def test_data_is_not_looked_at_while_a_run_writes(root: Path) -> None:
    with only_run(root):
        passed, detail = doctor._data(root)[:2]
    assert passed is None and "retune status" in detail


def test_parameters_that_are_wrong_are_the_only_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("ingest: {}\n")
    [wrong] = doctor.doctor(tmp_path)
    assert wrong.name == "parameters" and wrong.passed is False and "ingest.format is missing" in wrong.detail
