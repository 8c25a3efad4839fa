"""A tiny real base model with its own tokenizer, and rows that it can learn; needs no network."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STEPS = 600
COLOURS = ["red", "blue", "green", "black", "white"]


def sample_rows(number: int) -> list[dict[str, str]]:
    """Alpaca rows that a tiny model can learn: the answer is a word of the question."""
    draw = random.Random(0)
    rows = []
    for i in range(number):
        colour = draw.choice(COLOURS)
        rows.append({"instruction": f"Name the colour of box {i}: {colour}", "input": "", "output": colour})
    return rows


def byte_level(texts: Iterable[str] = (), special: Sequence[str] = SPECIAL) -> Any:
    """A tokenizer like GPT-2's, trained on `texts` or on `sample_rows`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or (row["instruction"] for row in sample_rows(200)), trainer)
    return tokenizer


def make_base(folder: Path, seed: int = 0, steps: int = 0, tokenizer: Any = None, **sizes: int) -> Path:
    """A random 2-layer Llama (or other `sizes`), trained for `steps`, with its own tokenizer and a ChatML template."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = tokenizer or byte_level()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    default = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    default |= {"num_key_value_heads": 4, "max_position_embeddings": 512}
    config = LlamaConfig(
        vocab_size=len(fast), eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, **default | sizes
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    if steps:
        teach_format(model, fast, steps)
    model.save_pretrained(folder)
    return folder


def teach_format(model: Any, tokenizer: Any, steps: int) -> None:
    """Train on chats with a random colour as the answer: the base learns the words and when to stop, not the task."""
    import torch

    draw = random.Random(1)
    texts = []
    for row in sample_rows(256):
        turns = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": draw.choice(COLOURS)},
        ]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # Liger's layers, which an earlier training in this process may have put into the model's class, need the GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    ids, mask, labels = (x.to(device) for x in (batch["input_ids"], batch["attention_mask"], labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.arange(16) + 16 * (step % 16)
        model(ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.cpu()
