"""Greedy answers of a model to tokenised prompts: in slots that rows enter and leave, where the model allows it.

Answers have the order of the prompts and are the same as one by one. What is done is kept on request, so that a
killed evaluation continues. Prompts that do not fit the model's context are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.chat import Message
from pipeline.chat.responses import ToolCall, as_calls, read_response
from pipeline.chat.template import ChatTemplate
from pipeline.core.memory import OutOfMemory, free, out_of_memory
from pipeline.core.progress import Progress, note
from pipeline.params import BatchSize
from pipeline.scoring.kept import KeptAnswers
from pipeline.scoring.slots import Slots, why_unfit
from pipeline.weights.loading import ModelError, input_device

ROWS_ON_A_CPU, MOST_ROWS = 64, 256  # with `batch_size: auto`; more rows make a step on a GPU no cheaper
CACHE_SHARE = 0.7  # of a GPU's free memory; the rest is for activations and logits
MIN_PREFIX = 8  # tokens that all prompts begin with; below, computing them once saves less than the pass costs


@dataclass(frozen=True)
class Answer:
    text: str  # without thinking and calls
    ids: list[int]  # new tokens, the end token included
    cut_off: bool  # max_new_tokens came before the end token, or the thinking never ended
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def message(self) -> Message:
        """As a turn of a conversation: the template decides what of it later turns see."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": as_calls(self.tool_calls)} if self.tool_calls else {})


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
) -> list[Answer]:
    """Answers to `prompts` (token ids), in their order. Greedy, so the same artifact always gives the same answers.

    Args:
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
            f"a prompt of {longest} tokens and evaluate.max_new_tokens ({max_new_tokens}) exceed the model's context "
            f"of {limit}; lower evaluate.max_new_tokens or prepare.max_length"
        )
    model.eval()
    with KeptAnswers(keep) as kept:
        answers = dict(kept.answers)
        left = [i for i in range(len(prompts)) if i not in answers]
        progress = Progress(stage, len(prompts), f"answers of {system}")
        progress.resume_at(len(answers))
        limits = [max_new_tokens] * len(left)
        rows = rows_at_once(model, batch_size, longest + max_new_tokens)
        for place, ids in new_tokens(model, [prompts[i] for i in left], limits, template, rows):
            answers[left[place]] = ids
            kept.add(left[place], ids)
            progress.update(len(answers))
    offered = tools or [None] * len(prompts)
    return [to_answer(answers[i], template, prompts[i], offered[i]) for i in range(len(prompts))]


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
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's place and its greedy tokens, at most `limits` of them, as they end; the end token included."""
    done: set[int] = set()
    reason_against_slots = why_unfit(model, prompts) if prompts else None
    if reason_against_slots is not None:
        note(f"answers are made in batches, each as slow as its longest; not in slots: {reason_against_slots}")
    while left := [i for i in range(len(prompts)) if i not in done]:
        waiting, their_limits = [prompts[i] for i in left], [limits[i] for i in left]
        try:
            if reason_against_slots is None:
                answers = in_slots(model, waiting, their_limits, template.stop_ids, batch_size)
            else:
                answers = _in_batches(model, waiting, their_limits, template, batch_size)
            for place, ids in answers:
                done.add(left[place])
                yield left[place], ids
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
                f"out of memory with one prompt of {max(map(len, waiting))} tokens ({reason}); lower "
                "evaluate.max_new_tokens or prepare.max_length, or take a machine with more memory"
            )
        batch_size = (size + 1) // 2
        note(f"out of memory with {size} prompts at once; retrying with {batch_size}")


@torch.inference_mode()
def in_slots(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop_ids: frozenset[int], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `new_tokens`, where `why_unfit` is None: a row that has ended leaves, and waiting ones take its place."""
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest is last, and first out
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    slots = Slots(model, min(batch_size, len(prompts)), capacity, common_prefix(prompts))
    rows: list[int] = []  # the prompt in each slot
    new: dict[int, list[int]] = {}
    while rows or waiting:
        # A few at a time: one pass over several prompts is cheaper than one over each.
        if waiting and (not rows or slots.free >= max(1, slots.slots // 8)):
            joining = [waiting.pop() for _ in range(min(slots.free, len(waiting)))]
            slots.add([prompts[i] for i in joining])
            rows += joining
            new |= {i: [] for i in joining}
        tokens = slots.step().argmax(-1).tolist()
        slots.append(tokens)
        for slot in reversed(range(len(rows))):  # the last first: it may take the place of one before it
            i = rows[slot]
            new[i].append(tokens[slot])
            if tokens[slot] in stop_ids or len(new[i]) == limits[i]:
                slots.drop(slot)
                rows[slot] = rows[-1]
                rows.pop()
                yield i, new.pop(i)


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with and none ends with, if they are worth a pass of their own."""
    if len(prompts) < 2:
        return []
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(prompt[:-1] for prompt in prompts), strict=False))
    prefix = [column[0] for column in same]
    return prefix if len(prefix) >= MIN_PREFIX else []


@torch.inference_mode()
def _in_batches(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `new_tokens`, by transformers' own `generate`, for models with another memory than keys and values."""
    pad = template.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max(limits), do_sample=False, eos_token_id=sorted(template.stop_ids), pad_token_id=pad
    )
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory fails early
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = torch.tensor([[*[pad] * (width - len(prompts[i])), *prompts[i]] for i in batch], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, new in zip(batch, output, strict=True):
            end = next((k for k, token in enumerate(new) if token in template.stop_ids), len(new))
            yield i, new[: min(end + 1, limits[i])]


def to_answer(ids: list[int], template: ChatTemplate, prompt: Sequence[int], tools: str | None = None) -> Answer:
    """New tokens after `prompt` as thinking, text and calls."""
    response = read_response(template, prompt, ids, tools)
    ended = bool(ids) and ids[-1] in template.stop_ids
    return Answer(response.content, ids, not (ended and response.finished), response.reasoning, response.tool_calls)
