"""What a person reads of a decision: what was decided, why, and what to do next, with the right numbers in it."""

from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console

from pipeline.registry.decisions import Record, name_of, word_of
from pipeline.registry.verdict import in_short, next_step, title, verdict_rows, why
from pipeline.report.tables import markdown, score_rows, terminal

MANIFEST: dict[str, Any] = {
    "params": {"prepare": {"test_fraction": 0.1}},
    "data": {"rows": {"train": 380, "validation": 52, "test": 48}},
    "evaluation": {"params": {"max_samples": None}},
}


def row(verdict: str, difference: float, margin: float | None = None, items: int = 48, **more: Any) -> dict[str, Any]:
    """A row of a comparison; of a guard where there is a margin."""
    needed = "more than 0" if margin is None else f"at least -{margin:g}"
    return {
        "candidate": 0.4 + difference, "champion": 0.4, "difference": difference, "low": difference - 0.05,
        "high": difference + 0.05, "margin": margin, "items": items, "groups": items, "needed": needed,
        "p_adjusted": 0.2, "verdict": verdict, "passed": verdict == "passed", "declared": 0.05, "gate_power": 0.3,
        "gate_rows": 78,
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        ({"rougeL": row("open", 0.034)}, ["0.034 better than that of champion v3", "48 test items are too few"]),
        ({"rougeL": row("passed", 0.1), "bleu": row("open", -0.5, 5.0)}, ["bleu is 0.5 worse", "too few", "least -5"]),
        ({"rougeL": row("passed", 0.1), "bleu": row("passed", 0.5, 5.0)}, ["0.100 better", "bleu lost no more"]),
        ({"rougeL": row("failed", -0.1)}, ["0.100 worse", "0.300 against 0.400", "more than 0 is needed"]),
        (
            {"rougeL": row("passed", 0.1), "bleu": row("failed", -9, 5.0)},
            ["bleu is 9.0 worse", "promote.guard_metrics"],
        ),
        ({"rougeL": row("open", 0.01, gate_power=0.9)}, ["can be chance", "improvement of 0.05"]),
        ({"perplexity": row("open", -0.2)}, ["perplexity is 0.200 better"]),
        ({"rougeL": row("open", 0.0)}, ["rougeL is the same as that of champion v3"]),
    ],
)
def test_the_reason_is_in_words_and_has_the_numbers(comparison: dict[str, Any], words: list[str]) -> None:
    said = why(comparison, "champion v3")
    assert [word for word in words if word not in said] == []


def test_too_few_items_are_said_in_rows_that_can_be_added() -> None:
    comparison = {"rougeL": row("open", 0.034)}  # 78 test items are needed, there are 48, a tenth of the rows
    beside_champion = next_step("undecided", "v4", comparison, MANIFEST)
    assert "about 300 rows" in beside_champion
    assert 'retune promote v4 --force --reason "…"' in beside_champion
    assert "test_fraction" not in beside_champion
    assert "prepare.test_fraction from 0.1 to 0.17" in next_step("undecided", "v4", comparison, MANIFEST, first=True)
    limited = MANIFEST | {"evaluation": {"params": {"max_samples": 48}}}
    assert "evaluate.max_samples from 48 to about 78" in next_step("undecided", "v4", comparison, limited)
    hopeless = {"rougeL": row("open", 0.0, gate_rows=None)}
    assert "promote.guard_metrics" in next_step("undecided", "v4", hopeless, MANIFEST)


def test_every_decision_has_a_title_and_a_forced_one_is_called_so() -> None:
    words = ["promoted", "forced", "refused", "undecided", "proposed", "open", "unchanged"]
    titles = [title(word, "v4 (295a1c…)", "v3 (11aa22…)") for word in words]
    assert len(set(titles)) == len(words)
    assert all("v4 (295a1c…)" in said for said in titles)
    assert "there is no champion yet" in title("refused", "v1", None)
    record = Record(1, "promoted", "abc", "abc", None, "a person's reason", overruled=["rougeL"])
    assert (word_of(record), word_of(Record(1, "promoted", "abc", "abc", None, "r"))) == ("forced", "promoted")
    assert (name_of("295a1c0011223344", "4"), name_of("295a1c0011223344", None)) == (
        "v4 (295a1c…)",
        "295a1c0011223344",
    )


def test_the_guide_shows_the_sentences_that_are_printed() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    v1, v2, v3 = "v1 (8b02f1…)", "v2 (295a1c…)", "v3 (77d0e4…)"
    shown = [("promoted", v2, None), ("refused", v3, v2), ("undecided", v2, v1), ("proposed", v2, v1)]
    for word, name, serving in shown:
        assert f"Verdict  {title(word, name, serving)}." in guide
        todo = next_step(word, name.split()[0], {"rougeL": row("open", 0.034)}, MANIFEST)
        assert f"Next     {todo}." in guide
    reason = why({"rougeL": row("open", 0.034)}, "champion v1 (8b02f1…)")
    assert f"Why      {reason}." in guide


def test_a_guard_that_guards_nothing_has_no_interval_and_no_p() -> None:
    zero = row("uninformative", 0.0, 0.05, candidate=0.0, champion=0.0, passed=None)
    [shown] = verdict_rows({"accuracy": zero})
    assert (shown["candidate"], shown["95 % interval"], shown["p"], shown["verdict"]) == (
        "0.000", "–", "–", "not informative",
    )  # fmt: skip


def test_one_table_of_scores_leaves_out_what_nobody_has_and_says_which_metrics_count_few_items() -> None:
    score = {"score": 0.5, "low": 0.4, "high": 0.6}
    systems: dict[str, Any] = {"base": {"bleu": None, "rougeL": score, "accuracy": score}, "champion": {}}
    systems["champion"] = {"rougeL": {"score": 0.55}}
    rows = score_rows(systems, {"accuracy": 3}, 48)
    assert [row["metric"] for row in rows] == [
        "accuracy (3 of 48 items)", "macro_f1 (needs 10 items per class)", "rougeL",
    ]  # fmt: skip
    assert rows[2] == {"metric": "rougeL", "base": "0.500 (0.400 to 0.600)", "champion": "0.550"}
    assert markdown(rows)[0] == "| metric | base | champion |"
    assert markdown([]) == []
    console = Console(width=100)
    with console.capture() as shown:
        console.print(terminal(rows, "Scores"))
    assert "0.500 (0.400 to 0.600)" in shown.get()


def test_the_history_names_the_metric_that_decided() -> None:
    comparison = {"rougeL": row("passed", 0.1), "bleu": row("failed", -9, 5.0, candidate=31.0, champion=40.0)}
    assert in_short(comparison) == "bleu 31.0 against 40.0"
    assert in_short({"rougeL": row("open", 0.1)}) == "rougeL 0.500 against 0.400"
    assert in_short({}) == ""


def test_a_first_version_is_next_to_the_base_model_and_has_no_champion_to_go_back_to() -> None:
    comparison = {"rougeL": row("passed", 0.1)}
    assert "champion" not in verdict_rows(comparison, first=True)[0]
    assert verdict_rows(comparison, first=True)[0]["base"] == verdict_rows(comparison)[0]["champion"] == "0.400"
    for word in ("promoted", "forced"):
        assert "rollback" not in next_step(word, "v1", comparison, MANIFEST, first=True)
        assert "rollback" in next_step(word, "v2", comparison, MANIFEST)
