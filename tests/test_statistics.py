"""Scores, intervals and paired comparisons, checked with sacrebleu and on simulated data."""

import random

import numpy as np
import pyarrow as pa
import pytest
import sacrebleu

from pipeline.scoring.resampling import Items, Score, bootstrap_metrics, corpus_score, metric_items, paired_difference

WORDS = ["the", "a", "red", "blue", "box", "stands", "on", "under", "table", "house", ".", ","]


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, longest)))


def corpus(seed: int) -> tuple[list[str], list[str]]:
    """Predictions and references that share much, little or nothing; some too short for 4-grams, some empty."""
    draw = random.Random(seed)
    longest, overlap = draw.choice([2, 4, 12]), draw.choice([0.0, 0.5, 1.0])
    predictions, references = [], []
    for _ in range(draw.randint(1, 8)):
        reference = sentence(draw, longest)
        words = [word if draw.random() < overlap else "x" for word in reference.split()]
        predictions.append(" ".join(words[draw.choice([0, 0, len(words) // 2]) :] + sentence(draw, 1).split()))
        references.append(reference)
    return predictions, references


def bleu_items(predictions: list[str], references: list[str]) -> Items:
    bleu = sacrebleu.BLEU(effective_order=True)
    scores = [bleu.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64)


def system(seed: int, items: int, quality: float) -> Items:
    return (np.random.default_rng(seed).random(items) < quality).astype(np.float64)


def bootstrap(items: Items, resamples: int, seed: int) -> Score:
    score = bootstrap_metrics({"": items}, np.arange(len(items)), resamples, seed)[""]
    assert score is not None
    return score


def test_bleu_from_item_statistics_is_sacrebleus_corpus_score() -> None:
    for seed in range(100):
        predictions, references = corpus(seed)
        items = bleu_items(predictions, references)
        drawn = random.Random(seed).choices(range(len(items)), k=len(items))
        resampled = [predictions[i] for i in drawn], [[references[i] for i in drawn]]
        expected = sacrebleu.BLEU().corpus_score(*resampled).score
        assert corpus_score(items[drawn]) == pytest.approx(expected, abs=1e-9), f"seed {seed}"


def test_each_resample_is_scored_as_if_it_were_the_test_set() -> None:
    items = np.concatenate([bleu_items(*corpus(seed)) for seed in range(20)])
    score = bootstrap(items, 400, seed=3)
    draw = np.random.default_rng(3).multinomial(len(items), np.full(len(items), 1 / len(items)), 400)
    scores = [corpus_score(np.repeat(items, counts, axis=0)) for counts in draw]
    assert (score["low"], score["high"]) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_the_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    covered = [
        (s := bootstrap(system(seed, items=150, quality=0.6), 300, seed))["low"] <= 0.6 <= s["high"]
        for seed in range(300)
    ]
    assert 0.91 <= np.mean(covered) <= 0.98


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


@pytest.mark.parametrize("items", [system(0, 100, 0.5), bleu_items(*corpus(7))], ids=["mean", "bleu"])
def test_a_system_never_differs_from_itself(items: Items) -> None:
    assert paired_difference(items, items.copy(), 500, seed=0) == {"score": 0.0, "low": 0.0, "high": 0.0}


def test_pairing_cancels_the_effect_of_hard_items() -> None:
    hardness = np.random.default_rng(0).random(200)
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
