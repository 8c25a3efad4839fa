"""Answers to test items in, scored items and summaries of them out: overall, by task, language and length.

An answer that is empty or cut off is counted as such and scored as an empty one, whatever its text: it is a failure,
and leaving it out would reward a model for failing on what is hard.
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
from pipeline.scoring.likelihood import Losses
from pipeline.scoring.metrics import text_metrics
from pipeline.scoring.resampling import ITEMS_OF_A_CLASS, METRICS, slices_of, table_scores

METRICS_FILE = Path(text_metrics.__file__)
# Metrics whose items are columns of the table: `label` and `predicted`, `loss` and `loss_tokens`.
OF_COLUMNS = {
    "macro_f1": f"macro-f1|classes:references|{text_metrics.FOLDED}",
    "perplexity": "perplexity|tokens:trained-of-the-last-answer|mean:token",
}
# Metrics of an answer's text and its reference alone.
TEXT_METRICS = [name for name in METRICS if name not in ("accuracy", *OF_COLUMNS) and not name.startswith("rouge")]
NOT_SCORED = {"prompts", "general"}  # parameters that no score of a test item depends on
# {metric: {score, low, high}, num_samples, num_cut_off, num_empty, by_task, by_language, by_length: {name:
# the same}}
Metrics = dict[str, Any]


def score_items(test: pa.Table, answers: Sequence[Answer], losses: Losses) -> tuple[pa.Table, dict[str, str]]:
    """Every test item with its answer and scores, (N rows), and the signature of each metric; `losses` of references.

    Columns: `id, task, language, group, scoring, messages, prompt, prompt_tokens, reference, answer, status` (ok,
    cut_off or empty), `cut_off, answer_ids, accuracy` (null without one right answer), `label, predicted` (null outside
    classifications), `exact_match, bleu` (ten n-gram statistics), `chrf` (18), `rouge1, rouge2, rougeL,
    rougeLsum` (null where the answer is calls), `loss, loss_tokens`.
    """
    references, scoring = test.column("reference").to_pylist(), test.column("scoring").to_pylist()
    texts, status, counted = [], [], []
    for answer, kind in zip(answers, scoring, strict=True):
        calls = canonical_calls(answer.tool_calls) if kind == TOOL_CALLS and answer.tool_calls else None
        texts.append(answer.text if calls is None else calls)
        said = answer.text.strip() or answer.tool_calls
        status.append("cut_off" if answer.cut_off else "ok" if said else "empty")
        counts = status[-1] == "ok" and (kind != TOOL_CALLS or calls is not None)
        counted.append(texts[-1] if counts else "")
    pair = {"predictions": counted, "references": references}
    of_texts = [number for number, kind in enumerate(scoring) if kind != TOOL_CALLS]  # of calls they say nothing
    texts_alone = {name: [column[number] for number in of_texts] for name, column in pair.items()}
    results = {metric: compute(metric, **texts_alone) for metric in (*TEXT_METRICS, "rouge")}
    results["accuracy"] = compute("accuracy", **pair, scoring=scoring)
    labels = class_labels(test)
    predicted = [
        None if label is None else f"{task}: {fold(text)}"
        for label, task, text in zip(labels, test.column("task").to_pylist(), counted, strict=True)
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
    by_text = {metric: results[metric]["items"] for metric in TEXT_METRICS} | results["rouge"]["items"]
    for metric, values in by_text.items():
        value_of = dict(zip(of_texts, values, strict=True))
        kept = [value_of.get(number) for number in range(len(test))]
        counts = any(isinstance(value, list) for value in values)  # that the set's score is made from
        columns[metric] = pa.array(kept, pa.list_(pa.float64()) if counts else pa.float64())
    columns |= {"loss": pa.array(losses[0], pa.float64()), "loss_tokens": pa.array(losses[1], pa.int32())}
    items = test.select(["id", "task", "language", "group", "scoring", "messages", "prompt", "reference"])
    for name, column in columns.items():
        items = items.append_column(name, column)
    signatures = OF_COLUMNS | {name: result["signature"] for name, result in results.items()}
    signatures |= dict.fromkeys(results["rouge"]["items"], results["rouge"]["signature"])
    return items, {metric: signatures[metric] for metric in METRICS}


def compute(name: str, **columns: Any) -> dict[str, Any]:
    """The result of the metric `name` of the local `evaluate` module."""
    metric = _metric(name)
    if not any(len(column) for column in columns.values()):
        return dict(metric._compute(**columns))  # evaluate itself takes no empty set
    return dict(metric.compute(**columns))


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
    scores |= {f"num_{state}": status.count(state) for state in ("cut_off", "empty")}
    return scores | table_scores(items, METRICS, params.bootstrap_samples, params.seed)


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


def test_items(dataset: Path, max_samples: int | None) -> pa.Table:
    """The test split, or its first `max_samples` rows in the order of their ids: random, but always the same."""
    table = pq.read_table(dataset / "test.parquet")
    return table if max_samples is None else table.sort_by("id").slice(0, max_samples)
