"""The gate's rule: both systems' scores of the same items in; out come a verdict on each gating metric, and a decision.

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
from pipeline.registry.significance import ALPHA, POWER, Tested, binary_test, corpus_test, holm, power, rows_factor
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
# verdict on this metric (passed | failed | open | unmeasured | uninformative), passed; the primary metric's row also
# has the whole gate's gate_power and gate_rows
Comparison = dict[str, Any]


class CompareError(RuntimeError):
    """No comparison can be made; the message says why and what can be done."""


@dataclass(frozen=True)
class Claim:
    """What has to be shown of one metric: the true difference is above `bound`."""

    name: str  # in the comparison; that of another set than the test split begins with "general_"
    metric: str
    candidate: Items
    champion: Items
    groups: Groups
    bound: float
    declared: float  # the true difference at which it should be shown
    needed: str
    margin: float | None  # None: the primary metric

    @property
    def sign(self) -> int:
        return -1 if self.metric in LOWER_IS_BETTER else 1


def claims_on(ours: pa.Table, theirs: pa.Table, params: PromoteParams) -> list[Claim]:
    """The primary metric's claim, then the guards', over two tables of the same items."""
    metric, least, groups = params.primary_metric, params.min_improvement, group_of(ours)
    needed = f"{'less than -' if metric in LOWER_IS_BETTER else 'more than '}{least:g}"
    systems = metric_items(ours, metric), metric_items(theirs, metric)
    primary = Claim(metric, metric, *systems, groups, least, params.declared_effect, needed, None)
    guards = [
        _guard(guard, guard, metric_items(ours, guard), metric_items(theirs, guard), groups, margin)
        for guard, margin in params.guard_metrics.items()
        if guard != metric
    ]
    return [primary, *guards]


def forgetting_claims(before: pa.Table, after: pa.Table, params: PromoteParams) -> list[Claim]:
    """The claims that the candidate lost no more of the general set than `max_forgetting`, against its own base."""
    claims, groups = [], group_of(after)
    for metric, limit in params.max_forgetting.items():
        old, new = metric_items(before, metric), metric_items(after, metric)
        if np.isnan(corpus_score(old)):
            continue  # a set without answers to be right about has a perplexity only
        margin = limit * corpus_score(old) if metric in LOWER_IS_BETTER else limit
        claims.append(_guard(f"general_{metric}", metric, new, old, groups, margin))
    return claims


def _guard(name: str, metric: str, candidate: Items, champion: Items, groups: Groups, margin: float) -> Claim:
    needed = f"{'at most +' if metric in LOWER_IS_BETTER else 'at least -'}{margin:.3g}"
    return Claim(name, metric, candidate, champion, groups, -margin, 0.0, needed, margin)


def compare_claims(claims: list[Claim], seed: int, resamples: int = RESAMPLES) -> Comparison:
    """The row of each claim; the first claim is the primary metric's."""
    rows: Comparison = {}
    measured = []
    for claim in claims:
        require_same_items(claim.candidate, claim.champion)
        scores = corpus_score(claim.candidate), corpus_score(claim.champion)
        if claim.margin is None and math.isnan(scores[0]):
            raise CompareError(
                f"promote.primary_metric is {claim.metric}, but no test item counts for it; choose another"
            )
        if claim.margin is not None and (math.isnan(scores[0]) or scores == (0.0, 0.0)):
            rows[claim.name] = _untested(claim, scores[0])
        else:
            rows[claim.name] = {}
            measured.append(claim)
    tested, drawn = [], []
    for claim in measured:
        first, second = (claim.candidate, claim.champion)[:: claim.sign]  # so that more is better
        drawn.append(resampled_differences(first, second, claim.groups, resamples, seed))
        if claim.metric in BINARY:
            tested.append(binary_test(first, second, claim.groups, claim.bound))
        else:
            tested.append(corpus_test(first, second, claim.groups, claim.bound, drawn[-1], seed))
    differences = np.stack(drawn, axis=1)
    errors = [test.error for test in tested]
    distances = [claim.declared - claim.bound for claim in measured]
    adjusted = holm([test.p for test in tested])
    for i, (claim, test, p) in enumerate(zip(measured, tested, adjusted, strict=True)):
        row = _row(claim, test, p)
        row["power"] = power(differences[:, i : i + 1], errors[i : i + 1], distances[i : i + 1])
        rows[claim.name] = row
    primary = rows[claims[0].name]
    primary["gate_power"] = power(differences, errors, distances)
    items = max(rows[claim.name]["items"] for claim in measured if claim.name == claim.metric)  # of the test split
    factor = max(rows_factor(differences, errors, distances), MIN_GROUPS / primary["groups"])
    primary["gate_rows"] = None if math.isinf(factor) else math.ceil(round(factor * items, 6))
    primary["declared"] = claims[0].declared
    return rows


def _row(claim: Claim, test: Tested, p: float) -> dict[str, Any]:
    """What was tested of one claim; `p` is corrected for all of them."""
    size, needed = _size(claim), claim.needed
    verdict = "passed" if p <= ALPHA else "failed" if test.high < claim.declared else "open"
    if size["groups"] < MIN_GROUPS and claim.margin is None:
        verdict = "open"  # an interval over a handful of items is narrower than the truth
        needed = f"at least {MIN_GROUPS} independent test items, there are {size['groups']}"
    candidate, champion = corpus_score(claim.candidate), corpus_score(claim.champion)
    low, high = sorted((claim.sign * test.low, claim.sign * test.high))
    return size | {
        "candidate": candidate,
        "champion": champion,
        "difference": candidate - champion,
        "low": low,
        "high": high,
        "needed": needed,
        "test": test.test,
        "p": test.p,
        "p_adjusted": p,
        "verdict": verdict,
        "passed": verdict == "passed",
    }


def _untested(claim: Claim, score: float) -> dict[str, Any]:
    """The row of a guard that guards nothing: no item counts for it, or both systems score 0 everywhere."""
    counts = not math.isnan(score)
    scores = dict.fromkeys(("candidate", "champion", "difference", "low", "high"), 0.0 if counts else None)
    tests = dict.fromkeys(("test", "p", "p_adjusted", "power", "passed"))
    verdict = "uninformative" if counts else "unmeasured"
    return scores | tests | _size(claim) | {"needed": claim.needed, "verdict": verdict}


def _size(claim: Claim) -> dict[str, Any]:
    """What a row says of the claim's margin and items; of `items` each is its own group."""
    groups = num_groups(claim.candidate, claim.groups)
    return {"margin": claim.margin, "items": num_groups(claim.candidate), "groups": groups}


def decide(comparison: Comparison) -> str:
    """The decision on a version, from the verdicts on its metrics: promoted, refused or undecided.

    Refused if a metric failed, promoted if all passed. What is still open is refused on a test set that would have
    shown the declared effect with a probability of POWER; a smaller one leaves it undecided.
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
