"""Conversations and chat templates for tests: the real templates that TRL ships, and the named ones."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate, Encoded
from pipeline.chat.template import NAMED, named_text

FOLDER = Path(trl.__file__).parent / "chat_templates"
# TRL's training variants of templates, and models that read images.
EXCLUDED = ("_training", "_vl", "idefics", "llava", "smolvlm", "diffusion")
TEMPLATES = [path.stem for path in sorted(FOLDER.glob("*.jinja")) if not any(part in path.stem for part in EXCLUDED)]
DATED = [name for name in TEMPLATES if "strftime_now" in (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")]
STOPS = {  # tokens that end a turn, by the start of the name, if not <|im_end|>; the first ends the sequence
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<｜end▁of▁sentence｜>"],
    "gemma4": ["<turn|>", "<|tool_response>"], "gemma": ["<end_of_turn>"],
    "glm": ["<|user|>", "<|observation|>", "<|endoftext|>"], "gptoss": ["<|return|>", "<|call|>"],
    "llama3": ["<|eot_id|>"], "muse": ["<|eot|>", "<|eom|>"], "phi": ["<|endoftext|>", "<|end|>"],
    "mistral": ["</s>"], "chatglm3": ["<|user|>", "<|observation|>", "</s>"],
}  # fmt: skip
CONTROL = re.compile(
    r"<\|[^|<>\s{}]+\|>|<[a-z_]+_of_turn>|<｜[^｜{}]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]|</?think>|<(?:bos|eos)>"
)
THOUGHT = "Two and two make four."
SYSTEM = {"role": "system", "content": "Be brief."}


def talk(*contents: str, thought: str | None = None) -> list[Message]:
    """Messages of user and assistant in turn; each answer has the reasoning `thought`."""
    messages: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
    ]
    if thought is not None:
        messages = [m | ({"reasoning_content": thought} if m["role"] == "assistant" else {}) for m in messages]
    return messages


CONVERSATIONS = {
    "one turn": talk("Hello", "Good day to you."),
    "three turns": talk("Hello", "Good day to you.", "Bye", "See you soon.", "Bye", "Take care."),
    "system": [SYSTEM, *talk("Hello", "Hi, friend.")],
    "reasoning": talk("2 + 2?", "Four it is.", thought=THOUGHT),
    "reasoning, two turns": talk("2 + 2?", "Four it is.", "And again?", "Still four.", thought=THOUGHT),
    "markup": talk("Say it in HTML.", "<p>Four</p>\n", "And indented?", "    return 4\n"),
}


def stops_of(name: str) -> list[str]:
    return next((stops for start, stops in STOPS.items() if name.startswith(start)), ["<|im_end|>"])


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a template's control tokens; like real ones, it merges line breaks."""
    text = named_text(name) if name in NAMED else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊĊ", "Ġb", "oo"]
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "b"), ("o", "o")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stops_of(name)[0], bos_token="<bos>")
    control = sorted({*CONTROL.findall(text), *stops_of(name), "<bos>"} - {"[INST", "[/INST"})
    fast.add_special_tokens({"additional_special_tokens": control})
    fast.chat_template = text
    return fast


def template_of(name: str, **settings: Any) -> ChatTemplate:
    """A template of TRL's or a named one, with the date 31 January 2026 if it prints one."""
    tokenizer = tokenizer_for(name)
    stop_ids = frozenset(tokenizer.convert_tokens_to_ids(stops_of(name)))
    return ChatTemplate(
        tokenizer, tokenizer.chat_template, stop_ids, **({"chat_template_date": "2026-01-31"} | settings)
    )


def trained_runs(row: Encoded) -> list[tuple[list[int], list[int]]]:
    """For each run of trained tokens in a row and its earlier rows: the tokens before it, and the run."""
    runs = []
    for ids, labels in [(part.input_ids, [*part.labels, -100]) for part in (*row.earlier, row)]:
        edges = [i for i, label in enumerate(labels) if (label == -100) != (i == 0 or labels[i - 1] == -100)]
        runs += [(ids[:start], ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return runs


def trained(template: ChatTemplate, messages: list[Message], tools: str | None = None) -> list[str]:
    """The trained texts of a conversation, one for each answer."""
    return [template.tokenizer.decode(ids) for _, ids in trained_runs(template.encode(messages, tools))]
