"""A published version asked again: scored on the test split of now, and answering the prompts of now."""

import json
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


def answer_prompts(version: str, prompts: list[str], max_new_tokens: int, root: Path = Path(".")) -> Path:
    """A folder whose `prompts.json` holds the answers of the version's merged model to `prompts`, kept for next time.

    Raises:
        RescoreError: it could not be asked.
    """
    folder = root / WORK_DIR / "versions" / version / "asked"
    kept = folder / "prompts.json"
    if kept.is_file() and [one["prompt"] for one in read_json(kept)] == prompts:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    questions, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    questions.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    places = ("--model", version, "--output", str(answers.resolve()), "--max-new-tokens", str(max_new_tokens))
    command = python_ending_with_parent("pipeline", "predict", str(questions.resolve()), *places)
    done = subprocess.run(command, cwd=root, env=graph.environment(), stdout=sys.stderr)
    if done.returncode != 0:
        raise RescoreError(f"version {version} could not be asked evaluate.prompts; `retune chat {version}` says why")
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    said = [{"prompt": row["prompt"], "merged": {key: row[key] for key in ("answer", "cut_off")}} for row in rows]
    write_json(kept, said)
    return folder
