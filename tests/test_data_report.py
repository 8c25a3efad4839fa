"""The data report: it adds up, says the same however it was counted, and nothing in the data can act in it."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.report import (
    EXAMPLES,
    MOST_KEYS,
    OTHER,
    DataReportError,
    DataStats,
    Histogram,
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
        stats.dropped.add_example(f"reason {number % 8}", source=source, text=turns(f"text {number}"))
        stats.duplicates.add_example("exact", source=source, of="file0:1", similarity=1.0, text="a", of_text="b")
        return
    if number % 7 == 0:
        stats.repaired.add_example("put right", source=source, text=turns(f"text {number}"))
    split = "test" if number % 5 == 0 else "train"
    length = number % MAX_LENGTH + 1
    stats.add_kept(split, [f"task {number % 3}"], [length], [length // 2], ["en"])


def finished(stats: DataStats) -> dict[str, Any]:
    return stats.report(MAX_LENGTH, "0" * 64, [("user says ", False), ("yes", True)])


@pytest.fixture
def full() -> dict[str, Any]:
    """A report with everything in it, every text of it hostile."""
    stats = DataStats()
    stats.add_read(HOSTILE, HOSTILE, 7)
    stats.add_kept("train", [HOSTILE] * 2, [10, 60], [5, 30], [HOSTILE, "en"])
    stats.add_kept("validation", ["code"], [10], [5], ["en"])
    stats.add_kept("test", ["code"], [10], [5], ["zh"])
    stats.repaired.add_example(HOSTILE, source=HOSTILE, text=turns(HOSTILE))
    for reason in (HOSTILE, "exact duplicate of an earlier row", "longer than prepare.max_length"):
        stats.dropped.add_example(reason, source=HOSTILE, text=turns(HOSTILE + " a@b.org"))
    pair = {"source": HOSTILE, "of": HOSTILE, "similarity": 0.93, "text": turns(HOSTILE), "of_text": turns(HOSTILE)}
    stats.duplicates.add_example(HOSTILE, **pair)
    return stats.report(MAX_LENGTH, "0" * 64, [(f"```{HOSTILE}\n", False), ("answer", True)])


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
    assert sum(report["lengths"]["train"].values()) == len(train)
    assert all(len(examples) <= EXAMPLES for examples in report["dropped_examples"].values())
    assert list(report["dropped"].values()) == sorted(report["dropped"].values(), reverse=True)


def test_a_row_that_is_neither_kept_nor_dropped_is_no_report() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "rows.json", 2)
    stats.add_kept("train", ["default"], [5], [2])
    with pytest.raises(DataReportError, match="2 rows came in, but 1 are kept and 0 dropped"):
        finished(stats)


def test_memory_stays_bounded_whatever_the_data_calls_itself() -> None:
    stats = DataStats()
    for number in range(MOST_KEYS + 100):
        stats.add_read("a", f"file {number}", 1)
        stats.dropped.add_example(f"reason {number}", source="f", text="x" * 100_000)
    report = finished(stats)
    assert len(report["dropped"]) == len(report["sources"]) == MOST_KEYS + 1
    assert report["dropped"][OTHER] == 100
    assert sum(map(len, report["dropped_examples"].values())) <= EXAMPLES * (MOST_KEYS + 1)


def test_the_example_and_the_excerpts_hold_no_secrets() -> None:
    stats = DataStats()
    stats.add_read("a", "f", 1)
    key = "AKIA" + "A1B2" * 4
    stats.dropped.add_example("reason", source="f:1", text=turns(f"use {key} " + "word " * 500))
    report = stats.report(MAX_LENGTH, "0" * 64, [(f"use {key}", False)])
    assert report["example"] == "use ***"
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


def test_the_same_rows_give_the_same_bytes(full: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(full, tmp_path / folder)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_limit_stands_where_its_tokens_are() -> None:
    histogram = Histogram({"32": 4, "64": 2}, 64)
    assert histogram.limit == 62.5  # the right edge of the fifth of eight bars
    assert [tokens for tokens, _ in histogram.ticks] == [32, 64]
    assert [bar["height"] for bar in histogram.bars if bar["rows"]] == [100, 50]
    assert Histogram({"32": 4}, 100_000).limit is None
    middle = Histogram({"32": 4, "1024": 1}, 181).limit
    assert middle is not None and 50 < middle < 60
