"""How likely a model finds the expected answers: test items in, the loss of each reference's tokens out."""

import json
from typing import Any

import pyarrow as pa
import torch

from pipeline.chat import Message
from pipeline.chat.responses import as_calls
from pipeline.chat.template import ChatTemplate
from pipeline.core.memory import in_fitting_batch
from pipeline.core.progress import Progress
from pipeline.data.records import TOOL_CALLS

MAX_BATCH = 64
MAX_LOGITS = 2**27  # of a batch: half a gigabyte in float32


@torch.inference_mode()
def reference_losses(
    model: Any, template: ChatTemplate, test: pa.Table, stage: str, system: str
) -> tuple[list[float], list[int]]:
    """Summed loss in nats of each test item's reference, (N,), and the number of its tokens, (N,).

    Counted are the tokens of the last answer that training would give loss, its end token included.
    """
    columns = [test.column(name).to_pylist() for name in ("messages", "tools", "reference", "input_ids")]
    rows = list(zip(*columns, strict=True))
    scoring = test.column("scoring").to_pylist()
    sequences = []
    for (messages, tools, reference, prompt), kind in zip(rows, scoring, strict=True):
        item = template.encode([*json.loads(messages), expected_answer(reference, kind)], tools)
        labels = [-100] * min(len(prompt), len(item.labels)) + item.labels[len(prompt) :]
        sequences.append((item.input_ids, labels))
    return sequence_losses(model, sequences, template.tokenizer.pad_token_id, stage, system)


def expected_answer(reference: str, scoring: str) -> Message:
    """A test item's reference as the turn that it was read from."""
    if scoring == TOOL_CALLS:
        return {"role": "assistant", "content": "", "tool_calls": as_calls(json.loads(reference))}
    return {"role": "assistant", "content": reference}


@torch.inference_mode()
def sequence_losses(
    model: Any, sequences: list[tuple[list[int], list[int]]], pad: int, stage: str, system: str
) -> tuple[list[float], list[int]]:
    """Summed loss of each sequence's labelled tokens (labels as in training: -100 does not count), and their number."""
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    losses, counts = [0.0] * len(sequences), [0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    progress = Progress(stage, len(order), f"likelihoods of {system}")
    largest = MAX_BATCH
    start = 0
    while start < len(order):
        width = len(sequences[order[start]][0])
        most = max(1, min(largest, len(order) - start, MAX_LOGITS // (width * vocabulary)))

        def attempt(size: int, start: int = start) -> tuple[list[float], list[int]]:
            return _losses(model, [sequences[i] for i in order[start : start + size]], pad)

        size, (totals, numbers) = in_fitting_batch(most, attempt, f"text of {width} tokens")
        largest = size if size < most else largest
        for i, total, number in zip(order[start : start + size], totals, numbers, strict=True):
            losses[i], counts[i] = total, number
        start += size
        progress.update(start)
    return losses, counts


def _losses(model: Any, batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[list[float], list[int]]:
    device = next(model.parameters()).device
    width = max(len(tokens) for tokens, _ in batch)
    ids, labels, mask = (torch.full((len(batch), width), value) for value in (pad, -100, 0))  # (B, T)
    for row, (tokens, marks) in enumerate(batch):
        ids[row, : len(tokens)], labels[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(marks)
        mask[row, : len(tokens)] = 1
    logits = model(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    logits = logits[:, -width:-1]  # virtual tokens of prompt tuning come before
    target = labels[:, 1:].to(device)
    # Only labelled positions become float32: a quarter of the memory on long prompts.
    loss = torch.zeros(target.shape, device=device)
    counted = target != -100
    loss[counted] = torch.nn.functional.cross_entropy(logits[counted].float(), target[counted], reduction="none")
    return loss.sum(dim=1).tolist(), counted.sum(dim=1).tolist()
