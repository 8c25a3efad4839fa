"""Sequence classification (`train.task`): the parts of train, evaluate and merge that differ from causal-lm.

Scores are accuracy and macro-F1 with the same intervals, files and gate as those of answers; the untuned base has a
random head, so its scores are those of chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.chat import Message
from pipeline.chat.template import local_source
from pipeline.core.files import read_json
from pipeline.core.memory import in_fitting_batch
from pipeline.core.progress import Progress
from pipeline.data.classes import TextEncoder, load_classes
from pipeline.params import BatchSize, EvaluateParams
from pipeline.scoring.items import provenance
from pipeline.scoring.resampling import METRICS
from pipeline.weights.loading import input_device
from pipeline.weights.merging import MergeError
from pipeline.weights.placement import load_for_scoring

ROWS = 64  # at a time, with `batch_size: auto`
SIGNATURES = {
    "accuracy": "most probable class|v:1",
    "macro_f1": "unweighted mean of F1 over the classes of the test split|v:1",
}


@dataclass(frozen=True)
class Prediction:
    label: str
    confidence: float  # probability that the model gives it, 0–1
    probabilities: list[float]  # (K,) in the order of the contract's labels


@torch.inference_mode()
def predict(
    model: Any, encoder: TextEncoder, rows: Sequence[list[int]], batch_size: BatchSize, stage: str, system: str
) -> NDArray[np.float32]:
    """Logits (N, K) for `rows` of token ids, in their order."""
    model.eval()
    rows_at_once = ROWS if batch_size == "auto" else batch_size
    model.config.pad_token_id = pad = encoder.tokenizer.pad_token_id
    device = input_device(model)
    progress = Progress(stage, len(rows), f"classes of {system}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    logits: list[NDArray[np.float32]] = []  # in that order: the longest first
    while left := [rows[i] for i in order[len(logits) :]]:

        def attempt(size: int, left: list[list[int]] = left) -> NDArray[np.float32]:
            width = len(left[0])
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in left[:size]], device=device)  # (B, T)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in left[:size]], device=device)
            computed: NDArray[np.float32] = model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()
            return computed

        of = f"text of {len(left[0])} tokens"
        rows_at_once, batch = in_fitting_batch(min(rows_at_once, len(left)), attempt, of)
        logits += list(batch)
        progress.update(len(logits))
    return np.stack([logits[place] for place in np.argsort(order)])


def predictions(logits: NDArray[np.float32], labels: Sequence[str]) -> list[Prediction]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    best = probabilities.argmax(axis=1)
    return [Prediction(labels[k], float(row[k]), row.tolist()) for k, row in zip(best, probabilities, strict=True)]


def classify(folder: Path, conversations: Sequence[list[Message]], batch_size: BatchSize = "auto") -> list[Prediction]:
    """Class and confidence of each conversation (most have one message, the text), by the merged model in `folder`.

    Raises:
        TemplateError, ModelError, MergeError: it is not whole, or no classification model.
    """
    contract = read_json(folder / "contract.json")
    if "labels" not in contract:
        raise MergeError(f"{folder} answers texts and has no classes; train.task sequence-classification makes such")
    encoder = load_classes(contract, local_source(folder))
    rows = [encoder.prompt(messages)[1] for messages in conversations]
    model = load_for_scoring(local_source(folder), None, contract["labels"])
    return predictions(predict(model, encoder, rows, batch_size, "classify", "the model"), contract["labels"])


def score_classes(test: pa.Table, predicted: list[Prediction]) -> pa.Table:
    """Every test text with its class and what was predicted, (N rows).

    Columns: as `score_items`, without `answer_ids`; beside them `confidence` and `probabilities`. What is measured on
    texts is null.
    """
    items = test.select(["id", "task", "language", "group", "scoring", "prompt", "reference"])
    labels = [each.label for each in predicted]
    references = test.column("reference").to_pylist()
    right = pa.array([float(a == b) for a, b in zip(labels, references, strict=True)], pa.float64())
    columns: dict[str, pa.Array] = {
        "prompt_tokens": pa.array(map(len, test.column("input_ids").to_pylist()), pa.int32()),
        "answer": pa.array(labels, pa.string()),
        "status": pa.array(["ok"] * len(predicted)),
        "cut_off": pa.array([False] * len(predicted)),
        "label": pa.array(references, pa.string()),
        "predicted": pa.array(labels, pa.string()),
        "confidence": pa.array([each.confidence for each in predicted], pa.float64()),
        "probabilities": pa.array([each.probabilities for each in predicted], pa.list_(pa.float64())),
        "accuracy": right,
        "exact_match": right,
        "loss": pa.nulls(len(predicted), pa.float64()),
        "loss_tokens": pa.nulls(len(predicted), pa.float64()),
    }
    texts = (metric for metric in METRICS if metric not in (*columns, "macro_f1", "perplexity"))
    columns |= {metric: pa.nulls(len(predicted), pa.float64()) for metric in texts}
    for name, column in columns.items():
        items = items.append_column(name, column)
    return items


def class_provenance(params: EvaluateParams, dataset: Path) -> dict[str, Any]:
    """`provenance` of scores of classes."""
    return provenance(params, dataset, SIGNATURES) | {"decoding": "most probable"}
