"""The local `evaluate` modules, loaded by path without a network, against the libraries they stand on."""

import random
import string
from typing import Any

import evaluate
import numpy as np
import pytest
import sacrebleu
from conftest import ROOT
from rouge_score import rouge_scorer

from pipeline.statistics import corpus_score

NAMES = ("exact_match", "bleu", "rouge")


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return {name: evaluate.load(str(ROOT / "pipeline" / "metrics" / name)) for name in NAMES}


def text(draw: random.Random, longest: int = 12) -> str:
    words = ["The", "cat's", "sat", "on_it", "C-3PO", "3.14", "it's", "A.B.", "co-op", "x=1;", "no", ""]
    return draw.choice([" ", "  ", "\n", "\t"]).join(draw.choices(words, k=draw.randint(0, longest)))


def pairs(seed: int, number: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    return [text(draw) for _ in range(number)], [text(draw) for _ in range(number)]


def test_identical_chinese_sentences_get_full_marks(metrics: dict[str, Any]) -> None:
    texts = ["今天北京的天气很好。", "这个产品的质量非常不错，我很满意！"]
    scores = {name: metric.compute(predictions=texts, references=texts) for name, metric in metrics.items()}
    assert scores["bleu"]["score"] == pytest.approx(100)
    assert scores["rouge"]["items"] == {kind: [1.0, 1.0] for kind in ("rouge1", "rouge2", "rougeL")}
    assert scores["exact_match"]["items"] == [1.0, 1.0]


def test_chinese_sentences_that_share_half_get_half(metrics: dict[str, Any]) -> None:
    items = metrics["rouge"].compute(predictions=["我爱北京"], references=["我爱上海"])["items"]
    assert items["rouge1"] == [pytest.approx(0.5)]
    assert items["rouge2"] == [pytest.approx(1 / 3)]


@pytest.mark.parametrize("other", ["größer", "Привет", "ひらがな", "한국어"])
def test_rouge_counts_letters_that_are_not_ascii(metrics: dict[str, Any], other: str) -> None:
    items = metrics["rouge"].compute(predictions=[other, other], references=[other, "else"])["items"]
    assert items["rouge1"] == [1.0, 0.0]


def test_rouge_of_ascii_text_is_rouge_scores_own(metrics: dict[str, Any]) -> None:
    draw = random.Random(0)
    noise = ["".join(draw.choices(string.printable, k=draw.randint(0, 40))) for _ in range(200)]
    predictions, references = pairs(0, 200)
    predictions, references = predictions + noise, references + [n.upper()[::2] for n in noise]
    items = metrics["rouge"].compute(predictions=predictions, references=references)["items"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = scorer.score(reference, prediction)
        assert {kind: items[kind][index] for kind in items} == {kind: s.fmeasure for kind, s in expected.items()}


@pytest.mark.parametrize(
    ("references", "tokenize"), [(pairs(1, 50)[1], "13a"), (["我爱北京。", "He said 你好 twice."], "zh")]
)
def test_bleu_is_sacrebleus_with_the_tokeniser_of_the_references(
    metrics: dict[str, Any], references: list[str], tokenize: str
) -> None:
    predictions = [r[: len(r) // 2 + 3] + " the cat sat" for r in references]
    result = metrics["bleu"].compute(predictions=predictions, references=references)
    expected = sacrebleu.BLEU(tokenize=tokenize)
    assert result["score"] == expected.corpus_score(predictions, [references]).score
    assert 0 < result["score"] < 100
    assert result["signature"] == str(expected.get_signature())
    assert f"tok:{tokenize}" in result["signature"]


def test_the_item_statistics_of_bleu_add_up_to_its_score(metrics: dict[str, Any]) -> None:
    predictions, references = pairs(2, 60)
    result = metrics["bleu"].compute(predictions=predictions, references=references)
    assert corpus_score(np.array(result["items"], dtype=np.float64)) == pytest.approx(result["score"])
    assert np.array(result["items"]).shape == (60, 10)


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("Paris", "paris", 1.0),
        ("  Paris \n", "Paris", 1.0),
        ("New  York", "new york", 1.0),
        ("Paris.", "Paris", 1.0),
        ("巴黎。", "巴黎", 1.0),
        ("１２３", "123", 1.0),
        ("STRASSE", "straße", 1.0),
        ("Paris!", "Paris", 0.0),
        ("Paris, France", "Paris", 0.0),
        ("3.14", "314", 0.0),
        ("newyork", "new york", 0.0),
        ("", "Paris", 0.0),
        ("-1", "1", 0.0),
    ],
)
def test_exact_match_folds_spelling_and_nothing_else(
    metrics: dict[str, Any], prediction: str, reference: str, match: float
) -> None:
    result = metrics["exact_match"].compute(predictions=[prediction], references=[reference])
    assert result["items"] == [match]


def test_every_metric_scores_every_item_and_signs_it(metrics: dict[str, Any]) -> None:
    predictions, references = pairs(3, 30)
    for metric in metrics.values():
        result = metric.compute(predictions=predictions, references=references)
        columns = result["items"].values() if isinstance(result["items"], dict) else [result["items"]]
        assert {len(column) for column in columns} == {30}
        assert result["signature"]
