"""Scores of texts, calls and thinking answers, their likelihoods, and what was forgotten."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chats import FOLDER, talk
from conftest import byte_level, make_base, sample_rows, with_
from tokenizers import AddedToken

from pipeline.chat.responses import Answer, as_calls, canonical_calls, read_answer
from pipeline.chat.template import ChatTemplate, TemplateError, load_contract, local_source
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import GeneralParams, Params
from pipeline.prepare import prepare
from pipeline.scoring.general import GeneralError, read_general
from pipeline.scoring.generation import generate
from pipeline.scoring.items import class_labels, score_items, summarise
from pipeline.scoring.likelihood import reference_losses
from pipeline.scoring.resampling import METRICS, PERCENT
from pipeline.train import train
from pipeline.weights.loading import load_base


def test_scores_have_intervals_for_every_metric_of_base_and_adapter(evaluation: Path, dataset: Path) -> None:
    metrics = read_json(evaluation / "scores.json")
    assert list(metrics) == ["adapter", "base"]
    test = pq.read_table(dataset / "test.parquet")
    for scores in metrics.values():
        assert scores["num_samples"] == len(test)
        assert set(scores["by_task"]) == set(test.column("task").to_pylist())
        for metric in METRICS:
            assert scores[metric]["low"] <= scores[metric]["score"] <= scores[metric]["high"]
            if metric == "perplexity":
                assert scores[metric]["score"] >= 1
            else:
                assert 0 <= scores[metric]["score"] <= (100 if metric in PERCENT else 1)
        assert set(scores["by_language"]) == set(test.column("language").to_pylist())
        for slices in ("by_task", "by_language", "by_length"):
            assert sum(part["num_samples"] for part in scores[slices].values()) == len(test)
    assert metrics["adapter"]["rougeL"]["low"] > metrics["base"]["rougeL"]["high"]  # tuning helps


def test_an_adapter_trained_under_another_template_is_refused(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    write_json(other / "contract.json", read_json(other / "contract.json") | {"chat_template_sha256": "0" * 64})
    with pytest.raises(TemplateError, match="chat_template_sha256"):
        evaluate(params.evaluate, dataset, other, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_empty_and_cut_off_answers_are_counted_apart_and_never_scored_as_text(dataset: Path, params: Params) -> None:
    test = pq.read_table(dataset / "test.parquet").slice(0, 4)
    right = test.column("reference").to_pylist()
    test = test.set_column(test.column_names.index("scoring"), "scoring", [["exact"] * 3 + ["text"]])
    texts = ((right[0], False), (right[1], True), (" ", False), ("", False))
    answers = [Answer(text, [1], cut_off) for text, cut_off in texts]
    items, signatures = score_items(test, answers, ([1.0] * 4, [2] * 4))
    assert set(signatures) == set(METRICS)
    assert items.column("accuracy").to_pylist() == [1.0, 0.0, 0.0, None]  # the last has no one right answer
    assert items.column("status").to_pylist() == ["ok", "cut_off", "empty", "empty"]
    assert items.column("answer").to_pylist()[1] == right[1]  # kept to be read
    for metric in ("exact_match", "rouge1", "rougeLsum"):
        assert items.column(metric).to_pylist() == [1.0, 0.0, 0.0, 0.0]
    assert [statistics[0] for statistics in items.column("bleu").to_pylist()][1:] == [0.0] * 3
    scores = summarise(items, params.evaluate)
    assert [scores[f"num_{state}"] for state in ("cut_off", "empty")] == [1, 2]
    assert scores["exact_match"]["score"] == 0.25


def test_a_task_with_few_labels_is_a_classification(dataset: Path) -> None:
    test = pq.read_table(dataset / "test.parquet").slice(0, 1).to_pylist()[0]
    rows = [test | {"task": "tone", "reference": word, "scoring": "exact"} for word in ["Good.", "bad"] * 10]
    rows += [test | {"task": "name", "reference": f"name {i}", "scoring": "exact"} for i in range(20)]
    rows += [test | {"task": "tone", "reference": "good", "scoring": "text"}]
    labels = class_labels(pa.Table.from_pylist(rows))
    assert labels == ["tone: good", "tone: bad"] * 10 + [None] * 21


def test_the_loss_of_a_reference_is_that_of_its_trained_tokens(base: Path, dataset: Path) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    test = pq.read_table(dataset / "test.parquet").slice(0, 7)
    model = load_base(local_source(base))
    losses, counts = reference_losses(model, template, test, "test", "base")
    for row, loss, count in zip(test.to_pylist(), losses, counts, strict=True):
        messages = [*json.loads(row["messages"]), {"role": "assistant", "content": row["reference"]}]
        encoded = template.encode(messages)
        labels = torch.tensor([encoded.labels])
        alone = model(torch.tensor([encoded.input_ids]), labels=labels)
        assert count == sum(label != -100 for label in encoded.labels)
        assert loss == pytest.approx(float(alone.loss) * count, rel=1e-4)
    assert min(counts) >= 2  # the end token counts


@pytest.fixture
def general(tmp_path: Path) -> tuple[Path, str]:
    rows = [
        {"messages": talk(f"Name the colour of box {i}: {colour}", colour), "scoring": "exact" if i < 3 else None}
        for i, colour in enumerate(["red", "blue", "green", "black"])
    ]
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, sha256_file(path)


def test_forgetting_is_measured_and_both_systems_answer_the_prompts(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params, general: tuple[Path, str]
) -> None:
    path, digest = general
    general_set, prompt = {"path": str(path), "sha256": digest}, "Name the colour of box 7: red"
    few = {"max_samples": 2, "prompts": [prompt], "general": general_set}
    evaluate(with_(params, evaluate=few).evaluate, dataset, adapter, tmp_path / "evaluation")
    result = read_json(tmp_path / "evaluation" / "general.json")
    assert result["rows"] == 4
    for system in ("base", "adapter"):
        table = pq.read_table(tmp_path / "evaluation" / f"general.{system}.parquet")
        assert [hit is None for hit in table.column("accuracy").to_pylist()] == [False] * 3 + [True]
        losses, tokens = (sum(table.column(name).to_pylist()) for name in ("loss", "loss_tokens"))
        assert result[system]["perplexity"]["score"] == pytest.approx(math.exp(losses / tokens))
    lost = result["base"]["accuracy"]["score"] - result["adapter"]["accuracy"]["score"]
    assert result["lost"]["accuracy"] == pytest.approx(lost)
    [answers] = read_json(tmp_path / "evaluation" / "prompts.json")
    assert (answers["prompt"], answers["adapter"]["answer"]) == (prompt, "red")
    assert answers["base"] != answers["adapter"]
    assert "prompts" not in read_json(tmp_path / "evaluation" / "evaluation.json")["params"]


def test_the_general_set_and_the_prompts_have_room_for_answers_of_their_own(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, int] = {}

    def record(*arguments: Any) -> list[Answer]:
        limits[arguments[6]] = arguments[3]
        return generate(*arguments)

    monkeypatch.setattr("pipeline.evaluate.generate", record)
    path = tmp_path / "general.jsonl"
    path.write_text(json.dumps({"messages": talk("Count", " ".join(map(str, range(60)))), "scoring": "exact"}))
    general = {"path": str(path), "sha256": sha256_file(path)}
    settings = {"max_new_tokens": "auto", "max_samples": 2, "prompts": ["Hello"], "general": general}
    evaluate(with_(params, evaluate=settings).evaluate, dataset, adapter, tmp_path / "evaluation")
    assert limits["the base"] < 60 * 1.25 <= limits["the base, general"]
    assert limits["the base, prompts"] == params.prepare.max_length


@pytest.mark.parametrize(
    ("ending", "digest", "context", "expected_text"),
    [("", "0" * 64, 512, "sha256"), ("", None, 8, "context is 8"), ("x", None, 512, "does not exist")],
)
def test_a_general_set_that_is_not_the_pinned_one_or_does_not_fit_is_refused(
    dataset: Path, general: tuple[Path, str], ending: str, digest: str | None, context: int, expected_text: str
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    with pytest.raises(GeneralError, match=expected_text):
        read_general(GeneralParams(path=f"{general[0]}{ending}", sha256=digest or general[1]), template, context)


def test_answers_may_be_longer_than_any_of_the_data_by_default_and_references_that_are_cut_off_are_counted(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = read_json(dataset / "contract.json")["max_answer_tokens"]
    lengths = pq.read_table(dataset / "test.parquet").column("answer_tokens").to_pylist()
    assert 1 < max(lengths) <= longest
    expected = {"auto": [], 2: [f"{sum(length > 2 for length in lengths[:4])} of 4"]}
    for limit, shown in expected.items():
        settings = with_(params, evaluate={"max_new_tokens": limit, "max_samples": 4, "bootstrap_samples": 100})
        evaluate(settings.evaluate, dataset, adapter, tmp_path / "evaluation")
        resolved = read_json(tmp_path / "evaluation" / "evaluation.json")["params"]["max_new_tokens"]
        assert resolved == limit or (1.25 * longest <= resolved < 1.25 * longest + 32 and resolved % 32 == 0)
        assert re.findall(r"(\d of 4) reference answers", capsys.readouterr().err) == shown


TOOLS = [{"type": "function", "function": {"name": "move", "parameters": {"type": "object", "properties": {}}}}]
TEXTS = ("exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")


def call_row(i: int) -> dict[str, Any]:
    calls = [{"name": "move", "arguments": {"box": i, "to": "red"}}, {"name": "stop", "arguments": {}}][: 1 + i % 2]
    question = {"role": "user", "content": f"Move the box {i * 7919} to red"}
    answer = {"role": "assistant", "content": None, "tool_calls": as_calls(calls)}
    return {"messages": [question, answer], "tools": TOOLS, "task": "calls"}


@pytest.fixture(scope="module")
def calls_dataset(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    data = tmp_path_factory.mktemp("data")
    (data / "calls.jsonl").write_text("\n".join(json.dumps(call_row(i)) for i in range(60)))
    (data / "rows.json").write_text(json.dumps(sample_rows(60)))
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    wide = params.prepare.model_copy(update={"max_length": 400, "near_duplicate_threshold": None})
    prepare(wide, data, output)
    return output


@pytest.fixture(scope="module")
def template(calls_dataset: Path) -> ChatTemplate:
    return load_contract(read_json(calls_dataset / "contract.json"))


def of_calls(calls_dataset: Path) -> Any:
    test = pq.read_table(calls_dataset / "test.parquet")
    return test.filter([task == "calls" for task in test["task"].to_pylist()])


def test_the_reference_of_a_call_equals_what_is_parsed_from_the_trained_tokens(
    calls_dataset: Path, template: ChatTemplate
) -> None:
    test = of_calls(calls_dataset)
    assert len(test) > 5
    assert set(test["scoring"].to_pylist()) == {"tool_calls"}
    assert "calls" not in read_json(calls_dataset / "report.json")["scoring"]  # nothing had to be chosen
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


def test_calls_count_for_accuracy_and_not_for_text_metrics(calls_dataset: Path, params: Params) -> None:
    test = of_calls(calls_dataset).slice(0, 5)
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


def test_calls_do_not_change_the_scores_of_texts(calls_dataset: Path, params: Params) -> None:
    rows = pq.read_table(calls_dataset / "test.parquet").to_pylist()
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


def test_the_likelihood_of_a_call_is_that_of_its_tokens(
    calls_dataset: Path, template: ChatTemplate, base: Path
) -> None:
    test = of_calls(calls_dataset).slice(0, 4)
    _, counts = reference_losses(load_base(local_source(base)), template, test, "test", "base")
    for item, count in zip(test.to_pylist(), counts, strict=True):
        calls = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in json.loads(item["reference"]))
        assert count == len(template.tokenizer.encode(calls, add_special_tokens=False)) + 1


def test_a_thinking_model_is_scored_without_its_thoughts_and_merged_with_its_template(
    tmp_path: Path, params: Params
) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    base = make_base(tmp_path / "base", steps=100, tokenizer=tokenizer)
    template = (FOLDER / "qwen3.jinja").read_bytes()
    (base / "chat_template.jinja").write_bytes(template)
    rows = []
    for i, row in enumerate(sample_rows(200)):
        thought = f"It says {row['output']}." if i % 2 else None
        rows.append({"messages": talk(row["instruction"], row["output"], thought=thought), "scoring": "exact"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"prepare": {"model_name_or_path": str(base)}, "evaluate": {"max_new_tokens": 24, "max_samples": 24}}
    params = with_(params, **settings, train={"num_train_epochs": 5.0})
    dataset, adapter, evaluation = (tmp_path / name for name in ("dataset", "adapter", "evaluation"))
    prepare(params.prepare, tmp_path / "rows.jsonl", dataset)
    train(params.train, dataset, adapter, tmp_path / "checkpoints")
    evaluate(params.evaluate, dataset, adapter, evaluation)
    answers = pq.read_table(evaluation / "items.adapter.parquet").to_pylist()
    assert not any("think" in item["answer"] for item in answers)
    assert any(tokenizer.token_to_id("<think>") in item["answer_ids"] for item in answers)
    scores = read_json(evaluation / "scores.json")
    assert scores["adapter"]["accuracy"]["score"] > scores["base"]["accuracy"]["score"]
    outputs = (tmp_path / name for name in ("merged", "parity"))
    assert merge(params.merge, dataset, adapter, evaluation, *outputs).agreement > 0.9
    assert (tmp_path / "merged" / "chat_template.jinja").read_bytes() == template
