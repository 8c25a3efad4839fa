import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from test_train import identity

from pipeline.chat.template import TemplateError, load_contract
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.evaluate import evaluate
from pipeline.params import GeneralParams, Params
from pipeline.scoring.general import GeneralError, general_items, read_general
from pipeline.scoring.generation import Answer, generate
from pipeline.scoring.items import class_labels, score_items, summarise
from pipeline.scoring.likelihood import reference_losses, sequence_losses
from pipeline.scoring.resampling import METRICS, PERCENT, length_bucket
from pipeline.weights.loading import load_adapter, load_base


def test_metrics_hold_every_score_with_its_interval_for_base_and_adapter(evaluation: Path, dataset: Path) -> None:
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


def test_tuning_helps(evaluation: Path) -> None:
    metrics = read_json(evaluation / "scores.json")
    assert metrics["adapter"]["rougeL"]["low"] > metrics["base"]["rougeL"]["high"]


def test_batched_answers_equal_one_by_one_answers(base: Path, dataset: Path, adapter: Path) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    quantisation = read_json(adapter / "training.json")["quantisation"]
    model = load_adapter(load_base(identity(base), quantisation), adapter)
    prompts = pq.read_table(dataset / "test.parquet").column("input_ids").to_pylist()[:12]
    prompts[3] = prompts[3][:9]  # lengths differ, so there is padding
    batched = generate(model, template, prompts, 8, 12, "test", "batch")
    single = [generate(model, template, [prompt], 8, 1, "test", "single")[0] for prompt in prompts]
    assert batched == single


def test_the_base_is_scored_without_any_trace_of_the_adapter(
    base: Path, dataset: Path, adapter: Path, evaluation: Path, params: Params
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    untouched = load_base(identity(base), read_json(adapter / "training.json")["quantisation"])
    test = pq.read_table(dataset / "test.parquet")
    answers = generate(
        untouched, template, test.column("input_ids").to_pylist(), params.evaluate.max_new_tokens, 64, "test", "base"
    )
    assert pq.read_table(evaluation / "items.base.parquet").column("answer").to_pylist() == [a.text for a in answers]


def test_an_adapter_trained_under_another_template_is_refused(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params
) -> None:
    import shutil

    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    contract = read_json(other / "contract.json")
    write_json(other / "contract.json", contract | {"chat_template_sha256": "0" * 64})
    with pytest.raises(TemplateError, match="chat_template_sha256"):
        evaluate(params.evaluate, dataset, other, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_max_samples_takes_the_same_items_every_time(tmp_path: Path, dataset: Path) -> None:
    from pipeline.scoring.items import test_items as items_of

    few, more = (items_of(dataset, n).column("id").to_pylist() for n in (3, 6))
    assert len(few) == 3
    assert more[:3] == few


def test_accuracy_counts_only_items_with_one_right_answer(dataset: Path) -> None:
    test = pq.read_table(dataset / "test.parquet").slice(0, 2)
    scoring = test.column_names.index("scoring")
    test = test.set_column(scoring, "scoring", [["exact", "text"]])
    right = [Answer(text, [1], False) for text in test.column("reference").to_pylist()]
    items, signatures = score_items(test, right, ([1.0, 2.0], [2, 2]))
    assert items.column("accuracy").to_pylist() == [1.0, None]
    assert items.column("rougeL").to_pylist() == [1.0, 1.0]
    assert set(signatures) == set(METRICS)


def test_failed_empty_and_cut_off_answers_are_counted_apart_and_never_scored_as_text(
    dataset: Path, params: Params
) -> None:
    test = pq.read_table(dataset / "test.parquet").slice(0, 4)
    right = test.column("reference").to_pylist()
    answers = [Answer(right[0], [1], False), Answer(right[1], [1], True), Answer(" ", [1], False), None]
    items, _ = score_items(test, answers, ([1.0] * 4, [2] * 4))
    assert items.column("status").to_pylist() == ["ok", "cut_off", "empty", "failed"]
    assert items.column("answer").to_pylist()[1] == right[1]  # kept to be read
    for metric in ("exact_match", "accuracy", "rouge1", "rougeLsum"):
        assert items.column(metric).to_pylist() == [1.0, 0.0, 0.0, 0.0]
    assert [statistics[0] for statistics in items.column("bleu").to_pylist()][1:] == [0.0] * 3
    scores = summarise(items, params.evaluate)
    assert [scores[f"num_{state}"] for state in ("cut_off", "empty", "failed")] == [1, 1, 1]
    assert scores["exact_match"]["score"] == 0.25
    assert scores["length_ratio"] == 1.0  # of the answer that is one


def test_a_task_with_few_labels_is_a_classification(dataset: Path) -> None:
    test = pq.read_table(dataset / "test.parquet").slice(0, 1).to_pylist()[0]
    rows = [test | {"task": "tone", "reference": word, "scoring": "exact"} for word in ["Good.", "bad"] * 10]
    rows += [test | {"task": "name", "reference": f"name {i}", "scoring": "exact"} for i in range(20)]
    rows += [test | {"task": "tone", "reference": "good", "scoring": "text"}]
    labels = class_labels(pa.Table.from_pylist(rows))
    assert labels == ["tone: good", "tone: bad"] * 10 + [None] * 21


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, "1–32 tokens"), (32, "1–32 tokens"), (33, "33–64 tokens"), (1000, "513–1024 tokens")]
)
def test_prompts_are_grouped_by_length(tokens: int, bucket: str) -> None:
    assert length_bucket(tokens) == bucket


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


def test_an_answer_without_an_end_counts_as_cut_off(base: Path, dataset: Path, params: Params) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    prompt = pq.read_table(dataset / "test.parquet").column("input_ids").to_pylist()[:1]
    model = load_base(identity(base))
    [cut] = generate(model, template, prompt, 1, 1, "test", "base")
    [whole] = generate(model, template, prompt, 64, 1, "test", "base")
    assert (cut.cut_off, len(cut.ids)) == (True, 1)
    assert not whole.cut_off
    assert 1 < len(whole.ids) < 64


def test_a_prompt_that_does_not_fit_the_context_is_refused(base: Path, dataset: Path) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    with pytest.raises(ValueError, match="context of 512"):
        generate(load_base(identity(base)), template, [[1] * 510], 8, 1, "test", "base")


def test_with_changes_one_section_only(params: Params) -> None:
    assert with_(params, evaluate={"seed": 1}).train == params.train


@pytest.fixture
def general(tmp_path: Path) -> tuple[Path, str]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Name the colour of box {i}: {c}"},
                {"role": "assistant", "content": c},
            ]
        }
        | {"scoring": "exact" if i < 3 else None}
        for i, c in enumerate(["red", "blue", "green", "black"])
    ]
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, sha256_file(path)


def test_forgetting_is_measured_on_rows_of_its_own_and_prompts_are_answered_side_by_side(
    tmp_path: Path, dataset: Path, adapter: Path, params: Params, general: tuple[Path, str]
) -> None:
    path, digest = general
    few = {
        "max_samples": 2,
        "prompts": ["Name the colour of box 7: red"],
        "general": {"path": str(path), "sha256": digest},
    }
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
    [asked] = read_json(tmp_path / "evaluation" / "prompts.json")
    assert asked["prompt"] == few["prompts"][0]  # type: ignore[index]
    assert asked["adapter"]["answer"] == "red"
    assert asked["base"] != asked["adapter"]
    assert "prompts" not in read_json(tmp_path / "evaluation" / "evaluation.json")["params"]


def test_a_general_set_of_plain_text_has_a_perplexity_alone(tmp_path: Path, base: Path, dataset: Path) -> None:
    path = tmp_path / "general.text.jsonl"
    path.write_text('{"text": "Name the colour of box 1."}\n{"text": "A box is red."}\n')
    template = load_contract(read_json(dataset / "contract.json"))
    rows = read_general(GeneralParams(path=str(path), sha256=sha256_file(path)), template, 512)
    assert rows.prompts == {}
    losses = sequence_losses(load_base(identity(base)), rows.sequences, 0, "test", "base")
    table = general_items(rows, [], losses)
    assert table.column("accuracy").null_count == 2
    assert min(table.column("loss").to_pylist()) > 0


def test_a_general_set_that_is_not_the_pinned_one_or_does_not_fit_is_refused(
    dataset: Path, general: tuple[Path, str]
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    path, digest = general
    with pytest.raises(GeneralError, match=f"its sha256 is {digest}"):
        read_general(GeneralParams(path=str(path), sha256="0" * 64), template, 512)
    with pytest.raises(GeneralError, match="the model's context is 8"):
        read_general(GeneralParams(path=str(path), sha256=digest), template, 8)
    with pytest.raises(GeneralError, match="which is not there"):
        read_general(GeneralParams(path=str(path) + "x", sha256=digest), template, 512)
