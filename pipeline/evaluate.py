"""evaluate: frozen test split, base and adapter in; BLEU, ROUGE and accuracy with intervals, and every answer, out."""

import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.template import TemplateError, differing_keys, load_contract
from pipeline.files import read_json, sha256_file, whole_directory, write_json
from pipeline.generate import Answer, generate, to_answer
from pipeline.generation.kept import forget_others, kept_file
from pipeline.generation.vllm import vllm_tokens
from pipeline.model import load_adapter, load_base, use_free_cores
from pipeline.params import EvaluateParams
from pipeline.report.contents import System
from pipeline.report.evaluation_pages import write_report
from pipeline.report.stage import stage_contents
from pipeline.security.sanitise import portable
from pipeline.statistics import METRICS, bootstrap, group_of, metric_items

METRIC_FOLDER = Path(__file__).with_name("metrics")
Metrics = dict[str, Any]  # {metric: {score, low, high}, num_samples, num_cut_off, by_task: {task: …}}


@dataclass(frozen=True)
class Evaluated:
    base: Metrics
    adapter: Metrics


def evaluate(params: EvaluateParams, dataset: Path, adapter: Path, output: Path, kept: Path | None = None) -> Evaluated:
    """Score the adapter and the untouched base, quantised as in training, on the same test prompts.

    Writes to `output`: `metrics.json` ({"base": …, "adapter": …}; BLEU 0–100, the others 0–1), `items.base.parquet` and
    `items.adapter.parquet` (every answer with its scores), `evaluation.json` (what the scores depend on: test split,
    decoding, signatures), `report.md` and `report.html`.

    Args:
        kept: a folder for answers: a killed run leaves them to the next one, and so does one with other metrics.

    Raises:
        TemplateError: base model or tokenizer is not what the dataset was prepared for, or the adapter was trained on.
        ModelError: the adapter is missing or does not fit the base.
        BackendError: `params.backend` cannot be used here.
    """
    contract = read_json(dataset / "contract.json")
    template = load_contract(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    test = test_items(dataset, params.max_samples)
    prompts = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    weights = sha256_file(adapter / "adapter_model.safetensors")
    identity = {"base": contract["model"]["digest"], "quantisation": quantisation}

    files: list[Path] = []

    def answer(system: str, **identifies: str) -> list[Answer]:
        keep = None
        if kept is not None:
            keep = kept_file(kept, identity | identifies, prompts, params.max_new_tokens, template.stop_ids)
            files.append(keep)
        return generate(
            model, template, prompts, params.max_new_tokens, params.batch_size, "evaluate", f"the {system}", keep
        )

    if params.backend == "vllm":
        limit, stops = params.max_new_tokens, template.stop_ids
        made = vllm_tokens(contract["model"], adapter, prompts, limit, stops, quantisation["load_in_4bit"])
        answers = {system: [to_answer(ids, template) for ids in each] for system, each in made.items()}
    else:
        model = load_adapter(load_base(contract["model"], quantisation), adapter)
        answers = {"adapter": answer("adapter", adapter=weights)}
        with model.disable_adapter():
            answers["base"] = answer("base")
    metrics: dict[str, Metrics] = {}
    items: dict[str, pa.Table] = {}
    signatures: dict[str, str] = {}
    with whole_directory(output) as folder:
        for system in ("base", "adapter"):
            items[system], signatures = score_items(test, answers[system])
            pq.write_table(items[system], folder / f"items.{system}.parquet")
            metrics[system] = summarise(items[system], params)
        write_json(folder / "metrics.json", metrics)
        settings = provenance(params, dataset, signatures)
        write_json(folder / "evaluation.json", settings)
        base, candidate = (
            System("base", metrics["base"], items["base"]),
            System("candidate", metrics["adapter"], items["adapter"]),
        )
        write_report(stage_contents(base, candidate, settings, dataset, adapter), folder)
    if kept is not None:
        forget_others(kept, files)
    return Evaluated(base=metrics["base"], adapter=metrics["adapter"])


def test_items(dataset: Path, max_samples: int | None) -> pa.Table:
    """The test split, or its first `max_samples` rows in the order of their ids: random, but always the same."""
    table = pq.read_table(dataset / "test.parquet")
    return table if max_samples is None else table.sort_by("id").slice(0, max_samples)


def require_same_contract(contract: dict[str, Any], other: dict[str, Any], where: Path) -> None:
    differ = differing_keys(portable(contract), portable(other))  # what ships names no folder of this machine
    if differ:
        raise TemplateError(f"{', '.join(differ)} of the template contract differ between the dataset and {where}")


def score_items(test: pa.Table, answers: list[Answer]) -> tuple[pa.Table, dict[str, str]]:
    """Every test item with its answer and scores, (N rows), and the signature of each metric.

    Columns: `id, task, group, scoring, prompt, reference, answer, cut_off, answer_ids, accuracy` (null without one
    right answer), `rouge1, rouge2, rougeL` and `bleu` (ten n-gram statistics).
    """
    predictions = [answer.text for answer in answers]
    references = test.column("reference").to_pylist()
    exact, bleu, rouge = (
        hf_evaluate.load(str(METRIC_FOLDER / name), experiment_id=uuid.uuid4().hex, keep_in_memory=True).compute(
            predictions=predictions, references=references
        )
        for name in ("exact_match", "bleu", "rouge")
    )
    scoring = test.column("scoring").to_pylist()
    accuracy = [hit if kind == "exact" else None for hit, kind in zip(exact["items"], scoring, strict=True)]
    items = test.select(["id", "task", "group", "scoring", "prompt", "reference"])
    columns: dict[str, pa.Array] = {
        "answer": pa.array(predictions, pa.string()),
        "cut_off": pa.array([answer.cut_off for answer in answers]),
        "answer_ids": pa.array([answer.ids for answer in answers], pa.list_(pa.int32())),
        "accuracy": pa.array(accuracy, pa.float64()),
        "bleu": pa.array(bleu["items"], pa.list_(pa.float64())),
    } | {kind: pa.array(values, pa.float64()) for kind, values in rouge["items"].items()}
    for name, column in columns.items():
        items = items.append_column(name, column)
    rouge_signatures = dict.fromkeys(rouge["items"], rouge["signature"])
    return items, {"accuracy": exact["signature"], "bleu": bleu["signature"]} | rouge_signatures


def summarise(items: pa.Table, params: EvaluateParams) -> Metrics:
    """Scores with 95 % intervals over all items and by task. A metric that no item counts for is null."""
    tasks = items.column("task").to_pylist()
    masks = {task: pa.array([t == task for t in tasks]) for task in sorted(set(tasks))}
    return _scores(items, params) | {"by_task": {t: _scores(items.filter(mask), params) for t, mask in masks.items()}}


def _scores(items: pa.Table, params: EvaluateParams) -> Metrics:
    scores: Metrics = {"num_samples": len(items), "num_cut_off": sum(items.column("cut_off").to_pylist())}
    for metric in METRICS:
        values = metric_items(items, metric)
        if not len(values) or np.isnan(values).all():
            scores[metric] = None
        else:
            scores[metric] = bootstrap(values, params.bootstrap_samples, params.seed, group_of(items)).as_dict()
    return scores


def provenance(params: EvaluateParams, dataset: Path, signatures: dict[str, str]) -> dict[str, Any]:
    """What two sets of item scores must share to be compared."""
    return {
        "test_sha256": read_json(dataset / "report.json")["test_sha256"],
        "params": params.model_dump(),
        "decoding": "greedy",
        "signatures": signatures,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
