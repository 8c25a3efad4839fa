"""Paired significance tests of two systems on the same test items: item scores in, one-sided p-values out.

The null hypothesis is always "the candidate's score minus the champion's is at most `bound`". Items of one group are
resampled together, so only groups count as independent. Also here: Holm's correction, and the power of several tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.scoring.resampling import BLOCK, CONFIDENCE, Array, Groups, Items, group_sums, set_scores

ALPHA = (1 - CONFIDENCE) / 2  # one-sided: what lies above the lower end of the 95 % interval
POWER = 0.8
Z = NormalDist().inv_cdf(1 - ALPHA)
MOST_ROWS = 10_000  # the largest answer of `rows_factor`, as a multiple of the present test set


@dataclass(frozen=True)
class TestResult:
    """The result of one test. `low` and `high` are the 95 % interval of the difference."""

    test: str
    p: float
    low: float
    high: float
    error: float  # standard error of the difference, for the power


def corpus_test(
    candidate: Items, champion: Items, groups: Groups, bound: float, differences: Array, seed: int
) -> TestResult:
    """Paired bootstrap (Koehn 2004) and approximate randomisation (Riezler and Maxwell 2005); the larger p counts.

    With few groups the bootstrap alone gives p-values that are too small; randomisation is exact there if `bound` is
    0. For another bound its distribution is shifted by it.
    """
    differences = differences[~np.isnan(differences)]
    low, high = np.quantile(differences, [ALPHA, 1 - ALPHA])
    number = len(differences)
    below = (1 + int((differences <= bound).sum())) / (1 + number)
    ours, theirs = group_sums(candidate, groups), group_sums(champion, groups)
    observed = float(set_scores(ours.sum(axis=0)[None])[0] - set_scores(theirs.sum(axis=0)[None])[0])
    exchanged = exchanged_differences(ours, theirs, number, seed)
    # Sums in another order differ in the last bit, but a tie must count as a tie.
    tolerance = 1e-9 * max(1.0, abs(observed))
    beyond = (1 + int((exchanged >= observed - bound - tolerance).sum())) / (1 + number)
    error = float(differences.std())
    return TestResult("bootstrap and randomisation", max(below, beyond), float(low), float(high), error)


def exchanged_differences(ours: Array, theirs: Array, number: int, seed: int) -> Array:
    """Differences after each group's answers were swapped between the systems, or not, at random: (number,)."""
    draw = np.random.default_rng([seed, 1])
    total, gap = ours.sum(axis=0) + theirs.sum(axis=0), ours - theirs
    differences = []
    block = max(1, BLOCK // len(ours))
    for start in range(0, number, block):
        sides = draw.integers(0, 2, (min(block, number - start), len(ours)), dtype=np.int8)
        first = theirs.sum(axis=0) + sides.astype(np.float64) @ gap
        second = total - first
        differences.append(set_scores(first) - set_scores(second))
    return np.concatenate(differences)


def binary_test(candidate: Items, champion: Items, groups: Groups, bound: float) -> TestResult:
    """For items that are right or wrong: McNemar's exact test if `bound` is 0, else Tango's score test (1998).

    McNemar's is an exact randomisation over groups; with single items it is the binomial test. Tango's test takes into
    account that a few items without a difference prove little; a bootstrap's interval would have no width then. Its
    counts are divided by the design effect of the groups.
    """
    counts = ~np.isnan(candidate)
    candidate, champion, groups = candidate[counts], champion[counts], groups[counts]
    change = candidate - champion
    _, member = np.unique(groups, return_inverse=True)
    net = np.bincount(member, weights=change).astype(np.float64)
    effect = design_effect(change, member)
    better, worse, number = ((change > 0).sum() / effect, (change < 0).sum() / effect, len(change) / effect)
    low, high = _score_interval(better, worse, number)
    error = max(score_test(better, worse, number, value)[1] for value in (bound, 0.0))
    if bound == 0.0:
        return TestResult("exact McNemar", mcnemar(net), low, high, error)
    z, _ = score_test(better, worse, number, bound)
    return TestResult("score test of paired proportions", NormalDist().cdf(-z), low, high, error)


def mcnemar(net: Array) -> float:
    """The exact probability of such a result, or a better one, if each group's net change has either sign by chance.

    `net`: right answers gained minus those lost, for each group. For single items this is McNemar's binomial test.
    """
    sizes, times = np.unique(np.abs(np.rint(net[net != 0])).astype(int), return_counts=True)
    distribution = np.ones(1)  # of the sum of |net| over the groups that favour the candidate
    for size, number in zip(sizes, times, strict=True):
        part = np.zeros(size * number + 1)
        part[::size] = _binomial(int(number))
        distribution = np.convolve(distribution, part)
    reached = round((float(net.sum()) + float(np.abs(net).sum())) / 2)
    return float(min(1.0, distribution[reached:].sum()))


def _binomial(number: int) -> Array:
    """Probabilities of 0 … number heads of a fair coin."""
    logs = [math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) for k in range(number + 1)]
    probabilities: Array = np.exp(np.array(logs) - number * math.log(2))
    return probabilities


def score_test(better: float, worse: float, number: float, bound: float) -> tuple[float, float]:
    """Tango's score statistic for a paired difference of proportions against `bound`, and its standard error."""
    linear = -better - worse + (2 * number - better + worse) * bound
    constant = -worse * bound * (1 - bound)
    share = (math.sqrt(max(0.0, linear**2 - 8 * number * constant)) - linear) / (4 * number)
    error = math.sqrt(max(0.0, number * (2 * share + bound * (1 - bound)))) / number
    distance = (better - worse) / number - bound
    return (distance / error if error else math.copysign(math.inf, distance) if distance else 0.0), error


def _score_interval(better: float, worse: float, number: float) -> tuple[float, float]:
    """The lowest and the highest bound that Tango's two-sided test does not reject at 5 %, by bisection."""

    def end(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            rejected = abs(score_test(better, worse, number, middle)[0]) > Z
            inside, outside = (inside, middle) if rejected else (middle, outside)
        return inside

    observed = (better - worse) / number
    return end(observed, -1.0), end(observed, 1.0)


def design_effect(change: Array, member: NDArray[np.intp]) -> float:
    """How many items of these groups are worth one independent item (Kish 1965); at least 1.

    If no item changed, the dependence cannot be estimated, and each group counts as one item.
    """
    deviation = change - change.mean()
    of_items = float((deviation**2).sum())
    of_groups = float((np.bincount(member, weights=deviation) ** 2).sum())
    return max(1.0, of_groups / of_items) if of_items else len(change) / (int(member.max()) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: compared with α each, they keep the risk of any false positive at most α."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def power(differences: Array, errors: Sequence[float], distances: Sequence[float], times: float = 1.0) -> float:
    """Probability that every test rejects, after Holm, on a test set `times` as large as this one.

    Args:
        differences: the metrics' resampled differences (R, M) from the same draws, so that they correlate.
        errors: the standard error of each difference.
        distances: for each test, the assumed true difference minus the bound.
    """
    noise = np.nan_to_num(differences - np.nanmean(differences, axis=0))
    spread = noise.std(axis=0)
    standard = np.random.default_rng(0).standard_normal(noise.shape)  # for metrics on which no item differs
    noise = np.divide(noise, spread, out=standard, where=spread > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.sqrt(times) * np.array(distances) / np.array(errors)
    reached = np.sort(noise + shift, axis=1)[:, ::-1]  # the most significant first
    metrics = reached.shape[1]
    needed = np.array([NormalDist().inv_cdf(1 - ALPHA / (metrics - rank)) for rank in range(metrics)])
    return float((reached > needed).all(axis=1).mean())


def rows_factor(differences: Array, errors: Sequence[float], distances: Sequence[float]) -> float:
    """How many times as large a test set must be for `POWER`; infinite if `MOST_ROWS` times is not enough."""
    low, high = 0.0, math.log(MOST_ROWS)
    if power(differences, errors, distances, MOST_ROWS) < POWER:
        return math.inf
    if power(differences, errors, distances) >= POWER:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = power(differences, errors, distances, math.exp(middle)) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return math.exp(high)
