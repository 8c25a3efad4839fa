"""A record of each format as a conversation of one shape.

Comes in: one record and where it stands. Goes out: a `Row`. What is no conversation is a ValueError that says what is
wrong, and becomes a `Rejected` in `formats.convert`.
"""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.params import ColumnsParams

# role: system | user | assistant | tool; content: text; tool_calls, name, tool_call_id: optional
Message = dict[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
SCORINGS = ("exact", "text")
# A dialogue in one text, as BELLE's multi-turn rows, Anthropic's and Guanaco's have it.
SPEAKER = re.compile(r"(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[::]")
SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # what `retune ingest` writes


@dataclass  # making a frozen one takes a tenth of all the time of reading rows
class Row:
    """One conversation that ends with the assistant's turn.

    `task`, `group` and `scoring` are optional columns of the source: a label for scores by task, what must stay in one
    split (e.g. all questions about one thing), and whether there is one right answer ("exact") or not ("text").
    A row whose only message is the assistant's is plain text (see `is_plain_text`); no format but `text` makes one.
    """

    messages: list[Message]
    source: str  # file:line (JSONL, CSV) or file:[index] (the others), for messages to people
    tools: str | None = None  # JSON schema of the tools on offer, as text
    task: str = "default"
    group: str | None = None
    scoring: str | None = None
    repairs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rejected:
    source: str
    reason: str
    record: Any


Converter = Callable[[dict[str, Any], str], Row | list[Row | Rejected]]


def is_plain_text(messages: list[Message]) -> bool:
    """Whether a row is text to continue rather than an answer to a prompt: no chat template belongs around it."""
    return len(messages) == 1


def converter(format: str, columns: ColumnsParams | None, labels: dict[str, list[str]]) -> Converter:
    """What makes rows of the records of a format; `labels` are the names of classes, by column."""
    made_by: dict[str, Converter] = {
        "alpaca": _from_alpaca,
        "belle": _from_alpaca,
        "self-instruct": _from_self_instruct,
        "sharegpt": _from_sharegpt,
        "messages": _from_messages,
        "prompt-completion": _from_prompt_completion,
        "openorca": _from_openorca,
        "ultrachat": _from_ultrachat,
        "text": _from_text,
        "shard": _from_shard,
    }
    return made_by.get(format) or _mapping(format, columns, labels)


def _from_alpaca(record: dict[str, Any], source: str) -> Row:
    instruction = _text(record, "instruction")
    extra = "" if record.get("input") in (None, "") else _text(record, "input", required=False)
    output = _text(record, "output")
    messages: list[Message] = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    if "history" in record:
        messages += _history(record, "history")
    if is_dialogue(instruction):
        if extra:
            raise ValueError("instruction holds a conversation (Human:/Assistant:) and there is an input beside it")
        messages += _dialogue(instruction, "instruction", open_end=True)
    else:
        messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return _row(messages, record, source)


def _from_self_instruct(record: dict[str, Any], source: str) -> list[Row | Rejected]:
    instances = _list(record, "instances")
    if not instances:
        raise ValueError("has no instances")
    rows: list[Row | Rejected] = []
    for number, instance in enumerate(instances):
        where = f"{source}#{number}"
        try:
            if not isinstance(instance, dict):
                raise ValueError(f"has an instance that is a {type(instance).__name__}, not an object")
            rows.append(
                _from_alpaca(record | {"input": instance.get("input"), "output": instance.get("output")}, where)
            )
        except ValueError as error:
            rows.append(Rejected(where, str(error), {"instruction": record.get("instruction"), "instance": instance}))
    return rows


def _from_sharegpt(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    for turn in _list(record, "conversations"):
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise ValueError(f"a turn is from {_short(speaker)}; expected one of {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            calls = _json(turn.get("value"), "function_call")
            calls = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": _text(turn, "value")})
    return _row(messages, record, source)


def _from_messages(record: dict[str, Any], source: str) -> Row:
    key = "conversations" if record.get("messages") is None and "conversations" in record else "messages"
    return _row(_chat(_list(record, key)), record, source)


def _from_prompt_completion(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record.get(key), list):
            messages += _chat(record[key])
        else:
            messages.append({"role": role, "content": _text(record, key)})
    return _row(messages, record, source)


def _from_openorca(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    if system := _text(record, "system_prompt", required=False):
        messages.append({"role": "system", "content": system})
    return _row([*messages, *_turns([_text(record, "question"), _text(record, "response")])], record, source)


def _from_ultrachat(record: dict[str, Any], source: str) -> Row:
    return _row(_turns([_checked(turn, "data") for turn in _list(record, "data")]), record, source)


def _from_text(record: dict[str, Any], source: str) -> Row:
    text = _text(record, "text")
    if is_dialogue(text):
        return _row(_dialogue(text, "text", open_end=False), record, source)
    return _row([{"role": "assistant", "content": text}], {"task": "text"} | record, source, plain=True)


def _from_shard(record: dict[str, Any], source: str) -> Row:
    messages = _chat(_list(record, "messages"))
    row = _row(messages, record, _text(record, "source"), plain=is_plain_text(messages))
    return replace(row, repairs=[*(record["repairs"] or []), *row.repairs])


def _mapping(format: str, columns: ColumnsParams | None, labels: dict[str, list[str]]) -> Converter:
    """The converter for columns that a person named; classification is text → label unless they say otherwise."""
    columns = columns or ColumnsParams()
    classes = format == "classification"
    response = columns.response or "label"
    prompt = columns.prompt or "text"
    template = list(string.Formatter().parse(columns.template)) if columns.template is not None else None

    def make(record: dict[str, Any], source: str) -> Row:
        messages: list[Message] = []
        if columns.system and (system := _text(record, columns.system, required=False)):
            messages.append({"role": "system", "content": system})
        if columns.history:
            messages += _history(record, columns.history)
        if template is None:
            asked = _text(record, prompt)
        else:
            parts = [literal + (_scalar(record, name) if name else "") for literal, name, _, _ in template]
            asked = _checked("".join(parts), "template")
        own = {name: record.get(getattr(columns, name) or name) for name in ("task", "group", "scoring", "tools")}
        if classes:
            own = own | {"task": own["task"] or "classification", "scoring": own["scoring"] or "exact"}
        return _row([*messages, *_turns([asked, _answer(record, response, labels)])], own, source)

    return make


def _answer(record: dict[str, Any], key: str, labels: dict[str, list[str]]) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = labels.get(key)
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = names[value]
    return _checked(value, key)


def _chat(turns: list[Any]) -> list[Message]:
    """OpenAI's messages; text parts of a content are joined, any other part cannot be trained on here."""
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has role {_short(role)}; expected system, user, assistant or tool")
        if turn.get("weight") not in (None, 1):
            raise ValueError("a message has a weight of its own; prepare.train_on says which answers are trained")
        content = turn.get("content")
        if isinstance(content, list):
            content = "".join(_part(part) for part in content)
        message: Message = {"role": ROLES[role], "content": content}
        calls = turn.get("tool_calls")
        if calls is None and turn.get("function_call"):
            calls = [turn["function_call"]]
        if calls:
            if not isinstance(calls, list) or message["role"] != "assistant":
                raise ValueError("tool_calls is not a list in an assistant's message")
            message["tool_calls"] = [_call(call) for call in calls]
        message["content"] = "" if content is None and calls else _checked(content, "content", required=not calls)
        if message["role"] == "tool":
            for key in ("name", "tool_call_id"):
                if turn.get(key) is not None:
                    message[key] = _checked(turn[key], key)
        messages.append(message)
    return messages


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ValueError(f"content has a part of type {_short(kind)}; only text can be trained on")
    return str(part["text"])


def _call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, with its arguments as an object (many files have them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = _json(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {_short(function['name'])} are a {type(arguments).__name__}, not an object")
    _compact(arguments, "arguments")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": _checked(function["name"], "name"), "arguments": arguments},
    }
    return made if call.get("id") is None else {"id": _checked(call["id"], "id")} | made


def _tools(record: dict[str, Any]) -> str | None:
    """The offer of tools in OpenAI's shape, which chat templates expect; bare schemas are wrapped."""
    tools = record.get("tools") or record.get("functions") or None
    if isinstance(tools, str):
        tools = _json(tools, "tools") or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools is not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return _checked(_compact(tools, "tools"), "tools")


def _history(record: dict[str, Any], key: str) -> list[Message]:
    messages: list[Message] = []
    for turn in _list(record, key):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{key} is not a list of [question, answer] pairs")
        messages += _turns([_checked(turn[0], key), _checked(turn[1], key)])
    return messages


def is_dialogue(text: Any) -> bool:
    """Whether `text` is a conversation written out: it begins with `Human:` and has an `Assistant:` of its own line."""
    if not isinstance(text, str) or "Assistant" not in text:
        return False
    speakers = [match.group(1) for match in SPEAKER.finditer(text.strip())]
    return SPEAKER.match(text.strip()) is not None and speakers[0] == "Human" and "Assistant" in speakers


def _dialogue(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation written out; with `open_end` its last `Assistant:` is left open and not returned."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} holds a conversation whose turns do not alternate between Human: and Assistant:")
    if open_end:
        if speakers[-1] != "Assistant" or contents[-1]:
            raise ValueError(f"{key} holds a conversation (Human:/Assistant:) that does not end with Assistant:")
        contents = contents[:-1]
    return _turns([_checked(content, key) for content in contents])


def _turns(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _row(messages: list[Message], record: dict[str, Any], source: str, plain: bool = False) -> Row:
    repairs = []
    if not messages or messages[-1]["role"] != "assistant":
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("has no assistant turn to learn from")
        repairs = ["turns after the last answer left out"]
        messages = messages[: answers[-1] + 1]
    if messages[0]["role"] == "assistant" and not plain:
        raise ValueError("begins with an answer to nothing")
    scoring = record.get("scoring") or None
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {_short(scoring)}; expected exact or text")
    return Row(
        messages,
        source,
        _tools(record) if "tools" in record or "functions" in record else None,
        (_label(record, "task") or "default") if "task" in record else "default",
        _label(record, "group") if "group" in record else None,
        scoring,
        repairs,
    )


def _label(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    return None if value is None else _scalar(record, key) or None


def _scalar(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise ValueError(f"{key} is a number too large or too strange to be kept exactly; write it as text")
    return str(value) if isinstance(value, int | float) else _checked(value, key, required=False)


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if isinstance(value, str) and value.strip():  # as in a CSV cell
        value = _json(value, key)
    if not value and not isinstance(value, int | float):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def _text(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return _checked(value, key, required) if value is not None or required else ""


def _checked(value: Any, key: str, required: bool = True) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    value = value.strip()
    if required and not value:
        raise ValueError(f"{key} is empty")
    return value


def _json(text: Any, key: str) -> Any:
    """JSON inside a column; NaN and half surrogates are none."""
    try:
        value = json.loads(_checked(text, key, required=False) or "null")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{key} is not JSON") from None
    _compact(value, key)
    return value


def _compact(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{key} holds what JSON cannot write (NaN, a date, …)") from None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
