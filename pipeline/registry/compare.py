"""Compares the merged models of candidate and champion on the same test items; gives one row per gating metric.

A version's published scores are used only if test split, decoding, metric signatures and library versions are the
current ones; otherwise the version is downloaded and scored again. If the champion was trained on rows that are test
rows now, nothing is compared, and the candidate is refused.
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

MANY_CUT_OFF = 0.05  # of the answers; more are worth a note


class UnfairError(CompareError):
    """The champion was trained on rows that are test rows now, so the candidate is refused."""


def compare(
    model: RegisteredModel, candidate: Manifest, serving: str | None, params: PromoteParams
) -> tuple[Comparison, list[str]]:
    """A row for each gating metric (see `gate.Comparison`), and notes that readers of the numbers need.

    Without a champion, the candidate is compared with its base model. Raises UnfairError, SignatureError, and
    CompareError: the systems answered different items, or no item counts for the primary metric.
    """
    notes: list[str] = []
    settings = scoring_settings(candidate, serving, model.root)
    if serving is None:
        champion_items = pq.read_table(model.fetch(candidate, "evaluation") / "items.base.parquet")
    else:
        champion = read_manifest(model.store, serving)
        if champion is None:
            raise CompareError(f"the champion {serving} is no longer in {model.store.uri}; restore its manifest")
        notes += _split_notes(candidate, champion)
        champion_items = merged_items(model, champion, settings)
    candidate_items = merged_items(model, candidate, settings)
    if candidate_items.column("id").to_pylist() != champion_items.column("id").to_pylist():
        raise CompareError("candidate and champion answered different test items; run `retune run` to score both again")
    claims = claims_on(candidate_items, champion_items, params)
    if "evaluation/general.json" in candidate["files"]:
        folder = model.fetch(candidate, "evaluation")
        base_items, adapter_items = (pq.read_table(folder / f"general.{name}.parquet") for name in ("base", "adapter"))
        claims += forgetting_claims(base_items, adapter_items, params)
    rows = compare_claims(claims, params.seed)
    cut_off = sum(state == "cut_off" for state in candidate_items.column("status").to_pylist())
    if cut_off > MANY_CUT_OFF * len(candidate_items):
        limit = settings["params"]["max_new_tokens"]
        notes.append(
            f"{cut_off:,} of the candidate's {len(candidate_items):,} answers were cut off (evaluate.max_new_tokens is "
            f"{limit}) and count as wrong"
        )
    for metric, row in rows.items():
        if row["passed"] is None:
            zero = f"both score 0 on all {row['items']:,} test items that count"
            notes.append(f"{metric} guards nothing here: {zero if row['items'] else 'no test item counts'} for it")
    return rows, notes


def scoring_settings(candidate: Manifest, serving: str | None, root: Path) -> dict[str, Any]:
    """The settings and the test split of the comparison: those of the workspace's artifacts, else the candidate's.

    A fresh clone has no artifacts. Without `serving`, the candidate's count: it was published with the base's answers.
    """
    parity = root / "artifacts" / "parity" / "parity.json"
    settings: dict[str, Any] = candidate["evaluation"]
    return read_json(parity)["evaluation"] if serving is not None and parity.is_file() else settings


def merged_items(
    model: RegisteredModel, manifest: Manifest, settings: dict[str, Any], may_score: bool = True
) -> pa.Table:
    """The merged model's scores of the test items of `settings`, scored again if it was published with other settings.

    Raises CompareError (it cannot be scored here, or its metrics are computed otherwise) and SignatureError (it must be
    scored again, and publish.require_signature does not allow loading it).
    """
    if manifest["evaluation"] == settings:
        return pq.read_table(model.fetch(manifest, "parity") / "items.merged.parquet")
    version = manifest["version"]
    scored = model.folder(version) / "scored"
    if not (scored / "evaluation.json").is_file() or read_json(scored / "evaluation.json") != settings:
        if not may_score:
            raise CompareError("its answers to these test items are not on this machine")
        dataset = model.root / "artifacts" / "dataset" / "report.json"
        if not dataset.is_file() or read_json(dataset)["test_sha256"] != settings["test_sha256"]:
            raise CompareError(
                f"version {version} was scored on other test items or with other settings, and the test items to score "
                "it again are not here; `dvc repro prepare` makes them, `dvc pull` fetches all artifacts"
            )
        _score(model, manifest, settings, scored)
    signatures = read_json(scored / "evaluation.json")["signatures"]
    for metric, expected in settings["signatures"].items():
        if signatures.get(metric) != expected:
            raise CompareError(
                f"{metric} of version {version} was computed as {signatures.get(metric)}; expected {expected}. "
                "`retune run` scores the candidate again"
            )
    return pq.read_table(scored / "items.parquet")


def score_on_current_split(model: RegisteredModel, manifest: Manifest, metric: str) -> float:
    """`metric` of the version on the prepared test split, decoded as when it was published; see `merged_items`."""
    test_sha256 = read_json(model.root / "artifacts" / "dataset" / "report.json")["test_sha256"]
    items = merged_items(model, manifest, manifest["evaluation"] | {"test_sha256": test_sha256})
    score = corpus_score(metric_items(items, metric))
    if math.isnan(score):
        raise CompareError(f"no item of the current test split counts for {metric}")
    return score


def _score(model: RegisteredModel, manifest: Manifest, settings: dict[str, Any], output: Path) -> None:
    """Score the version's merged model on the workspace's test split, in a child process, which frees its memory."""
    merged = model.fetch_signed(manifest, "merged")
    with tempfile.TemporaryDirectory(dir=merged.parent) as folder:  # another process may score it with other settings
        path = Path(folder) / "settings.json"
        write_json(path, settings)
        options = ["--settings", str(path.resolve()), "--output", str(output.resolve())]
        command = python_ending_with_parent("pipeline", "score", str(merged.resolve()), *options)
        scoring = subprocess.run(command, cwd=model.root, env=environment(), stdout=sys.stderr)
    if scoring.returncode != 0:
        raise CompareError(f"version {manifest['version']} could not be scored on the current test split")


def _split_notes(candidate: Manifest, champion: Manifest) -> list[str]:
    """Notes about test splits that differ. Raises UnfairError.

    Rows whose group's hash, from 0 to 1, is below `test_fraction` are test rows. So a smaller test split has only rows
    that were test rows before; a larger one also has rows that the champion was trained on.
    """
    if champion["evaluation"]["test_sha256"] == candidate["evaluation"]["test_sha256"]:
        return []
    new, old = (manifest["params"]["prepare"]["test_fraction"] for manifest in (candidate, champion))
    if new > old:
        raise UnfairError(
            f"prepare.test_fraction is {new:g}, and was {old:g} for the champion {champion['version']}: it was "
            "trained on rows that are test rows now, so its scores on them would be too high. Set the fraction back, "
            "or promote by hand: `retune promote VERSION --force --reason …`"
        )
    if new < old:
        return [f"the test split is a part of the champion's: prepare.test_fraction {new:g} instead of {old:g}"]
    return ["the test split is not the champion's (rows or their preparation changed); the champion was scored again"]
