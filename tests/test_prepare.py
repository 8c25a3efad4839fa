"""Instruction data into splits: who goes where, who is dropped and why, and that nothing is lost or leaked."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import CHATML, sample_rows, with_

from pipeline.chat.template import load_contract
from pipeline.core.files import read_json
from pipeline.data.default_scoring import reason, sentence
from pipeline.data.encoding import OVERLONG, split_of
from pipeline.data.readers import FormatError
from pipeline.data.records import Row
from pipeline.data.verdicts import DUPLICATE, LEAKED, NEAR_DUPLICATE, NEAR_TEST, SPLITS
from pipeline.params import Params
from pipeline.prepare import Prepared, PrepareError, prepare

OUTPUTS = {f"{split}.parquet" for split in SPLITS} | {
    "contract.json",
    "report.json",
    "report.md",
    "report.html",
    "dropped.jsonl",
}


def run(params: Params, folder: Path, rows: list[Any], **changes: Any) -> tuple[Prepared, Path]:
    data, output = folder / "data", folder / "dataset"
    data.mkdir(exist_ok=True)
    (data / "rows.json").write_text(json.dumps(rows))
    return prepare(with_(params, prepare=changes).prepare, data, output), output


def read(output: Path, column: str) -> dict[str, list[Any]]:
    return {split: pq.read_table(output / f"{split}.parquet").column(column).to_pylist() for split in SPLITS}


def splits_by(output: Path, column: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for split, values in read(output, column).items():
        for value in values:
            found.setdefault(value, set()).add(split)
    return found


def dropped(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]


def group_in(split: str, params: Params) -> str:
    row = Row(messages=[], source="")
    names = (f"g{i}" for i in range(1000))
    return next(g for g in names if split_of(Row(**vars(row) | {"group": g}), params.prepare) == split)


def ask(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer} | columns


def test_every_output_is_written_and_the_counts_agree(params: Params, tmp_path: Path) -> None:
    result, output = run(params, tmp_path, sample_rows(200))
    assert {path.name for path in output.iterdir()} == OUTPUTS
    assert {split: len(ids) for split, ids in read(output, "id").items()} == result.rows
    assert min(result.rows.values()) > 0
    tables = read(output, "input_ids")
    assert result.tokens == sum(map(len, tables["train"]))
    assert read_json(output / "contract.json")["max_length"] == 128
    assert load_contract(read_json(output / "contract.json")).tokenizer.decode(tables["train"][0]).startswith("<|im_")
    labels = pq.read_table(output / "train.parquet").column("labels").to_pylist()
    assert result.trained_tokens == sum(label != -100 for row in labels for label in row)


def test_a_test_row_holds_its_prompt_and_its_reference(params: Params, tmp_path: Path) -> None:
    _, output = run(params, tmp_path, sample_rows(200))
    template = load_contract(read_json(output / "contract.json"))
    for row in pq.read_table(output / "test.parquet").to_pylist():
        [question] = json.loads(row["messages"])
        assert question["content"].endswith(row["reference"])
        assert template.tokenizer.decode(row["input_ids"]) == row["prompt"]
        assert row["prompt"].endswith("<|im_start|>assistant\n")


def test_a_row_never_moves_between_splits(params: Params, tmp_path: Path) -> None:
    (tmp_path / "less").mkdir()
    (tmp_path / "more").mkdir()
    more = sample_rows(300)
    random.Random(1).shuffle(more)
    before = splits_by(run(params, tmp_path / "less", sample_rows(200))[1], "id")
    after = splits_by(run(params, tmp_path / "more", more)[1], "id")
    assert len(before) == 200 and all(len(splits) == 1 for splits in after.values())
    assert before == {id: after[id] for id in before}


def test_the_splits_have_the_sizes_asked_for(params: Params) -> None:
    rows = [Row(messages=[], source="", group=f"g{i}") for i in range(4000)]
    fractions = params.prepare.model_copy(update={"test_fraction": 0.1, "validation_fraction": 0.05})
    counts = Counter(split_of(row, fractions) for row in rows)
    assert counts["test"] == pytest.approx(400, abs=80)  # 4 standard deviations
    assert counts["validation"] == pytest.approx(200, abs=56)


@pytest.mark.parametrize("name", [str, int])
def test_a_group_stays_together(params: Params, tmp_path: Path, name: type) -> None:
    rows = [ask(f"{r['instruction']}?", r["output"], group=name(i % 20)) for i, r in enumerate(sample_rows(200))]
    _, output = run(params, tmp_path, [row | {"task": f"t{row['group']}"} for row in rows])
    by_group = splits_by(output, "task")
    assert len(by_group) == 20
    assert {group: splits for group, splits in by_group.items() if len(splits) > 1} == {}


def test_a_template_that_rewrites_gets_a_row_an_answer_in_one_split_and_the_report_says_so(
    params: Params, tmp_path: Path
) -> None:
    text = CHATML.replace("{{ message['content'] }}", "{{ '' if loop.last else ' ' }}{{ message['content'] }}")
    (tmp_path / "rewrites.jinja").write_text(text)
    talks = [[f"question {i}", f"answer {i}", f"and then {i}", f"then that {i}"] for i in range(60)]
    rows = [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(x)]} for x in talks
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = with_(
        params, prepare={"chat_template": str(tmp_path / "rewrites.jinja"), "near_duplicate_threshold": None}
    )
    made = prepare(settings.prepare, tmp_path / "rows.jsonl", tmp_path / "dataset")
    report = json.loads((tmp_path / "dataset" / "report.json").read_text())
    tests = report["rows"]["test"]
    trained = made.rows["train"] + made.rows["validation"]
    assert trained == 2 * (60 - tests)
    assert report["rewritten_conversations"] == report["more_rows"] == 60 - tests
    sources = {
        split: pq.read_table(tmp_path / "dataset" / f"{split}.parquet")["source"].to_pylist()
        for split in report["rows"]
    }
    assert not set(sources["train"]) & set(sources["validation"])
    assert len(set(sources["test"])) == tests
    ids = pq.read_table(tmp_path / "dataset" / "train.parquet")["id"].to_pylist()
    assert len(set(ids)) == len(ids)


def test_answers_marked_as_not_trained_are_counted_and_never_a_reference(params: Params, tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        turns = [("user", f"question {i}"), ("assistant", f"good {i}"), ("user", "again"), ("assistant", f"bad {i}")]
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        messages[1 if i % 2 else 3]["weight"] = 0
        rows.append({"messages": messages})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = with_(params, prepare={"near_duplicate_threshold": None})
    prepare(changed.prepare, tmp_path / "rows.jsonl", tmp_path / "dataset")
    test = pq.read_table(tmp_path / "dataset" / "test.parquet").to_pylist()
    assert test
    for row in test:
        number = int(row["source"].rpartition(":")[2]) - 1
        assert row["reference"] == (f"bad {number}" if number % 2 else f"good {number}")
    report = json.loads((tmp_path / "dataset" / "report.json").read_text())
    assert report["untrained_answers"] == 30


def test_a_prompt_of_the_test_split_is_not_trained_on(params: Params, tmp_path: Path) -> None:
    rows = [
        *sample_rows(100),
        ask("What is the secret?", "one", group=group_in("test", params)),
        ask(" what IS  the\nSecret? ", "two", group=group_in("train", params)),
        ask("What is the secret?", "three", group=group_in("validation", params)),
    ]
    result, output = run(params, tmp_path, rows)
    assert result.dropped == {LEAKED: 2}
    assert [d["source"] for d in dropped(output)] == ["rows.json:[101]", "rows.json:[102]"]


def test_an_earlier_turn_that_asks_a_test_prompt_is_not_trained_on(params: Params, tmp_path: Path) -> None:
    later = ask("And then?", "two", history=[["What is the secret?", "one"]], group=group_in("train", params))
    rows = [*sample_rows(100), ask("What is the secret?", "one", group=group_in("test", params)), later]
    result, output = run(params, tmp_path, rows)
    assert result.dropped == {LEAKED: 1}
    assert dropped(output)[0]["source"] == "rows.json:[101]"


def test_exact_duplicates_are_dropped_and_counted(params: Params, tmp_path: Path) -> None:
    rows = sample_rows(100)
    result, output = run(params, tmp_path, [*rows, *rows[:7], ask(rows[0]["instruction"], "another answer")])
    assert result.dropped == {DUPLICATE: 7}
    assert sum(result.rows.values()) == 101
    assert [d["source"] for d in dropped(output)] == [f"rows.json:[{i}]" for i in range(100, 107)]


def test_every_row_is_kept_or_dropped_with_a_reason(params: Params, tmp_path: Path) -> None:
    broken: list[Any] = [
        None,
        {},
        ask("q", ""),
        ask("q", "a <|im_end|>"),
        ask("long", "word " * 200),
        ask("half", "\ud83d"),
        ask("not a number", "a") | {"input": float("nan")},
        sample_rows(1)[0],
    ]
    result, output = run(
        params, tmp_path, [*sample_rows(100), *broken], max_dropped_fraction=0.5, on_control_tokens="drop"
    )
    report = read_json(output / "report.json")
    assert report["rows_in"] == 108 == sum(result.rows.values()) + sum(result.dropped.values())
    assert [d["source"] for d in sorted(dropped(output), key=lambda d: d["source"])] == [
        f"rows.json:[{i}]" for i in range(100, 108)
    ]
    assert all(d["reason"] in result.dropped for d in dropped(output))


def test_too_many_unusable_rows_leave_the_output_as_it_was(params: Params, tmp_path: Path) -> None:
    _, output = run(params, tmp_path, sample_rows(100))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    broken = [ask(f"q{i}", "") for i in range(6)]
    with pytest.raises(
        PrepareError, match=r"6 of 106 rows are unusable.*6 × a row output is empty.*rows\.json:\[100\]"
    ):
        run(params, tmp_path, [*sample_rows(100), *broken])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dataset"}


def test_duplicates_and_overlong_rows_are_no_sign_of_a_broken_source(params: Params, tmp_path: Path) -> None:
    rows = sample_rows(100)
    result, _ = run(params, tmp_path, [*rows, *rows, *[ask(f"q{i}", "word " * 200) for i in range(50)]])
    assert result.dropped == {DUPLICATE: 100, OVERLONG: 50}


def test_rows_are_kept_up_to_max_length_answers_included(params: Params, tmp_path: Path) -> None:
    rows = [ask(f"q{i}", "x" * i) for i in range(1, 200)]
    result, output = run(params, tmp_path, rows, max_length=100)
    template = load_contract(read_json(output / "contract.json"))
    lengths = [
        len(
            template.encode(
                [*json.loads(row["messages"]), {"role": "assistant", "content": row["reference"]}]
            ).input_ids
        )
        for row in pq.read_table(output / "test.parquet").to_pylist()
    ]
    ids = read(output, "input_ids")
    lengths += [len(row) for split in ("train", "validation") for row in ids[split]]
    assert max(lengths) == 100
    assert result.dropped == {OVERLONG: 199 - len(lengths)}


def test_an_overlong_row_stops_the_stage_on_demand(params: Params, tmp_path: Path) -> None:
    rows = [*sample_rows(100), ask("q", "word " * 200)]
    with pytest.raises(
        PrepareError, match=r"rows\.json:\[100\] has \d+ tokens, more than prepare\.max_length \(128\): raise it"
    ):
        run(params, tmp_path, rows, on_overlong="error")


def test_an_empty_test_split_is_refused_with_the_way_out(params: Params, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"the test split is empty: 3 rows.*raise prepare\.test_fraction"):
        run(params, tmp_path, [ask(f"q{i}", "a", group=group_in("train", params)) for i in range(3)])


def test_an_empty_training_split_says_when_length_is_why(params: Params, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"the train split is empty: 100 rows.*100 of them longer.*10 tokens"):
        run(params, tmp_path, sample_rows(100), max_length=10)


LABELS = ["yes", "No.", "no", "YES"]  # two, as they are compared


@pytest.mark.parametrize(
    ("answers", "scoring", "choice"),
    [
        ([LABELS[i % 4] for i in range(200)], "exact", {"rows": 200, "short": 200, "answers": 2}),
        ([f"{i // 5}" for i in range(200)], "exact", {"rows": 200, "short": 200, "answers": 40}),
        ([f"{i // 4}" for i in range(200)], "text", {"rows": 200, "short": 200, "answers": 50}),
        ([f"It depends on a, b and {i}, and on the weather." for i in range(200)], "text", {"short": 0}),
        (["yes, because the weather is good and so is the box" if i % 10 == 0 else "no" for i in range(200)], "text",
         {"short": 180}),
        (["a\nb"] * 200, "text", {"short": 0}),
    ],
)  # fmt: skip
def test_rows_without_a_scoring_are_scored_by_what_their_answers_look_like(
    answers: list[str], scoring: str, choice: dict[str, int], params: Params, tmp_path: Path
) -> None:
    rows = [ask(f"{word}?", answer) for word, answer in zip(unlike_words(len(answers)), answers, strict=True)]
    made, output = run(params, tmp_path, rows)
    assert set(pq.read_table(output / "test.parquet").column("scoring").to_pylist()) == {scoring}
    assert made.scoring == read_json(output / "report.json")["scoring"]
    assert choice.items() <= made.scoring["default"].items()
    assert made.scoring["default"]["scoring"] == scoring
    assert scoring in sentence(made.scoring, "auto")
    assert reason(made.scoring["default"]) in (output / "report.md").read_text()


def test_the_parameter_and_a_rows_own_scoring_overrule(params: Params, tmp_path: Path) -> None:
    test = group_in("test", params)
    rows = [*sample_rows(100), ask("own", "red", group=test, task="o", scoring="text")]
    for default in ("text", "exact"):
        made, output = run(params, tmp_path, rows, default_scoring=default)
        table = pq.read_table(output / "test.parquet")
        scoring = dict(zip(table.column("task").to_pylist(), table.column("scoring").to_pylist(), strict=True))
        assert scoring == {"default": default, "o": "text"}
        assert set(made.scoring) == {"default"}
        assert "prepare.default_scoring" in sentence(made.scoring, default)
    assert sentence({}, "auto") == ""


def unlike_words(number: int) -> list[str]:
    """Texts that are no near copies of each other."""
    draw = random.Random(5)
    return [" ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(4)) for _ in range(number)]


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def varied_rows(number: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of unlike words, so that none is a near copy of another."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(3000)]
    return [ask(" ".join(draw.choices(words, k=8)), " ".join(draw.choices(words, k=3))) for _ in range(number)]


def test_what_was_encoded_before_is_read_from_the_cache(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.prepare

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps(varied_rows(150)))
    cache = tmp_path / "cache"
    prepare(params.prepare, tmp_path / "data", tmp_path / "first", cache)
    encoded: list[Path] = []
    encode_shard = pipeline.prepare.encode_shard
    monkeypatch.setattr(pipeline.prepare, "encode_shard", lambda *a: (encoded.append(a[1]), encode_shard(*a)))
    prepare(params.prepare, tmp_path / "data", tmp_path / "again", cache)
    assert encoded == []
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")
    (tmp_path / "data" / "b.json").write_text(json.dumps(varied_rows(50, seed=4)))
    prepare(params.prepare, tmp_path / "data", tmp_path / "more", cache)
    assert len(encoded) == 1
    prepare(params.prepare, tmp_path / "data", tmp_path / "afresh")
    assert files_of(tmp_path / "more") == files_of(tmp_path / "afresh")


def test_another_parameter_encodes_afresh(params: Params, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps(varied_rows(150)))
    prepare(params.prepare, tmp_path / "data", tmp_path / "long", tmp_path / "cache")
    shorter = with_(params, prepare={"max_length": 110}).prepare
    prepare(shorter, tmp_path / "data", tmp_path / "short", tmp_path / "cache")
    prepare(shorter, tmp_path / "data", tmp_path / "afresh")
    assert files_of(tmp_path / "short") == files_of(tmp_path / "afresh") != files_of(tmp_path / "long")


def test_a_damaged_cache_is_encoded_again(params: Params, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps(varied_rows(150)))
    prepare(params.prepare, tmp_path / "data", tmp_path / "first", tmp_path / "cache")
    for path in (tmp_path / "cache" / "encoded").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    prepare(params.prepare, tmp_path / "data", tmp_path / "again", tmp_path / "cache")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")


def test_worker_processes_give_the_same_bytes(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(varied_rows(100, seed=ord(name))))
    prepare(params.prepare, tmp_path / "data", tmp_path / "one")
    monkeypatch.setattr("pipeline.prepare.PARALLEL_ROWS", 0)
    prepare(params.prepare, tmp_path / "data", tmp_path / "two")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_near_copy_of_a_test_row_is_not_trained_on(params: Params, tmp_path: Path) -> None:
    text = "The old lighthouse keeper climbed all the narrow steps every evening to light the great lamp above the bay"
    rows = [
        *varied_rows(100),
        ask(f"{text}. What did he light?", "He lit the great lamp", group=group_in("train", params)),
        ask(f"{text}! What did he light then?", "He lit the great lamp", group=group_in("test", params)),
    ]
    result, output = run(params, tmp_path, rows, max_length=512)
    assert result.dropped == {NEAR_TEST: 1}
    [row] = dropped(output)
    assert (row["source"], row["copy_of"]) == ("rows.json:[100]", "rows.json:[101]")


def test_near_copies_in_the_test_split_stay_and_count_as_one_group(params: Params, tmp_path: Path) -> None:
    names = [f"g{i}" for i in range(100)]
    groups = [g for g in names if split_of(Row(messages=[], source="", group=g), params.prepare) == "test"][:2]
    text = "The old lighthouse keeper climbed all the narrow steps every evening to light the great lamp above the bay"
    rows = [*varied_rows(100), ask(f"{text}?", "Yes", group=groups[0]), ask(f"{text}!", "Yes", group=groups[1])]
    result, output = run(params, tmp_path, rows, max_length=512)
    assert result.dropped == {}
    table = pq.read_table(output / "test.parquet").to_pylist()
    assert len({row["group"] for row in table if "lighthouse" in row["prompt"]}) == 1
    assert sum("lighthouse" in row["prompt"] for row in table) == 2


def test_rows_for_training_leave_the_test_split_as_it_was(params: Params, tmp_path: Path) -> None:
    rows = varied_rows(200)
    _, before = run(params, tmp_path, rows)
    frozen = pq.read_table(before / "test.parquet").drop_columns("source")
    digest = read_json(before / "report.json")["test_sha256"]
    train = [row | {"group": group_in("train", params)} for row in varied_rows(50, seed=5)]
    random.Random(6).shuffle(rows)
    _, after = run(params, tmp_path, [*train, *rows])
    assert pq.read_table(after / "test.parquet").drop_columns("source").equals(frozen)
    assert read_json(after / "report.json")["test_sha256"] == digest


def test_near_duplicates_stay_when_the_threshold_is_null(params: Params, tmp_path: Path) -> None:
    text = "The old lighthouse keeper climbed all the narrow steps every evening to light the great lamp above the bay"
    group = group_in("train", params)
    rows = [*varied_rows(100), *(ask(f"{text}{mark}", f"Yes{mark}", group=group) for mark in "?!")]
    assert run(params, tmp_path, rows, max_length=512)[0].dropped == {NEAR_DUPLICATE: 1}
    assert run(params, tmp_path, rows, max_length=512, near_duplicate_threshold=None)[0].dropped == {}


def test_a_file_put_in_by_hand_that_needs_a_mapping_is_sent_to_ingest(params: Params, tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text("ticket,team\nIt is late.,delivery\n")
    with pytest.raises(FormatError, match=r"retune ingest tickets\.csv"):
        prepare(params.prepare, tmp_path, tmp_path / "out")
