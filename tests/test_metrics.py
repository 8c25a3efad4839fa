"""Metrics compared with the libraries that they use; scores, intervals and paired comparisons on simulated data."""

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
from pipeline.scoring.resampling import Items, bootstrap_metrics, corpus_score, metric_items, paired_difference
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


WORDS = ["The", "cat's", "sat", "on_it", "C-3PO", "3.14", "A.B.", "x=1;", "a", "mat", ""]


def corpus(seed: int) -> tuple[list[str], list[str]]:
    """Predictions and references that share much, little or nothing; some too short for 4-grams, some empty."""
    draw = random.Random(seed)
    longest, overlap = draw.choice([2, 4, 12]), draw.choice([0.0, 0.5, 1.0])
    references = [draw.choices(WORDS, k=draw.randint(0, longest)) for _ in range(draw.randint(1, 8))]
    predictions = [[word if draw.random() < overlap else "x" for word in words] for words in references]
    return [" ".join(words[draw.choice([0, 0, 2]) :]) for words in predictions], list(map(" ".join, references))


def counts_of(metrics: dict[str, Any], name: str, seed: int) -> tuple[Items, list[str], list[str]]:
    predictions, references = corpus(seed)
    counts = metrics[name].compute(predictions=predictions, references=references)["items"]
    return np.array(counts, float), predictions, references


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_score_of_a_resample_follows_from_the_counts_of_its_items(metrics: dict[str, Any], name: str) -> None:
    library = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[name]()
    for seed in range(100):
        items, predictions, references = counts_of(metrics, name, seed)
        drawn = random.Random(seed).choices(range(len(items)), k=len(items))
        expected = library.corpus_score([predictions[i] for i in drawn], [[references[i] for i in drawn]])
        assert corpus_score(items[drawn]) == pytest.approx(expected.score, abs=1e-9), f"seed {seed}"


def test_each_resample_is_scored_as_if_it_were_the_test_set(metrics: dict[str, Any]) -> None:
    items = np.concatenate([counts_of(metrics, "bleu", seed)[0] for seed in range(20)])
    score = bootstrap_metrics({"": items}, np.arange(len(items)), 400, seed=3)[""]
    draw = np.random.default_rng(3).multinomial(len(items), np.full(len(items), 1 / len(items)), 400)
    scores = [corpus_score(np.repeat(items, counts, axis=0)) for counts in draw]
    assert score is not None
    assert (score["low"], score["high"]) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_the_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    covered = 0
    for seed in range(300):
        items = (np.random.default_rng(seed).random(150) < 0.6).astype(float)
        score = bootstrap_metrics({"": items}, np.arange(150), 300, seed)[""]
        covered += score is not None and score["low"] <= 0.6 <= score["high"]
    assert 0.91 <= covered / 300 <= 0.98


def test_items_that_do_not_count_change_nothing() -> None:
    table = pa.table({"accuracy": pa.array([1.0, None, 0.0, 1.0, None])})
    items = metric_items(table, "accuracy")
    counting = np.array([1.0, 0.0, 1.0])
    assert corpus_score(items) == corpus_score(counting) == pytest.approx(2 / 3)
    other = np.array([0.0, np.nan, 0.0, 1.0, np.nan])
    expected = paired_difference(counting, np.array([0.0, 0.0, 1.0]), 200, seed=0)
    assert paired_difference(items, other, 200, seed=0) == expected
    nothing = np.array([np.nan, np.nan])
    score = paired_difference(nothing, nothing, 100, 0)
    assert np.isnan(list(score.values())).all()
    assert bootstrap_metrics({"": nothing}, np.arange(2), 100, 0) == {"": None}


def test_a_system_never_differs_from_itself_and_pairing_cancels_the_effect_of_hard_items(
    metrics: dict[str, Any],
) -> None:
    hardness = np.random.default_rng(0).random(200)
    for items in (hardness, counts_of(metrics, "bleu", 7)[0]):
        assert paired_difference(items, items.copy(), 500, seed=0) == {"score": 0.0, "low": 0.0, "high": 0.0}
    better = paired_difference(hardness + 0.01, hardness, 300, seed=0)
    assert (better["low"], better["high"]) == pytest.approx((0.01, 0.01))


def test_systems_that_scored_different_items_are_not_compared() -> None:
    holes = np.array([1.0, np.nan])
    for a, b in ((np.ones(3), np.ones(4)), (np.ones(3), np.ones((3, 10))), (holes, holes[::-1])):
        with pytest.raises(ValueError, match=r"\(3,\)|\(2,\)"):
            paired_difference(a, b, 100, seed=0)


@pytest.mark.parametrize(
    ("group_size", "quality", "at_least", "at_most"),
    [(1, 0.5, 0.0, 0.05), (10, 0.5, 0.0, 0.09), (1, 0.9, 0.9, 1.0)],
    ids=["equal", "equal, in groups of ten", "better"],
)
def test_a_better_system_is_recognised_and_an_equal_one_rarely(
    group_size: int, quality: float, at_least: float, at_most: float
) -> None:
    draw = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), group_size)
    wins = 0
    for simulation in range(200):
        a, b = (np.repeat(draw.random(40) < right, group_size).astype(float) for right in (quality, 0.5))
        wins += paired_difference(a, b, 300, simulation, groups)["low"] > 0
    assert at_least <= wins / 200 <= at_most
