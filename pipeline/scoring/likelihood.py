"""A model's loss on given texts, and how many of their tokens it would have chosen itself."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.chat import Message
from pipeline.chat.responses import as_calls
from pipeline.chat.template import ChatTemplate
from pipeline.core.memory import in_fitting_batch
from pipeline.core.progress import Progress
from pipeline.data.records import TOOL_CALLS
from pipeline.weights.loading import input_device

BATCH_TOKENS = 2**12  # per pass, with padding
BATCH_LOGITS = 2**28  # per pass: half a gigabyte in bfloat16
Sequence = tuple[list[int], list[int]]  # tokens, and labels as in training: -100 does not count
Losses = tuple[list[float], list[int]]  # for each text: loss in nats, summed over the tokens that count; their number
T = TypeVar("T")
# Logits of the labelled tokens (n, V), these tokens (n,) and a mask of their positions (B, T) → one result per row.
Reduce = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[T]]


def reference_losses(model: Any, template: ChatTemplate, test: pa.Table, stage: str, system: str) -> Losses:
    """The loss of each test item's reference, over the tokens that training would count, with the end token."""
    names = ("messages", "tools", "reference", "input_ids", "scoring")
    sequences = []
    for messages, tools, reference, prompt, kind in zip(*(test[name].to_pylist() for name in names), strict=True):
        expected: Message = {"role": "assistant", "content": reference}
        if kind == TOOL_CALLS:
            expected |= {"content": "", "tool_calls": as_calls(json.loads(reference))}
        item = template.encode([*json.loads(messages), expected], tools)
        labels = [-100] * min(len(prompt), len(item.labels)) + item.labels[len(prompt) :]
        sequences.append((item.input_ids, labels))
    return sequence_losses(model, sequences, template.tokenizer.pad_token_id, stage, system)


def sequence_losses(model: Any, sequences: list[Sequence], pad: int, stage: str, system: str) -> Losses:
    """Summed loss of each sequence's labelled tokens, and their number."""

    def sum_losses(logits: torch.Tensor, tokens: torch.Tensor, labelled: torch.Tensor) -> list[tuple[float, int]]:
        losses = torch.zeros(labelled.shape, dtype=torch.float64, device=logits.device)
        losses[labelled] = torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none").double()
        return list(zip(losses.sum(dim=1).tolist(), labelled.sum(dim=1).tolist(), strict=True))

    results = per_sequence(model, sequences, pad, sum_losses, stage, f"likelihoods of {system}")
    return [loss for loss, _ in results], [count for _, count in results]


def token_agreement(
    model: Any, prompts: list[list[int]], answers: list[list[int]], pad: int, stage: str, system: str
) -> float:
    """Fraction of the tokens in `answers` that `model` finds most likely after the prompt and the tokens before."""

    def count_equal(logits: torch.Tensor, tokens: torch.Tensor, labelled: torch.Tensor) -> list[int]:
        equal = torch.zeros_like(labelled)
        equal[labelled] = logits.argmax(-1) == tokens
        return equal.sum(dim=1).tolist()

    sequences = [(p + a, [-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    counts = per_sequence(model, sequences, pad, count_equal, stage, f"answers compared with {system}")
    return sum(counts) / sum(map(len, answers))


@torch.inference_mode()
def per_sequence(model: Any, sequences: list[Sequence], pad: int, reduce: Reduce[T], stage: str, unit: str) -> list[T]:
    """The result of `reduce` for each sequence, in their order; computes the longest first, as many at once as fit."""
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    results: dict[int, T] = {}
    progress = Progress(stage, len(order), unit)
    tokens_at_once = BATCH_TOKENS
    while remaining := order[len(results) :]:
        width = len(sequences[remaining[0]][0])
        max_rows = _fitting_rows([sequences[i] for i in remaining], tokens_at_once, vocabulary)

        def attempt(rows: int, remaining: list[int] = remaining) -> list[T]:
            return _reduce_batch(model, [sequences[i] for i in remaining[:rows]], pad, reduce)

        rows, batch_results = in_fitting_batch(max_rows, attempt, f"text of {width} tokens")
        if rows < max_rows:
            tokens_at_once = rows * width
        results |= zip(remaining[:rows], batch_results, strict=True)
        progress.update(len(results))
    return [results[i] for i in range(len(sequences))]


def _fitting_rows(sequences: list[Sequence], tokens_at_once: int, vocabulary: int) -> int:
    """How many of `sequences`, the longest first, fit one pass."""
    width, logits = len(sequences[0][0]), 0
    for rows, (_, labels) in enumerate(sequences, start=1):
        logits = max(logits, _logits_to_keep(labels, width))
        if rows > 1 and (rows * width > tokens_at_once or rows * logits * vocabulary > BATCH_LOGITS):
            return rows - 1
    return len(sequences)


def _logits_to_keep(labels: list[int], width: int) -> int:
    """Number of positions from just before the first labelled token to the end of a row of `width` tokens."""
    first = next((k for k, label in enumerate(labels) if k and label != -100), width)
    return width - first + 1


def _reduce_batch(model: Any, batch: list[Sequence], pad: int, reduce: Reduce[T]) -> list[T]:
    device, width = input_device(model), len(batch[0][0])
    kept = max(_logits_to_keep(labels, width) for _, labels in batch)
    rows = [torch.tensor(tokens) for tokens, _ in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(device)  # (B, T)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    labels = pad_sequence([torch.tensor(labels) for _, labels in batch], batch_first=True, padding_value=-100)[:, 1:]
    # Counted from the end, because prompt tuning adds virtual tokens before the text.
    logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
    labels = labels.to(logits.device)
    labelled = labels != -100
    return reduce(logits[labelled[:, width - kept :]], labels[labelled], labelled)
