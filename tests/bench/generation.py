"""`make bench-evaluate`: answers in slots against transformers' static batches and its continuous batching.

A random Llama with a LoRA adapter on it, unmerged, and answers that end where real ones do: log-normal lengths. All
three write the same tokens or the line says how many differ. Only useful tokens count: none after an answer's end.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from pipeline.scoring.generation import in_slots

BATCH_SIZE = 64
MAX_NEW_TOKENS = 512
PROMPTS = 320
PREFIX = 24  # tokens of a system message that all prompts begin with
NO_STOP: frozenset[int] = frozenset()  # where a random model would stop means nothing: lengths are given


@dataclass(frozen=True)
class Work:
    model: Any
    prompts: list[list[int]]
    lengths: list[int]  # of the answers


def made_up() -> Work:
    """Answers of 8 to 512 tokens, 60 at the median, and prompts of 30 to 200, in no order."""
    torch.manual_seed(0)
    draw = random.Random(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    system = [draw.randrange(3, 8192) for _ in range(PREFIX)]
    prompts, lengths = [], []
    for _ in range(PROMPTS):
        body = min(176, max(6, round(draw.lognormvariate(3.6, 0.7))))
        prompts.append(system + [draw.randrange(3, 8192) for _ in range(body)])
        lengths.append(min(MAX_NEW_TOKENS, max(8, round(draw.lognormvariate(4.1, 0.9)))))
    return Work(model, prompts, lengths)


class _Lengths(StoppingCriteria):
    """Ends each row at its own length, as an end token would."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.ends  # type: ignore[return-value]


@torch.inference_mode()
def static(work: Work) -> dict[int, list[int]]:
    """transformers' `generate`, batches in the given order: each takes as long as its longest answer."""
    answers: dict[int, list[int]] = {}
    for start in range(0, len(work.prompts), BATCH_SIZE):
        batch = range(start, min(start + BATCH_SIZE, len(work.prompts)))
        width = max(len(work.prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(work.prompts[i])) + work.prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(work.prompts[i])) + [1] * len(work.prompts[i]) for i in batch])
        config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
        output = work.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[_Lengths([width + work.lengths[i] for i in batch])],
        )[:, width:].tolist()
        answers |= {i: new[: work.lengths[i]] for i, new in zip(batch, output, strict=True)}
    return answers


def slots(work: Work) -> dict[int, list[int]]:
    """What Retune does."""
    return dict(in_slots(work.model, work.prompts, work.lengths, NO_STOP, BATCH_SIZE))


def continuous(work: Work) -> dict[int, list[int]]:
    """transformers' continuous batching, on paged attention."""
    model = work.model.base_model.model  # PEFT's wrapper has no such method; the adapter's layers are in it
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = ContinuousBatchingConfig(max_requests_per_batch=BATCH_SIZE)
    answers: dict[int, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=limits, block=True, timeout=5
    ) as manager:
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=length)
        while len(answers) < len(work.prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                answers[int(result.request_id)] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended early")
    return answers


def measure(work: Work, ways: list[Callable[[Work], dict[int, list[int]]]]) -> Iterator[tuple[str, float, int]]:
    """Name, seconds, and how many answers differ from those of the first way."""
    first: dict[int, list[int]] = {}
    for way in ways:
        started = time.perf_counter()
        answers = way(work)
        seconds = time.perf_counter() - started
        first = first or answers
        yield way.__name__, seconds, sum(answers[i] != first[i] for i in first)


def main() -> None:
    torch.set_num_threads(1)  # the same for all, whatever else the machine does
    work = made_up()
    useful = sum(work.lengths)
    print(f"{len(work.prompts)} prompts, {useful:,} useful tokens, answers of at most {max(work.lengths)}, 1 thread")
    table = Table("way", "seconds", "useful tokens/s", "against static", "answers that differ")
    base = 0.0
    for name, seconds, differ in measure(work, [static, slots, continuous]):
        base = base or seconds
        table.add_row(name, f"{seconds:.1f}", f"{useful / seconds:,.0f}", f"{base / seconds:.2f}", str(differ))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
