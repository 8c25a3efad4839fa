"""Scores, their intervals and paired comparisons, against sacrebleu and against what is known to be true."""

import random

import numpy as np
import pyarrow as pa
import pytest
import sacrebleu

from pipeline.scoring.resampling import Items, Score, bootstrap, corpus_score, metric_items, paired_difference

WORDS = ["the", "a", "red", "blue", "box", "stands", "on", "under", "table", "house", ".", ","]


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, longest)))


def corpus(seed: int) -> tuple[list[str], list[str]]:
    """Pairs that share much, little or nothing, some too short for 4-grams, some empty."""
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


def test_bleu_from_item_statistics_is_sacrebleus_corpus_score() -> None:
    for seed in range(300):
        predictions, references = corpus(seed)
        items = bleu_items(predictions, references)
        drawn = random.Random(seed).choices(range(len(items)), k=len(items))
        resampled = [predictions[i] for i in drawn], [[references[i] for i in drawn]]
        expected = sacrebleu.BLEU().corpus_score(*resampled).score
        assert corpus_score(items[drawn]) == pytest.approx(expected, abs=1e-9), f"seed {seed}"


def test_the_random_corpora_reach_every_case_of_bleu() -> None:
    scores = [corpus_score(bleu_items(*corpus(seed))) for seed in range(300)]
    smoothed = sum(
        bool(((sums := bleu_items(*corpus(seed)).sum(axis=0))[2:6] == 0).any() and sums[2] > 0 and sums[9] > 0)
        for seed in range(300)
    )
    assert scores.count(0.0) > 20
    assert sum(score > 50 for score in scores) > 20
    assert smoothed > 20


def test_each_resample_is_scored_as_if_it_were_the_test_set() -> None:
    items = np.concatenate([bleu_items(*corpus(seed)) for seed in range(20)])
    whole = bootstrap(items, 400, seed=3)
    draw = np.random.default_rng(3).multinomial(len(items), np.full(len(items), 1 / len(items)), 400)
    scores = [corpus_score(np.repeat(items, counts, axis=0)) for counts in draw]
    assert (whole.low, whole.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_the_score_of_a_mean_metric_is_the_mean() -> None:
    items = np.random.default_rng(0).random(50)
    assert corpus_score(items) == pytest.approx(items.mean())
    assert bootstrap(items, 200, seed=0).score == pytest.approx(items.mean())


@pytest.mark.parametrize("seed", range(20))
def test_the_interval_contains_the_score(seed: int) -> None:
    items = system(seed, items=5 + 10 * seed, quality=0.7)
    score = bootstrap(items, 300, seed)
    assert score.low - 1e-9 <= score.score <= score.high + 1e-9


def test_the_interval_narrows_as_the_square_root_of_the_items() -> None:
    widths = [(s := bootstrap(system(1, items, 0.5), 1000, seed=1)).high - s.low for items in (100, 400, 1600)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = [
        (s := bootstrap(system(seed, items=150, quality=0.6), 300, seed)).low <= 0.6 <= s.high for seed in range(300)
    ]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    items = np.random.default_rng(0).random(40)
    assert bootstrap(items, 200, seed=1) == bootstrap(items, 200, seed=1)
    assert bootstrap(items, 200, seed=1) != bootstrap(items, 200, seed=2)


def test_items_that_do_not_count_change_nothing() -> None:
    table = pa.table({"accuracy": pa.array([1.0, None, 0.0, 1.0, None])})
    items = metric_items(table, "accuracy")
    counting = np.array([1.0, 0.0, 1.0])
    assert corpus_score(items) == corpus_score(counting) == pytest.approx(2 / 3)
    assert bootstrap(items, 200, seed=0) == bootstrap(counting, 200, seed=0)
    other = np.array([0.0, np.nan, 0.0, 1.0, np.nan])
    expected = paired_difference(counting, np.array([0.0, 0.0, 1.0]), 200, seed=0)
    assert paired_difference(items, other, 200, seed=0) == expected


def test_no_counting_item_gives_no_number() -> None:
    nothing = np.array([np.nan, np.nan])
    assert np.isnan(corpus_score(nothing))
    for score in (bootstrap(nothing, 100, 0), paired_difference(nothing, nothing, 100, 0)):
        assert np.isnan([score.score, score.low, score.high]).all()


def test_bleu_statistics_of_a_table_keep_their_ten_numbers() -> None:
    items = bleu_items(*corpus(5))
    assert (metric_items(pa.table({"bleu": items.tolist()}), "bleu") == items).all()


@pytest.mark.parametrize("items", [system(0, 100, 0.5), bleu_items(*corpus(7))], ids=["mean", "bleu"])
def test_a_system_never_differs_from_itself(items: Items) -> None:
    assert paired_difference(items, items.copy(), 500, seed=0) == Score(0.0, 0.0, 0.0)


def test_the_difference_turns_with_the_order_of_the_systems() -> None:
    a, b = system(1, 200, 0.7), system(2, 200, 0.5)
    one, other = paired_difference(a, b, 300, seed=0), paired_difference(b, a, 300, seed=0)
    assert (one.score, one.low, one.high) == pytest.approx((-other.score, -other.high, -other.low))
    assert one.low > 0


def test_pairing_cancels_what_hard_items_do_to_both() -> None:
    hardness = np.random.default_rng(0).random(200)
    better = paired_difference(hardness + 0.01, hardness, 300, seed=0)
    assert (better.low, better.high) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones(3), np.ones(4)),
        (np.ones(3), np.ones((3, 10))),
        (np.array([1.0, np.nan]), np.array([np.nan, 1.0])),
    ],
)
def test_systems_that_scored_different_items_are_not_compared(a: Items, b: Items) -> None:
    with pytest.raises(ValueError, match="different items"):
        paired_difference(a, b, 100, seed=0)


def test_equally_good_systems_are_rarely_called_better() -> None:
    better = [
        paired_difference(system(2 * seed, 100, 0.6), system(2 * seed + 1, 100, 0.6), 400, seed).low > 0
        for seed in range(400)
    ]
    assert np.mean(better) <= 0.05


def test_a_clearly_better_system_is_mostly_called_better() -> None:
    better = [
        paired_difference(system(2 * seed, 200, 0.75), system(2 * seed + 1, 200, 0.55), 300, seed).low > 0
        for seed in range(50)
    ]
    assert np.mean(better) >= 0.9


def test_items_that_succeed_together_count_as_one() -> None:
    seed = 3
    draw = np.random.default_rng(seed)
    wins = 0
    for simulation in range(200):
        groups = np.repeat(np.arange(40), 10)
        ours, theirs = (np.repeat(draw.random(40) < 0.5, 10).astype(float) for _ in range(2))
        wins += paired_difference(ours, theirs, 300, simulation, groups).low > 0
    assert wins <= 200 * 0.05 + 8, f"{wins} of 200 equal systems were called better (seed {seed})"


def test_every_item_is_its_own_group_when_none_is_named() -> None:
    items = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert bootstrap(items, 200, 0) == bootstrap(items, 200, 0, np.array(["a", "b", "c", "d", "e"], dtype=object))
