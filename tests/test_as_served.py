"""Real chat templates: what is trained stands behind the prompt that a server sends, and ends as a generation does."""

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.chat import Message
from pipeline.chat.conversation import LEFT_OUT, ChatTemplate
from pipeline.chat.rendering import RowError

FOLDER = Path(trl.__file__).parent / "chat_templates"
# TRL's own changes of templates, and models that look at pictures.
NOT_TEXT = ("_training", "_vl", "idefics", "llava", "smolvlm", "diffusion")
TEMPLATES = [path.stem for path in sorted(FOLDER.glob("*.jinja")) if not any(part in path.stem for part in NOT_TEXT)]
# Tokens that end a turn, by the beginning of the template's name; the first is the end-of-sequence token.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "gemma4": ["<turn|>"],
    "gemma": ["<end_of_turn>"],
    "glm": ["<|user|>", "<|observation|>", "<|endoftext|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "llama3": ["<|eot_id|>"],
    "muse": ["<|eot|>", "<|eom|>"],
    "phi": ["<|endoftext|>", "<|end|>"],
}
CONTROL = re.compile(
    r"<\|[^|<>\s{}]+\|>|<[a-z_]+_of_turn>|<｜[^｜{}]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]|</?think>|<(?:bos|eos)>"
)
THOUGHT = "Two and two make four."


def said(*turns: str, thought: str | None = None) -> list[Message]:
    messages: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)
    ]
    if thought is not None:
        messages = [m | ({"reasoning_content": thought} if m["role"] == "assistant" else {}) for m in messages]
    return messages


CONVERSATIONS = {
    "one turn": said("Hello", "Good day to you."),
    "three turns": said("Hello", "Good day to you.", "Bye", "See you soon.", "Bye", "Take care."),
    "system": [{"role": "system", "content": "Be brief."}, *said("Hello", "Hi, friend.")],
    "reasoning": said("2 + 2?", "Four it is.", thought=THOUGHT),
    "reasoning, two turns": said("2 + 2?", "Four it is.", "And again?", "Still four.", thought=THOUGHT),
    "markup": said("Say it in HTML.", "<p>Four</p>\n", "And indented?", "    return 4\n"),
}


def stops_of(name: str) -> list[str]:
    return next((stops for start, stops in STOPS.items() if name.startswith(start)), ["<|im_end|>"])


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that merges line breaks, as real ones do, with the template's control tokens."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "ĊĊ", "ĊĊĊ", "Ġb", "oo"]
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "b"), ("o", "o")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    stops = stops_of(name)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stops[0], bos_token="<bos>")
    control = sorted({*CONTROL.findall(text), *stops, "<bos>"} - {"[INST", "[/INST"})
    fast.add_special_tokens({"additional_special_tokens": control})
    fast.chat_template = text
    return fast


def template_of(name: str, train_on: str = "all_responses", **settings: Any) -> ChatTemplate:
    tokenizer = tokenizer_for(name)
    stop_ids = frozenset(tokenizer.convert_tokens_to_ids(stops_of(name)))
    today = datetime.date.today().isoformat()
    return ChatTemplate(tokenizer, tokenizer.chat_template, stop_ids, train_on, **({"date": today} | settings))


def runs(template: ChatTemplate, messages: list[Message]) -> list[tuple[list[int], list[int]]]:
    """The tokens before each run of trained tokens, and those of the run, in all rows of a conversation."""
    found = []
    encoded = template.encode(messages)
    for row in (*encoded.earlier, encoded):
        start = None
        for place, label in enumerate([*row.labels, -100]):
            if label != -100 and start is None:
                start = place
            if label == -100 and start is not None:
                ids = row.input_ids
                found.append((ids[:start], ids[start:place]))
                start = None
    return found


@pytest.mark.parametrize("train_on", ["all_responses", "last_response"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_trained_answer_stands_behind_the_prompt_a_server_sends(name: str, train_on: str) -> None:
    template = template_of(name, train_on)
    tokenizer = template.tokenizer
    for messages in CONVERSATIONS.values():
        try:
            tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        except Exception:
            continue  # a family without a system message
        trained = runs(template, messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = answers if train_on == "all_responses" else answers[-1:]
        assert len(trained) == len(asked)
        for place, (before, ids) in zip(asked, trained, strict=True):
            served = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, tokenize=False)
            assert tokenizer.decode(before) == served
            assert before == tokenizer(served, add_special_tokens=False)["input_ids"]
            run = tokenizer.decode(ids)
            assert messages[place]["content"].strip() in run
            assert run.endswith(tuple(stops_of(name)))
            opened = served.rstrip().endswith("<think>")
            assert run.count("</think>") == run.count("<think>") + opened
            assert (THOUGHT in run) == (
                "reasoning_content" in messages[place] and (opened or renders_thoughts(template))
            )


def renders_thoughts(template: ChatTemplate) -> bool:
    """Whether the template writes reasoning behind the prompt that it asks with."""
    prompt = template.render(CONVERSATIONS["reasoning"][:1], add_generation_prompt=True)
    rendered = template.render(CONVERSATIONS["reasoning"])
    return THOUGHT in rendered and not prompt.rstrip().endswith(("</think>", "<channel|>"))


DATED = [name for name in TEMPLATES if "strftime_now" in (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_pinned(name: str) -> None:
    prompts = {template_of(name, date=date).prompt(said("Hello"))[0] for date in ("2026-01-31", "2026-02-01")}
    assert len(prompts) == 2
    assert prompts == {template_of(name, date=date).prompt(said("Hello"))[0] for date in ("2026-02-01", "2026-01-31")}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_template_arguments_are_those_of_a_server(name: str) -> None:
    template = template_of(name, chat_template_kwargs={"enable_thinking": False})
    messages = CONVERSATIONS["reasoning, two turns"]
    for place, (before, ids) in zip((1, 3), runs(template, messages), strict=True):
        served = template.tokenizer.apply_chat_template(
            messages[:place], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        assert template.tokenizer.decode(before) == served
        assert THOUGHT not in template.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("reasoning", "written"), [("drop", "Four it is."), ("inline", f"<think>\n{THOUGHT}\n</think>\n\nFour it is.")]
)
def test_reasoning_without_a_place_is_dropped_and_counted_or_written_into_the_answer(
    reasoning: str, written: str
) -> None:
    template = template_of("llama3", reasoning=reasoning)
    encoded = template.encode(CONVERSATIONS["reasoning"])
    run = template.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert run == f"{written}<|eot_id|>"
    assert len(encoded.repairs) == 1


def test_reasoning_without_a_place_can_be_refused() -> None:
    with pytest.raises(RowError):
        template_of("llama3", reasoning="refuse").encode(CONVERSATIONS["reasoning"])
    template_of("llama3", reasoning="refuse").encode(CONVERSATIONS["one turn"])


def parallel_calls() -> list[Message]:
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for i, city in enumerate(("Oslo", "Rome"))
    ]
    results = [
        {"role": "tool", "name": "weather", "tool_call_id": f"call0000{i}", "content": sky}
        for i, sky in enumerate(("snow", "sun"))
    ]
    question, answer = said("Weather in Oslo and Rome?", "Snow in Oslo, sun in Rome.")
    return [question, {"role": "assistant", "content": "", "tool_calls": calls}, *results, answer]


def test_a_row_of_which_the_template_leaves_out_a_call_is_dropped_or_counted() -> None:
    # gpt-oss writes the first of several calls.
    with pytest.raises(RowError):
        template_of("gptoss").encode(parallel_calls())
    assert template_of("gptoss", on_left_out="keep").encode(parallel_calls()).repairs == (LEFT_OUT,)
    assert template_of("qwen3").encode(parallel_calls()).repairs == ()


def test_a_system_message_that_the_template_drops_is_noticed_and_one_that_it_moves_is_not() -> None:
    later = [*said("Hello", "Hi."), {"role": "system", "content": "One word only."}, *said("How are you?", "Fine.")]
    with pytest.raises(RowError):
        template_of("gptoss").encode(later)
    assert template_of("deepseek_r1_distill").encode(later).repairs == ()


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer", "qwen3", "nemotron_3_nano", "llama3"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"reasoning_effort": "low"}])
def test_the_template_that_ships_renders_what_was_trained_without_being_told_arguments_or_date(
    name: str, kwargs: dict[str, Any]
) -> None:
    template = template_of(name, date="2024-02-29" if name in DATED else None, chat_template_kwargs=kwargs)
    shipped = template.served_text()
    for messages in CONVERSATIONS.values():
        served = template.tokenizer.apply_chat_template(
            messages[:-1], chat_template=shipped, add_generation_prompt=True, tokenize=False
        )
        assert served == template.prompt(messages[:-1])[0]
