"""Comparing two versions: everything that differs is listed with its values, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import with_, write_params
from versions import ITEMS, make_workspace, parameters, promote_version, published, records

from pipeline.cli.versions import compare
from pipeline.core import graph
from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.gate import CompareError
from pipeline.report.versus import compare_versions, comparison_json


@pytest.fixture
def params(tmp_path: Path) -> Params:
    """Parameters of a project with v1, the champion, and v2, which is better and has another rank and seed."""
    params = parameters(tmp_path)
    published(tmp_path, params, 0.5)
    promote_version(tmp_path, params)
    published(tmp_path, with_(params, train={"lora_r": 32, "seed": 7}), 0.6)
    return params


def test_scores_parameters_and_texts_of_two_versions_are_compared(tmp_path: Path, params: Params) -> None:
    comparison = comparison_json(compare_versions(params, "v1", "v2", tmp_path))
    assert comparison["old"].startswith("v1 (") and comparison["new"].startswith("v2 (")
    rouge = comparison["metrics"]["rougeL"]
    assert rouge["difference"] == pytest.approx(rouge["new"] - rouge["old"]) == pytest.approx(0.1, abs=0.001)
    assert rouge["low"] - 1e-9 <= rouge["difference"] <= rouge["high"] + 1e-9
    assert (comparison["better"] + comparison["worse"] + comparison["same"], comparison["better"]) == (ITEMS, ITEMS)
    rows = {row["parameter"]: list(row.values())[1:] for row in comparison["tables"]["Parameters that differ"]}
    assert rows == {"train.lora_r": ["16", "32"], "train.seed": ["42", "7"]}
    assert comparison["tables"]["Data and code that differ"] == []
    first = comparison["texts"]["improved"][0]
    assert first["prompt"].startswith("Which colour has box") and first["old"] != first["new"]
    reverse = comparison_json(compare_versions(params, "v2", "champion", tmp_path))
    assert reverse["metrics"]["rougeL"]["difference"] == pytest.approx(-0.1, abs=0.001)


def test_the_workspace_is_compared_without_being_published(tmp_path: Path, params: Params) -> None:
    make_workspace(tmp_path, params, 0.7)
    before = records(tmp_path)
    comparison = comparison_json(compare_versions(params, "champion", "workspace", tmp_path))
    assert comparison["new"] == "workspace"
    assert comparison["metrics"]["rougeL"]["difference"] == pytest.approx(0.2, abs=0.01)
    assert not (tmp_path / "store" / "versions" / graph.version_id(tmp_path)).exists()
    assert records(tmp_path) == before


def test_what_cannot_be_compared_is_refused(tmp_path: Path, params: Params) -> None:
    shutil.rmtree(tmp_path / "artifacts")
    for other, error in (("champion", CompareError), ("0" * 16, StoreError), ("workspace", CompareError)):
        with pytest.raises(error):
            compare_versions(params, "v1", other, tmp_path)
    assert comparison_json(compare_versions(params, "v1", "v2", tmp_path))["better"] == ITEMS  # needs no artifacts


def test_a_note_tells_that_versions_had_different_test_items(tmp_path: Path, params: Params) -> None:
    third = published(tmp_path, with_(params, train={"seed": 9}), 0.6, test_split="b", test_fraction=0.05)
    scored = tmp_path / ".retune" / "versions" / third / "scored"
    shutil.copytree(tmp_path / "artifacts" / "parity", scored)
    published(tmp_path, params, 0.5)  # the workspace has the items of v1 again
    write_json(scored / "evaluation.json", read_json(tmp_path / "artifacts/parity/parity.json")["evaluation"])
    shutil.copy(tmp_path / "artifacts/evaluation/items.base.parquet", scored / "items.parquet")
    notes = compare_versions(params, "v1", third, tmp_path).notes
    assert any(note.startswith("v3 (") and "scored again" in note for note in notes)
    assert any("prepare.test_fraction" in note for note in notes)


def test_the_command_prints_text_or_json_and_writes_a_page(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, params)
    compare("v1", "v2", tmp_path / "page.html")
    output = capsys.readouterr().out
    for text in ("rougeL is better", f"{ITEMS} answers are better", "train.lora_r", "Which colour has box"):
        assert text in output
    page = (tmp_path / "page.html").read_text()
    assert "<h1>Comparison</h1>" in page and "train.lora_r" in page and "default-src" in page
    compare("v1", "v2", json_output=True)
    assert json.loads(capsys.readouterr().out)["test_items"] == ITEMS
