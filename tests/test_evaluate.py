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
from chats import talk
from conftest import with_
from test_train import identity

from pipeline.chat.responses import Answer
from pipeline.chat.template import TemplateError, load_contract
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.evaluate import evaluate
from pipeline.params import GeneralParams, Params
from pipeline.scoring.general import GeneralError, read_general
from pipeline.scoring.generation import generate
from pipeline.scoring.items import class_labels, score_items, summarise
from pipeline.scoring.likelihood import reference_losses
from pipeline.scoring.resampling import METRICS, PERCENT
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
    model = load_base(identity(base))
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
