"""A published version scored again, on the test split of now."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import read_json, write_json
from pipeline.core.processes import environment, python_ending_with_parent
from pipeline.registry.gate import CompareError
from pipeline.registry.manifest import Manifest
from pipeline.registry.model import RegisteredModel
from pipeline.scoring.resampling import corpus_score, metric_items, num_groups


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
                f"{metric} of the candidate was scored as {ours} and that of version {version} as "
                f"{signatures.get(metric)}: such scores are not compared. `retune run` scores the candidate anew"
            )
    return pq.read_table(scored / "items.parquet")


def score_today(model: RegisteredModel, manifest: Manifest, metric: str) -> float:
    """`metric` of the version's merged model on the prepared test split, decoded as when it was published.

    On the very split it was published with, that is the score of then, and nothing is computed.

    Raises:
        CompareError: it could not be scored, or no test item counts for the metric.
        SignatureError: as for `merged_items`.
    """
    test = read_json(model.root / "artifacts" / "dataset" / "report.json")["test_sha256"]
    if manifest["evaluation"]["test_sha256"] == test:
        score = manifest["metrics"]["merged"].get(metric)
        if score is None:
            raise CompareError(f"{metric} was not measured when version {manifest['version']} was published")
        return float(score["score"])
    scored = model.folder(manifest["version"]) / "today"
    _score(model, manifest, manifest["evaluation"], scored)
    items = metric_items(pq.read_table(scored / "items.parquet"), metric)
    if not num_groups(items):
        raise CompareError(f"no item of today's test split counts for {metric}")
    return corpus_score(items)


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
