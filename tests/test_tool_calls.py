"""Rows whose answer is a call: expected, generated and compared as calls, from the data to the scores."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sample_rows

from pipeline.chat.responses import Answer, as_calls, canonical_calls, read_answer
from pipeline.chat.template import ChatTemplate, load_contract, local_source
from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.scoring.items import score_items, summarise
from pipeline.scoring.likelihood import reference_losses
from pipeline.weights.loading import load_base

TOOLS = [{"type": "function", "function": {"name": "move", "parameters": {"type": "object", "properties": {}}}}]
TEXTS = ("exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")


def call_row(i: int) -> dict[str, Any]:
    calls = [{"name": "move", "arguments": {"box": i, "to": "red"}}, {"name": "stop", "arguments": {}}][: 1 + i % 2]
    question = {"role": "user", "content": f"Move the box {i * 7919} to red"}
    answer = {"role": "assistant", "content": None, "tool_calls": as_calls(calls)}
    return {"messages": [question, answer], "tools": TOOLS, "task": "calls"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    data = tmp_path_factory.mktemp("data")
    (data / "calls.jsonl").write_text("\n".join(json.dumps(call_row(i)) for i in range(60)))
    (data / "rows.json").write_text(json.dumps(sample_rows(60)))
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    wide = params.prepare.model_copy(update={"max_length": 400, "near_duplicate_threshold": None})
    prepare(wide, data, output)
    return output


@pytest.fixture(scope="module")
def template(dataset: Path) -> ChatTemplate:
    return load_contract(read_json(dataset / "contract.json"))


def of_calls(dataset: Path) -> Any:
    test = pq.read_table(dataset / "test.parquet")
    return test.filter([task == "calls" for task in test["task"].to_pylist()])


def test_the_reference_of_a_call_equals_what_is_parsed_from_the_trained_tokens(
    dataset: Path, template: ChatTemplate
) -> None:
    test = of_calls(dataset)
    assert len(test) > 5
    assert set(test["scoring"].to_pylist()) == {"tool_calls"}
    assert "calls" not in read_json(dataset / "report.json")["scoring"]  # nothing had to be chosen
    for item in test.to_pylist():
        messages, prompt = json.loads(item["messages"]), item["input_ids"]
        calls = call_row(int(messages[-1]["content"].split()[3]) // 7919)["messages"][-1]["tool_calls"]
        assert item["reference"] == canonical_calls([call["function"] for call in calls])
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        written = template.encode([*messages, answer], item["tools"]).input_ids[len(prompt) :]
        while written[-1] not in template.stop_ids:
            written.pop()
        read = read_answer(template, prompt, written, item["tools"])
        assert (canonical_calls(read.tool_calls), read.cut_off) == (item["reference"], False)


def test_calls_count_for_accuracy_and_not_for_text_metrics(dataset: Path, params: Params) -> None:
    test = of_calls(dataset).slice(0, 5)
    expected = [json.loads(reference) for reference in test["reference"].to_pylist()]
    swapped = [dict(reversed(call.items())) for call in reversed(expected[1])]
    other = [call | {"arguments": {"box": -1}} for call in expected[2]]
    answers = [
        Answer("", [1], False, None, tuple(expected[0])),
        Answer("I move it.", [1], False, "Which?", tuple(swapped)),
        Answer("", [1], False, None, tuple(other)),
        Answer(test["reference"][3].as_py(), [1], False),  # the same words, but no call
        Answer("", [1], True, None, tuple(expected[4])),
    ]
    items, _ = score_items(test, answers, ([1.0] * 5, [2] * 5))
    assert items["status"].to_pylist() == ["ok"] * 4 + ["cut_off"]
    assert items["accuracy"].to_pylist() == [1, 1, 0, 0, 0]
    for metric in TEXTS:
        assert items[metric].to_pylist() == [None] * 5
    scores = summarise(items, params.evaluate)
    assert scores["accuracy"]["score"] == pytest.approx(0.4)
    assert [scores[metric] for metric in TEXTS] == [None] * len(TEXTS)


def test_calls_do_not_change_the_scores_of_texts(dataset: Path, params: Params) -> None:
    rows = pq.read_table(dataset / "test.parquet").to_pylist()
    for row in rows:  # calls with Chinese arguments ask for no other tokeniser of the texts
        row["reference"] = row["reference"].replace("box", "盒") if row["scoring"] == "tool_calls" else row["reference"]
    texts = [row for row in rows if row["scoring"] != "tool_calls"]
    assert 0 < len(texts) < len(rows)

    def scored(rows: list[dict[str, Any]]) -> Any:
        answers = [Answer(f"{row['reference'][:4]} or so", [1], False) for row in rows]
        losses = ([1.0] * len(rows), [2] * len(rows))
        items, signatures = score_items(pa.Table.from_pylist(rows), answers, losses)
        return [summarise(items, params.evaluate)[metric]["score"] for metric in TEXTS], signatures

    assert scored(rows) == scored(texts)


def test_the_likelihood_of_a_call_is_that_of_its_tokens(dataset: Path, template: ChatTemplate, base: Path) -> None:
    test = of_calls(dataset).slice(0, 4)
    _, counts = reference_losses(load_base(local_source(base)), template, test, "test", "base")
    for item, count in zip(test.to_pylist(), counts, strict=True):
        calls = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in json.loads(item["reference"]))
        assert count == len(template.tokenizer.encode(calls, add_special_tokens=False)) + 1
