"""A decision, and the comparison of two versions, in words: everything that differs, with the right numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import with_, write_params
from versions import ITEMS, make_workspace, parameters, promote_version, published, records

from pipeline.cli.versions import compare
from pipeline.core import graph
from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.decisions import Record, name_of
from pipeline.registry.gate import Claim, CompareError
from pipeline.registry.wording import TITLES, next_step, number, title, why
from pipeline.report.tables import in_short, markdown, score_rows, show_table, verdict_rows
from pipeline.report.versus import compare_versions, comparison_json

MANIFEST: dict[str, Any] = {
    "params": {"prepare": {"test_fraction": 0.1}, "train": {"task": "causal-lm"}},
    "data": {"rows": {"train": 380, "validation": 52, "test": 48}},
    "evaluation": {"params": {"max_samples": None}},
}
CLASSIFIER = MANIFEST | {"params": {"train": {"task": "sequence-classification"}}}
LIMITED = MANIFEST | {"evaluation": {"params": {"max_samples": 48}}}


def row(verdict: str, difference: float, margin: float | None = None, **more: Any) -> dict[str, Any]:
    """A row of a comparison on 48 items; with a margin it is a guard's."""
    needed = "more than 0" if margin is None else f"at least -{margin:g}"
    return {
        "candidate": 0.4 + difference, "champion": 0.4, "difference": difference, "low": difference - 0.05,
        "high": difference + 0.05, "margin": margin, "items": 48, "groups": 48, "needed": needed,
        "p_adjusted": 0.2, "verdict": verdict, "passed": verdict == "passed", "declared": 0.05, "gate_power": 0.3,
        "gate_rows": 78,
    } | more  # fmt: skip


BETTER = row("passed", 0.1)
UNDECIDED = {"rougeL": row("open", 0.034)}  # needs 78 test items; there are 48, a tenth of the rows


def test_a_zero_has_no_minus_sign() -> None:
    items = np.ones(2)
    claims = [Claim("perplexity", "perplexity", items, items, items, bound) for bound in (0.0, 0.5)]
    assert [replace(claim, declared=1.0).needed for claim in claims] == ["less than 0", "less than -0.5"]
    assert (number("bleu", -0.01), number("rougeL", -1e-5, "+"), number("bleu", -0.1)) == ("0.0", "+0.000", "-0.1")


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (UNDECIDED, ["0.034 better than that of champion v3", "48 test items are too few"]),
        ({"rougeL": BETTER, "bleu": row("open", -0.5, 5.0)}, ["bleu is 0.5 worse", "too few", "least -5"]),
        ({"rougeL": BETTER, "bleu": row("passed", 0.5, 5.0)}, ["0.100 better", "bleu lost no more"]),
        ({"rougeL": row("failed", -0.1)}, ["0.100 worse", "0.300 against 0.400", "needed: more than 0"]),
        ({"rougeL": BETTER, "bleu": row("failed", -9, 5.0)}, ["bleu is 9.0 worse", "promote.guard_metrics"]),
        ({"general_accuracy": row("failed", -0.1, 0.02)}, ["general_accuracy is 0.100", "promote.max_forgetting"]),
        ({"rougeL": row("open", 0.01, gate_power=0.9)}, ["can be chance", "improvement of 0.05"]),
        ({"rougeL": BETTER | {"gate_power": 0.9}, "bleu": row("open", -0.5, 5.0)}, ["larger loss than allowed"]),
        ({"perplexity": row("open", -0.2)}, ["perplexity is 0.200 better"]),
        ({"rougeL": row("open", 0.0)}, ["rougeL is the same as that of champion v3"]),
    ],
)
def test_the_reason_has_the_numbers(comparison: dict[str, Any], words: list[str]) -> None:
    reason = why(comparison, "champion v3")
    assert [word for word in words if word not in reason] == []


def test_the_next_step_fits_the_decision() -> None:
    never = {"rougeL": row("open", 0.0, gate_rows=None)}
    for word, comparison, manifest, first, expected, unexpected in (
        ("undecided", UNDECIDED, MANIFEST, False, "about 300 rows", "test_fraction"),
        ("undecided", UNDECIDED, MANIFEST, False, 'retune promote v4 --force --reason "…"', "rollback"),
        ("undecided", UNDECIDED, LIMITED, False, "evaluate.max_samples from 48 to about 78", "rows"),
        ("undecided", never, MANIFEST, False, "promote.guard_metrics", "Add"),
        ("promoted", {"rougeL": BETTER}, MANIFEST, False, "retune rollback", "force"),
        ("promoted", {"rougeL": BETTER}, MANIFEST, True, "retune chat", "rollback"),  # there is nothing to go back to
        ("promoted", {"rougeL": BETTER}, CLASSIFIER, False, "retune classify TEXT", "retune chat"),
        ("forced", {"rougeL": BETTER}, CLASSIFIER, True, "retune classify TEXT", "retune chat"),
        ("refused", {"rougeL": row("failed", -0.1)}, MANIFEST, False, "overrule the gate", "after all"),
    ):
        record = Record(1, word, "295a1c", None, None if first else "11aa22", "", comparison)
        text = next_step(record, "v4", manifest)
        assert expected in text and unexpected not in text
    answer = Record(3, "refused", "295a1c", None, None, "", {"rougeL": BETTER}, proposal=2)  # it passed the gate
    text = next_step(answer, "v4", MANIFEST)
    assert 'retune promote v4 --force --reason "…"' in text and "overrule" not in text and "worst" not in text


def test_every_decision_has_a_title_and_a_forced_one_is_called_so() -> None:
    titles = [title(word, "v4 (295a1c…)", "v3 (11aa22…)") for word in TITLES]
    assert len(set(titles)) == 7 and all("v4 (295a1c…)" in text for text in titles)
    assert "there is no champion yet" in title("refused", "v1", None)
    forced = Record(1, "promoted", "abc", "abc", None, "a person's reason", overruled=["rougeL"])
    assert (forced.word, Record(1, "promoted", "abc", "abc", None, "r").word) == ("forced", "promoted")
    names = [name_of("295a1c0011223344", number) for number in ("4", None)]
    assert names == ["v4 (295a1c…)", "295a1c0011223344"]


def test_the_verdicts_table_names_base_or_champion_and_shows_what_was_not_tested() -> None:
    zero = row("uninformative", 0.0, 0.05, candidate=0.0, champion=0.0, passed=None)
    none = row("unmeasured", 0.0, 0.05, candidate=None, champion=None, passed=None)
    better, untested, unmeasured = verdict_rows({"rougeL": BETTER, "accuracy": zero, "bleu": none}, first=True)
    assert (better["base"], better["p"], better["verdict"]) == ("0.400", "0.200", "passed")
    assert [untested[key] for key in ("candidate", "95 % interval", "p", "verdict")] == [
        "0.000", "–", "–", "not informative",
    ]  # fmt: skip
    assert (unmeasured["candidate"], unmeasured["verdict"]) == ("–", "not measured")
    assert "champion" in verdict_rows({"rougeL": BETTER})[0]


def test_the_score_table_omits_missing_metrics_and_says_if_a_metric_counts_few_items(
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"score": 0.5, "low": 0.4, "high": 0.6}
    systems: dict[str, Any] = {"base": {"bleu": None, "rougeL": score, "accuracy": score}, "champion": {}}
    systems["champion"] = {"rougeL": {"score": 0.55}}
    rows = score_rows(systems, {"accuracy": 3}, 48)
    assert [row["metric"] for row in rows] == [
        "accuracy (3 of 48 items)", "macro_f1 (needs 10 items per class)", "rougeL",
    ]  # fmt: skip
    assert rows[2] == {"metric": "rougeL", "base": "0.500 (0.400 to 0.600)", "champion": "0.550"}
    assert (markdown(rows)[0], markdown([])) == ("| metric | base | champion |", [])
    show_table(rows, "Scores")
    assert "0.500 (0.400 to 0.600)" in capsys.readouterr().out


def test_the_history_names_the_metric_that_decided() -> None:
    comparison = {"rougeL": BETTER, "bleu": row("failed", -9, 5.0, candidate=31.0, champion=40.0)}
    texts = [in_short(rows) for rows in (comparison, {"rougeL": row("open", 0.1)}, {})]
    assert texts == ["bleu 31.0 against 40.0", "rougeL 0.500 against 0.400", ""]


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
