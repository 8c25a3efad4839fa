"""What a model wrote, in its parts: the thinking before the answer, the answer itself, and the tools it calls.

Templates write these parts in some twenty ways. Tool calls are read by transformers' response parser with TRL's fields
for it where TRL has the family, with fields of the same form for the others. Thinking is found here, since the prompt
may have opened it and a model may never end it. A text in which none of this occurs is decoded without control tokens,
and nothing else happens to it.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.rendering import RowError, TemplateError
from pipeline.chat.turns import PLACE, opened_thinking

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
END = r"\s*(?:<[^<>\s]{1,30}>)?\s*$"  # the token that ends a turn, if there is one
TAIL = 32  # tokens of the prompt that may hold how its last header ends

LENIENT = {"name": "json", "args": {"allow_non_json": True}}  # an argument's value; what is not JSON is text
_BY_NAME = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def _json_call(open_pattern: str, close_pattern: str) -> Field:
    """A call whose name stands in its opening, before a JSON object of its arguments."""
    pattern = {"open_pattern": open_pattern, "close_pattern": close_pattern}
    return pattern | {"repeats": True, "content": "json", "transform": _BY_NAME}


def _json_list(open_pattern: str, close_pattern: str, name: str = "name", arguments: str = "arguments") -> Field:
    """Calls as one JSON list of objects."""
    call = {"type": "function", "function": {"name": f"{{{name}}}", "arguments": f"{{{arguments}}}"}}
    pattern = {"open_pattern": open_pattern, "close_pattern": close_pattern}
    return pattern | {"repeats": True, "content": "json", "transform": call, "transform_each": True}


def _tags(open_pattern: str, close_pattern: str, tag_pattern: str, value_parser: Field) -> Field:
    """A call whose name stands in its opening, before its arguments one by one."""
    pattern = {"open_pattern": open_pattern, "close_pattern": close_pattern}
    values = {"tag_pattern": tag_pattern, "value_parser": value_parser}
    return pattern | {"repeats": True, "content": "xml-inline", "content_args": values, "transform": _BY_NAME}


def _of_trl(template: dict[str, Any]) -> Field:
    """TRL's field for calls, with names that may hold dots and dashes, as OpenAI's may."""
    field: Field = template["fields"]["tool_calls"]
    return field | {"open_pattern": field["open_pattern"].replace(r"<name>\w+)", r"<name>[\w.-]+)")}


MAY_CALL = re.compile(r'tool.?call|functions\.|\[TOOL_CALLS\]|<\|START_ACTION\|>|invoke name=|"parameters"')
BARE = '"parameters"'  # JSON without a mark around it; a call only if it names a tool on offer


# What an answer with calls contains, what its template then contains, and how its calls are read; the first counts.
OTHER_CALLS: tuple[tuple[str, str, Field], ...] = (
    (  # gpt-oss, as its template writes calls and as the model itself does
        "to=functions.",
        "",
        _json_call(
            r"(?:<\|channel\|>commentary\s*)?to=functions\.(?P<name>[\w.-]+)\s*(?:<\|channel\|>commentary)?\s*"
            r"(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>",
            r"<\|call\|>\s*|$",
        ),
    ),
    (
        "<｜tool▁call▁begin｜>",
        "",
        _json_call(
            r"(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)"
            r"(?:<｜tool▁sep｜>|\s*```json\s)",
            r"(?:\s*```)?\s*<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
        ),
    ),
    (
        "<|tool_call_begin|>",
        "",
        _json_call(
            r"(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+?)"
            r"(?::\d+)?\s*<\|tool_call_argument_begin\|>",
            r"<\|tool_call_end\|>\s*(?:<\|tool_calls_section_end\|>)?",
        ),
    ),
    (
        "[TOOL_CALLS]",
        "[ARGS]",
        _json_call(r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]", rf"(?=\[TOOL_CALLS\])|{END}"),
    ),
    ("[TOOL_CALLS]", "", _json_list(r"\[TOOL_CALLS\]", rf"(?<=\]){END}")),
    ("<|tool_call|>", "", _json_list(r"<\|tool_call\|>", rf"<\|/tool_call\|>|(?<=\]){END}")),
    ("<|START_ACTION|>", "", _json_list(r"<\|START_ACTION\|>", r"<\|END_ACTION\|>", "tool_name", "parameters")),
    (
        "invoke name=",
        "",
        _tags(
            r'(?:<(?:\w+:)?(?:function_calls|tool_call)>)?\s*<(?:\w+:)?invoke name="(?P<name>[^"]+)">',
            r"</(?:\w+:)?invoke>\s*(?:</(?:\w+:)?(?:function_calls|tool_call)>)?\s*",
            r'<(?:\w+:)?parameter name="(?P<key>[^"]+)">(?P<value>.*?)</(?:\w+:)?parameter>',
            {"name": "text"},
        ),
    ),
    (
        "tool_call(",
        "tool_call(",  # ChatGLM 3
        _tags(
            r"(?P<name>[\w.-]+)\s*```python\s*tool_call\(",
            r"\)\s*```\s*",
            r'(?P<key>\w+)=(?P<value>"(?:[^"\\]|\\.)*"|\[.*?\]|\{.*?\}|[^,)]+)(?:,\s*|$)',
            LENIENT,
        ),
    ),
)


@cache
def _call_fields() -> tuple[tuple[str, str, Field], ...]:
    """`OTHER_CALLS` and those that TRL has; its import takes seconds, and PyTorch with it."""
    from trl import chat_template_utils as trl

    return (
        ("<tool_call>", "<arg_key>", _of_trl(trl.glm4moe_template)),
        ("<tool_call>", "<function=", _of_trl(trl.qwen3_5_template)),
        ("<tool_call>", "", trl.qwen3_template["fields"]["tool_calls"]),  # what templates without calls are given, too
        ("<|tool_call>", "", _of_trl(trl.gemma4_template)),
        ("<|tool_call_start|>", "", _of_trl(trl.lfm2_2_5_template)),
        *OTHER_CALLS,
        (BARE, BARE, _of_trl(trl.llama3_template)),
    )


# Answers whose text stands in a frame of its own; what is outside of it is no text.
FRAMES: tuple[tuple[str, Field], ...] = (
    (
        "<|channel|>",
        {
            "open_pattern": r"<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>\w+)?<\|message\|>",
            "close_pattern": r"<\|(?:return|end)\|>",
        },
    ),
    ("to=user<|message|>", {"open_pattern": r"to=user<\|message\|>", "close_pattern": r"<\|e(?:ot|om)\|>"}),
)


@dataclass(frozen=True)
class Response:
    content: str  # without control tokens, and without the space around it that is not part of it
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finished: bool = True  # False: the thinking never ended


def read_response(
    template: ChatTemplate, prompt: Sequence[int], ids: Sequence[int], tools: str | None = None
) -> Response:
    """The parts of the tokens `ids`, which a model wrote after the tokens `prompt`.

    A call that is not well-formed stays part of the content.

    Args:
        tools: those on offer, as JSON: some templates write 7 and "7" alike, and only these tell them apart.
    """
    tokenizer = template.tokenizer
    ended = bool(ids) and ids[-1] in template.stop_ids
    text = str(tokenizer.decode(list(ids)))
    thoughts, rest = _thinking(template, str(tokenizer.decode(list(prompt[-TAIL:]))), text)
    reasoning = _without_tokens(tokenizer, "\n".join(thoughts)).strip() or None
    if rest is None:
        return Response("", reasoning, finished=False)
    stop = str(tokenizer.decode(ids[-1:])) if ended else ""
    content, calls = _answer(template, prompt, rest, stop, tools)
    if content == text:
        answer = str(tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True))
    else:
        answer = _without_tokens(tokenizer, content.rstrip().removesuffix(stop))
    return Response(_unframed(template, answer), reasoning, calls)


def canonical_calls(calls: Sequence[ToolCall]) -> str:
    """`calls` as JSON that is the same for equal calls: keys, and the calls of one turn, have no order; 3.0 is 3."""
    return f"[{', '.join(sorted(json.dumps(_plain(c), ensure_ascii=False, sort_keys=True) for c in calls))}]"


def as_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """`calls` in the form that conversations have them."""
    return [{"id": f"call{i:05}", "type": "function", "function": dict(call)} for i, call in enumerate(calls, start=1)]


def _thinking(template: ChatTemplate, asked: str, text: str) -> tuple[list[str], str | None]:
    """The thoughts that `text` begins with, and what follows them; None if they never end."""
    thoughts: list[str] = []
    opened = opened_thinking(asked)
    start, pair = 0, None if opened is None else ("", opened.closer)
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
    frame = next((field for mark, field in FRAMES if mark in text), None)
    mark, call = next(((m, field) for m, hint, field in _marked(text) if hint in template.text), ("", None))
    offered = json.loads(tools) if tools is not None else None
    if call is not None and call["content"] == "xml-inline" and not offered:
        parser = call["content_args"]["value_parser"]
        parser = LENIENT if parser["name"] == "text" else parser
        call = call | {"content_args": call["content_args"] | {"value_parser": parser}}
    fields = {"content": (frame or {}) | {"content": "text", "content_args": {"strip": False}}}
    for tried in ([fields | {"tool_calls": call}] if call else []) + ([fields] if frame else []):
        try:
            parsed = template.tokenizer.parse_response(
                text, {"start_anchor": " ", "fields": tried}, prefix="", tools=offered
            )
            calls = tuple(_call(item) for item in _flat(parsed.get("tool_calls", [])))
        except (ValueError, KeyError, TypeError):  # it began as a call and is none
            continue
        if calls and mark == BARE:
            asked = str(template.tokenizer.decode(list(prompt)))
            calls = calls if all(c["name"] in asked for c in calls) else ()
        if calls or frame:
            return str(parsed.get("content", "")), calls
    return text, ()


def _marked(text: str) -> list[tuple[str, str, Field]]:
    return [entry for entry in _call_fields() if entry[0] in text] if MAY_CALL.search(text) else []


def _flat(calls: list[Any]) -> list[Any]:
    return [call for entry in calls for call in (entry if isinstance(entry, list) else [entry])]


def _call(parsed: Any) -> ToolCall:
    """Raises ValueError: no name, or arguments that are not an object."""
    function = parsed["function"]
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ValueError(name)
    return {"name": name, "arguments": arguments or {}}


def _plain(value: Any) -> Any:
    """`value` with whole numbers as integers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
        before = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACE}])
        before = before.partition(PLACE)[0]
        lead = before[len(before.rstrip()) :]
    return re.sub(r"\A(?:\s*\n| (?! ))", "", text.removeprefix(lead))
