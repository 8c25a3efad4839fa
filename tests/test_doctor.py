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
    assert found["packages"]["passed"] and found["base model"]["passed"] and found["clock"]["passed"]
    assert found["dvc remote"]["passed"] is None  # a project of the tests has none

    rows = root / "data" / "instructions" / "rows.json"
    rows.unlink()
    rows.write_text("[]")
    keys = {"signing_key": "lost.pem", "verify_key": "lost.pub"}
    change_params(root, publish=keys, prepare={"chat_template": "no"}, merge={"export": ["gguf-f16"]})
    status, found = checks(root)
    assert status == 1
    failed = {name for name, each in found.items() if each["passed"] is False}
    assert failed == {"data", "base model", "exports", "signing"}
    assert "retune ingest" in found["data"]["advice"]
    assert "prepare.chat_template is no" in found["base model"]["detail"]
    assert "lost.pem, lost.pub" in found["signing"]["detail"]


def test_data_is_not_looked_at_while_a_run_writes(root: Path) -> None:
    with only_run(root):
        _, found = checks(root)
    assert found["data"]["passed"] is None and "retune status" in found["data"]["detail"]


def test_parameters_that_are_wrong_are_a_line_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("ingest: {}\n")
    [wrong] = [each for each in doctor.doctor(tmp_path) if each.passed is False and each.name == "parameters"]
    assert "ingest.format is missing" in wrong.detail


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_GIB", 10.0**6)
    [disk] = [each for each in doctor.doctor(tmp_path) if each.name == "disk"]
    assert disk.passed is False and "retune gc" in disk.advice
