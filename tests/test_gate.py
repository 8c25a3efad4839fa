"""The gate and its significance tests: known values, and error rates in simulations."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, with_

from pipeline.params import Params, PromoteParams
from pipeline.registry import gate
from pipeline.registry.significance import (
    ALPHA,
    binary_test,
    corpus_test,
    design_effect,
    exchanged_differences,
    holm,
    mcnemar,
    power,
    rows_factor,
    score_test,
)
from pipeline.scoring.resampling import group_sums, resampled_differences, set_scores
from pipeline.settings import load_params


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@dataclass(frozen=True)
class World:
    """Two systems with a true difference, and items in groups whose difficulty they share."""

    items: int
    gain: float = 0.0  # of the candidate, in expected item score
    group_size: int = 1

    def table(self, seed: int) -> tuple[pa.Table, pa.Table]:
        draw = np.random.default_rng(seed)
        groups = np.arange(self.items) // self.group_size
        number = int(groups[-1]) + 1
        ease = (0.35 + 0.3 * draw.random(number))[groups]
        # A system's knowledge is the same for all items of a group; the rest is noise of the item.
        systems = []
        for gain in (self.gain, 0.0):
            known = ease + 0.1 * draw.standard_normal(number)[groups] + gain
            scores = np.clip(known + 0.1 * draw.standard_normal(self.items), 0, 1)
            right = (draw.random(self.items) < known).astype(float)
            matches = np.stack([np.round(12 * scores**k) for k in (1, 1.5, 2, 2.5)], axis=1)
            bleu = np.concatenate([np.full((self.items, 2), 12.0), matches, np.full((self.items, 4), 12.0)], axis=1)
            columns: dict[str, Any] = {"group": groups.astype(str), "rougeL": scores, "accuracy": right}
            systems.append(pa.table(columns | {"bleu": bleu.tolist()}))
        return systems[0], systems[1]


def compare(world: World, seed: int, promote: PromoteParams, resamples: int = 400) -> gate.Comparison:
    candidate, champion = world.table(seed)
    return gate.compare_claims(gate.claims_on(candidate, champion, promote), seed, resamples)


def decisions(world: World, number: int, promote: PromoteParams, resamples: int = 400) -> list[str]:
    return [gate.decide(compare(world, seed, promote, resamples)) for seed in range(number)]


WIDE = {"guard_metrics": {"accuracy": 0.2, "bleu": 20.0}}  # margins so wide that only the primary metric errs


def all_signs(number: int) -> np.ndarray:
    return np.array(np.meshgrid(*[[-1, 1]] * number)).reshape(number, -1).T


def test_mcnemar_is_the_exact_randomisation_of_every_sign_and_of_single_items_the_binomial_tail() -> None:
    for net in ([3, -1, 2, 2, -4, 1, 0], [1] * 5, [1] * 3 + [-1] * 9, [0, 0]):
        expected = ((all_signs(len(net)) @ np.abs(net)) >= sum(net)).mean()
        assert mcnemar(np.array(net, dtype=float)) == pytest.approx(expected, rel=1e-12), net
    tail = sum(math.comb(101, k) for k in range(60, 102)) / 2**101
    assert mcnemar(np.array([1.0] * 60 + [-1.0] * 41 + [0.0] * 20)) == pytest.approx(tail, rel=1e-12)


def test_the_score_test_equals_mcnemars_for_bound_0_and_its_interval_tangos_published_one() -> None:
    assert score_test(14, 5, 100, 0.0)[0] == pytest.approx((14 - 5) / math.sqrt(14 + 5))
    result = binary_test(np.array([1.0] * 43 + [0.0]), np.ones(44), np.arange(44), 0.1)
    assert (result.low, result.high) == pytest.approx((-0.118, 0.060), abs=0.001)


def test_few_items_without_a_difference_do_not_prove_the_guard() -> None:
    few, many = (binary_test(np.ones(n), np.ones(n), np.arange(n), -0.05) for n in (25, 250))
    assert few.p > ALPHA > many.p
    bootstrapped = corpus_test(np.ones(25), np.ones(25), np.arange(25), -0.05, np.zeros(1000), seed=0)
    assert bootstrapped.p < ALPHA  # this is why items that are right or wrong have a test of their own


def test_dependent_items_count_less() -> None:
    change = np.repeat(np.array([1.0, -1.0, 1.0, 0.0, -1.0, 1.0]), 5)
    assert design_effect(change, np.arange(30)) == pytest.approx(1.0)
    assert design_effect(change, np.repeat(np.arange(6), 5)) == pytest.approx(5.0)
    candidate = np.repeat((np.arange(30) % 3 > 0).astype(float), 4)
    champion = np.repeat((np.arange(30) % 3 > 1).astype(float), 4)
    p_groups = binary_test(candidate, champion, np.repeat(np.arange(30), 4), 0.0).p
    assert p_groups > 100 * binary_test(candidate, champion, np.arange(120), 0.0).p
    assert p_groups == pytest.approx(0.5**10)
    grouped, single = (binary_test(candidate, champion, g, 0.2) for g in (np.repeat(np.arange(30), 4), np.arange(120)))
    assert grouped.p > 1.5 * single.p
    assert grouped.low < single.low


def test_holm_is_his_own_example_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_randomisation_of_few_groups_is_the_share_of_all_exchanges() -> None:
    ours, theirs = np.array([0.9, 0.8, 0.7, 0.9, 0.4, 0.8]), np.array([0.5, 0.6, 0.8, 0.3, 0.3, 0.5])
    gap, groups = ours - theirs, np.arange(6)
    exact = ((all_signs(6) * gap).sum(axis=1) >= gap.sum() - 1e-9).mean()
    drawn = exchanged_differences(group_sums(ours, groups), group_sums(theirs, groups), 20_000, seed=0)
    assert (drawn >= gap.mean() - 1e-9).mean() == pytest.approx(exact, abs=0.005)


def test_the_power_is_the_textbooks_for_one_metric() -> None:
    noise = np.random.default_rng(0).standard_normal((200_000, 1))
    # One-sided 2.5 %, standard error 1: a difference of 2.8016 is found with a probability of 0.8.
    assert power(noise, [1.0], [2.8016]) == pytest.approx(0.8, abs=0.003)
    assert power(noise, [1.0], [0.0]) == pytest.approx(ALPHA, abs=0.002)
    assert rows_factor(noise[:20_000], [2.0], [2.8016]) == pytest.approx(4.0, rel=0.03)
    assert rows_factor(noise[:2000], [1.0], [0.0]) == math.inf


def test_large_test_sets_are_resampled_in_blocks_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = np.random.default_rng(0).random((2, 300))
    groups = np.arange(300) // 3
    whole = resampled_differences(ours, theirs, groups, 50, seed=1)
    exchanged = exchanged_differences(group_sums(ours, groups), group_sums(theirs, groups), 50, seed=1)
    for module in ("pipeline.scoring.resampling", "pipeline.registry.significance"):
        monkeypatch.setattr(f"{module}.BLOCK", 700)
    assert resampled_differences(ours, theirs, groups, 50, seed=1) == pytest.approx(whole)
    sums = group_sums(ours, groups), group_sums(theirs, groups)
    assert exchanged_differences(*sums, 50, seed=1) == pytest.approx(exchanged)


def test_metrics_that_count_other_items_share_their_draws() -> None:
    scores, groups = np.random.default_rng(0).random(60), np.arange(60)
    some = scores.copy()
    some[::2] = np.nan
    zero = np.zeros(60)
    all_items = resampled_differences(scores, zero, groups, 300, seed=0)
    half = resampled_differences(some, np.where(np.isnan(some), np.nan, 0.0), groups, 300, seed=0)
    assert np.corrcoef(all_items, half)[0, 1] > 0.5
    assert set_scores(np.array([[0.0, 0.0]]))[0] != 0  # a draw without an item has no score


def test_a_clear_result_decides_even_with_little_power(params: Params) -> None:
    gain = compare(World(60, gain=0.3), 0, with_(params, promote={"declared_effect": 0.001}).promote)
    loss = compare(World(40, gain=-0.3), 0, params.promote)
    assert (gate.decide(gain), gate.decide(loss)) == ("promoted", "refused")
    assert gain["rougeL"]["gate_power"] < 0.2 and loss["rougeL"]["gate_power"] < 0.8
    assert gain["rougeL"]["p_adjusted"] == pytest.approx(0.005, abs=0.001)  # the smallest of 400 resamples


def test_with_too_few_items_the_gate_is_undecided_and_says_how_many_are_enough(params: Params) -> None:
    promote = with_(params, promote=WIDE).promote
    comparison = compare(World(60, gain=0.02), 5, promote)
    assert gate.decide(comparison) == "undecided"
    rows = comparison["rougeL"]["gate_rows"]
    assert 90 < rows < 300
    assert decisions(World(rows, gain=promote.declared_effect), 40, promote).count("promoted") > 0.6 * 40
    grouped = compare(World(190, gain=0.3, group_size=10), 0, params.promote)  # 19 groups
    assert (gate.decide(grouped), grouped["rougeL"]["groups"]) == ("undecided", 19)
    assert grouped["rougeL"]["needed"].startswith("at least 20") and grouped["rougeL"]["gate_rows"] >= 200


def test_no_gain_on_enough_items_is_refused(params: Params) -> None:
    comparisons = [compare(World(190, gain=0.02), seed, with_(params, promote=WIDE).promote) for seed in range(15)]
    open_ones = [c for c in comparisons if "open" in {row["verdict"] for row in c.values()}]
    powerful = [c for c in open_ones if c["rougeL"]["gate_power"] >= 0.8]
    assert {gate.decide(comparison) for comparison in powerful} == {"refused"}


def test_a_guard_on_which_both_score_0_is_uninformative(params: Params) -> None:
    candidate, champion = World(60, gain=0.3).table(0)
    zeros = [0.0] * 60

    def with_column(table: pa.Table, name: str, values: list[float]) -> pa.Table:
        return table.drop_columns(name).append_column(name, [pa.array(values)])

    def compare_zeros(name: str, candidate: pa.Table, accuracy: list[float]) -> gate.Comparison:
        zero_champion = with_column(with_column(champion, name, zeros), "accuracy", zeros)
        claims = gate.claims_on(with_column(candidate, "accuracy", accuracy), zero_champion, params.promote)
        return gate.compare_claims(claims, 0, 400)

    both = compare_zeros("accuracy", candidate, zeros)
    assert (both["accuracy"]["verdict"], both["accuracy"]["passed"]) == ("uninformative", None)
    assert (both["accuracy"]["items"], both["accuracy"]["p"]) == (60, None)
    assert gate.decide(both) == "promoted"  # 60 items that score 0 could never show "at most 0.05 worse"
    assert compare_zeros("accuracy", candidate, [1.0, *zeros[1:]])["accuracy"]["verdict"] != "uninformative"
    # The primary metric is not a guard.
    assert gate.decide(compare_zeros("rougeL", with_column(candidate, "rougeL", zeros), zeros)) != "promoted"


def test_a_lower_perplexity_is_better(params: Params) -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 30, 200).astype(float)
    worse = tokens * (1.5 + 0.1 * draw.random(200))
    columns = {"group": [str(i) for i in range(200)], "loss_tokens": tokens}
    high, low = (pa.table(columns | {"loss": loss}) for loss in (worse, worse - 0.1 * tokens))
    promote = with_(params, promote={"primary_metric": "perplexity", "guard_metrics": {}}).promote
    better = gate.compare_claims(gate.claims_on(low, high, promote), 0)
    assert gate.decide(better) == "promoted"
    assert better["perplexity"]["high"] < 0
    assert gate.decide(gate.compare_claims(gate.claims_on(high, low, promote), 0)) == "refused"
    guard = with_(params, promote={"primary_metric": "perplexity", "guard_metrics": {"perplexity": 0.1}}).promote
    assert [c.metric for c in gate.claims_on(low, high, guard)] == ["perplexity"]


def test_a_candidate_that_forgets_too_much_is_refused_despite_its_gain(params: Params) -> None:
    candidate, champion = World(300, gain=0.3).table(0)
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 30, 100).astype(float)
    columns = {"group": [str(i) for i in range(100)], "loss_tokens": tokens, "accuracy": pa.nulls(100, pa.float64())}
    before = pa.table(columns | {"loss": tokens * (2.0 + 0.1 * draw.random(100))})

    claims = gate.claims_on(candidate, champion, params.promote)

    def compare_after(rise: float) -> gate.Comparison:
        after = before.set_column(3, "loss", [pa.array(before["loss"].to_numpy() + rise * tokens)])
        return gate.compare_claims([*claims, *gate.forgetting_claims(before, after, params.promote)], 0)

    little, much = compare_after(0.01), compare_after(0.3)
    assert gate.decide(little) == "promoted"
    assert "general_accuracy" not in little  # no row of the set has one right answer
    assert much["rougeL"]["passed"]
    assert gate.decide(much) == "refused"
    assert much["general_perplexity"]["needed"].startswith("at most +0.7")
    columns = {"group": [str(i) for i in range(5000)], "loss_tokens": [9.0] * 5000, "accuracy": [None] * 5000}
    large = pa.table(columns | {"loss": [18.0 + i % 7 for i in range(5000)]})
    rows, rows_with_general = (
        gate.compare_claims([*claims, *others], 0)["rougeL"]["gate_rows"]
        for others in ([], gate.forgetting_claims(large, large, params.promote))
    )
    assert rows_with_general == pytest.approx(rows, rel=0.2)  # rows of the test split, not of the general set


def test_equal_systems_are_rarely_promoted_and_better_ones_mostly(params: Params) -> None:
    promote = with_(params, promote=WIDE).promote
    assert decisions(World(160, group_size=2), 100, promote, 300).count("promoted") <= 100 * 0.05
    assert decisions(World(400, gain=promote.declared_effect), 40, promote, 300).count("promoted") >= 40 * 0.8


@pytest.mark.faults
def test_of_1000_equal_pairs_at_most_5_percent_are_promoted(params: Params) -> None:
    for world in (World(160), World(200, group_size=5)):
        for promote in (params.promote, with_(params, promote=WIDE).promote):
            promoted = decisions(world, 1000, promote, 1000).count("promoted")
            assert promoted <= 50, f"{promoted} of 1000 equal pairs were promoted ({world}, {promote.guard_metrics})"


@pytest.mark.faults
def test_with_as_many_rows_as_the_gate_asks_for_the_declared_effect_is_found_4_times_in_5(params: Params) -> None:
    pilot = [compare(World(400, params.promote.declared_effect), seed, params.promote, 1000) for seed in range(20)]
    rows = int(np.median([comparison["rougeL"]["gate_rows"] for comparison in pilot]))
    promoted = decisions(World(rows, params.promote.declared_effect), 500, params.promote, 1000).count("promoted")
    assert promoted >= 0.8 * 500, f"{promoted} of 500 with {rows} rows"
