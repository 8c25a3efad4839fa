"""`make bench-evaluate`: answers of rows that come and go next to batches of transformers' `generate`.

A random Llama with a LoRA adapter on it, unmerged; every hundredth token ends an answer, so lengths differ as those of
real answers do. Only tokens of answers count, not what a batch computes after an answer's end.
"""

import random
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.scoring.generation import generate_in_batches, generate_in_slots
from tests.bench.measuring import header, row, timed

BATCH_SIZE, PROMPTS, MAX_NEW_TOKENS, VOCABULARY = 32, 160, 256, 8192
TEMPLATE: Any = SimpleNamespace(
    stop_ids=frozenset(range(3, VOCABULARY, 100)), tokenizer=SimpleNamespace(pad_token_id=0)
)


def make() -> tuple[Any, list[list[int]]]:
    """The model, and prompts of 30 to 200 tokens in no order."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora).eval()
    for parameter in model.parameters():  # a fresh model repeats itself; this one depends on what it has read
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    draw = random.Random(0)
    lengths = [min(200, max(30, round(draw.lognormvariate(4.1, 0.5)))) for _ in range(PROMPTS)]
    return model, [[draw.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]


def main() -> None:
    torch.set_num_threads(1)  # the same for both, whatever else the machine does
    model, prompts = make()
    ways = {"`generate`, batches sorted by length": generate_in_batches, "Retune": generate_in_slots}
    expected, first = dict[int, list[int]](), 0.0
    header(f"{PROMPTS} prompts, 1 thread", "tokens/s", "against `generate`", "answers that differ")
    for name, way in ways.items():
        seconds, answers = timed(
            lambda way=way: dict(way(model, prompts, [MAX_NEW_TOKENS] * PROMPTS, TEMPLATE, BATCH_SIZE))
        )
        expected, first = expected or answers, first or seconds
        tokens, differ = sum(map(len, answers.values())), sum(answers[i] != expected[i] for i in expected)
        row(name, f"{tokens / seconds:,.0f}", f"{first / seconds:.2f}", differ)
    lengths = sorted(map(len, expected.values()))
    print(f"\nanswers: {lengths[0]} to {lengths[-1]} tokens, {lengths[len(lengths) // 2]} at the median")


if __name__ == "__main__":
    main()
