"""A published version asked again: scored on the test split of now, and answering the prompts of now."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.core.processes import environment, python_ending_with_parent
from pipeline.params import PublishParams
from pipeline.registry.manifest import Manifest
from pipeline.registry.verify import fetch_signed
from pipeline.scoring.resampling import corpus_score, metric_items, num_groups


class RescoreError(RuntimeError):
    """The version could not be scored, or no test item counts for the metric."""


def score_today(params: PublishParams, manifest: Manifest, metric: str, root: Path = Path(".")) -> float:
    """`metric` of the version's merged model on the prepared test split, decoded as when it was published.

    On the very split it was published with, that is the score of then, and nothing is computed.

    Raises:
        RescoreError: it could not be scored, or no test item counts for the metric.
        SignatureError: see `score_again`.
    """
    test = read_json(root / "artifacts" / "dataset" / "report.json")["test_sha256"]
    if manifest["evaluation"]["test_sha256"] == test:
        published = manifest["metrics"]["merged"].get(metric)
        if published is None:
            raise RescoreError(f"{metric} was not measured when version {manifest['version']} was published")
        return float(published["score"])
    scored = root / WORK_DIR / "versions" / manifest["version"] / "today"
    if not score_again(params, manifest, manifest["evaluation"], scored, root):
        raise RescoreError(f"version {manifest['version']} could not be scored on today's test split")
    items = metric_items(pq.read_table(scored / "items.parquet"), metric)
    if not num_groups(items):
        raise RescoreError(f"no item of today's test split counts for {metric}")
    return corpus_score(items)


def score_again(
    params: PublishParams, manifest: Manifest, settings: dict[str, Any], output: Path, root: Path = Path(".")
) -> bool:
    """Score the version's merged model on the workspace's test split as `settings` (an `evaluation.json`) say.

    Returns: whether `output` now holds `items.parquet` and `evaluation.json`; if not, the reason has been printed.

    Raises:
        SignatureError: `publish.require_signature` is on, and the version is not signed.
    """
    folder = root / WORK_DIR / "versions" / manifest["version"]
    model = fetch_signed(params, manifest, "merged", folder, root)
    with tempfile.TemporaryDirectory(dir=folder) as asked:  # another process may score it with other settings
        write_json(Path(asked) / "settings.json", settings)
        return _retune(root, "score", model, "--settings", Path(asked) / "settings.json", "--output", output)


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
    questions, answers = (folder / f"{name}.{os.getpid()}.jsonl" for name in ("prompts", "answers"))
    questions.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    limit = str(max_new_tokens)
    if not _retune(root, "predict", questions, "--model", version, "--output", answers, "--max-new-tokens", limit):
        raise RescoreError(f"version {version} could not be asked evaluate.prompts; `retune chat {version}` says why")
    # Not splitlines: an answer may hold other line separators.
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
    said = [{"prompt": row["prompt"], "merged": {key: row[key] for key in ("answer", "cut_off")}} for row in rows]
    write_json(kept, said)
    return folder


def _retune(root: Path, *arguments: str | Path) -> bool:
    """Whether a command of ours succeeded, in a process of its own: a model's memory is returned when it ends."""
    words = (str(word.resolve()) if isinstance(word, Path) else word for word in arguments)
    command = python_ending_with_parent("pipeline", *words)
    return subprocess.run(command, cwd=root, env=environment(), stdout=sys.stderr).returncode == 0
