"""Sequence classification (`train.task`): the parts of evaluate and merge that differ from causal-lm.

The untuned base has a random head, so it scores at chance level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

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

AUTO_BATCH_SIZE = 64
SIGNATURES = {
    "accuracy": "most probable class|v:1",
    "macro_f1": "unweighted mean of F1 over the classes of the test split|v:1",
}


@dataclass(frozen=True)
class Prediction:
    label: str
    confidence: float  # the label's probability, 0–1
    probabilities: list[float]  # (K,) in the order of the contract's labels


@torch.inference_mode()
def compute_logits(
    model: Any, encoder: TextEncoder, rows: Sequence[list[int]], batch_size: BatchSize, stage: str, system: str
) -> NDArray[np.float32]:
    """Logits (N, K) for `rows` of token ids, in their order."""
    model.eval()
    size = AUTO_BATCH_SIZE if batch_size == "auto" else batch_size
    model.config.pad_token_id = pad = encoder.tokenizer.pad_token_id
    device = input_device(model)
    progress = Progress(stage, len(rows), f"classes of {system}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest first
    logits: list[NDArray[np.float32]] = []  # in this order
    while remaining := [rows[i] for i in order[len(logits) :]]:

        def attempt(size: int, rows: list[list[int]] = remaining) -> NDArray[np.float32]:
            batch = [torch.tensor(row, device=device) for row in rows[:size]]
            ids = pad_sequence(batch, batch_first=True, padding_value=pad)  # (B, T)
            mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
            return model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()

        size, batch = in_fitting_batch(min(size, len(remaining)), attempt, f"text of {len(remaining[0])} tokens")
        logits += list(batch)
        progress.update(len(logits))
    return np.stack(logits)[np.argsort(order)]


def _make_predictions(logits: NDArray[np.float32], labels: Sequence[str]) -> list[Prediction]:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    best = probabilities.argmax(axis=1)
    return [Prediction(labels[k], float(row[k]), row.tolist()) for k, row in zip(best, probabilities, strict=True)]


def classify(folder: Path, conversations: Sequence[list[Message]], batch_size: BatchSize = "auto") -> list[Prediction]:
    """Class and confidence of each conversation (mostly a single message) by the merged model in `folder`."""
    contract = read_json(folder / "contract.json")
    if "labels" not in contract:
        raise MergeError(
            f"{folder} is not a classification model: its contract.json has no labels; train one with train.task "
            "sequence-classification"
        )
    encoder = load_classes(contract, local_source(folder))
    rows = [encoder.prompt(messages)[1] for messages in conversations]
    model = load_for_scoring(local_source(folder), None, contract["labels"])
    logits = compute_logits(model, encoder, rows, batch_size, "classify", "the model")
    return _make_predictions(logits, contract["labels"])


def score_classes(test: pa.Table, logits: NDArray[np.float32], labels: Sequence[str]) -> pa.Table:
    """Every test text with its class and the predicted one, (N rows).

    Columns: as `score_items`, plus `confidence` and `probabilities`, without `answer_ids`; metrics of texts are null.
    """
    items = test.select(["id", "task", "language", "group", "scoring", "prompt", "reference"])
    predictions = _make_predictions(logits, labels)
    predicted, references = [prediction.label for prediction in predictions], test["reference"].to_pylist()
    right = pa.array([float(a == b) for a, b in zip(predicted, references, strict=True)], pa.float64())
    columns: dict[str, pa.Array] = {
        "prompt_tokens": pa.array(map(len, test.column("input_ids").to_pylist()), pa.int32()),
        "answer": pa.array(predicted, pa.string()),
        "status": pa.array(["ok"] * len(test)),
        "cut_off": pa.array([False] * len(test)),
        "label": pa.array(references, pa.string()),
        "predicted": pa.array(predicted, pa.string()),
        "confidence": pa.array([prediction.confidence for prediction in predictions], pa.float64()),
        "probabilities": pa.array([prediction.probabilities for prediction in predictions], pa.list_(pa.float64())),
        "accuracy": right,
        "exact_match": right,
    }
    text_metrics = [metric for metric in METRICS if metric not in (*columns, "macro_f1", "perplexity")]
    for name in ("loss", "loss_tokens", *text_metrics):
        columns[name] = pa.nulls(len(test), pa.float64())
    for name, column in columns.items():
        items = items.append_column(name, column)
    return items


def class_provenance(params: EvaluateParams, dataset: Path) -> dict[str, Any]:
    """`provenance` of scores of classes."""
    return provenance(params, dataset, SIGNATURES) | {"decoding": "most probable"}
