"""The local `evaluate` modules, loaded by path without a network, compared with the libraries they use."""

import math
import random
from typing import Any

import evaluate
import numpy as np
import pyarrow as pa
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from pipeline.scoring.items import METRICS_FILE
from pipeline.scoring.resampling import corpus_score, metric_items
from pipeline.scoring.text_metrics import tokeniser_for

ALL = ("exact_match", "bleu", "chrf", "rouge", "accuracy")


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return {name: evaluate.load(str(METRICS_FILE), name) for name in ALL}


def test_identical_sentences_of_any_script_get_the_highest_score(metrics: dict[str, Any]) -> None:
    texts = ["今天北京的天气很好。", "größer, Привет, ひらがな, 한국어"]
    for name in ("bleu", "chrf"):
        assert metrics[name].compute(predictions=texts, references=texts)["score"] == pytest.approx(100)
    rouge = metrics["rouge"].compute(predictions=texts, references=texts)["items"]
    assert rouge == {kind: [1.0, 1.0] for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")}


def test_exact_match_folds_spelling_and_nothing_else(metrics: dict[str, Any]) -> None:
    same = [("  New  York.\n", "new york"), ("巴黎。", "巴黎"), ("１２３", "123"), ("STRASSE", "straße")]
    other = [("Paris!", "Paris"), ("3.14", "314"), ("newyork", "new york"), ("", "Paris"), ("-1", "1")]
    predictions, references = zip(*same, *other, strict=True)
    result = metrics["exact_match"].compute(predictions=predictions, references=references)
    assert result["items"] == [1.0] * len(same) + [0.0] * len(other)


def test_the_tokeniser_follows_the_reference() -> None:
    texts = {
        "13a": ["Plain words.", "Größe, Привет, 한국어 문장", ""],
        "zh": ["He said 你好 twice.", "我爱北京", "这家店叫做优の良品，在台湾很有名。"],
        "char": ["東京タワーへ行きました。", "สวัสดีครับ"],
    }
    assert texts == {name: [text for text in some if tokeniser_for(text) == name] for name, some in texts.items()}


def test_an_items_score_does_not_depend_on_other_items(metrics: dict[str, Any]) -> None:
    texts = ["the cat sat on the mat", "我爱北京天安门", "東京へ行きます", "x = f(a_b); don't!"]
    others = ["the cat sat on a mat", "我爱上海天安门", "京都へ行きます", "x = f(b); do not!"]
    together = metrics["bleu"].compute(predictions=others, references=texts)
    alone = [metrics["bleu"].compute(predictions=[p], references=[r]) for p, r in zip(others, texts, strict=True)]
    assert together["items"] == [result["items"][0] for result in alone]
    assert "tok:13a+char+zh|" in together["signature"]


CASES = {
    "13a": (
        ["The cat's mat, 3.14 km-long; isn't it?", 'He said: "no".', "A\tB", ""],
        ["The cat is on 3.14 km mats, isn't it?", 'She said "no way".', "A B", "nothing"],
    ),
    "zh": (["我爱北京天安门。", "今天 weather 很好，3.14！"], ["我爱上海的天安门。", "今天的 weather 很好，2.14！"]),
    "char": (["東京へ行きます。", "これは English の本です。"], ["京都へ行きました。", "それは English 本です。"]),
}


@pytest.mark.parametrize("tokenize", CASES)
def test_bleu_and_chrf_equal_those_of_sacrebleu(tokenize: str, metrics: dict[str, Any]) -> None:
    predictions, references = CASES[tokenize]
    for name, library in (("bleu", sacrebleu.BLEU(tokenize=tokenize)), ("chrf", sacrebleu.CHRF())):
        result = metrics[name].compute(predictions=predictions, references=references)
        assert result["score"] == pytest.approx(library.corpus_score(predictions, [references]).score, abs=1e-12)
        assert result["signature"] == str(library.get_signature())
        assert 0 < result["score"] < 100


def test_rouge_equals_that_of_rouge_score(metrics: dict[str, Any]) -> None:
    draw = random.Random(4)
    words = ["the", "Cat", "on_it", "a", "mat", "it's", "3.14", "co-op", "C-3PO", "x=1;", "end.\n", "so,\n"]
    predictions, references = ([" ".join(draw.choices(words, k=draw.randint(3, 25))) for _ in range(40)] for _ in "ab")
    items = metrics["rouge"].compute(predictions=predictions, references=references)["items"]
    scorer = rouge_scorer.RougeScorer(list(items), use_stemmer=False)
    expected = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    for kind, scores in items.items():
        assert scores == [score[kind].fmeasure for score in expected]
    assert items["rougeL"] != items["rougeLsum"]


def test_rouge_lsum_takes_the_union_of_lins_example_in_chinese_sentences(metrics: dict[str, Any]) -> None:
    # Lin 2004, section 3.2, its two sentences exchanged: the union of the longest common subsequences is w1 w2 w3 w5,
    # its recall 4/5.
    items = metrics["rouge"].compute(predictions=["甲丙辛壬戊。甲乙己庚辛。"], references=["甲乙丙丁戊"])["items"]
    assert items["rougeLsum"] == [pytest.approx(2 * (4 / 5) * (4 / 10) / (4 / 5 + 4 / 10))]
    assert items["rougeL"][0] < items["rougeLsum"][0]


def test_accuracy_counts_exact_items_and_macro_f1_weights_classes_equally(metrics: dict[str, Any]) -> None:
    table = pa.table({"label": list("012012"), "predicted": list("021001")})
    # sklearn.metrics.f1_score, average="macro"
    assert corpus_score(metric_items(table, "macro_f1")) == pytest.approx(0.26666666666)
    # An answer that is not a class is only a miss.
    table = pa.table({"label": ["yes", "yes", "no"], "predicted": ["yes", "maybe", "no"]})
    assert corpus_score(metric_items(table, "macro_f1")) == pytest.approx((1 + 2 / 3) / 2)
    scoring = ["exact", "exact", "text"]
    result = metrics["accuracy"].compute(predictions=["a", "b", "c"], references=["A.", "x", "c"], scoring=scoring)
    assert (result["score"], result["items"]) == (0.5, [1.0, 0.0, None])


def test_perplexity_weights_tokens_and_not_items_equally() -> None:
    table = pa.table({"loss": [3.0, 1.0], "loss_tokens": [2, 6]})
    assert corpus_score(metric_items(table, "perplexity")) == pytest.approx(math.exp(4 / 8))


def test_the_score_of_a_resample_follows_from_the_counts_of_its_items(metrics: dict[str, Any]) -> None:
    draw = random.Random(5)
    words = ["The", "cat's", "sat", "on_it", "C-3PO", "3.14", "A.B.", "x=1;", ""]
    for number in range(1, 30):
        predictions, references = ([" ".join(draw.choices(words, k=9)) for _ in range(number)] for _ in "ab")
        items = np.array(metrics["chrf"].compute(predictions=predictions, references=references)["items"], float)
        chosen = draw.choices(range(number), k=number)
        expected = sacrebleu.CHRF().corpus_score([predictions[i] for i in chosen], [[references[i] for i in chosen]])
        assert corpus_score(items[chosen]) == pytest.approx(expected.score, abs=1e-9)
