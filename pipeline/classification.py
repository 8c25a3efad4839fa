"""Sequence classification (`train.task`): the parts of train, evaluate and merge that differ from causal-lm.

A text comes in, a class with its confidence goes out. Scores are accuracy and macro-F1 with the same intervals, files
and gate as those of answers; the untuned base has a random head, so its scores are those of chance.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.chat import Message
from pipeline.chat.template import local_source
from pipeline.data.classes import TextEncoder, load_contract
from pipeline.evaluate import require_same_contract, test_items
from pipeline.files import read_json, sha256_file, whole_directory, write_json
from pipeline.generation.kept import KeptAnswers, kept_file
from pipeline.model import load_base, load_tuned, record_dtype, untuned, use_free_cores
from pipeline.params import EvaluateParams, MergeParams
from pipeline.progress import Progress
from pipeline.report.contents import System
from pipeline.report.stage import write_stage_report
from pipeline.scoring import Metrics, provenance, scoring_params, summarise
from pipeline.security.sanitise import clean_folder, one_line, portable
from pipeline.statistics import METRICS, headline, read_scores
from pipeline.training.memory import in_fitting_batch
from pipeline.weights.merging import MergeError, Merging, merge_adapter, require_mergeable

SIGNATURES = {
    "accuracy": "most probable class|v:1",
    "macro_f1": "unweighted mean of F1 over the classes of the test split|v:1",
}


@dataclass(frozen=True)
class Prediction:
    label: str
    confidence: float  # probability that the model gives it, 0–1
    probabilities: list[float]  # (K,) in the order of the contract's labels


@dataclass(frozen=True)
class MergedClasses:
    base: str  # full | nf4
    merging: Merging
    logit_error: dict[str, float]  # mean absolute difference to adapter-on-quantised-base, by base tried
    agreement: float  # fraction of test texts with the same class
    metrics: Metrics


@torch.inference_mode()
def predict(
    model: Any,
    encoder: TextEncoder,
    rows: Sequence[list[int]],
    batch_size: int,
    stage: str,
    system: str,
    keep: Path | None = None,
) -> NDArray[np.float32]:
    """Logits (N, K) for `rows` of token ids, in their order; those in the file `keep` are not computed again."""
    with KeptAnswers(keep) as kept:
        return _logits(model, encoder, rows, batch_size, Progress(stage, len(rows), f"classes of {system}"), kept)


def _logits(
    model: Any,
    encoder: TextEncoder,
    rows: Sequence[list[int]],
    batch_size: int,
    progress: Progress,
    kept: KeptAnswers,
) -> NDArray[np.float32]:
    model.eval()
    model.config.pad_token_id = pad = encoder.tokenizer.pad_token_id
    device = next(model.parameters()).device
    logits = {place: np.array(answer, dtype=np.float32) for place, answer in kept.answers.items()}
    progress.resume_at(len(logits))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while left := [i for i in order if i not in logits]:

        def attempt(size: int, left: list[int] = left) -> NDArray[np.float32]:
            width = len(rows[left[0]])
            batch = [(rows[i], width - len(rows[i])) for i in left[:size]]
            ids = torch.tensor([row + [pad] * short for row, short in batch], device=device)  # (B, T)
            mask = torch.tensor([[1] * len(row) + [0] * short for row, short in batch], device=device)
            found: NDArray[np.float32] = model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()
            return found

        text = f"text of {len(rows[left[0]])} tokens"
        batch_size, found = in_fitting_batch(min(batch_size, len(left)), attempt, text)
        for place, row in zip(left[:batch_size], found, strict=True):
            logits[place] = row
            kept.add(place, row.tolist())
        progress.update(len(logits))
    return np.stack([logits[i] for i in range(len(rows))])


def predictions(logits: NDArray[np.float32], labels: Sequence[str]) -> list[Prediction]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    best = probabilities.argmax(axis=1)
    return [Prediction(labels[k], float(row[k]), row.tolist()) for k, row in zip(best, probabilities, strict=True)]


def classify(
    folder: Path, conversations: Sequence[list[Message]], batch_size: int = 64, keep_in: Path | None = None
) -> list[Prediction]:
    """Class and confidence of each conversation (most have one message, the text), by the merged model in `folder`.

    Args:
        keep_in: folder of a file of what is done, so that the same call after a kill continues there.

    Raises:
        TemplateError, ModelError: it is not whole, or no classification model.
    """
    contract = read_json(folder / "contract.json")
    if "labels" not in contract:
        raise MergeError(f"{folder} answers texts and has no classes; train.task sequence-classification makes such")
    encoder = load_contract(contract, local_source(folder))
    rows = [encoder.prompt(messages)[1] for messages in conversations]
    model = load_base(local_source(folder), None, contract["labels"])
    identity = {"weights": [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))], "contract": contract}
    keep = kept_file(keep_in, identity, rows, 0, frozenset()) if keep_in is not None else None
    logits = predict(model, encoder, rows, batch_size, "classify", "the model", keep)
    if keep is not None:
        keep.unlink(missing_ok=True)
    return predictions(logits, contract["labels"])


def score_classes(test: pa.Table, found: list[Prediction]) -> pa.Table:
    """Every test text with its class and what was predicted, (N rows).

    Columns: as `score_items`, without `answer_ids`; beside them `confidence` and `probabilities`. What is measured on
    texts is null.
    """
    items = test.select(["id", "task", "language", "group", "scoring", "prompt", "reference"])
    said = [each.label for each in found]
    references = test.column("reference").to_pylist()
    right = pa.array([float(a == b) for a, b in zip(said, references, strict=True)], pa.float64())
    columns: dict[str, pa.Array] = {
        "prompt_tokens": pa.array(map(len, test.column("input_ids").to_pylist()), pa.int32()),
        "answer": pa.array(said, pa.string()),
        "status": pa.array(["ok"] * len(found)),
        "cut_off": pa.array([False] * len(found)),
        "label": pa.array(references, pa.string()),
        "predicted": pa.array(said, pa.string()),
        "confidence": pa.array([each.confidence for each in found], pa.float64()),
        "probabilities": pa.array([each.probabilities for each in found], pa.list_(pa.float64())),
        "accuracy": right,
        "exact_match": right,
        "loss": pa.nulls(len(found), pa.float64()),
        "loss_tokens": pa.nulls(len(found), pa.float64()),
    }
    texts = (metric for metric in METRICS if metric not in (*columns, "macro_f1", "perplexity"))
    columns |= {metric: pa.nulls(len(found), pa.float64()) for metric in texts}
    for name, column in columns.items():
        items = items.append_column(name, column)
    return items


def evaluate_classes(params: EvaluateParams, dataset: Path, adapter: Path, output: Path) -> tuple[Metrics, Metrics]:
    """`evaluate` for classes: scores of base and adapter, and the same files in `output`.

    Raises:
        TemplateError, ModelError: as `evaluate`.
    """
    contract = read_json(dataset / "contract.json")
    labels, encoder = contract["labels"], load_contract(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    test = test_items(dataset, params.max_samples)
    rows = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    model = load_tuned(contract["model"], quantisation, adapter, labels)
    logits = {"adapter": predict(model, encoder, rows, params.batch_size, "evaluate", "the adapter")}
    with untuned(model, contract["model"], labels) as before:
        logits["base"] = predict(before, encoder, rows, params.batch_size, "evaluate", "the base")
    metrics: dict[str, Metrics] = {}
    items: dict[str, pa.Table] = {}
    with whole_directory(output) as folder:
        for system in ("base", "adapter"):
            items[system] = score_classes(test, predictions(logits[system], labels)).append_column(
                "logits", pa.array(logits[system].tolist(), pa.list_(pa.float32()))
            )
            pq.write_table(items[system], folder / f"items.{system}.parquet")
            metrics[system] = summarise(items[system], params)
        write_json(folder / "scores.json", metrics)
        write_json(folder / "evaluation.json", provenance(params, dataset, SIGNATURES) | {"decoding": "most probable"})
        base, candidate = (
            System(name, metrics[key], items[key]) for name, key in (("base", "base"), ("adapter", "adapter"))
        )
        write_stage_report(base, candidate, dataset, adapter, folder)
        with (folder / "report.md").open("a", encoding="utf-8") as page:
            page.write(by_class(items["adapter"]))
    return metrics["base"], metrics["adapter"]


def merge_classes(
    params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path, exports: Path
) -> MergedClasses:
    """`merge` for classes: the same files, and parity by the classes and logits of all test texts.

    Raises:
        MergeError, WeightsError, TemplateError, ModelError: as `merge`.
    """
    contract = read_json(dataset / "contract.json")
    labels, identity, encoder = contract["labels"], contract["model"], load_contract(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    require_mergeable(adapter)
    use_free_cores()
    settings = read_json(evaluation / "evaluation.json")
    evaluated = scoring_params(settings)
    test = test_items(dataset, evaluated.max_samples)
    rows = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    expected, before = (
        np.array(pq.read_table(evaluation / f"items.{system}.parquet")["logits"].to_pylist(), dtype=np.float32)
        for system in ("adapter", "base")
    )
    reach = float(np.abs(expected - before).mean())
    dtype = None if params.dtype == "auto" else getattr(torch, params.dtype)
    choices = ["full", "nf4"] if quantisation["load_in_4bit"] else ["full"]
    mergings: dict[str, Merging] = {}
    logits: dict[str, NDArray[np.float32]] = {}
    with whole_directory(output) as folder, whole_directory(parity) as proof, whole_directory(exports) as others:
        for choice in choices if params.base == "auto" else [params.base]:
            place = folder / choice
            place.mkdir()
            rounded = quantisation if choice == "nf4" else None
            mergings[choice] = merge_adapter(identity, adapter, place, rounded, dtype, labels)
            model = load_base(local_source(place), None, labels)
            logits[choice] = predict(
                model, encoder, rows, evaluated.batch_size, "merge", f"the merged model ({choice})"
            )
        errors = {choice: float(np.abs(found - expected).mean()) for choice, found in logits.items()}
        chosen = min(errors, key=lambda choice: errors[choice])
        for path in list((folder / chosen).iterdir()):
            path.rename(folder / path.name)
        for choice in errors:
            shutil.rmtree(folder / choice)
        encoder.tokenizer.save_pretrained(str(folder))
        record_dtype(folder)
        clean_folder(folder)
        write_json(folder / "contract.json", portable(contract))
        items = score_classes(test, predictions(logits[chosen], labels))
        metrics = summarise(items, evaluated)
        agreement = float((logits[chosen].argmax(axis=1) == expected.argmax(axis=1)).mean())
        scores = read_scores(evaluation)
        drop = {m: metrics[m]["score"] - scores["adapter"][m]["score"] for m in SIGNATURES}
        _require_parity(params, agreement, errors[chosen], reach, drop)
        write_json(others / "exports.json", {})
        pq.write_table(items, proof / "items.merged.parquet")
        write_json(proof / "scores.json", {"merged": metrics})
        write_json(proof / "metrics.json", headline(metrics, scores["base"]))
        write_json(
            proof / "parity.json",
            {
                "base": chosen,
                **asdict(mergings[chosen]),
                "mean_absolute_logit_error": errors,
                "mean_absolute_logit_change": reach,
                "token_agreement": agreement,  # of classes: a text has one answer
                "identical_answers": agreement,
                "metric_difference": drop,
                "prompts": len(rows),
                "combined": None,
                "evaluation": settings,
            },
        )
    return MergedClasses(chosen, mergings[chosen], errors, agreement, metrics)


def score_merged(folder: Path, dataset: Path, settings: dict[str, Any], output: Path) -> None:
    """`score_model` for classes: an earlier version's classes of today's test texts."""
    contract = read_json(folder / "contract.json")
    encoder = load_contract(contract, local_source(folder))
    use_free_cores()
    params = scoring_params(settings)
    test = test_items(dataset, params.max_samples)
    rows = [encoder.prompt([{"role": "user", "content": text}])[1] for text in test.column("prompt").to_pylist()]
    model = load_base(local_source(folder), None, contract["labels"])
    logits = predict(model, encoder, rows, params.batch_size, "promote", "the champion")
    with whole_directory(output) as made:
        pq.write_table(score_classes(test, predictions(logits, contract["labels"])), made / "items.parquet")
        write_json(made / "evaluation.json", provenance(params, dataset, SIGNATURES) | {"decoding": "most probable"})


def by_class(items: pa.Table) -> str:
    """Markdown: precision and recall of each class, and the texts that were wrong with the most confidence."""
    lines = ["", "## By class", "", "| class | texts | precision | recall | F1 |", "|---" * 5 + "|"]
    label, predicted = items["label"].to_pylist(), items["predicted"].to_pylist()
    for name in sorted({*label, *predicted}):
        hits = sum(a == b == name for a, b in zip(label, predicted, strict=True))
        there, named = label.count(name), predicted.count(name)
        numbers = [hits / named if named else 0.0, hits / there if there else 0.0, 2 * hits / (there + named)]
        lines.append(f"| {one_line(name)} | {there} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |")
    rows = items.select(["prompt", "label", "predicted", "confidence"]).to_pylist()
    wrong = sorted((r for r in rows if r["label"] != r["predicted"]), key=lambda r: -r["confidence"])[:10]
    lines += ["", "## Wrong with the most confidence", ""]
    for row in wrong:
        text = one_line(" ".join(row["prompt"].split())[:160])
        lines.append(f"- {one_line(row['predicted'])} ({row['confidence']:.2f}) for {one_line(row['label'])}: {text}")
    return "\n".join([*lines, *([] if wrong else ["None."]), ""])


def _require_parity(params: MergeParams, agreement: float, error: float, reach: float, drop: dict[str, float]) -> None:
    if agreement < params.min_agreement:
        raise MergeError(
            f"the merged model gives {agreement:.2%} of the test texts the adapter's class; merge.min_agreement is "
            f"{params.min_agreement:.2%}. Set merge.dtype to float32, or merge.base to the other base"
        )
    if not error <= params.max_logit_error * reach:
        raise MergeError(
            f"the merged model's logits differ from the adapter's by {error:.4f} in the mean, and the adapter changes "
            f"those of its base by {reach:.4f}; merge.max_logit_error allows {params.max_logit_error:g} of it"
        )
    for metric, difference in drop.items():
        if difference < -params.max_metric_drop:
            raise MergeError(
                f"{metric} of the merged model is {-difference:.4f} below the adapter's; merge.max_metric_drop is "
                f"{params.max_metric_drop:g}"
            )
