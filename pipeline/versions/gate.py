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
from pipeline.statistics import (
    BINARY,
    LOWER_IS_BETTER,
    PERCENT,
    Groups,
    Items,
    corpus_score,
    group_of,
    metric_items,
    num_groups,
    require_same_items,
    resampled_differences,
)
from pipeline.versions.significance import ALPHA, POWER, binary_test, corpus_test, holm, power, rows_factor

RESAMPLES = 2000
MIN_GROUPS = 20  # independent test items (or groups of them) below which nothing is decided
COLUMNS = ("metric", "candidate", "champion", "difference", "95 % CI", "needed", "p (Holm)", "verdict")
WORDS = {"passed": "passed", "failed": "refused", "open": "not shown", "unmeasured": "not measured"}
# metric → candidate, champion, difference, low, high, margin, items, groups, needed, test, p, p_adjusted, power,
# verdict (a key of WORDS), passed; the primary metric's row also has the whole gate's gate_power and gate_rows
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
        if corpus_score(claim.candidate) != corpus_score(claim.candidate):  # NaN
            if claim.margin is None:
                raise UnmeasuredError(
                    f"promote.primary_metric is {claim.metric}, but no test item counts for it; choose another"
                )
            empty = dict.fromkeys(("candidate", "champion", "difference", "low", "high", "p", "p_adjusted", "power"))
            rows[claim.metric] = empty | {"margin": claim.margin, "items": 0, "groups": 0, "needed": claim.needed}
            rows[claim.metric] |= {"test": None, "verdict": "unmeasured", "passed": None}
        else:
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


def reason(comparison: Comparison, against: str) -> str:
    """The decision in a sentence: the primary metric's numbers, or those of every metric in the way, and why."""
    made = decision_on(comparison)
    metric, primary = next(iter(comparison.items()))
    if made == "promoted":
        number = _format(metric)
        return (
            f"{_scores(metric, primary)} of {against} on {primary['items']} test items (difference "
            f"{number(primary['difference'], '+')}, 95 % CI {_interval(metric, primary)}, p {_p(primary)})"
        )
    parts: list[str] = []
    refused = any(row["verdict"] == "failed" for row in comparison.values())
    for metric, row in comparison.items():
        if row["verdict"] != ("failed" if refused else "open"):
            continue
        first = not parts
        numbers = f"{'95 % CI ' if first else ''}{_interval(metric, row)}, needed {row['needed']}, p {_p(row)}"
        parts.append(f"{_scores(metric, row)}{f' of {against}' if first else ''} ({numbers})")
    numbers = "; ".join(parts)
    if refused:
        return numbers
    rows = primary["gate_rows"]
    would = "no number of rows would do with these margins" if rows is None else f"about {rows:,} would do"
    seen = (
        f"a candidate {primary['declared']:g} better and no worse on the guards passes with a probability of "
        f"{primary['gate_power']:.2f} on {primary['items']:,} test items"
    )
    return f"{numbers}; {seen}" + ("" if made == "refused" else f", {POWER:g} is needed: {would}")


def verdict_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The comparison as text, one dictionary with `COLUMNS` as keys for each metric."""
    rows = []
    for metric, row in comparison.items():
        number = _format(metric)
        measured = row["items"] > 0
        cells = [
            number(row["candidate"]) if measured else "–",
            number(row["champion"]) if measured else "–",
            number(row["difference"], "+") if measured else "–",
            _interval(metric, row) if measured else "–",
            row["needed"],
            _p(row) if measured else "–",
            WORDS[verdict_of(row)],
        ]
        rows.append(dict(zip(COLUMNS, [metric, *cells], strict=True)))
    return rows


def verdict_of(row: dict[str, Any]) -> str:
    """A key of `WORDS`. Records of the log from before the tests know only whether a metric passed."""
    return str(row.get("verdict") or {True: "passed", False: "failed", None: "unmeasured"}[row["passed"]])


def _scores(metric: str, row: dict[str, Any]) -> str:
    number = _format(metric)
    return f"{metric} {number(row['candidate'])} against {number(row['champion'])}"


def _interval(metric: str, row: dict[str, Any]) -> str:
    number = _format(metric)
    return f"{number(row['low'], '+')} to {number(row['high'], '+')}"


def _p(row: dict[str, Any]) -> str:
    p = row.get("p_adjusted")
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _format(metric: str) -> Any:
    digits = 1 if metric in PERCENT else 3
    return lambda value, sign="": f"{value:{sign}.{digits}f}"
