"""The gate's rule: from both systems' scores of the same items to a verdict on each gating metric, and a decision.

The candidate must be superior on the primary metric and not inferior on every guard metric, each by a paired test,
after Holm's correction. A clear result is decided on any test set. An open one is refused if this test set had enough
power to show the declared effect; otherwise the gate is undecided, and says how many rows are enough.
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
    bound: float  # of a guard: minus its margin
    declared: float = 0.0  # the true difference at which it should be shown; of a guard 0

    @property
    def is_guard(self) -> bool:
        return self.declared == 0.0

    @property
    def sign(self) -> int:
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def needed(self) -> str:
        if self.is_guard:
            return f"{'at least -' if self.sign > 0 else 'at most +'}{-self.bound:.3g}"
        return f"{'more than ' if self.sign > 0 else 'less than -'}{self.bound:g}"


def claims_on(ours: pa.Table, theirs: pa.Table, params: PromoteParams) -> list[Claim]:
    """The primary metric's claim, then the guards', over two tables of the same items."""
    margins = {metric: margin for metric, margin in params.guard_metrics.items() if metric != params.primary_metric}
    bounds = {params.primary_metric: params.min_improvement} | {metric: -margin for metric, margin in margins.items()}
    return [
        Claim(
            metric,
            metric,
            metric_items(ours, metric),
            metric_items(theirs, metric),
            group_of(ours),
            bound,
            params.declared_effect if metric == params.primary_metric else 0.0,
        )
        for metric, bound in bounds.items()
    ]


def forgetting_claims(before: pa.Table, after: pa.Table, params: PromoteParams) -> list[Claim]:
    """The claims that the candidate lost no more of the general set than `max_forgetting`, against its own base."""
    claims, groups = [], group_of(after)
    for metric, limit in params.max_forgetting.items():
        old, new = metric_items(before, metric), metric_items(after, metric)
        if np.isnan(corpus_score(old)):
            continue  # a set without answers to be right about has a perplexity only
        margin = limit * corpus_score(old) if metric in LOWER_IS_BETTER else limit
        claims.append(Claim(f"general_{metric}", metric, new, old, groups, -margin))
    return claims


def compare_claims(claims: list[Claim], seed: int, resamples: int = RESAMPLES) -> Comparison:
    """The row of each claim; the first claim is the primary metric's."""
    rows: Comparison = {claim.name: _untested(claim) for claim in claims}
    primary = rows[claims[0].name]
    if primary["verdict"] == "unmeasured":
        raise CompareError(
            f"promote.primary_metric is {claims[0].metric}, but no test item counts for it; choose another"
        )
    measured = [claim for claim in claims if rows[claim.name]["verdict"] == "open"]
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
        row = rows[claim.name]
        row["low"], row["high"] = sorted((claim.sign * test.low, claim.sign * test.high))
        row |= {"test": test.test, "p": test.p, "p_adjusted": p}
        row["power"] = power(differences[:, i : i + 1], errors[i : i + 1], distances[i : i + 1])
        row["verdict"] = "passed" if p <= ALPHA else "failed" if test.high < claim.declared else "open"
        if row["groups"] < MIN_GROUPS and not claim.is_guard:
            row["verdict"] = "open"  # an interval over a handful of items is narrower than the truth
            row["needed"] = f"at least {MIN_GROUPS} independent test items, there are {row['groups']}"
        row["passed"] = row["verdict"] == "passed"
    items = max(rows[claim.name]["items"] for claim in measured if claim.name == claim.metric)  # of the test split
    factor = max(rows_factor(differences, errors, distances), MIN_GROUPS / primary["groups"])
    primary["gate_power"] = power(differences, errors, distances)
    primary["gate_rows"] = None if math.isinf(factor) else math.ceil(round(factor * items, 6))
    primary["declared"] = claims[0].declared
    return rows


def _untested(claim: Claim) -> dict[str, Any]:
    """A claim's row before its test; the final row of a guard without counting items, or on which both score 0."""
    require_same_items(claim.candidate, claim.champion)
    candidate, champion = corpus_score(claim.candidate), corpus_score(claim.champion)
    scores: dict[str, Any] = {"candidate": candidate, "champion": champion, "difference": candidate - champion}
    scores |= {"low": 0.0, "high": 0.0}
    verdict = "uninformative" if claim.is_guard and candidate == champion == 0.0 else "open"
    if math.isnan(candidate):
        scores, verdict = dict.fromkeys(scores), "unmeasured"
    return scores | {
        "margin": -claim.bound if claim.is_guard else None,
        "items": num_groups(claim.candidate),  # of which each is its own group
        "groups": num_groups(claim.candidate, claim.groups),
        "needed": claim.needed,
        **dict.fromkeys(("test", "p", "p_adjusted", "power", "passed")),
        "verdict": verdict,
    }


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
