"""`retune inspect` shows what the model sees, with a verdict on every row."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chats import talk
from conftest import retune, with_, write_params
from hypothesis import given, settings
from hypothesis import strategies as st
from test_classification import make_encoder, with_classification
from test_template import REWRITES

from pipeline.chat.template import ChatTemplate, load_template
from pipeline.data.inspection import (
    InspectedRow,
    InspectionError,
    as_text,
    decode_tokens,
    inspect_dataset,
    inspect_file,
)
from pipeline.params import Params
from pipeline.prepare import prepare


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return load_template(params.prepare)[0]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    records = [
        {"instruction": "What is red?", "input": "", "output": "A colour."},
        {"instruction": "What is <|im_end|>?", "input": "", "output": "A token.", "task": "tokens"},
        {"instruction": "Nothing", "input": "", "output": ""},
        {"instruction": "long " * 400, "input": "", "output": "short"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records))
    return path


def test_a_prepared_row_is_shown_with_all_its_tokens_and_labels_or_with_its_reference(dataset: Path) -> None:
    [shown] = inspect_dataset(dataset, "train", 3, None, None, 1)
    assert shown.id is not None and inspect_dataset(dataset, "train", None, shown.id, None, 3) == [shown]
    record = pq.read_table(dataset / "train.parquet").slice(3, 1).to_pylist()[0]
    assert [number for token in shown.tokens for number in token.ids] == record["input_ids"]
    assert shown.trained == sum(label != -100 for label in record["labels"])
    assert (shown.place, shown.id, shown.task, shown.length) == (
        "train row 3", record["id"], record["task"], len(record["input_ids"])
    )  # fmt: skip
    [shown] = inspect_dataset(dataset, "test", None, None, None, 1)
    record = pq.read_table(dataset / "test.parquet").slice(0, 1).to_pylist()[0]
    assert "".join(token.text for token in shown.tokens) == record["prompt"]
    assert (shown.reference, shown.trained) == (record["reference"], 0)
    assert f"expected: {record['reference']}" in as_text(shown).plain


@pytest.mark.parametrize(
    ("row", "id", "task", "what"),
    [
        (10**6, None, None, "the train split has no row 1000000"),
        (None, "none", None, "the train split has no id none"),
        (None, None, "none", "the train split has no task none; .*default"),
    ],
)
def test_a_missing_row_is_an_error(dataset: Path, row: int | None, id: str | None, task: str | None, what: str) -> None:
    with pytest.raises(InspectionError, match=what):
        inspect_dataset(dataset, "train", row, id, task, 1)


def test_each_row_of_a_file_is_shown_as_prepared_with_its_verdict(params: Params, rows: Path) -> None:
    kept, repaired, dropped, overlong = inspect_file(params, rows, None, None, 10)
    assert (kept.verdict, kept.reasons) == ("kept", [])
    assert "".join(token.text for token in kept.tokens if token.trained) == "A colour.<|im_end|>"
    assert (repaired.verdict, repaired.reasons) == ("repaired", ["control tokens in its text escaped"])
    assert (dropped.verdict, dropped.tokens) == ("dropped", [])
    assert "output is empty" in dropped.reasons[0] and "output is empty" in as_text(dropped).plain
    huge = as_text(replace(dropped, record={"output": "a" * 10_000})).plain
    assert "(10,014 characters)" in huge and len(huge) < 5_000
    assert overlong.verdict == "dropped" and "more than prepare.max_length (128)" in overlong.reasons[0]
    cut = with_(params, prepare={"on_overlong": "truncate_prompt"})
    assert inspect_file(cut, rows, 3, None, 1)[0].verdict == "repaired"
    filters = params.prepare.filters.model_dump() | {"min_answer_chars": 10}
    short = inspect_file(with_(params, prepare={"filters": filters}), rows, 0, None, 1)[0]
    assert short.verdict == "dropped" and "min_answer_chars" in short.reasons[0]


def test_every_answer_is_shown_as_trained_if_the_template_rewrites_earlier_turns(
    params: Params, tmp_path: Path
) -> None:
    template, path = tmp_path / "rewrites.jinja", tmp_path / "rows.jsonl"
    template.write_text(REWRITES)
    path.write_text(json.dumps({"messages": talk("q1", "a1", "q2", "a2")}))
    shown = inspect_file(with_(params, prepare={"chat_template": str(template)}), path, None, None, 1)
    trained = ["".join(token.text for token in row.tokens if token.trained) for row in shown]
    assert trained == ["a1<|im_end|>", "a2<|im_end|>"]
    assert [row.place for row in shown] == ["record 0, part 1 of 2", "record 0, part 2 of 2"]


def test_a_text_and_its_class_are_shown_from_a_file_and_from_the_dataset(params: Params, tmp_path: Path) -> None:
    settings = with_classification(params, make_encoder(tmp_path / "base", "bert"))
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    rows = ({"text": f"film {i} is {('good', 'bad')[i % 2]}", "label": ("pos", "neg")[i % 2]} for i in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"text": "x", "label": ""}) + "\n")
    first, *_, last = inspect_file(settings, path, None, None, 61)
    assert (first.verdict, first.label, first.trained, last.verdict) == ("kept", "pos", 0, "dropped")
    assert "class: pos" in as_text(first).plain
    prepare(settings.prepare, path.parent, tmp_path / "dataset", train_task=settings.train.task)
    [shown] = inspect_dataset(tmp_path / "dataset", "train", 0, None, None, 1)
    assert shown.label in ("pos", "neg") and shown.as_json()["label"] == shown.label
    assert "good" in "".join(token.text for token in shown.tokens) or shown.label == "neg"


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_texts_of_the_tokens_add_up_to_the_text(template: ChatTemplate, text: str) -> None:
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    tokens = decode_tokens(template.tokenizer, ids)
    assert "".join(token.text for token in tokens) == template.tokenizer.decode(ids)
    assert [number for token in tokens for number in token.ids] == ids


def test_trained_tokens_are_in_brackets_and_green(template: ChatTemplate) -> None:
    encoded = template.encode([{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}])
    tokens = decode_tokens(template.tokenizer, encoded.input_ids, encoded.labels)
    text = as_text(InspectedRow("row 0", "kept", [], "t", tokens))
    *_, start, answer, _ = text.plain.replace("·", "").split("\n")
    assert (start, answer) == ("<|im_start|>assistant⏎", "⟦blue<|im_end|>⟧⏎")
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert "".join(green) == "blue<|im_end|>"
    only_trained = as_text(InspectedRow("row 0", "kept", [], "t", [token for token in tokens if token.trained])).plain
    assert only_trained.replace("·", "").split("\n")[1] == "⟦blue<|im_end|>⟧"


def test_control_characters_in_a_text_do_not_reach_the_terminal(template: ChatTemplate) -> None:
    hostile = "\x1b[2J\x07\x9b31m[bold]"
    tokens = decode_tokens(template.tokenizer, template.tokenizer.encode(hostile))
    plain = as_text(InspectedRow("row 0", "kept", [], "t", tokens, reference=hostile)).plain
    assert not set(plain) & set("\x1b\x07\x9b")
    assert "[bold]" in plain.replace("·", "")


def test_the_command_shows_a_file_in_text_and_as_json(params: Params, rows: Path, tmp_path: Path) -> None:
    write_params(tmp_path, params)
    text = retune(tmp_path, "inspect", str(rows), "--count", "2")
    assert text.returncode == 0, text.stderr
    assert "⟦" in text.stdout and "\x1b" not in text.stdout
    assert "repaired: control tokens in its text escaped" in text.stdout
    answer = json.loads(retune(tmp_path, "inspect", str(rows), "--task", "tokens", "--json").stdout)
    assert [(row["verdict"], row["task"]) for row in answer["rows"]] == [("repaired", "tokens")]


def test_a_fresh_clone_fetches_the_base_model_to_show_a_file(project: Path, rows: Path) -> None:
    shutil.rmtree(project / "data")
    done = retune(project, "inspect", str(rows), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
