"""Scores answers to test items and summarises the scores: overall, by task, by language and by length.

An empty or cut-off answer is counted as such and scored as an empty text: leaving it out would reward a model for
failing on hard items.
"""

import uuid
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.responses import Answer, canonical_calls
from pipeline.core.files import read_json
from pipeline.core.text import fold
from pipeline.data.records import TOOL_CALLS
from pipeline.params import EvaluateParams
from pipeline.scoring import text_metrics
from pipeline.scoring.likelihood import Losses
from pipeline.scoring.resampling import ITEMS_OF_A_CLASS, METRICS, slices_of, table_scores

METRICS_FILE = Path(text_metrics.__file__)
# Signatures of the metrics that are computed from columns of the table: label and predicted, loss and loss_tokens.
COLUMN_METRICS = {
    "macro_f1": f"macro-f1|classes:references|{text_metrics.FOLDED}",
    "perplexity": "perplexity|tokens:trained-of-the-last-answer|mean:token",
}
# Metrics that need only an answer's text and its reference.
TEXT_METRICS = [name for name in METRICS if name not in ("accuracy", *COLUMN_METRICS) and not name.startswith("rouge")]
NOT_SCORED = {"prompts", "general"}  # parameters that do not affect the scores of test items
# {metric: {score, low, high}, num_samples, num_cut_off, num_empty, by_task, by_language, by_length: {name: the same}}
Metrics = dict[str, Any]


def score_items(test: pa.Table, answers: Sequence[Answer], losses: Losses) -> tuple[pa.Table, dict[str, str]]:
    """Every test item with its answer and scores (N rows), and each metric's signature; `losses` of the references.

    Columns: `id, task, language, group, scoring, messages, prompt, prompt_tokens, reference, answer, status` (ok,
    cut_off or empty), `cut_off, answer_ids, accuracy` (null without one right answer), `label, predicted` (null outside
    classifications), `exact_match, bleu` (ten n-gram statistics), `chrf` (18), `rouge1, rouge2, rougeL,
    rougeLsum` (null where the answer is calls), `loss, loss_tokens`.
    """
    references, scoring = test.column("reference").to_pylist(), test.column("scoring").to_pylist()
    texts, status, predictions = [], [], []
    for answer, kind in zip(answers, scoring, strict=True):
        calls = canonical_calls(answer.tool_calls) if kind == TOOL_CALLS and answer.tool_calls else None
        texts.append(answer.text if calls is None else calls)
        has_content = answer.text.strip() or answer.tool_calls
        status.append("cut_off" if answer.cut_off else "ok" if has_content else "empty")
        usable = status[-1] == "ok" and (kind != TOOL_CALLS or calls is not None)
        predictions.append(texts[-1] if usable else "")
    columns_of_all = {"predictions": predictions, "references": references}
    text_rows = [row for row, kind in enumerate(scoring) if kind != TOOL_CALLS]
    columns_of_texts = {name: [column[row] for row in text_rows] for name, column in columns_of_all.items()}
    results = {metric: compute_metric(metric, **columns_of_texts) for metric in (*TEXT_METRICS, "rouge")}
    results["accuracy"] = compute_metric("accuracy", **columns_of_all, scoring=scoring)
    labels = class_labels(test)
    predicted = [
        None if label is None else f"{task}: {fold(text)}"
        for label, task, text in zip(labels, test.column("task").to_pylist(), predictions, strict=True)
    ]
    columns: dict[str, pa.Array] = {
        "prompt_tokens": pa.array(map(len, test.column("input_ids").to_pylist()), pa.int32()),
        "answer": pa.array(texts, pa.string()),
        "status": pa.array(status, pa.string()),
        "cut_off": pa.array([state == "cut_off" for state in status]),
        "answer_ids": pa.array([answer.ids for answer in answers], pa.list_(pa.int32())),
        "accuracy": pa.array(results["accuracy"]["items"], pa.float64()),
        "label": pa.array(labels, pa.string()),
        "predicted": pa.array(predicted, pa.string()),
    }
    text_scores = {metric: results[metric]["items"] for metric in TEXT_METRICS} | results["rouge"]["items"]
    for metric, values in text_scores.items():
        by_row = dict(zip(text_rows, values, strict=True))
        are_counts = any(isinstance(value, list) for value in values)
        kind = pa.list_(pa.float64()) if are_counts else pa.float64()
        columns[metric] = pa.array([by_row.get(row) for row in range(len(test))], kind)
    columns |= {"loss": pa.array(losses[0], pa.float64()), "loss_tokens": pa.array(losses[1], pa.int32())}
    items = test.select(["id", "task", "language", "group", "scoring", "messages", "prompt", "reference"])
    for name, column in columns.items():
        items = items.append_column(name, column)
    signatures = COLUMN_METRICS | {name: result["signature"] for name, result in results.items()}
    signatures |= dict.fromkeys(results["rouge"]["items"], results["rouge"]["signature"])
    return items, {metric: signatures[metric] for metric in METRICS}


def compute_metric(name: str, **columns: Any) -> dict[str, Any]:
    """The result of the metric `name` of the local `evaluate` module."""
    metric = _metric(name)
    if not any(len(column) for column in columns.values()):
        return dict(metric._compute(**columns))  # `compute` does not accept an empty set
    return dict(metric.compute(**columns))


@cache
def _metric(name: str) -> Any:
    """The metric, loaded once per process, with files that concurrent runs do not share."""
    return hf_evaluate.load(str(METRICS_FILE), name, experiment_id=uuid.uuid4().hex, keep_in_memory=True)


def class_labels(test: pa.Table) -> list[str | None]:
    """Each item's class as `task: label`; None if its task is not a classification (few labels, each often)."""
    tasks, scoring = test.column("task").to_pylist(), test.column("scoring").to_pylist()
    labels = [
        f"{task}: {fold(reference)}" if kind == "exact" else None
        for task, kind, reference in zip(tasks, scoring, test.column("reference").to_pylist(), strict=True)
    ]
    classifications = set()
    for task in set(tasks):
        task_labels = [label for label, name in zip(labels, tasks, strict=True) if name == task and label is not None]
        if 2 <= len(set(task_labels)) <= len(task_labels) / ITEMS_OF_A_CLASS:
            classifications.add(task)
    return [label if task in classifications else None for label, task in zip(labels, tasks, strict=True)]


def summarise(items: pa.Table, params: EvaluateParams) -> Metrics:
    """Scores with 95 % intervals of all items and of each slice; null for a metric that counts no item."""

    def scores(items: pa.Table) -> Metrics:
        status = items.column("status").to_pylist()
        counts = {"num_samples": len(items)} | {f"num_{state}": status.count(state) for state in ("cut_off", "empty")}
        return counts | table_scores(items, METRICS, params.bootstrap_samples, params.seed)

    kinds = ("by_task", "by_language", "by_length")
    slices = {kind: {name: scores(part) for name, part in slices_of(items, kind).items()} for kind in kinds}
    return scores(items) | slices


def provenance(params: EvaluateParams, dataset: Path, signatures: dict[str, str]) -> dict[str, Any]:
    """Everything that must be equal for two sets of item scores to be comparable."""
    return {
        "test_sha256": read_json(dataset / "report.json")["test_sha256"],
        "params": params.model_dump(exclude=NOT_SCORED),
        "decoding": "greedy, scored without the thinking",
        "signatures": signatures,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def scoring_params(provenance: dict[str, Any]) -> EvaluateParams:
    """The evaluation parameters recorded in a `provenance`."""
    return EvaluateParams.model_validate({"prompts": [], "general": None} | provenance["params"])


def test_items(dataset: Path, max_samples: int | None) -> pa.Table:
    """The test split, or its first `max_samples` rows by id, which is a fixed random sample."""
    table = pq.read_table(dataset / "test.parquet")
    return table if max_samples is None else table.sort_by("id").slice(0, max_samples)
