"""Candidate against champion: both systems' scores of the same frozen test items in, one row a gating metric out.

The numbers are those of the merged models that would serve. Scores that a version was published with count only if test
split, decoding, metric signatures and library versions are today's; else the version is fetched and scored again.
Items that the champion may have been trained on are not compared on.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.files import read_json
from pipeline.params import PromoteParams
from pipeline.registry.gate import CompareError, Comparison, claims_on, compare_claims, forgetting_claims
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.rescore import merged_items

BASE = "the base model"


class UnfairError(CompareError):
    """The champion was trained on rows that are test rows now; a candidate is refused for it."""


def compare(
    model: RegisteredModel, candidate: Manifest, serving: str | None, params: PromoteParams
) -> tuple[Comparison, list[str]]:
    """Each gating metric's row, and notes that a reader of the numbers needs.

    Without a champion the base model that the candidate was tuned from stands in. What each row says, and when a metric
    passes, is in `gate`. `passed` is None for a guard metric that no test item counts for.

    Raises:
        UnfairError: the champion was trained on some of the test items.
        CompareError: the systems answered different items, or no item counts for the primary metric.
        SignatureError: one has to be loaded to be scored, and publish.require_signature does not let it.
    """
    notes: list[str] = []
    if serving is None:
        ours = merged_items(model, candidate, candidate["evaluation"])
        theirs = pq.read_table(model.fetch(candidate, "evaluation") / "items.base.parquet")
    else:
        champion = read_manifest(model.store, serving)
        if champion is None:
            raise CompareError(f"the champion {serving} is no longer in {model.store.uri}; restore its manifest")
        notes += _split_notes(candidate, champion)
        settings = settings_of(candidate, model.root)
        ours, theirs = (merged_items(model, manifest, settings) for manifest in (candidate, champion))
    if ours.column("id").to_pylist() != theirs.column("id").to_pylist():
        raise CompareError("candidate and champion answered different test items; run `retune run` to score both again")
    general = []
    if "evaluation/general.json" in candidate["files"]:
        folder = model.fetch(candidate, "evaluation")
        before, after = (pq.read_table(folder / f"general.{system}.parquet") for system in ("base", "adapter"))
        general = forgetting_claims(before, after, params)
    rows = compare_claims([*claims_on(ours, theirs, params), *general], params.seed)
    return rows, notes + [_guards_nothing(metric, row) for metric, row in rows.items() if row["passed"] is None]


def _guards_nothing(metric: str, row: dict[str, Any]) -> str:
    if row["items"]:
        return f"{metric} guards nothing here: both score 0 on all {row['items']:,} test items that count for it"
    return f"{metric} guards nothing here: no test item counts for it"


def _split_notes(candidate: Manifest, champion: Manifest) -> list[str]:
    """What differing splits mean for the comparison.

    A row's place is fixed by its group, and the test split is the places below `test_fraction`: a smaller one holds
    only rows that were test rows before, a larger one also rows that the champion was trained on.
    """
    if champion["evaluation"]["test_sha256"] == candidate["evaluation"]["test_sha256"]:
        return []
    ours, theirs = (manifest["params"]["prepare"]["test_fraction"] for manifest in (candidate, champion))
    if ours > theirs:
        raise UnfairError(
            f"prepare.test_fraction is {ours:g}, and was {theirs:g} for the champion {champion['version']}: it was "
            "trained on rows that are test rows now, so its scores on them would be too high. Set the fraction back, "
            "or promote by hand: `retune promote VERSION --force --reason …`"
        )
    if ours < theirs:
        return [f"the test split is a part of the champion's: prepare.test_fraction {ours:g} instead of {theirs:g}"]
    return ["the test split is not the champion's (rows or their preparation changed); the champion was scored again"]


def settings_of(candidate: Manifest, root: Path) -> dict[str, Any]:
    """How both are scored, and on which test items: as the workspace's artifacts were; without any, as the candidate.

    A fresh clone has no artifacts, and needs none to compare versions that were scored alike.
    """
    proof = root / "artifacts" / "parity" / "parity.json"
    settings: dict[str, Any] = read_json(proof)["evaluation"] if proof.is_file() else candidate["evaluation"]
    return settings
