"""Plain texts, long rows, benchmark items and crowded rows, through the whole of prepare."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import sample_rows
from test_prepare import ask, dropped, group_in, read, run, talks

from pipeline.chat.template import load_contract
from pipeline.core.files import read_json
from pipeline.data import outcomes
from pipeline.data.benchmarks import COMMON, read_benchmark_files
from pipeline.data.formats import read_rows
from pipeline.data.outcomes import SPLITS
from pipeline.data.shards import ShardWriter, tables
from pipeline.params import Params


def plain(number: int, words: int) -> dict[str, Any]:
    return {"text": " ".join(f"t{number}w{word}" for word in range(words))}


def write_texts(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A shard of plain texts in `folder/data`, as `retune ingest --format text` makes it."""
    (folder / "data").mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = ShardWriter(folder / "data", "texts")
    for table, _ in tables(read_rows(folder / "texts.jsonl", "text")):
        writer.add(table)
    writer.close()


def test_plain_text_is_trained_whole_and_never_in_the_test_split(params: Params, tmp_path: Path) -> None:
    write_texts(tmp_path, [plain(i, 6) for i in range(60)])
    _, output = run(params, tmp_path, sample_rows(100))
    kept = [
        (split, ids, labels)
        for split in ("train", "validation")
        for ids, labels in zip(read(output, "input_ids")[split], read_labels(output, split), strict=True)
    ]
    tokenizer = load_contract(read_json(output / "contract.json")).tokenizer
    texts = [(tokenizer.decode(ids), ids, labels) for _, ids, labels in kept]
    texts = [each for each in texts if not each[0].startswith("<|im_start|>")]
    assert len(texts) == 60
    assert all(labels == ids for _, ids, labels in texts)
    assert all(text.endswith(tokenizer.eos_token) for text, _, _ in texts)  # where a text ends is trained too


def read_labels(output: Path, split: str) -> list[list[int]]:
    return pq.read_table(output / f"{split}.parquet").column("labels").to_pylist()


@pytest.mark.parametrize("how", ["drop", "split", "truncate_prompt"])
def test_a_long_plain_text_is_dropped_or_split_but_never_cut_unseen(params: Params, tmp_path: Path, how: str) -> None:
    write_texts(tmp_path, [plain(0, 90)])
    _, output = run(params, tmp_path, sample_rows(100), on_overlong=how)
    template = load_contract(read_json(output / "contract.json"))
    texts = [template.tokenizer.decode(ids) for split in SPLITS for ids in read(output, "input_ids")[split]]
    parts = [text for text in texts if "t0w" in text]
    if how == "drop":
        assert not parts and any("t0w" in json.dumps(each["record"]) for each in dropped(output))
    else:  # it has no prompt that could be truncated
        assert len(parts) > 1 and "".join(parts) == plain(0, 90)["text"] + template.tokenizer.eos_token


def test_a_long_conversation_is_split_between_turns_and_every_answer_is_trained_once(
    params: Params, tmp_path: Path
) -> None:
    turns = [
        {"role": role, "content": f"{name}{i} said once"}
        for i in range(12)
        for role, name in (("user", "question"), ("assistant", "answer"))
    ]
    _, output = run(
        params,
        tmp_path,
        [{"messages": turns, "group": group_in("train", params)}, *talks("question", "answer", number=100)],
        on_overlong="split",
    )
    tokenizer = load_contract(read_json(output / "contract.json")).tokenizer
    trained = [
        tokenizer.decode([id for id, label in zip(ids, labels, strict=True) if label != -100])
        for split in ("train", "validation")
        for ids, labels in zip(read(output, "input_ids")[split], read_labels(output, split), strict=True)
    ]
    for i in range(12):
        assert sum(f"answer{i} said once" in text for text in trained) == 1


def test_benchmarks_of_one_file_name_are_all_searched_and_what_cannot_be_is_named(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = (
        "seven bridges over the old river were built before the mill",
        "nine towers of the city fell in the storm",
    )
    names, rows = [], sample_rows(100)
    for number, place in enumerate(places):
        item = f"Tell me in one short sentence which of the {place} that the great winter of that year brought?"
        folder = tmp_path / str(number)
        folder.mkdir()
        records = [ask(item, "The third one."), {"instruction": "nothing", "output": ""}]
        (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        names.append(str(folder / "test.jsonl"))
        rows.append(ask(f"Please: {item}", "The third.") | {"group": group_in("train", params)})
    _, output = run(params, tmp_path, rows, decontaminate=names, max_length=256)
    assert sorted(each["reason"] for each in dropped(output)) == [f"has an item of the benchmark {n}" for n in names]
    notes = read_json(output / "benchmarks.json")
    unusable = {"test.jsonl:2": "output is empty"}
    assert notes == {name: {"items": 1, "unsearchable": [], "unusable": unusable} for name in names}
    assert capsys.readouterr().err.count("1 records are not conversations") == 2


def test_items_without_a_phrase_of_their_own_are_named(tmp_path: Path) -> None:
    phrase = "Choose the right answer to the following question from the four options below."
    texts = [*(f"{phrase} {' '.join(f'w{n}x{word}' for word in range(20))}" for n in range(COMMON + 1)), phrase]
    bench = tmp_path / "bench.jsonl"
    bench.write_text("".join(json.dumps(ask(text, "A")) + "\n" for text in texts))
    [file] = read_benchmark_files([str(bench)], lambda messages: str(messages[0]["content"]))
    assert file.unsearchable == [f"bench.jsonl:{COMMON + 2}"]
    assert file.warnings()[0].startswith(f"bench.jsonl: 1 of {COMMON + 2} items")


def test_rows_with_more_likely_copies_than_are_compared_are_reported(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outcomes.near_duplicates
    monkeypatch.setattr(outcomes, "near_duplicates", lambda *given: replace(real(*given), crowded=7))
    _, output = run(params, tmp_path, sample_rows(100))
    assert read_json(output / "report.json")["crowded"] == 7
    assert "7 rows resemble so many others" in (output / "report.html").read_text()
