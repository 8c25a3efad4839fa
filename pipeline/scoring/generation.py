"""Greedy answers of a model to tokenised prompts, in the order of the prompts: a row that has ended makes room at once.

Rows computed together round otherwise than one alone, in the last bits, so where two tokens are nearly as likely an
answer may depend on `batch_size`; the same batch gives the same answers. What is done is kept on request, so that a
killed evaluation continues. Prompts that do not fit the model's context are refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.chat.responses import Answer, read_answer
from pipeline.chat.template import ChatTemplate
from pipeline.core.memory import OutOfMemory, free, out_of_memory
from pipeline.core.progress import Progress, note
from pipeline.params import BatchSize
from pipeline.scoring.kept import KeptAnswers
from pipeline.scoring.rolling import RollingBatch, remembers_keys_and_values_alone
from pipeline.weights.loading import ModelError, input_device

ROWS_ON_A_CPU, MOST_ROWS = 64, 256  # with `batch_size: auto`; more rows make a step on a GPU no cheaper
CACHE_SHARE = 0.7  # of a GPU's free memory; the rest is for activations, logits and the copy of a layer that grows
Prompts = Sequence[Sequence[int]]


@torch.inference_mode()
def generate(
    model: Any,
    template: ChatTemplate,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: BatchSize,
    stage: str,
    system: str,
    keep: Path | None = None,
    tools: Sequence[str | None] | None = None,
    limited_by: str = "evaluate.max_new_tokens",
) -> list[Answer]:
    """Answers to `prompts` (token ids), in their order.

    Args:
        limited_by: the option that `max_new_tokens` comes from, for errors.
        keep: file of answers, named after all that they depend on (`kept_file`): those in it are not made again.
        tools: those on offer in each prompt, as JSON.

    Raises:
        ModelError: a prompt and its answer do not fit the model's context.
        OutOfMemory: memory ran out with a single prompt; before that, the batch is halved.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ModelError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones ({limited_by}) exceed the model's context of "
            f"{limit}; lower {limited_by}, or shorten the prompts (prepare.max_length)"
        )
    model.eval()
    answers = KeptAnswers(keep)
    left = [i for i in range(len(prompts)) if i not in answers]
    progress = Progress(stage, len(prompts), f"answers of {system}")
    progress.resume_at(len(answers))
    rows = rows_at_once(model, batch_size, longest + max_new_tokens)
    for number, ids in new_tokens(model, [prompts[i] for i in left], max_new_tokens, template, rows, limited_by):
        answers[left[number]] = ids
        progress.update(len(answers))
    offered = tools or [None] * len(prompts)
    return [read_answer(template, prompts[i], answers[i], offered[i]) for i in range(len(prompts))]


def rows_at_once(model: Any, batch_size: BatchSize, tokens: int) -> int:
    """How many rows of `tokens` each are answered at a time: with `auto` what a GPU has memory for."""
    if batch_size != "auto":
        return batch_size
    if input_device(model).type == "cpu":
        return ROWS_ON_A_CPU
    free()
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_of_a_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize  # keys and values
    unused, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST_ROWS, int(unused * CACHE_SHARE) // (bytes_of_a_token * tokens)))


def new_tokens(
    model: Any, prompts: Prompts, limit: int, template: ChatTemplate, batch_size: int, limited_by: str
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's number and its greedy tokens, at most `limit` of them, as they end; the end token included."""
    done: set[int] = set()
    rolling = remembers_keys_and_values_alone(model)
    if prompts and not rolling:
        note("answers are made in fixed batches, each as slow as its longest: rows of this model cannot be exchanged")
    while left := [i for i in range(len(prompts)) if i not in done]:
        waiting = [prompts[i] for i in left]
        answers = (rolling_answers if rolling else in_batches)(model, waiting, limit, template, batch_size)
        try:
            for number, ids in answers:
                done.add(left[number])
                yield left[number], ids
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside `except`, whose traceback holds the failed attempt's tensors.
        del answers
        free()
        size = min(batch_size, len(left))
        if size == 1:
            raise OutOfMemory(
                f"out of memory with one prompt of {max(map(len, waiting))} tokens ({reason}); lower {limited_by} or "
                "prepare.max_length, or take a machine with more memory"
            )
        batch_size = (size + 1) // 2
        note(f"out of memory with {size} prompts at once; retrying with {batch_size}")


@torch.inference_mode()
def rolling_answers(
    model: Any, prompts: Prompts, limit: int, template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `new_tokens`: a row that has ended leaves the batch, and waiting ones join it."""
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory fails early
    batch, rows = RollingBatch(model), list[int]()  # the prompt of each row
    new: list[list[int]] = [[] for _ in prompts]
    while rows or waiting:
        first, room = 0, batch_size - len(rows)
        # A few at a time: one pass over several prompts is cheaper than one over each.
        if waiting and (not rows or room >= max(1, batch_size // 8)):
            first, joined = len(rows), batch.join([prompts[i] for i in waiting[:room]])
            rows, waiting = rows + waiting[:joined], waiting[joined:]
        else:
            batch.step()
        for i, token in zip(rows[first:], batch.last[first:], strict=True):
            new[i].append(token)
        ended = [row for row, i in enumerate(rows) if new[i][-1] in template.stop_ids or len(new[i]) == limit]
        if ended:
            yield from ((rows[row], new[rows[row]]) for row in ended)
            left = [row for row in range(len(rows)) if row not in ended]
            batch.keep(left)
            rows = [rows[row] for row in left]


@torch.inference_mode()
def in_batches(
    model: Any, prompts: Prompts, limit: int, template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `new_tokens`, by transformers' own `generate`, for models with another memory than keys and values."""
    pad = template.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(template.stop_ids), pad_token_id=pad
    )
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = torch.tensor([[*[pad] * (width - len(prompts[i])), *prompts[i]] for i in batch], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, new in zip(batch, output, strict=True):
            end = next((k for k, token in enumerate(new) if token in template.stop_ids), len(new))
            yield i, new[: end + 1]
