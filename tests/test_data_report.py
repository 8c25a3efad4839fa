"""The data report: it adds up, says the same however it was counted, and nothing in the data can act in it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.report import (
    EXAMPLES,
    DataReportError,
    DataStats,
    excerpt,
    write_report,
)

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">`*|[x](javascript:alert(1))"
)
MAX_LENGTH = 64


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


def count(stats: DataStats, number: int) -> None:
    """One row, whose fate follows from its number."""
    stats.add_read(f"format{number % 2}", f"file{number % 3}", 1)
    source = f"file{number % 3}:{number}"
    if number % 4 == 0:
        stats.dropped.add(f"reason {number % 8}", source=source, text=turns(f"text {number}"))
        stats.duplicates.add("exact", source=source, of="file0:1", similarity=1.0, text="a", of_text="b")
        return
    if number % 7 == 0:
        stats.repaired.add("put right", source=source, text=turns(f"text {number}"))
    split = "test" if number % 5 == 0 else "train"
    length = number % MAX_LENGTH + 1
    stats.tasks[split][f"task {number % 3}"] += 1
    if split == "train":
        stats.lengths[length] += 1
        stats.trained_tokens += length // 2


def finished(stats: DataStats) -> dict[str, Any]:
    return stats.report(MAX_LENGTH, "0" * 64, [("user says ", False), ("yes", True)], 0, {})


@pytest.fixture
def full() -> dict[str, Any]:
    """A report with everything in it, every text of it hostile."""
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
    return stats.report(MAX_LENGTH, "0" * 64, [(f"```{HOSTILE}\n", False), ("answer", True)], 0, {})


def test_the_numbers_are_those_of_the_rows() -> None:
    stats = DataStats()
    for number in range(1, 201):
        count(stats, number)
    report = finished(stats)
    kept = [number for number in range(1, 201) if number % 4]
    train = [number for number in kept if number % 5]
    lengths = sorted(number % MAX_LENGTH + 1 for number in train)
    assert report["rows_in"] == 200
    assert report["rows"] == {"train": len(train), "validation": 0, "test": len(kept) - len(train)}
    assert sum(report["dropped"].values()) == 200 - len(kept)
    assert report["train_tokens"] == {
        "total": sum(lengths),
        "trained": sum(length // 2 for length in lengths),
        "median_per_row": lengths[len(lengths) // 2],
        "max_per_row": lengths[-1],
    }
    assert report["lengths"]["8"] == sum(4 < length <= 8 for length in lengths)
    assert sum(report["lengths"].values()) == len(train)
    assert all(len(examples) <= EXAMPLES for examples in report["dropped_examples"].values())
    assert list(report["dropped"].values()) == sorted(report["dropped"].values(), reverse=True)


def test_a_row_that_is_neither_kept_nor_dropped_is_no_report() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "rows.json", 2)
    stats.tasks["train"]["default"] += 1
    with pytest.raises(DataReportError, match="2 rows came in, but 1 are kept and 0 dropped"):
        finished(stats)


def test_the_example_and_the_excerpts_hold_no_secrets() -> None:
    stats = DataStats()
    stats.add_read("a", "f", 1)
    key = "AKIA" + "A1B2" * 4
    stats.dropped.add("reason", source="f:1", text=turns(f"use {key} " + "word " * 500))
    report = stats.report(MAX_LENGTH, "0" * 64, [(f"use {key}", False)], 0, {})
    assert report["example_segments"] == [("use ***", False)]
    (example,) = report["dropped_examples"]["reason"]
    assert example["text"].startswith("user: use *** word") and len(example["text"]) <= 600


@pytest.mark.parametrize("record", [None, 5, "x", [], [1], {"a": float("nan")}, [{"role": "user"}], {"a": b"\xff"},
                                    [{"role": "user", "content": "\x00\x1b[31m\u202e"}]])  # fmt: skip
def test_any_record_has_an_excerpt_that_a_terminal_can_show(record: Any) -> None:
    assert all(character.isprintable() or character == "\n" for character in excerpt(record))


def test_nothing_of_the_data_is_markup(full: dict[str, Any], tmp_path: Path) -> None:
    write_report(full, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and 'onerror="' not in page
    assert page.count("&lt;script&gt;") >= 8 and "default-src 'none'" in page
    text = (tmp_path / "report.md").read_text()
    outside_code = re.sub(r"^````\n.*?^````$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "````" in text and not re.search(r"(?<!\\)<(?:script|img)", outside_code)
    assert "](javascript" not in outside_code.replace("\\]", "")
