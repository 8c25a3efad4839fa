"""The gate's rule: both systems' scores of the same items in, one row a gating metric and a decision out.

The candidate must be superior on the primary metric and not inferior on every guard metric, each by a paired test,
after Holm's correction. What is seen clearly is decided on any test set; where it is not, and a test set of this size
would miss the declared effect too often, nothing is decided and the number of rows that would do is said.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.params import PromoteParams
from pipeline.registry.significance import ALPHA, POWER, binary_test, corpus_test, holm, power, rows_factor
from pipeline.scoring.resampling import (
    BINARY,
    LOWER_IS_BETTER,
    Groups,
    Items,
    corpus_score,
    group_of,
    metric_items,
    num_groups,
    require_same_items,
    resampled_differences,
)

RESAMPLES = 2000
MIN_GROUPS = 20  # independent test items (or groups of them) below which nothing is decided
# metric → candidate, champion, difference, low, high, margin, items, groups, needed, test, p, p_adjusted, power,
# verdict (passed | failed | open | unmeasured | uninformative), passed; the primary metric's row also has the whole
# gate's gate_power and gate_rows
Comparison = dict[str, Any]


class UnmeasuredError(RuntimeError):
    """No test item counts for the primary metric."""


@dataclass(frozen=True)
class Claim:
    """What has to be shown of one metric: the true difference is above `bound`."""

    metric: str
    candidate: Items
    champion: Items
    groups: Groups
    bound: float
    declared: float  # the true difference at which it should be shown
    needed: str
    margin: float | None  # None: the primary metric
    sign: int = 1  # -1: lower scores are better
    kind: str = ""  # the metric as statistics knows it, where that is another name


def claims_on(ours: pa.Table, theirs: pa.Table, params: PromoteParams) -> list[Claim]:
    """The primary metric's claim, then the guards', over two tables of the same items."""
    margins = {m: margin for m, margin in params.guard_metrics.items() if m != params.primary_metric}
    groups = group_of(ours)

    def claim(metric: str, bound: float, declared: float, needed: str, margin: float | None) -> Claim:
        a, b = metric_items(ours, metric), metric_items(theirs, metric)
        sign = -1 if metric in LOWER_IS_BETTER else 1
        return Claim(metric, a, b, groups, bound, declared, needed, margin, sign)

    best, metric = params.min_improvement, params.primary_metric
    falls = metric in LOWER_IS_BETTER
    primary = claim(metric, best, params.declared_effect, f"{'less than -' if falls else 'more than '}{best:g}", None)
    return [primary, *(claim(m, -margin, 0.0, _within(m, margin), margin) for m, margin in margins.items())]


def forgetting_claims(before: pa.Table, after: pa.Table, params: PromoteParams) -> list[Claim]:
    """The claims that the candidate lost no more of the general set than `max_forgetting`, against its own base."""
    claims, groups = [], group_of(after)
    for metric, limit in params.max_forgetting.items():
        old, new = metric_items(before, metric), metric_items(after, metric)
        if np.isnan(corpus_score(old)):
            continue  # a set without answers to be right about has a perplexity only
        falls = metric in LOWER_IS_BETTER
        margin = limit * corpus_score(old) if falls else limit
        needed = _within(metric, float(f"{margin:.3g}"))
        claims.append(
            Claim(f"general_{metric}", new, old, groups, -margin, 0.0, needed, margin, -1 if falls else 1, metric)
        )
    return claims


def _within(metric: str, margin: float) -> str:
    return f"at most +{margin:g}" if metric in LOWER_IS_BETTER else f"at least -{margin:g}"


def compare_claims(claims: list[Claim], seed: int, resamples: int = RESAMPLES) -> Comparison:
    """The row of each claim; the first claim is the primary metric's.

    Raises:
        UnmeasuredError: no item counts for the primary metric.
        ValueError: the systems score different items.
    """
    rows: Comparison = {}
    measured = []
    for claim in claims:
        require_same_items(claim.candidate, claim.champion)
        scores = corpus_score(claim.candidate), corpus_score(claim.champion)
        if claim.margin is None:
            if math.isnan(scores[0]):
                raise UnmeasuredError(
                    f"promote.primary_metric is {claim.metric}, but no test item counts for it; choose another"
                )
        elif math.isnan(scores[0]) or scores == (0.0, 0.0):
            rows[claim.metric] = _untested(claim, *scores)
            continue
        rows[claim.metric] = {}
        measured.append(claim)
    tested, drawn = [], []
    for claim in measured:
        first, second = (claim.candidate, claim.champion)[:: claim.sign]  # so that more is better
        differences = resampled_differences(first, second, claim.groups, resamples, seed)
        drawn.append(differences)
        if (claim.kind or claim.metric) in BINARY:
            tested.append(binary_test(first, second, claim.groups, claim.bound))
        else:
            tested.append(corpus_test(first, second, claim.groups, claim.bound, differences, seed))
    everything = np.stack(drawn, axis=1)
    errors = [test.error for test in tested]
    distances = [claim.declared - claim.bound for claim in measured]
    adjusted = holm([test.p for test in tested])
    for i, (claim, test, p) in enumerate(zip(measured, tested, adjusted, strict=True)):
        independent = num_groups(claim.candidate, claim.groups)
        verdict = "passed" if p <= ALPHA else "failed" if test.high < claim.declared else "open"
        needed = claim.needed
        if independent < MIN_GROUPS and claim.margin is None:
            verdict = "open"  # an interval over a handful of items is narrower than the truth
            needed = f"at least {MIN_GROUPS} independent test items, there are {independent}"
        candidate, champion = corpus_score(claim.candidate), corpus_score(claim.champion)
        low, high = sorted((claim.sign * test.low, claim.sign * test.high))
        rows[claim.metric] = {
            "candidate": candidate,
            "champion": champion,
            "difference": candidate - champion,
            "low": low,
            "high": high,
            "margin": claim.margin,
            "items": num_groups(claim.candidate),  # each item its own group
            "groups": independent,
            "needed": needed,
            "test": test.test,
            "p": test.p,
            "p_adjusted": p,
            "power": power(everything[:, i : i + 1], errors[i : i + 1], distances[i : i + 1]),
            "verdict": verdict,
            "passed": verdict == "passed",
        }
    primary = rows[claims[0].metric]
    primary["gate_power"] = power(everything, errors, distances)
    items = max(rows[claim.metric]["items"] for claim in measured if not claim.kind)  # of the test split
    factor = max(rows_factor(everything, errors, distances), MIN_GROUPS / primary["groups"])
    primary["gate_rows"] = None if math.isinf(factor) else math.ceil(round(factor * items, 6))
    primary["declared"] = claims[0].declared
    return rows


def _untested(claim: Claim, candidate: float, champion: float) -> dict[str, Any]:
    """The row of a guard that guards nothing: no item counts for it, or both systems score 0 everywhere."""
    row: dict[str, Any] = dict.fromkeys(("candidate", "champion", "difference", "low", "high", "p", "p_adjusted"))
    verdict = "unmeasured"
    if not math.isnan(candidate):
        verdict = "uninformative"
        row |= {"candidate": candidate, "champion": champion, "difference": 0.0, "low": 0.0, "high": 0.0}
    row |= {"power": None, "margin": claim.margin, "needed": claim.needed, "test": None}
    groups = num_groups(claim.candidate, claim.groups)
    return row | {"items": num_groups(claim.candidate), "groups": groups, "verdict": verdict, "passed": None}


def decision_on(comparison: Comparison) -> str:
    """promoted, refused or undecided.

    A test that rejects errs with the same small probability on any number of items, so what was shown is a decision
    without a look at the power, and so is what the interval excludes. Power counts where nothing was shown.
    """
    verdicts = [row["verdict"] for row in comparison.values()]
    primary = next(iter(comparison.values()))
    if "failed" in verdicts:
        return "refused"
    if "open" not in verdicts:
        return "promoted"
    enough = primary["gate_power"] >= POWER and primary["groups"] >= MIN_GROUPS
    return "refused" if enough else "undecided"


def refusals(comparison: Comparison) -> list[str]:
    """The metrics on which what the gate asks for was not shown."""
    return [metric for metric, row in comparison.items() if row["passed"] is False]
