"""A published version scored on the test split that the workspace has now: is it still as good as it was?"""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import graph
from pipeline.files import WORK_DIR, read_json, write_json
from pipeline.process import python_ending_with_parent
from pipeline.publish import fetch_version
from pipeline.statistics import corpus_score, metric_items, num_groups
from pipeline.store.artifact_store import ArtifactStore
from pipeline.versions.manifest import Manifest


class RescoreError(RuntimeError):
    """The version could not be scored, or no test item counts for the metric."""


def score_today(store: ArtifactStore, manifest: Manifest, metric: str, root: Path = Path(".")) -> float:
    """`metric` of the version's merged model on the prepared test split, decoded as when it was published.

    On the very split it was published with, that is the score of then, and nothing is computed.

    Raises:
        RescoreError: it could not be scored, or no test item counts for the metric.
    """
    test = read_json(root / "artifacts" / "dataset" / "report.json")["test_sha256"]
    if manifest["evaluation"]["test_sha256"] == test:
        return float(manifest["metrics"]["merged"][metric]["score"])
    folder = root / WORK_DIR / "versions" / manifest["version"]
    model = fetch_version(store, manifest, "merged", folder)
    settings, scored = folder / "settings.json", folder / "today"
    write_json(settings, manifest["evaluation"])
    places = ("--settings", str(settings.resolve()), "--output", str(scored.resolve()))
    command = python_ending_with_parent("pipeline", "score", str(model.resolve()), *places)
    done = subprocess.run(command, cwd=root, env=graph.environment(), stdout=sys.stderr)
    if done.returncode != 0:
        raise RescoreError(f"version {manifest['version']} could not be scored on today's test split")
    items = metric_items(pq.read_table(scored / "items.parquet"), metric)
    if not num_groups(items):
        raise RescoreError(f"no item of today's test split counts for {metric}")
    return corpus_score(items)
