"""Scores of a test set from scores of its items, their bootstrap intervals, and paired comparisons of two systems.

An item's score is one number for accuracy and ROUGE (the set's score is their mean) and ten for BLEU, whose corpus
score is not a mean. Two systems are compared on the same resamples, so what an easy or hard item does to both cancels
out.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

METRICS = ("accuracy", "bleu", "rouge1", "rouge2", "rougeL")
CONFIDENCE = 0.95
Groups = NDArray[Any]  # (N,) the group that each item belongs to
Items = NDArray[np.float64]  # (N,) for accuracy and ROUGE, (N, 10) for BLEU; NaN: the item does not count


@dataclass(frozen=True)
class Score:
    """BLEU 0–100, the others 0–1, with the 95 % percentile interval of the bootstrap."""

    score: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def metric_items(items: pa.Table, metric: str) -> Items:
    """One metric's item scores as numbers, (N,) or for BLEU (N, 10); NaN where an item does not count."""
    values = items.column(metric).to_pylist()
    return np.array([float("nan") if v is None else v for v in values], dtype=np.float64)


def group_of(items: pa.Table) -> Groups:
    """The group of each item, (N,)."""
    return np.array(items.column("group").to_pylist(), dtype=object)


def corpus_score(items: Items) -> float:
    """The score of a whole set of items; NaN for an empty one."""
    items = _counting(items)
    return float(_scores(np.ones((1, len(items))), items)[0]) if len(items) else float("nan")


def bootstrap(items: Items, resamples: int, seed: int, groups: Groups | None = None) -> Score:
    """Score and percentile interval (Efron 1979; for BLEU as in Koehn 2004) over `resamples` draws.

    Items of one group (questions about one thing) succeed and fail together, so groups are drawn, not items; without
    `groups` each item is one. Drawing items made 29 % false promotions of 5 in a simulation with 40 groups of 10.
    """
    groups = _counting_groups(items, groups)
    items = _counting(items)
    if not len(items):
        return Score(float("nan"), float("nan"), float("nan"))
    scores = _scores(_draws(groups, resamples, seed), items)
    low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(corpus_score(items), float(low), float(high))


def paired_difference(
    candidate: Items, champion: Items, resamples: int, seed: int, groups: Groups | None = None
) -> Score:
    """Candidate minus champion on the same items: the difference and its 95 % interval over paired draws of groups.

    Raises:
        ValueError: the two do not score the same items.
    """
    if candidate.shape != champion.shape or (_missing(candidate) != _missing(champion)).any():
        raise ValueError(f"the systems score different items: {candidate.shape} and {champion.shape}")
    groups = _counting_groups(candidate, groups)
    candidate, champion = _counting(candidate), _counting(champion)
    if not len(candidate):
        return Score(float("nan"), float("nan"), float("nan"))
    draws = _draws(groups, resamples, seed)
    differences = _scores(draws, candidate) - _scores(draws, champion)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(corpus_score(candidate) - corpus_score(champion), float(low), float(high))


def _missing(items: Items) -> NDArray[np.bool_]:
    missing: NDArray[np.bool_] = np.isnan(items if items.ndim == 1 else items[:, 0])
    return missing


def _counting(items: Items) -> Items:
    return items[~_missing(items)]


def num_groups(items: Items, groups: Groups | None = None) -> int:
    """How many independent groups of items count."""
    return len(np.unique(_counting_groups(items, groups)))


def _counting_groups(items: Items, groups: Groups | None) -> Groups:
    everyone = np.arange(len(items)) if groups is None else groups
    return everyone[~_missing(items)]


def _draws(groups: Groups, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each item is drawn, (resamples, items): as often as its group is."""
    _, member = np.unique(groups, return_inverse=True)
    number = int(member.max()) + 1
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), resamples)
    return draws[:, member].astype(np.float64)


def _scores(draws: NDArray[np.float64], items: Items) -> NDArray[np.float64]:
    """The set's score under each draw, (resamples,)."""
    sums = draws @ items
    return sums / draws.sum(axis=1) if items.ndim == 1 else _bleu(sums)


def _bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """sacrebleu's corpus BLEU (order 4, exponential smoothing) from summed statistics (R, 10), for all R at once."""
    length, reference, correct, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    zeros = (correct == 0) & (total > 0)
    smoothing = 2.0 ** np.cumsum(zeros, axis=1)  # the k-th order without a match counts as 1/2^k matches
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(zeros, 1 / (smoothing * total), correct / total)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        score = 100 * brevity * np.exp(np.log(precision).mean(axis=1))
    return np.where((correct.sum(axis=1) == 0) | (total == 0).any(axis=1), 0.0, np.nan_to_num(score))
