"""Splits what a model wrote into thinking, answer and tool calls.

Tool calls are read by transformers' response parser with the fields in `calls.yaml`. Thinking is found here, because
the prompt may have opened it and the model may never end it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message, alternating
from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.turns import PROBE_ANSWER, opened_thinking

Field = dict[str, Any]  # a field of a response template, as transformers documents it
ToolCall = dict[str, Any]  # {"name": str, "arguments": object}

# The beginning and the end of thinking.
TAGS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"))
THINKING = (
    *TAGS,
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("to=self<|message|>", "<|eom|>"),  # Muse
)
HEADER = re.compile(r"\s*(?:<\|start\|>\w*\s*)?")  # gpt-oss: before each part of an answer but the first
TAIL = 32  # tokens of the prompt that are searched for an opening of the thinking

LENIENT = {"name": "json", "args": {"allow_non_json": True}}  # parser of an argument's value: JSON, else text
TABLE = YAML(typ="safe").load(Path(__file__).with_name("calls.yaml"))


@dataclass(frozen=True)
class Answer:
    text: str  # without thinking, calls, control tokens and surrounding white space
    ids: list[int]  # new tokens, the end token included
    cut_off: bool  # no end token, or the thinking never ended
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def message(self) -> Message:
        """The answer as a message; the template decides which parts of it later turns see."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": as_calls(self.tool_calls)} if self.tool_calls else {})


def read_answer(template: ChatTemplate, prompt: Sequence[int], ids: list[int], tools: str | None = None) -> Answer:
    """Parse the tokens `ids`, which a model wrote after the tokens `prompt`; a malformed call stays part of the text.

    `tools` are the offered tools as JSON: some templates write 7 and "7" alike, and only the schemas tell which it is.
    """
    tokenizer = template.tokenizer
    ended = bool(ids) and ids[-1] in template.stop_ids
    text = str(tokenizer.decode(ids))
    thoughts, rest = _split_thinking(template, str(tokenizer.decode(list(prompt[-TAIL:]))), text)
    reasoning = _without_tokens(tokenizer, "\n".join(thoughts)).strip() or None
    if rest is None:
        return Answer("", ids, True, reasoning)
    stop = str(tokenizer.decode(ids[-1:])) if ended else ""
    content, calls = _split_calls(template, prompt, rest, tools)
    if content == text:
        answer = str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
    else:
        answer = _without_tokens(tokenizer, content.rstrip().removesuffix(stop))
    return Answer(_strip(template, answer), ids, not ended, reasoning, calls)


def canonical_calls(calls: Sequence[ToolCall]) -> str:
    """`calls` as JSON that is the same for equal calls: the order of keys and calls does not count; 3.0 is 3."""
    plain = json.loads(
        json.dumps(list(calls)), parse_float=lambda text: int(x) if (x := float(text)).is_integer() else x
    )
    return f"[{', '.join(sorted(json.dumps(call, ensure_ascii=False, sort_keys=True) for call in plain))}]"


def as_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """`calls` as a message's `tool_calls`."""
    return [{"id": f"call{i:05}", "type": "function", "function": dict(call)} for i, call in enumerate(calls, start=1)]


def _split_thinking(template: ChatTemplate, prompt_end: str, text: str) -> tuple[list[str], str | None]:
    """The thoughts at the beginning of `text`, and what follows them; None if they never end."""
    thoughts: list[str] = []
    opened = opened_thinking(prompt_end)
    start, pair = 0, None if opened is None else ("", opened[0])
    if pair is None:  # a template may leave out the opening that its model was trained with
        closed = (pair for pair in TAGS if pair[1] in template.text and pair[1] in text)
        pair = next((pair for pair in closed if pair[0] not in text.partition(pair[1])[0]), None)
    rest = text
    while True:
        if pair is None:
            header = HEADER.match(rest)
            start = header.end() if header else 0
            pair = next((pair for pair in THINKING if rest.startswith(pair[0], start)), None)
            if pair is None:
                return thoughts, rest[start:] if thoughts and rest[:start].strip() else rest
            start += len(pair[0])
        thought, closing, rest = rest[start:].partition(pair[1])
        thoughts.append(thought.strip())
        if not closing:
            return thoughts, None
        start, pair = 0, None


def _split_calls(
    template: ChatTemplate, prompt: Sequence[int], text: str, tools: str | None
) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and calls of an answer without thinking; all of `text` is content if there are no calls."""
    frame: Field = next((entry["field"] for entry in TABLE["frames"] if entry["mark"] in text), {})
    matching = (entry for entry in TABLE["calls"] if entry["mark"] in text and entry["template"] in template.text)
    entry: dict[str, Any] = next(matching, {})
    offered = json.loads(tools) if tools is not None else None
    content = {"content": frame | {"content": "text", "content_args": {"strip": False}}}
    attempts = [content | {"tool_calls": _call_field(entry, bool(offered))}] if entry else []
    attempts += [content] if frame else []
    for fields in attempts:
        try:
            parsed = template.tokenizer.parse_response(
                text, {"start_anchor": " ", "fields": fields}, prefix="", tools=offered
            )
            items = parsed.get("tool_calls", [])
            calls = tuple(_parse_call(call) for item in items for call in (item if isinstance(item, list) else [item]))
        except (ValueError, KeyError, TypeError):  # malformed
            continue
        if calls and entry.get("bare"):
            prompt_text = str(template.tokenizer.decode(list(prompt)))
            calls = calls if all(call["name"] in prompt_text for call in calls) else ()
        if calls or frame:
            return str(parsed.get("content", "")), calls
    return text, ()


def _call_field(entry: dict[str, Any], offered: bool) -> Field:
    """The parser's field for an entry of `calls.yaml`; if no tools are offered, values that are JSON are parsed."""
    if "trl" in entry:
        from trl import chat_template_utils as trl  # slow: it imports PyTorch

        field: Field = getattr(trl, f"{entry['trl']}_template")["fields"]["tool_calls"]
        if "open_pattern" in field:  # OpenAI allows dots and dashes in names
            field = field | {"open_pattern": field["open_pattern"].replace(r"<name>\w+)", r"<name>[\w.-]+)")}
    else:
        field = entry["field"]
    if field["content"] == "xml-inline" and not offered and field["content_args"]["value_parser"]["name"] == "text":
        field = field | {"content_args": field["content_args"] | {"value_parser": LENIENT}}
    return field


def _parse_call(parsed: Any) -> ToolCall:
    """A tool call from the parser's result; ValueError if it has no name or its arguments are not an object."""
    function = parsed["function"]
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ValueError(name)
    return {"name": name, "arguments": arguments or {}}


def _without_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.sub("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)", "", text)


def _strip(template: ChatTemplate, text: str) -> str:
    """`text` without the white space that the template puts around an answer; the first line keeps its indentation."""
    text = text.rstrip()
    if not text[:1].isspace():
        return text
    before = template.renderer.attempt(alternating("?", PROBE_ANSWER)).partition(PROBE_ANSWER)[0]
    return re.sub(r"\A(?:\s*\n| (?! ))", "", text.removeprefix(before[len(before.rstrip()) :]))
