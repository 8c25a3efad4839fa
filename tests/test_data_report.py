"""The data report adds up, has no secrets, and shows text from the data only as text."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.data_report import DataReportError, DataStats, excerpt, write_report

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">`*|[x](javascript:alert(1))"
)


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


def report_of(stats: DataStats, prompt: str = "user says ") -> dict[str, Any]:
    return stats.report([(prompt, False), ("yes", True)], max_length=64, test_sha256="0" * 64, crowded=0, scoring={})


@pytest.fixture
def hostile_report() -> dict[str, Any]:
    """A report with every section, in which every text is hostile."""
    stats = DataStats()
    stats.add_read(HOSTILE, HOSTILE, 7)
    stats.tasks |= {"train": Counter({HOSTILE: 2}), "validation": Counter(["code"]), "test": Counter(["code"])}
    stats.languages |= {"train": Counter([HOSTILE, "en"]), "test": Counter(["zh"])}
    stats.lengths.update([10, 60])
    stats.repaired.add(HOSTILE, source=HOSTILE, text=turns(HOSTILE))
    for reason in (HOSTILE, "exact duplicate of an earlier row", "longer than prepare.max_length"):
        stats.dropped.add(reason, source=HOSTILE, text=turns(HOSTILE + " a@b.org"))
    pair = {"source": HOSTILE, "of": HOSTILE, "similarity": 0.93, "text": turns(HOSTILE), "of_text": turns(HOSTILE)}
    stats.duplicates.add(HOSTILE, **pair)
    return report_of(stats, f"```{HOSTILE}\n")


def test_the_report_has_the_counts_of_the_rows() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "a.json", 40)
    stats.tasks |= {"train": Counter(one=20, two=10), "test": Counter(one=2)}
    stats.lengths.update(range(1, 31))
    stats.trained_tokens = 100
    for number in range(8):
        stats.dropped.add("seldom" if number < 2 else "often", source=f"a.json:{number}", text=turns("text"))
    report = report_of(stats)
    assert report["rows_in"] == 40
    assert report["rows"] == {"train": 30, "validation": 0, "test": 2}
    assert list(report["dropped"].items()) == [("often", 6), ("seldom", 2)]
    examples = {reason: len(examples) for reason, examples in report["dropped_examples"].items()}
    assert examples == {"often": 5, "seldom": 2}
    assert report["train_tokens"] == {"total": 465, "trained": 100, "median_per_row": 16, "max_per_row": 30}
    assert report["lengths"] == {"1": 1, "2": 1, "4": 2, "8": 4, "16": 8, "32": 14}


def test_a_row_that_is_neither_kept_nor_dropped_is_an_error() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "rows.json", 2)
    stats.tasks["train"]["default"] += 1
    with pytest.raises(DataReportError):
        report_of(stats)


def test_the_example_and_the_excerpts_hold_no_secrets() -> None:
    stats = DataStats()
    stats.add_read("a", "f", 1)
    key = "AKIA" + "A1B2" * 4
    stats.dropped.add("reason", source="f:1", text=turns(f"use {key} " + "word " * 500))
    report = report_of(stats, f"use {key}")
    assert report["example_segments"] == [("use ***", False), ("yes", True)]
    (example,) = report["dropped_examples"]["reason"]
    assert example["text"].startswith("user: use *** word") and len(example["text"]) <= 600


@pytest.mark.parametrize("record", [None, 5, "x", [], [1], {"a": float("nan")}, [{"role": "user"}], {"a": b"\xff"},
                                    [{"role": "user", "content": "\x00\x1b[31m\u202e"}]])  # fmt: skip
def test_any_record_has_an_excerpt_that_a_terminal_can_show(record: Any) -> None:
    assert all(character.isprintable() or character == "\n" for character in excerpt(record))


def test_text_from_the_data_is_not_markup(hostile_report: dict[str, Any], tmp_path: Path) -> None:
    write_report(hostile_report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and 'onerror="' not in page
    assert page.count("&lt;script&gt;") >= 8 and "default-src 'none'" in page
    text = (tmp_path / "report.md").read_text()
    outside_code = re.sub(r"^````\n.*?^````$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "````" in text and not re.search(r"(?<!\\)<(?:script|img)", outside_code)
    assert "](javascript" not in outside_code.replace("\\]", "")
