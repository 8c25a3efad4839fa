"""Answers to test items in, scored items and summaries of them out: overall, by task, language and length.

An answer that is empty, cut off or was never made is counted as such and scored as an empty one, whatever its text: it
is a failure, and leaving it out would reward a model for failing on what is hard.
"""

import uuid
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.responses import canonical_calls
from pipeline.core.files import read_json
from pipeline.core.text import fold
from pipeline.data.records import TOOL_CALLS
from pipeline.params import EvaluateParams
from pipeline.scoring.generation import Answer
from pipeline.scoring.metrics import text_metrics
from pipeline.scoring.resampling import ITEMS_OF_A_CLASS, METRICS, bootstrap_metrics, group_of, metric_items, slices_of

METRICS_FILE = Path(text_metrics.__file__)
# Metrics of an answer's text and its reference alone.
TEXT_METRICS = [
    name for name in METRICS if name not in ("accuracy", "macro_f1", "perplexity") and not name.startswith("rouge")
]
NOT_SCORED = {"prompts", "general"}  # parameters that no score of a test item depends on
STATUSES = ("ok", "cut_off", "empty", "failed")
# {metric: {score, low, high}, num_samples, num_cut_off, num_empty, num_failed, by_task, by_language, by_length: {name:
# the same}}
Metrics = dict[str, Any]


def score_items(
    test: pa.Table, answers: Sequence[Answer | None], losses: tuple[list[float], list[int]]
) -> tuple[pa.Table, dict[str, str]]:
    """Every test item with its answer and scores, (N rows), and the signature of each metric.

    Args:
        answers: None where none was made.
        losses: of each reference, summed over its tokens in nats, and the number of these tokens.

    Columns: `id, task, language, group, scoring, messages, prompt, prompt_tokens, reference, answer, status` (of
    STATUSES), `cut_off, answer_ids, accuracy` (null without one right answer), `label, predicted` (null outside
    classifications), `exact_match, bleu` (ten n-gram statistics), `chrf` (18), `rouge1, rouge2, rougeL,
    rougeLsum` (null where the answer is calls), `loss, loss_tokens`.
    """
    status = [_status(answer) for answer in answers]
    references, scoring = test.column("reference").to_pylist(), test.column("scoring").to_pylist()
    texts = [_said(answer, kind) for answer, kind in zip(answers, scoring, strict=True)]
    counted = [
        text if state == "ok" and (kind != TOOL_CALLS or (answer is not None and answer.tool_calls)) else ""
        for text, state, kind, answer in zip(texts, status, scoring, answers, strict=True)
    ]
    is_text = [kind != TOOL_CALLS for kind in scoring]
    pairs = {"predictions": _where(is_text, counted), "references": _where(is_text, references)}
    results = {
        "accuracy": compute("accuracy", predictions=counted, references=references, scoring=scoring),
        **{metric: compute(metric, **pairs) for metric in TEXT_METRICS},
        "rouge": compute("rouge", **pairs),
        "perplexity": compute("perplexity", losses=losses[0], tokens=losses[1]),
    }
    labels = class_labels(test)
    predicted = [
        None if label is None else f"{task}: {fold(text)}"
        for label, task, text in zip(labels, test.column("task").to_pylist(), counted, strict=True)
    ]
    classes = [label is not None for label in labels]
    macro_f1 = compute("macro_f1", predictions=_where(classes, predicted), references=_where(classes, labels))
    columns: dict[str, pa.Array] = {
        "prompt_tokens": pa.array(map(len, test.column("input_ids").to_pylist()), pa.int32()),
        "answer": pa.array(texts, pa.string()),
        "status": pa.array(status, pa.string()),
        "cut_off": pa.array([state == "cut_off" for state in status]),
        "answer_ids": pa.array([[] if answer is None else answer.ids for answer in answers], pa.list_(pa.int32())),
        "accuracy": pa.array(results["accuracy"]["items"], pa.float64()),
        "label": pa.array(labels, pa.string()),
        "predicted": pa.array(predicted, pa.string()),
    }
    by_text = {metric: results[metric]["items"] for metric in TEXT_METRICS} | results["rouge"]["items"]
    columns |= {metric: _column(_scattered(is_text, values)) for metric, values in by_text.items()}
    columns |= {"loss": pa.array(losses[0], pa.float64()), "loss_tokens": pa.array(losses[1], pa.int32())}
    items = test.select(["id", "task", "language", "group", "scoring", "messages", "prompt", "reference"])
    for name, column in columns.items():
        items = items.append_column(name, column)
    signatures = {name: result["signature"] for name, result in results.items() if name != "rouge"}
    signatures |= {"macro_f1": macro_f1["signature"]} | dict.fromkeys(
        results["rouge"]["items"], results["rouge"]["signature"]
    )
    return items, {metric: signatures[metric] for metric in METRICS}


def compute(name: str, **inputs: Any) -> dict[str, Any]:
    """The result of the metric `name` of the local `evaluate` module."""
    metric = _metric(name)
    settings = {key: value for key, value in inputs.items() if key not in metric.features}
    columns = {key: value for key, value in inputs.items() if key in metric.features}
    if not any(len(column) for column in columns.values()):
        return dict(metric._compute(**inputs))  # evaluate itself takes no empty set
    return dict(metric.compute(**columns, **settings))


@cache
def _metric(name: str) -> Any:
    """Loaded once a process; concurrent runs have files of their own."""
    return hf_evaluate.load(str(METRICS_FILE), name, experiment_id=uuid.uuid4().hex, keep_in_memory=True)


def class_labels(test: pa.Table) -> list[str | None]:
    """Each item's class as `task: label`; None where the task is no classification."""
    tasks, scoring = test.column("task").to_pylist(), test.column("scoring").to_pylist()
    labels = [
        f"{task}: {fold(reference)}" if kind == "exact" else None
        for task, kind, reference in zip(tasks, scoring, test.column("reference").to_pylist(), strict=True)
    ]
    classifications = set()
    for task in set(tasks):
        of_task = [label for label, its in zip(labels, tasks, strict=True) if its == task and label is not None]
        if 2 <= len(set(of_task)) <= len(of_task) / ITEMS_OF_A_CLASS:
            classifications.add(task)
    return [label if task in classifications else None for label, task in zip(labels, tasks, strict=True)]


def summarise(items: pa.Table, params: EvaluateParams) -> Metrics:
    """Scores with 95 % intervals over all items and of each slice. A metric that no item counts for is null."""
    result = _scores(items, params)
    for kind in ("by_task", "by_language", "by_length"):
        result[kind] = {name: _scores(part, params) for name, part in slices_of(items, kind).items()}
    return result


def _scores(items: pa.Table, params: EvaluateParams) -> Metrics:
    status = items.column("status").to_pylist()
    scores: Metrics = {"num_samples": len(items)}
    scores |= {f"num_{state}": status.count(state) for state in STATUSES if state != "ok"}
    values = {metric: metric_items(items, metric) for metric in METRICS}
    measured = bootstrap_metrics(values, group_of(items), params.bootstrap_samples, params.seed)
    return scores | {metric: score.as_dict() if score else None for metric, score in measured.items()}


def provenance(params: EvaluateParams, dataset: Path, signatures: dict[str, str]) -> dict[str, Any]:
    """What two sets of item scores must share to be compared."""
    return {
        "test_sha256": read_json(dataset / "report.json")["test_sha256"],
        "params": params.model_dump(exclude=NOT_SCORED),
        "decoding": "greedy, scored without the thinking",
        "signatures": signatures,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def scoring_params(provenance: dict[str, Any]) -> EvaluateParams:
    """The parameters that scores were made with, from their provenance."""
    return EvaluateParams.model_validate({"prompts": [], "general": None} | provenance["params"])


def _status(answer: Answer | None) -> str:
    if answer is None:
        return "failed"
    return "cut_off" if answer.cut_off else "ok" if answer.text.strip() or answer.tool_calls else "empty"


def _said(answer: Answer | None, scoring: str) -> str:
    """What is scored of an answer: its calls where calls are expected and it has some, else its text."""
    if answer is None:
        return ""
    return canonical_calls(answer.tool_calls) if scoring == TOOL_CALLS and answer.tool_calls else answer.text


def _scattered(chosen: list[bool], values: Sequence[Any]) -> list[Any]:
    """`values`, one for each that is chosen, and None for the others."""
    each = iter(values)
    return [next(each) if is_one else None for is_one in chosen]


def _column(values: list[Any]) -> pa.Array:
    """Scores of items, or the counts that a set's score is made from."""
    counts = any(isinstance(value, list) for value in values)
    return pa.array(values, pa.list_(pa.float64()) if counts else pa.float64())


def _where(chosen: list[bool], values: Iterable[str | None]) -> list[str]:
    return [value for value, is_one in zip(values, chosen, strict=True) if is_one and value is not None]


def test_items(dataset: Path, max_samples: int | None) -> pa.Table:
    """The test split, or its first `max_samples` rows in the order of their ids: random, but always the same."""
    table = pq.read_table(dataset / "test.parquet")
    return table if max_samples is None else table.sort_by("id").slice(0, max_samples)
