"""The gate: turns two systems' scores of the same items into a verdict on each gating metric, and a decision.

The candidate must be superior on the primary metric and not inferior on every guard metric, each by a paired test,
after Holm's correction. A clear result decides on any test set. After an open one the candidate is refused if the test
set had enough power to show the declared effect; otherwise the gate is undecided, and says how many rows are enough.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.params import PromoteParams
from pipeline.registry.significance import ALPHA, POWER, binary_test, corpus_test, holm, power, rows_factor
from pipeline.scoring import resampling
from pipeline.scoring.resampling import Groups, Items

BASE = "the base model"  # as what a candidate is compared with
RESAMPLES = 2000
MIN_GROUPS = 20  # with fewer independent test items (or groups of items) nothing is decided
# metric → candidate, champion, difference, low, high, margin, items, groups, needed, test, p, p_adjusted, power,
# verdict (passed | failed | open | unmeasured | uninformative), passed. The primary metric's row also has the power of
# the whole gate and the number of rows that it needs (gate_power, gate_rows).
Comparison = dict[str, Any]


class CompareError(RuntimeError):
    """No comparison can be made; the message says why and what can be done."""


@dataclass(frozen=True)
class Claim:
    """What must be shown for one metric: the true difference is above `bound`."""

    name: str  # key in the comparison: the metric, after "general_" if it is measured on the general set
    metric: str
    candidate: Items
    champion: Items
    groups: Groups
    bound: float  # for a guard: minus its margin
    declared: float = 0.0  # the true difference that the test should be able to show; for a guard 0

    @property
    def is_guard(self) -> bool:
        return self.declared == 0.0

    @property
    def sign(self) -> int:
        return -1 if self.metric in resampling.LOWER_IS_BETTER else 1

    @property
    def needed(self) -> str:
        if self.is_guard:
            return f"{'at least -' if self.sign > 0 else 'at most +'}{-self.bound:.3g}"
        return f"{'more' if self.sign > 0 else 'less'} than {self.sign * self.bound:zg}"


def claims_on(candidate: pa.Table, champion: pa.Table, params: PromoteParams) -> list[Claim]:
    """The claims of the primary metric and then of the guards; both tables have the same items."""
    groups = resampling.group_of(candidate)

    def claim(metric: str, bound: float, declared: float = 0.0) -> Claim:
        items = resampling.metric_items(candidate, metric), resampling.metric_items(champion, metric)
        return Claim(metric, metric, *items, groups, bound, declared)

    primary = params.primary_metric
    guards = [claim(metric, -margin) for metric, margin in params.guard_metrics.items() if metric != primary]
    return [claim(primary, params.min_improvement, params.declared_effect), *guards]


def forgetting_claims(base: pa.Table, candidate: pa.Table, params: PromoteParams) -> list[Claim]:
    """The claims that the candidate is at most `max_forgetting` worse on the general set than its own base model."""
    claims, groups = [], resampling.group_of(candidate)
    for metric, limit in params.max_forgetting.items():
        old, new = resampling.metric_items(base, metric), resampling.metric_items(candidate, metric)
        if np.isnan(resampling.corpus_score(old)):
            continue  # no row of the set has one right answer, so it has no accuracy
        margin = limit * resampling.corpus_score(old) if metric in resampling.RELATIVE else limit
        claims.append(Claim(f"general_{metric}", metric, new, old, groups, -margin))
    return claims


def compare_claims(claims: list[Claim], seed: int, resamples: int = RESAMPLES) -> Comparison:
    """The row of each claim; the first claim is the primary metric's."""
    rows: Comparison = {claim.name: _untested(claim) for claim in claims}
    primary = rows[claims[0].name]
    if primary["verdict"] == "unmeasured":
        raise CompareError(f"no test item counts for promote.primary_metric {claims[0].metric}; choose another")
    measured = [claim for claim in claims if rows[claim.name]["verdict"] == "open"]
    tests, resampled = [], []
    for claim in measured:
        first, second = (claim.candidate, claim.champion)[:: claim.sign]  # swapped if lower is better
        resampled.append(resampling.resampled_differences(first, second, claim.groups, resamples, seed))
        if claim.metric in resampling.BINARY:
            tests.append(binary_test(first, second, claim.groups, claim.bound))
        else:
            tests.append(corpus_test(first, second, claim.groups, claim.bound, resampled[-1], seed))
    differences = np.stack(resampled, axis=1)
    errors = [test.error for test in tests]
    distances = [claim.declared - claim.bound for claim in measured]
    adjusted = holm([test.p for test in tests])
    for i, (claim, test, p) in enumerate(zip(measured, tests, adjusted, strict=True)):
        row = rows[claim.name]
        row["low"], row["high"] = sorted((claim.sign * test.low, claim.sign * test.high))
        row |= {"test": test.test, "p": test.p, "p_adjusted": p}
        row["power"] = power(differences[:, i : i + 1], errors[i : i + 1], distances[i : i + 1])
        row["verdict"] = "passed" if p <= ALPHA else "failed" if test.high < claim.declared else "open"
        if row["groups"] < MIN_GROUPS and not claim.is_guard:
            row["verdict"] = "open"  # the interval of so few items is too narrow to be trusted
            row["needed"] = f"at least {MIN_GROUPS} independent test items, there are {row['groups']}"
        row["passed"] = row["verdict"] == "passed"
    items = max(rows[claim.name]["items"] for claim in measured if claim.name == claim.metric)  # of the test split
    factor = max(rows_factor(differences, errors, distances), MIN_GROUPS / primary["groups"])
    primary["gate_power"] = power(differences, errors, distances)
    primary["gate_rows"] = None if math.isinf(factor) else math.ceil(round(factor * items, 6))
    primary["declared"] = claims[0].declared
    return rows


def _untested(claim: Claim) -> dict[str, Any]:
    """A claim's row before its test. It is final if no item counts, or if both score 0 on a guard."""
    resampling.require_same_items(claim.candidate, claim.champion)
    candidate, champion = resampling.corpus_score(claim.candidate), resampling.corpus_score(claim.champion)
    scores: dict[str, Any] = {"candidate": candidate, "champion": champion, "difference": candidate - champion}
    scores |= {"low": 0.0, "high": 0.0}
    verdict = "uninformative" if claim.is_guard and candidate == champion == 0.0 else "open"
    if math.isnan(candidate):
        scores, verdict = dict.fromkeys(scores), "unmeasured"
    return scores | {
        "margin": -claim.bound if claim.is_guard else None,
        "items": resampling.num_counted(claim.candidate),
        "groups": resampling.num_groups(claim.candidate, claim.groups),
        "needed": claim.needed,
        **dict.fromkeys(("test", "p", "p_adjusted", "power", "passed")),
        "verdict": verdict,
    }


def decide(comparison: Comparison) -> str:
    """promoted, refused or undecided; an open metric refuses if POWER was enough to show the declared effect."""
    verdicts = [row["verdict"] for row in comparison.values()]
    primary = next(iter(comparison.values()))
    if "failed" in verdicts:
        return "refused"
    if "open" not in verdicts:
        return "promoted"
    enough = primary["gate_power"] >= POWER and primary["groups"] >= MIN_GROUPS
    return "refused" if enough else "undecided"
