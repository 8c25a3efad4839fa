"""Greedy answers of a model to tokenised prompts, in batches of similar length."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.chat.template import ChatTemplate
from pipeline.model import ModelError
from pipeline.progress import Progress
from pipeline.training.memory import OutOfMemory, free, out_of_memory


@dataclass(frozen=True)
class Answer:
    text: str
    ids: list[int]  # new tokens, the end token included
    cut_off: bool  # max_new_tokens came before the end token


@torch.inference_mode()
def generate(
    model: Any,
    template: ChatTemplate,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    stage: str,
    system: str,
) -> list[Answer]:
    """Answers to `prompts` (token ids), in their order. Greedy, so the same artifact always gives the same answers.

    Raises:
        ModelError: a prompt and its answer do not fit the model's context.
        OutOfMemory: memory ran out with a single prompt; before that, the batch is halved.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ModelError(
            f"a prompt of {longest} tokens and evaluate.max_new_tokens ({max_new_tokens}) exceed the model's context "
            f"of {limit}; lower evaluate.max_new_tokens or prepare.max_length"
        )
    pad = template.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(template.stop_ids), pad_token_id=pad
    )
    model.eval()
    device = next(model.parameters()).device
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory fails early
    progress = Progress(stage, len(prompts), f"answers of {system}")
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        try:
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise OutOfMemory(
                    f"memory ran out with one prompt of {width} tokens ({str(error).splitlines()[0]}); lower "
                    "evaluate.max_new_tokens or prepare.max_length, or take a machine with more memory"
                ) from None
            output = None
        if output is None:  # outside `except`, whose traceback holds the failed attempt's tensors
            free()
            batch_size = (len(batch) + 1) // 2
            print(f"{stage} · memory ran out with {len(batch)} prompts; it goes on with {batch_size}", flush=True)
            continue
        for i, new in zip(batch, output, strict=True):
            answers[i] = _answer(new, template)
        start += len(batch)
        progress.update(start)
    return [answer for answer in answers if answer is not None]


def _answer(new: list[int], template: ChatTemplate) -> Answer:
    end = next((k for k, token in enumerate(new) if token in template.stop_ids), None)
    text = template.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
    return Answer(text, new if end is None else new[: end + 1], cut_off=end is None)
