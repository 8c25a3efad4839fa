"""prepare assigns every row to a split or drops it with a reason, and no row leaks into training."""

import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import CHATML, sample_rows, with_

import pipeline.prepare
from pipeline.chat.template import load_contract
from pipeline.core.files import read_json
from pipeline.data.data_report import SPLITS
from pipeline.data.default_scoring import explain_choice, summarise_choices
from pipeline.data.encoding import OVERLONG, assign_split
from pipeline.data.outcomes import DUPLICATE, LEAKED, NEAR_DUPLICATE, NEAR_TEST
from pipeline.params import Params
from pipeline.prepare import PrepareError, PrepareResult, prepare

OUTPUTS = {*(f"{split}.parquet" for split in SPLITS), "contract.json", "dropped.jsonl"} | {
    f"report.{suffix}" for suffix in ("json", "md", "html")
}


def run(params: Params, folder: Path, rows: list[Any], **changes: Any) -> tuple[PrepareResult, Path]:
    data, output = folder / "data", folder / "dataset"
    data.mkdir(exist_ok=True)
    (data / "rows.json").write_text(json.dumps(rows))
    return prepare(with_(params, prepare=changes).prepare, data, output), output


def read(output: Path, column: str) -> dict[str, list[Any]]:
    return {split: pq.read_table(output / f"{split}.parquet").column(column).to_pylist() for split in SPLITS}


def splits_by(output: Path, column: str) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = defaultdict(set)
    for split, values in read(output, column).items():
        for value in values:
            splits[value].add(split)
    return splits


def dropped(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def groups_in(split: str, params: Params) -> list[str]:
    return [group for group in (f"g{i}" for i in range(200)) if assign_split(group, params.prepare) == split]


def ask(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer} | columns


def varied_rows(number: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of random words, so that none is a near copy of another."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(3000)]
    return [ask(" ".join(draw.choices(words, k=8)), " ".join(draw.choices(words, k=3))) for _ in range(number)]


def test_every_output_is_written_and_its_counts_agree(params: Params, tmp_path: Path) -> None:
    result, output = run(params, tmp_path, sample_rows(200))
    assert {path.name for path in output.iterdir()} == OUTPUTS
    assert {split: len(ids) for split, ids in read(output, "id").items()} == result.rows
    assert min(result.rows.values()) > 0
    tables, labels = read(output, "input_ids"), pq.read_table(output / "train.parquet")["labels"].to_pylist()
    assert result.tokens == sum(map(len, tables["train"]))
    assert result.trained_tokens == sum(label != -100 for row in labels for label in row)
    contract = read_json(output / "contract.json")
    assert contract["max_length"] == 128
    tokenizer = load_contract(contract).tokenizer
    for row in pq.read_table(output / "test.parquet").to_pylist():
        [question] = json.loads(row["messages"])
        assert question["content"].endswith(row["reference"])
        assert tokenizer.decode(row["input_ids"]) == row["prompt"]
        assert row["prompt"].endswith("<|im_start|>assistant\n")


def test_added_rows_change_neither_the_split_of_a_row_nor_the_test_split(params: Params, tmp_path: Path) -> None:
    rows = varied_rows(200)
    _, output = run(params, tmp_path, rows)
    before, test_before = splits_by(output, "id"), pq.read_table(output / "test.parquet").drop_columns("source")
    digest = read_json(output / "report.json")["test_sha256"]
    more = [row | {"group": groups_in("train", params)[0]} for row in varied_rows(50, seed=5)]
    random.Random(6).shuffle(rows)
    run(params, tmp_path, [*more, *rows])
    after = splits_by(output, "id")
    assert len(before) == 200 and all(len(splits) == 1 for splits in after.values())
    assert before == {id: after[id] for id in before}
    assert pq.read_table(output / "test.parquet").drop_columns("source").equals(test_before)
    assert read_json(output / "report.json")["test_sha256"] == digest


def test_the_splits_have_the_configured_sizes(params: Params) -> None:
    fractions = params.prepare.model_copy(update={"test_fraction": 0.1, "validation_fraction": 0.05})
    counts = Counter(assign_split(f"g{i}", fractions) for i in range(4000))
    assert counts["test"] == pytest.approx(400, abs=80)  # 4 standard deviations
    assert counts["validation"] == pytest.approx(200, abs=56)


def test_a_group_stays_in_one_split(params: Params, tmp_path: Path) -> None:
    rows = [row | {"group": i % 20, "task": f"t{i % 20}"} for i, row in enumerate(varied_rows(200))]
    by_group = splits_by(run(params, tmp_path, rows)[1], "task")
    assert len(by_group) == 20
    assert {group: splits for group, splits in by_group.items() if len(splits) > 1} == {}


def talks(*contents: str, number: int = 60) -> list[dict[str, Any]]:
    """Conversations of `contents`, each with its number in every turn."""
    return [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": f"{t} {i}"} for k, t in enumerate(contents)]}
        for i in range(number)
    ]


def test_a_template_that_rewrites_turns_gets_one_row_per_answer_all_in_one_split(
    params: Params, tmp_path: Path
) -> None:
    text = CHATML.replace("{{ message['content'] }}", "{{ '' if loop.last else ' ' }}{{ message['content'] }}")
    (tmp_path / "rewrites.jinja").write_text(text)
    rewrites = {"chat_template": str(tmp_path / "rewrites.jinja"), "near_duplicate_threshold": None}
    result, output = run(params, tmp_path, talks("question", "answer", "and then", "then that"), **rewrites)
    report, sources = read_json(output / "report.json"), read(output, "source")
    tests = report["rows"]["test"]
    assert result.rows["train"] + result.rows["validation"] == 2 * (60 - tests)
    assert report["rewritten_conversations"] == report["more_rows"] == 60 - tests
    assert not set(sources["train"]) & set(sources["validation"])
    assert len(set(sources["test"])) == tests
    ids = read(output, "id")["train"]
    assert len(set(ids)) == len(ids)


def test_answers_marked_as_not_trained_are_counted_and_never_a_reference(params: Params, tmp_path: Path) -> None:
    rows = talks("question", "good", "again", "bad")
    for i, row in enumerate(rows):
        row["messages"][1 if i % 2 else 3]["weight"] = 0
    _, output = run(params, tmp_path, rows, near_duplicate_threshold=None)
    test = pq.read_table(output / "test.parquet").to_pylist()
    assert test
    for row in test:
        number = int(row["source"].rpartition("[")[2][:-1])
        assert row["reference"] == (f"bad {number}" if number % 2 else f"good {number}")
    assert read_json(output / "report.json")["untrained_answers"] == 30


LIGHTHOUSE = "The old lighthouse keeper climbed all the narrow steps each evening to light the great lamp above the bay"


def test_a_copy_of_a_row_or_of_a_test_row_is_dropped_with_its_original(params: Params, tmp_path: Path) -> None:
    test, train, validation = (groups_in(split, params)[0] for split in ("test", "train", "validation"))
    rows = varied_rows(100)
    cases = [
        (ask("What is the secret?", "one", group=test), None, None),
        (ask(" what IS  the\nSecret? ", "two", group=train), LEAKED, 100),
        (ask("What is the secret?", "three", group=validation), LEAKED, 100),
        (ask("And then?", "two", history=[["What is the secret?", "one"]], group=train), LEAKED, 100),
        (rows[0], DUPLICATE, 0),
        (rows[0] | {"output": "another answer"}, None, None),
        (ask(f"{LIGHTHOUSE}. What did he light?", "He lit the great lamp", group=train), NEAR_TEST, 107),
        (ask(f"{LIGHTHOUSE}! What did he light then?", "He lit the great lamp", group=test), None, None),
        (ask(f"{LIGHTHOUSE[::-1]}?", "Yes?", group=train), None, None),
        (ask(f"{LIGHTHOUSE[::-1]}!", "Yes!", group=train), NEAR_DUPLICATE, 108),
    ]
    rows += [row for row, _, _ in cases]
    result, output = run(params, tmp_path, rows, max_length=512)
    expected = {
        f"rows.json:[{100 + i}]": (reason, f"rows.json:[{original}]")
        for i, (_, reason, original) in enumerate(cases)
        if reason is not None
    }
    assert {row["source"]: (row["reason"], row["copy_of"]) for row in dropped(output)} == expected
    assert sum(result.rows.values()) == len(rows) - len(expected)
    exact = run(params, tmp_path, rows, max_length=512, near_duplicate_threshold=None)[0]
    assert exact.dropped == {LEAKED: 3, DUPLICATE: 1}


def test_every_row_is_kept_or_dropped_with_a_reason(params: Params, tmp_path: Path) -> None:
    broken: list[Any] = [
        None, {}, ask("q", ""), ask("q", "a <|im_end|>"), ask("long", "word " * 200), ask("half", "\ud83d"),
        ask("not a number", "a") | {"input": float("nan")}, sample_rows(1)[0],
    ]  # fmt: skip
    settings = {"max_dropped_fraction": 0.5, "on_control_tokens": "drop"}
    result, output = run(params, tmp_path, [*sample_rows(100), *broken], **settings)
    assert read_json(output / "report.json")["rows_in"] == 108 == sum((result.rows | result.dropped).values())
    assert sorted(row["source"] for row in dropped(output)) == [f"rows.json:[{i}]" for i in range(100, 108)]
    assert all(row["reason"] in result.dropped for row in dropped(output))


@pytest.mark.parametrize(
    ("rows", "changes", "what"),
    [
        ([*sample_rows(100), *(ask(f"q{i}", "") for i in range(6))], {},
         r"6 of 106 rows are unusable.*6 × output is empty.*rows\.json:\[100\]"),
        ([*sample_rows(100), ask("q", "word " * 200)], {"on_overlong": "error"},
         r"rows\.json:\[100\] has \d+ tokens, more than prepare\.max_length \(128\)"),
        ([ask(f"q{i}", "a", group="same") for i in range(3)], {"max_length": 10},
         r"split is empty: 3 rows .*10 tokens"),
    ],
)  # fmt: skip
def test_data_that_cannot_become_a_dataset_leaves_the_output_unchanged(
    params: Params, tmp_path: Path, rows: list[Any], changes: dict[str, Any], what: str
) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "contract.json").write_text("{}")
    with pytest.raises(PrepareError, match=what):
        run(params, tmp_path, rows, **changes)
    assert files_of(tmp_path / "dataset") == {"contract.json": b"{}"}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dataset"}


def test_rows_up_to_max_length_are_kept_and_longer_ones_do_not_count_as_unusable(
    params: Params, tmp_path: Path
) -> None:
    result, output = run(params, tmp_path, [ask(f"q{i}", "x" * i) for i in range(1, 200)], max_length=100)
    template = load_contract(read_json(output / "contract.json"))
    ids = read(output, "input_ids")
    lengths = [len(row) for split in ("train", "validation") for row in ids[split]]
    for row in pq.read_table(output / "test.parquet").to_pylist():
        answer = {"role": "assistant", "content": row["reference"]}
        lengths.append(template.encode([*json.loads(row["messages"]), answer]).length)
    assert max(lengths) == 100
    assert result.dropped == {OVERLONG: 199 - len(lengths)}


LABELS = ["yes", "No.", "no", "YES"]  # two different answers, as they are compared


@pytest.mark.parametrize(
    ("answers", "scoring", "choice"),
    [
        ([LABELS[i % 4] for i in range(100)], "exact", {"rows": 100, "short": 100, "answers": 2}),
        ([f"{i // 5}" for i in range(100)], "exact", {"rows": 100, "short": 100, "answers": 20}),
        ([f"{i // 4}" for i in range(100)], "text", {"rows": 100, "short": 100, "answers": 25}),
        ([f"yes, {'because the weather is good and so is the box' * (i % 10 == 0)}" for i in range(100)], "text",
         {"short": 90}),
    ],
)  # fmt: skip
def test_the_scoring_of_rows_without_one_depends_on_their_answers(
    answers: list[str], scoring: str, choice: dict[str, int], params: Params, tmp_path: Path
) -> None:
    rows = [row | {"output": answer} for row, answer in zip(varied_rows(100), answers, strict=True)]
    result, output = run(params, tmp_path, rows)
    assert set(pq.read_table(output / "test.parquet").column("scoring").to_pylist()) == {scoring}
    assert result.scoring == read_json(output / "report.json")["scoring"]
    assert choice.items() <= result.scoring["default"].items()
    assert result.scoring["default"]["scoring"] == scoring
    assert scoring in summarise_choices(result.scoring)
    assert explain_choice(result.scoring["default"]) in (output / "report.md").read_text()


def test_the_parameter_and_the_scoring_of_a_row_override_the_choice(params: Params, tmp_path: Path) -> None:
    test = groups_in("test", params)[0]
    rows = [*sample_rows(100), ask("own", "red", group=test, task="o", scoring="text")]
    for default in ("text", "exact"):
        result, output = run(params, tmp_path, rows, default_scoring=default)
        table = pq.read_table(output / "test.parquet")
        scoring = dict(zip(table.column("task").to_pylist(), table.column("scoring").to_pylist(), strict=True))
        assert scoring == {"default": default, "o": "text"}
        assert set(result.scoring) == {"default"}


def test_encoded_shards_are_reused_from_the_cache_unless_a_parameter_changed(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encoded = tmp_path / "data", list[Path]()
    encode_shard = pipeline.prepare.encode_shard
    monkeypatch.setattr(pipeline.prepare, "encode_shard", lambda *a: (encoded.append(a[2]), encode_shard(*a)))

    def files(name: str, cache: str, **changes: Any) -> tuple[dict[str, bytes], int]:
        """The files of the dataset, and how many shards were encoded for it."""
        encoded.clear()
        changed = with_(params, prepare=changes).prepare
        prepare(changed, data, tmp_path / name, tmp_path / cache)
        return files_of(tmp_path / name), len(encoded)

    data.mkdir()
    (data / "a.json").write_text(json.dumps(varied_rows(150)))
    first = files("first", "cache")
    assert files("again", "cache") == (first[0], 0)
    (data / "b.json").write_text(json.dumps(varied_rows(50, seed=4)))
    with_cache, without_cache = files("more", "cache"), files("more", "none")
    assert (with_cache[1], without_cache[1]) == (1, 2)
    assert with_cache[0] == without_cache[0] != first[0]
    assert files("short", "cache", max_length=110) == files("short", "short", max_length=110)
    assert files("short", "cache", max_length=110)[0] != with_cache[0]


def test_encoding_in_another_process_gives_the_same_bytes(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(varied_rows(100, seed=ord(name))))
    prepare(params.prepare, tmp_path / "data", tmp_path / "one")
    monkeypatch.setattr(pipeline.prepare, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(pipeline.prepare, "available_cores", lambda: 1)
    prepare(params.prepare, tmp_path / "data", tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_killed_process_ends_the_stage() -> None:
    with pytest.raises(PrepareError), pipeline.prepare._process_pool() as pool:
        pool.submit(os._exit, 1).result()


def test_near_copies_in_the_test_split_are_kept_as_one_group(params: Params, tmp_path: Path) -> None:
    groups = groups_in("test", params)[:2]
    rows = [*varied_rows(100), *(ask(f"{LIGHTHOUSE}{i}", "Yes", group=group) for i, group in enumerate(groups))]
    result, output = run(params, tmp_path, rows, max_length=512)
    assert result.dropped == {}
    table = pq.read_table(output / "test.parquet").to_pylist()
    assert len({row["group"] for row in table if "lighthouse" in row["prompt"]}) == 1
    assert sum("lighthouse" in row["prompt"] for row in table) == 2


def test_a_long_conversation_is_split_between_exchanges_and_every_answer_is_trained_once(
    params: Params, tmp_path: Path
) -> None:
    [long] = talks(*(f"{name}{i} said once" for i in range(12) for name in ("question", "answer")), number=1)
    rows = [long | {"group": groups_in("train", params)[0]}, *talks("question", "answer", number=100)]
    _, output = run(params, tmp_path, rows, on_overlong="split")
    tokenizer = load_contract(read_json(output / "contract.json")).tokenizer
    trained = [
        tokenizer.decode([id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
        for split in ("train", "validation")
        for row in pq.read_table(output / f"{split}.parquet").to_pylist()
    ]
    for i in range(12):
        assert sum(f"answer{i} said once" in text for text in trained) == 1
