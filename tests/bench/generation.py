"""`make bench-evaluate`: answers in slots next to batches of transformers' `generate`.

A random Llama with a LoRA adapter on it, unmerged, and answers that end where real ones do: log-normal lengths. Only
useful tokens count: none after an answer's end.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from pipeline.scoring.generation import in_slots
from tests.bench.measuring import header, row, timed

BATCH_SIZE = 64
MAX_NEW_TOKENS = 512
PROMPTS = 320
PREFIX = 24  # tokens of a system message that all prompts begin with
Answers = dict[int, list[int]]


@dataclass(frozen=True)
class Work:
    model: Any
    prompts: list[list[int]]
    lengths: list[int]  # of the answers


def made_up() -> Work:
    """Answers of 8 to 512 tokens, 60 at the median, and prompts of 30 to 200, in no order."""
    torch.manual_seed(0)
    draw = random.Random(0)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    system = [draw.randrange(3, 8192) for _ in range(PREFIX)]
    prompts, lengths = [], []
    for _ in range(PROMPTS):
        body = min(176, max(6, round(draw.lognormvariate(3.6, 0.7))))
        prompts.append(system + [draw.randrange(3, 8192) for _ in range(body)])
        lengths.append(min(MAX_NEW_TOKENS, max(8, round(draw.lognormvariate(4.1, 0.9)))))
    return Work(get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora).eval(), prompts, lengths)


class _Lengths(StoppingCriteria):
    """Ends each row at its own length, as an end token would."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.ends  # type: ignore[return-value]


@torch.inference_mode()
def static(work: Work) -> Answers:
    """transformers' `generate`, batches in the given order: each takes as long as its longest answer."""
    answers: Answers = {}
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
    for start in range(0, len(work.prompts), BATCH_SIZE):
        batch = range(start, min(start + BATCH_SIZE, len(work.prompts)))
        width = max(len(work.prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(work.prompts[i])) + work.prompts[i] for i in batch])
        ends = _Lengths([width + work.lengths[i] for i in batch])
        output = work.model.generate(
            input_ids=ids, attention_mask=(ids != 0).long(), generation_config=config, stopping_criteria=[ends]
        )
        answers |= {i: new[: work.lengths[i]] for i, new in zip(batch, output[:, width:].tolist(), strict=True)}
    return answers


def slots(work: Work) -> Answers:
    """What Retune does; where a random model would stop means nothing, lengths are given."""
    return dict(in_slots(work.model, work.prompts, work.lengths, frozenset(), BATCH_SIZE))


def main() -> None:
    torch.set_num_threads(1)  # the same for all, whatever else the machine does
    work = made_up()
    useful, expected, first = sum(work.lengths), {}, 0.0
    ways: list[Callable[[Work], Answers]] = [static, slots]
    header(f"{len(work.prompts)} prompts, 1 thread", "useful tokens/s", "against static", "answers that differ")
    for way in ways:
        seconds, answers = timed(lambda way=way: way(work))  # type: ignore[misc]
        expected, first = expected or answers, first or seconds
        differ = sum(answers[i] != expected[i] for i in expected)
        row(way.__name__, f"{useful / seconds:,.0f}", f"{first / seconds:.2f}", differ)


if __name__ == "__main__":
    main()
