"""What a model wrote, in its parts: the thinking before the answer, the answer itself, and the tools it calls.

Tool calls are read by transformers' response parser with the fields of `calls.yaml`. Thinking is found here, since the
prompt may have opened it and a model may never end it. A text in which none of this occurs is decoded without control
tokens, and nothing else happens to it.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.rendering import RowError, TemplateError
from pipeline.chat.turns import PROBE_ANSWER, opened_thinking

Field = dict[str, Any]  # of a response template, as transformers documents it
ToolCall = dict[str, Any]  # {"name": str, "arguments": object}

# How the thinking begins and ends.
TAGS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"))
THINKING = (
    *TAGS,
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("to=self<|message|>", "<|eom|>"),  # Muse
)
HEADER = re.compile(r"\s*(?:<\|start\|>\w*\s*)?")  # gpt-oss: each part of an answer has one, the prompt the first
TAIL = 32  # tokens of the prompt that may hold how its last header ends

LENIENT = {"name": "json", "args": {"allow_non_json": True}}  # an argument's value; what is not JSON is text
TABLE = YAML(typ="safe").load(Path(__file__).with_name("calls.yaml"))


@dataclass(frozen=True)
class Answer:
    text: str  # without thinking, calls and control tokens, nor the space around it that is not part of it
    ids: list[int]  # new tokens, the end token included
    cut_off: bool  # no end token came, or the thinking never ended
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def message(self) -> Message:
        """As a turn of a conversation: the template decides what of it later turns see."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": as_calls(self.tool_calls)} if self.tool_calls else {})


def read_answer(template: ChatTemplate, prompt: Sequence[int], ids: list[int], tools: str | None = None) -> Answer:
    """The parts of the tokens `ids`, which a model wrote after the tokens `prompt`.

    A call that is not well-formed stays part of the content.

    Args:
        tools: those on offer, as JSON: some templates write 7 and "7" alike, and only these tell them apart.
    """
    tokenizer = template.tokenizer
    ended = bool(ids) and ids[-1] in template.stop_ids
    text = str(tokenizer.decode(ids))
    thoughts, rest = _thinking(template, str(tokenizer.decode(list(prompt[-TAIL:]))), text)
    reasoning = _without_tokens(tokenizer, "\n".join(thoughts)).strip() or None
    if rest is None:
        return Answer("", ids, True, reasoning)
    stop = str(tokenizer.decode(ids[-1:])) if ended else ""
    content, calls = _answer(template, prompt, rest, stop, tools)
    if content == text:
        answer = str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
    else:
        answer = _without_tokens(tokenizer, content.rstrip().removesuffix(stop))
    return Answer(_unframed(template, answer), ids, not ended, reasoning, calls)


def canonical_calls(calls: Sequence[ToolCall]) -> str:
    """`calls` as JSON that is the same for equal calls: keys, and the calls of one turn, have no order; 3.0 is 3."""
    plain = json.loads(json.dumps(list(calls)), parse_float=_number)
    return f"[{', '.join(sorted(json.dumps(call, ensure_ascii=False, sort_keys=True) for call in plain))}]"


def as_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """`calls` in the form that conversations have them."""
    return [{"id": f"call{i:05}", "type": "function", "function": dict(call)} for i, call in enumerate(calls, start=1)]


def _thinking(template: ChatTemplate, asked: str, text: str) -> tuple[list[str], str | None]:
    """The thoughts that `text` begins with, and what follows them; None if they never end."""
    thoughts: list[str] = []
    opened = opened_thinking(asked)
    start, pair = 0, None if opened is None else ("", opened[0])
    if pair is None:  # a template may leave the opening out that its model was trained with
        ends = (pair for pair in TAGS if pair[1] in template.text and pair[1] in text)
        pair = next((pair for pair in ends if pair[0] not in text.partition(pair[1])[0]), None)
    rest = text
    while True:
        if pair is None:
            header = HEADER.match(rest)
            assert header is not None  # it may be empty
            start = header.end()
            pair = next((pair for pair in THINKING if rest.startswith(pair[0], start)), None)
            if pair is None:
                return thoughts, rest[start:] if thoughts and header[0].strip() else rest
            start += len(pair[0])
        thought, end, rest = rest[start:].partition(pair[1])
        thoughts.append(thought.strip())
        if not end:
            return thoughts, None
        start, pair = 0, None


def _answer(
    template: ChatTemplate, prompt: Sequence[int], text: str, stop: str, tools: str | None
) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and calls of an answer without its thinking; all of `text` is content where nothing else is in it."""
    frame: Field = next((entry["field"] for entry in TABLE["frames"] if entry["mark"] in text), {})
    marked = (entry for entry in TABLE["calls"] if entry["mark"] in text and entry["template"] in template.text)
    entry: dict[str, Any] = next(marked, {})
    offered = json.loads(tools) if tools is not None else None
    fields = {"content": frame | {"content": "text", "content_args": {"strip": False}}}
    with_calls = [fields | {"tool_calls": _call_field(entry, bool(offered))}] if entry else []
    for tried in [*with_calls, *([fields] if frame else [])]:
        try:
            parsed = template.tokenizer.parse_response(
                text, {"start_anchor": " ", "fields": tried}, prefix="", tools=offered
            )
            found = parsed.get("tool_calls", [])
            calls = tuple(_call(item) for one in found for item in (one if isinstance(one, list) else [one]))
        except (ValueError, KeyError, TypeError):  # it began as a call and is none
            continue
        if calls and entry.get("bare"):
            asked = str(template.tokenizer.decode(list(prompt)))
            calls = calls if all(c["name"] in asked for c in calls) else ()
        if calls or frame:
            return str(parsed.get("content", "")), calls
    return text, ()


def _call_field(entry: dict[str, Any], offered: bool) -> Field:
    """How the calls of a table's entry are read; without tools on offer, values have the type that they look like."""
    if "trl" in entry:
        from trl import chat_template_utils as trl  # seconds, and PyTorch with it

        field: Field = getattr(trl, f"{entry['trl']}_template")["fields"]["tool_calls"]
        if "open_pattern" in field:  # names may hold dots and dashes, as OpenAI's may
            field = field | {"open_pattern": field["open_pattern"].replace(r"<name>\w+)", r"<name>[\w.-]+)")}
    else:
        field = entry["field"]
    if field["content"] == "xml-inline" and not offered and field["content_args"]["value_parser"]["name"] == "text":
        field = field | {"content_args": field["content_args"] | {"value_parser": LENIENT}}
    return field


def _call(parsed: Any) -> ToolCall:
    """Raises ValueError: no name, or arguments that are not an object."""
    function = parsed["function"]
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ValueError(name)
    return {"name": name, "arguments": arguments or {}}


def _number(text: str) -> float:
    """A whole number as an integer."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _without_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.sub("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)", "", text)


def _unframed(template: ChatTemplate, text: str) -> str:
    """`text` without the space that stands around an answer; its first line keeps the indentation that it has."""
    text = text.rstrip()
    if not text[:1].isspace():
        return text
    lead = ""
    with suppress(RowError, TemplateError):
        before = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER}])
        before = before.partition(PROBE_ANSWER)[0]
        lead = before[len(before.rstrip()) :]
    return re.sub(r"\A(?:\s*\n| (?! ))", "", text.removeprefix(lead))
