"""A decision in words: what was decided, why, and what to do next, with the right numbers."""

from typing import Any

import pytest

from pipeline.registry.decisions import Record, name_of
from pipeline.registry.wording import TITLES, next_step, title, why
from pipeline.report.tables import in_short, markdown, score_rows, show_table, verdict_rows

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
