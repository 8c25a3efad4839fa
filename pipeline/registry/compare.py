"""Compares candidate and champion: their scores on the same frozen test items become one row per gating metric.

The scores are those of the merged models, which serve. A version's published scores count only if test split, decoding,
metric signatures and library versions are today's; otherwise the version is fetched and scored again. If the champion
was trained on rows that are test rows now, nothing is compared, and the candidate is refused.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import read_json, write_json
from pipeline.core.processes import environment, python_ending_with_parent
from pipeline.params import PromoteParams
from pipeline.registry.gate import CompareError, Comparison, claims_on, compare_claims, forgetting_claims
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.scoring.resampling import corpus_score, metric_items

BASE = "the base model"


class UnfairError(CompareError):
    """The champion was trained on rows that are test rows now; a candidate is refused for it."""


def compare(
    model: RegisteredModel, candidate: Manifest, serving: str | None, params: PromoteParams
) -> tuple[Comparison, list[str]]:
    """Each gating metric's row, as `gate` has them, and notes that a reader of the numbers needs.

    Without a champion the base model that the candidate was tuned from stands in.

    Raises:
        UnfairError: the champion was trained on some of the test items.
        CompareError: the systems answered different items, or no item counts for the primary metric.
        SignatureError: one has to be loaded to be scored, and publish.require_signature does not let it.
    """
    notes: list[str] = []
    settings = settings_of(candidate, serving, model.root)
    if serving is None:
        theirs = pq.read_table(model.fetch(candidate, "evaluation") / "items.base.parquet")
    else:
        champion = read_manifest(model.store, serving)
        if champion is None:
            raise CompareError(f"the champion {serving} is no longer in {model.store.uri}; restore its manifest")
        notes += _split_notes(candidate, champion)
        theirs = merged_items(model, champion, settings)
    ours = merged_items(model, candidate, settings)
    if ours.column("id").to_pylist() != theirs.column("id").to_pylist():
        raise CompareError("candidate and champion answered different test items; run `retune run` to score both again")
    claims = claims_on(ours, theirs, params)
    if "evaluation/general.json" in candidate["files"]:
        folder = model.fetch(candidate, "evaluation")
        before, after = (pq.read_table(folder / f"general.{system}.parquet") for system in ("base", "adapter"))
        claims += forgetting_claims(before, after, params)
    rows = compare_claims(claims, params.seed)
    for metric, row in rows.items():
        if row["passed"] is None:
            zero = f"both score 0 on all {row['items']:,} test items that count"
            notes.append(f"{metric} guards nothing here: {zero if row['items'] else 'no test item counts'} for it")
    return rows, notes


def settings_of(candidate: Manifest, serving: str | None, root: Path) -> dict[str, Any]:
    """How both are scored, and on which test items: as the workspace's artifacts were; without any, as the candidate.

    A fresh clone has no artifacts, and needs none to compare versions that were scored alike. Against the base model
    it is always as the candidate was: the base's answers were published with it.
    """
    proof = root / "artifacts" / "parity" / "parity.json"
    settings: dict[str, Any] = candidate["evaluation"]
    return read_json(proof)["evaluation"] if serving is not None and proof.is_file() else settings


def merged_items(
    model: RegisteredModel, manifest: Manifest, settings: dict[str, Any], may_score: bool = True
) -> pa.Table:
    """The merged model's scores on the test split of `settings`; measured again where it was published otherwise.

    Raises:
        CompareError: it cannot be scored here, or its metrics are not computed as `settings` say.
        SignatureError: it has to be loaded, and publish.require_signature does not let it.
    """
    if manifest["evaluation"] == settings:
        return pq.read_table(model.fetch(manifest, "parity") / "items.merged.parquet")
    version = manifest["version"]
    scored = model.folder(version) / "scored"
    if not (scored / "evaluation.json").is_file() or read_json(scored / "evaluation.json") != settings:
        if not may_score:
            raise CompareError("its answers to these test items are not here")
        dataset = model.root / "artifacts" / "dataset" / "report.json"
        if not dataset.is_file() or read_json(dataset)["test_sha256"] != settings["test_sha256"]:
            raise CompareError(
                f"version {version} was scored on other test items or otherwise, and the test items to score it on "
                "are not here; `dvc repro prepare` makes them, `dvc pull` fetches all artifacts"
            )
        _score(model, manifest, settings, scored)
    signatures = read_json(scored / "evaluation.json")["signatures"]
    for metric, ours in settings["signatures"].items():
        if signatures.get(metric) != ours:
            raise CompareError(
                f"{metric} is to be scored as {ours}, and that of version {version} was scored as "
                f"{signatures.get(metric)}: such scores are not compared. `retune run` scores the candidate anew"
            )
    return pq.read_table(scored / "items.parquet")


def score_today(model: RegisteredModel, manifest: Manifest, metric: str) -> float:
    """`metric` of the version's merged model on the prepared test split, decoded as when it was published; it raises
    what `merged_items` does, and CompareError where no test item counts for the metric.
    """
    test_sha256 = read_json(model.root / "artifacts" / "dataset" / "report.json")["test_sha256"]
    items = merged_items(model, manifest, manifest["evaluation"] | {"test_sha256": test_sha256})
    score = corpus_score(metric_items(items, metric))
    if math.isnan(score):
        raise CompareError(f"no item of today's test split counts for {metric}")
    return score


def _score(model: RegisteredModel, manifest: Manifest, settings: dict[str, Any], output: Path) -> None:
    """Score the version's merged model on the workspace's test split, in a process of its own: its memory is returned
    when it ends.
    """
    merged = model.fetch_signed(manifest, "merged")
    with tempfile.TemporaryDirectory(dir=merged.parent) as folder:  # another process may score it with other settings
        path = Path(folder) / "settings.json"
        write_json(path, settings)
        paths = [str(each.resolve()) for each in (merged, path, output)]
        command = python_ending_with_parent("pipeline", "score", paths[0], "--settings", paths[1], "--output", paths[2])
        ran = subprocess.run(command, cwd=model.root, env=environment(), stdout=sys.stderr)
    if ran.returncode != 0:
        raise CompareError(f"version {manifest['version']} could not be scored on today's test split")


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
