"""Sequence classification, from rows of text and label to a merged model, on tiny random encoders."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_level, environment, make_base, make_project, retune, with_, write_params
from tokenizers import processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from pipeline.chat.rendering import TemplateError
from pipeline.cli.talk import classify as classify_texts
from pipeline.cli.talk import predict as answer_file
from pipeline.cli.versions import CommandError
from pipeline.core.files import read_json
from pipeline.data.classes import ClassError, order_classes
from pipeline.evaluate import evaluate
from pipeline.merge import merge, score_model
from pipeline.params import Params
from pipeline.prepare import PrepareError, prepare
from pipeline.scoring.classification import classify
from pipeline.train import TrainError, train

GOOD, BAD = ["a joy", "splendid", "moving", "wise"], ["a bore", "dreadful", "clumsy", "stale"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def reviews(number: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    rows = []
    for i in range(number):
        label = draw.choice(["neg", "pos"])
        words = draw.choice(GOOD if label == "pos" else BAD)
        rows.append((f"Film {i} by director {draw.randrange(10**6)}: {words}.", label))
    return rows


def write_rows(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return folder


def make_encoder(folder: Path, family: str, steps: int = 60) -> Path:
    """A random masked language model with its tokenizer, as roberta-base and bert-base are published."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = byte_level([text for text, _ in reviews(200)], special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(folder)
    torch.manual_seed(0)
    settings = SIZES | {"vocab_size": len(tokenizer.get_vocab()), "pad_token_id": 1, "max_position_embeddings": 130}
    config = {"roberta": RobertaConfig, "bert": BertConfig}[family](**settings)
    model = AutoModelForMaskedLM.from_config(config)
    teach_words(model, folder, steps)
    model.save_pretrained(folder)
    return folder


def teach_words(model: Any, folder: Path, steps: int) -> None:
    """Train briefly, so that the first token attends to the others, as in published encoders."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    batch = tokenizer([text for text, _ in reviews(64)], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for step in range(steps):
        ids = batch["input_ids"][step % 4 :: 4].clone()
        hidden = (torch.rand(ids.shape) < 0.3) & (ids > 4)
        labels = ids.masked_fill(~hidden, -100)
        ids[hidden] = tokenizer.mask_token_id
        ids[:, 0], labels[:, 0] = tokenizer.mask_token_id, ids[:, -4]  # predict one of the last words
        model(ids, attention_mask=(ids != 1).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def with_classification(params: Params, base: Path, method: str = "lora", **train: Any) -> Params:
    settings = {
        "task": "sequence-classification", "method": method, "load_in_4bit": "auto", "packing": False,
        "gradient_accumulation_steps": 1, "tokens_per_step": None, "per_device_train_batch_size": 8,
        "learning_rate": 0.002, "num_train_epochs": 6.0, "warmup_ratio": 0.0,
    }  # fmt: skip
    few, close = {"bootstrap_samples": 100, "max_new_tokens": "auto"}, {"min_agreement": 0.9}
    other = {"prepare": {"model_name_or_path": str(base)}, "promote": {"primary_metric": "accuracy"}}
    return with_(params, train=settings | train, evaluate=few, merge=close, **other)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("texts") / "data", reviews(240))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "base", "roberta")


def prepare_dataset(params: Params, data: Path, folder: Path) -> Path:
    prepare(params.prepare, data, folder / "dataset", train_task=params.train.task)
    return folder / "dataset"


@pytest.mark.parametrize(
    ("family", "method", "rate"),
    [
        ("bert", "qlora", 0.002),
        ("llama", "lora", 0.002),
        pytest.param("roberta", "lora", 0.002, marks=pytest.mark.faults),
        pytest.param("roberta", "full", 0.0005, marks=pytest.mark.faults),
        pytest.param("bert", "ia3", 0.03, marks=pytest.mark.faults),
        pytest.param("llama", "dora", 0.002, marks=pytest.mark.faults),
    ],
)
def test_reviews_are_classified_by_the_merged_model_as_by_the_adapter(
    tmp_path: Path, params: Params, texts: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], family: str, method: str, rate: float,
) -> None:  # fmt: skip
    # IA3 only scales activations, so it needs a better base and more steps.
    steps, epochs = (400, 12.0) if method == "ia3" else (60, 6.0)
    base = make_base(tmp_path / "base") if family == "llama" else make_encoder(tmp_path / "base", family, steps)
    settings = with_classification(params, base, method, learning_rate=rate, num_train_epochs=epochs)
    dataset = prepare_dataset(settings, texts, tmp_path)
    assert read_json(dataset / "contract.json")["labels"] == ["neg", "pos"]
    train(settings.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    scores = evaluate(settings.evaluate, dataset, tmp_path / "adapter", tmp_path / "evaluation")
    untrained, tuned = scores["base"], scores["adapter"]
    assert tuned["accuracy"]["low"] > untrained["accuracy"]["high"] and tuned["accuracy"]["score"] > 0.85
    assert tuned["macro_f1"]["low"] <= tuned["macro_f1"]["score"] <= tuned["macro_f1"]["high"] <= 1
    assert "macro_f1" in (tmp_path / "evaluation" / "report.html").read_text()
    outputs = (tmp_path / name for name in ("merged", "parity"))
    result = merge(settings.merge, dataset, tmp_path / "adapter", tmp_path / "evaluation", *outputs)
    assert result.agreement >= (0.95 if method == "qlora" else 1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    items = pq.read_table(tmp_path / "parity" / "items.merged.parquet")
    conversations = [[{"role": "user", "content": text}] for text in items["prompt"].to_pylist()[:8]]
    classes = classify(tmp_path / "merged", conversations)
    assert [c.label for c in classes] == items["predicted"].to_pylist()[:8]
    assert [c.confidence for c in classes] == pytest.approx(items["confidence"].to_pylist()[:8], abs=1e-4)
    assert all(0.5 <= c.confidence <= 1 and sum(c.probabilities) == pytest.approx(1) for c in classes)

    (tmp_path / "artifacts").mkdir()
    shutil.copytree(tmp_path / "merged", tmp_path / "artifacts" / "merged")
    write_params(tmp_path, settings)
    monkeypatch.chdir(tmp_path)
    lines = [{"id": 0, "text": conversations[0][0]["content"]}, {"id": 1, "prompt": conversations[1][0]["content"]}]
    Path("reviews.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answer_file(Path("reviews.jsonl"), model="workspace")
    rows = [json.loads(line) for line in Path("reviews.answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["label"], row["confidence"], row["model"]) for row in rows] == [
        (i, classes[i].label, pytest.approx(classes[i].confidence, abs=1e-4), "workspace") for i in (0, 1)
    ]
    for command, asked in ((answer_file, Path("reviews.jsonl")), (classify_texts, ["A text."])):
        with pytest.raises(CommandError, match="a base model has no classes"):
            command(asked, model="base")  # type: ignore[operator]
    capsys.readouterr()
    (tmp_path / "workspace").mkdir()  # a name of a model, whatever folders there are
    shutil.copy(tmp_path / "merged" / "contract.json", tmp_path / "workspace")
    for name in ("workspace", str(tmp_path / "merged")):
        classify_texts([lines[0]["text"]], name, json_output=True)
        answer = json.loads(capsys.readouterr().out)
        assert (answer["model"], answer["texts"][0]["label"]) == (name, classes[0].label)
        expected = dict(zip(["neg", "pos"], classes[0].probabilities, strict=True))
        assert answer["texts"][0]["probabilities"] == pytest.approx(expected, abs=1e-4)
    recorded = read_json(tmp_path / "evaluation" / "evaluation.json")
    score_model(tmp_path / "merged", dataset, recorded, tmp_path / "again")
    assert pq.read_table(tmp_path / "again" / "items.parquet")["predicted"].equals(items["predicted"])


def test_a_text_is_tokenised_as_by_its_tokenizer_and_keeps_its_class(
    tmp_path: Path, params: Params, texts: Path, encoder: Path
) -> None:
    settings = with_classification(params, encoder)
    dataset = prepare_dataset(settings, texts, tmp_path)
    rows = pq.read_table(dataset / "train.parquet").to_pylist() + pq.read_table(dataset / "test.parquet").to_pylist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    classes = dict(reviews(240))
    assert len(rows) > 200
    for row in rows:
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert row["input_ids"] == tokenizer(text)["input_ids"]
        assert classes[text] == (row["label"] if "label" in row else row["reference"])


@pytest.mark.parametrize(("overlong", "kept"), [("drop", False), ("truncate_prompt", True)])
def test_a_text_longer_than_the_context_is_dropped_or_its_end_is_cut(
    tmp_path: Path, params: Params, encoder: Path, overlong: str, kept: bool
) -> None:
    long = "Film 9999: " + "a joy " * 200
    data = write_rows(tmp_path / "data", [*reviews(60), (long, "pos")])
    settings = with_classification(params, encoder)
    settings = with_(settings, prepare={"on_overlong": overlong, "max_length": 64, "test_fraction": 0.1})
    result = prepare(settings.prepare, data, tmp_path / "dataset", train_task=settings.train.task)
    assert sum(result.rows.values()) == 60 + kept
    longest = max(len(r) for r in pq.read_table(tmp_path / "dataset" / "train.parquet")["input_ids"].to_pylist())
    assert longest == 64 if kept else longest < 64


@pytest.mark.parametrize(
    ("label", "max_length", "error"),
    [("pos", 64, ClassError), ("x " * 200, 64, PrepareError), (None, 129, TemplateError)],
    ids=["one class", "not a class", "longer than the encoder reads"],
)
def test_classes_that_cannot_be_learned_are_refused(
    tmp_path: Path, params: Params, encoder: Path, label: str | None, max_length: int, error: type[Exception]
) -> None:
    rows = [(text, label or original) for text, original in reviews(80)]
    settings = with_(with_classification(params, encoder), prepare={"max_length": max_length})
    with pytest.raises(error):
        prepare_dataset(settings, write_rows(tmp_path / "data", rows), tmp_path)


def test_every_class_without_a_training_row_is_named_with_its_rows() -> None:
    rare = Counter({f"rare{number:02}": 1 for number in range(11)})
    for other, words in (
        (Counter(c=2), ["1 class ", " c (2 rows)"]),
        (Counter(A=1, c=2), ["2 classes ", " A (1 row; ", " from a ", " c (2 rows)"]),
        (rare, ["11 classes ", "rare09 (1 row)", "1 more"]),
    ):
        with pytest.raises(ClassError) as error:
            order_classes(Counter("ab"), other)
        assert [word for word in words if word not in str(error.value)] == []
        assert "rare10" not in str(error.value)
    assert order_classes(Counter(["10", "9", "1"]), Counter("9")) == ["1", "9", "10"]


def test_a_dataset_of_the_other_task_is_refused(tmp_path: Path, params: Params, dataset: Path, base: Path) -> None:
    with pytest.raises(TrainError):
        train(with_classification(params, base).train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")


@pytest.mark.faults
def test_a_classifier_becomes_champion(tmp_path: Path, params: Params) -> None:
    """The four stages by `dvc repro`, as in the preset roberta-base-imdb; then publish, promote and the report."""
    base = make_encoder(tmp_path / "encoder", "roberta")
    root = make_project(tmp_path / "project", base, params)
    write_params(root, with_classification(params, Path("data/base")))
    shutil.rmtree(root / "data" / "instructions")
    write_rows(root / "data" / "instructions", reviews(240))
    command = [sys.executable, "-m", "dvc"]
    subprocess.run([*command, "add", "-q", "data"], cwd=root, env=environment(), check=True)
    done = subprocess.run([*command, "repro"], cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    metrics = read_json(root / "artifacts" / "evaluation" / "scores.json")
    assert metrics["adapter"]["accuracy"]["score"] > metrics["base"]["accuracy"]["score"]
    assert metrics["adapter"]["macro_f1"]["score"] > 0.8
    merged = read_json(root / "artifacts" / "parity" / "scores.json")["merged"]
    assert merged["accuracy"] == metrics["adapter"]["accuracy"]
    text = "Film 7 by director 123456: splendid."
    answered = retune(root, "classify", "--json", text)
    assert answered.returncode == 0 and "workspace" in answered.stderr  # there is no champion yet
    assert json.loads(answered.stdout)["texts"][0]["label"] == "pos"
    ran = retune(root, "run", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert [s["outcome"] for s in result["stages"] if s["stage"] in ("prepare", "train", "merge")] == ["cached"] * 3
    assert result["decision"]["decision"] == "promoted"
    assert "retune classify" in result["decision"]["next"]
    assert "Promoted" in (root / "artifacts" / "report.html").read_text()
    assert retune(root, "doctor").returncode == 0
    version = result["version"]["version"]
    shutil.rmtree(root / "artifacts" / "merged")  # the champion's files come from the store
    for name in ([], ["--model", "champion"], ["--model", version]):
        answered = retune(root, "classify", "--json", *name, text)
        assert json.loads(answered.stdout)["model"] == version, answered.stderr
