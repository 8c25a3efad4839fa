"""A chat template as a program that turns messages into text, run in transformers' sandbox.

Tools and tool calls are written by the template itself where it can, else in a documented textual form. A template that
is not Jinja or breaks out of the sandbox is refused, and so is a conversation that it cannot carry.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template  # the sandbox of apply_chat_template

from pipeline.chat import Message

Tools = list[dict[str, Any]]

CALL_FORMAT = '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]}
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "probe", "parameters": _PARAMETERS},
}
_PROBE_QUESTION = {"role": "user", "content": "probe question"}


class TemplateError(ValueError):
    """The template, tokenizer or base model is not the one the dataset was made with, or cannot be trained with."""


class RowError(ValueError):
    """One conversation that this template cannot carry; the others are fine."""


class Renderer:
    """A compiled template, and what it can do by itself: found by trying it, since its text does not say."""

    def __init__(
        self,
        text: str,
        named_tokens: dict[str, str],
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self._variables = named_tokens | (chat_template_kwargs or {})
        if date is not None:
            self._variables |= {"strftime_now": _clock(date)}
        try:
            self._compiled = _compile_jinja_template(text)
            self._compiled.globals = dict(self._compiled.globals)  # copied for every rendering: a ChainMap takes longer
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from None
        self._offers = "probe_tool" in self._tries([_PROBE_QUESTION], [_PROBE_TOOL])
        kinds = [(kind, empty) for empty in ("", None) for kind in ("object", "text")]
        self._arguments = next((kind for kind in kinds if self._calls(*kind)), None)
        self._takes_system = self._tries([{"role": "system", "content": "probe system"}, _PROBE_QUESTION]) != ""

    def render(self, messages: list[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """The text of `messages` and `tools` as `adapt` gives them."""
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template does what its sandbox forbids: {error}") from None
        except jinja2.TemplateError as error:  # what the template itself raises, e.g. for a system message
            raise RowError(f"is refused by the chat template: {error}") from None
        except Exception as error:  # a template is a program: it can fail in any way on values it did not expect
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RowError(f"cannot be rendered by the chat template: {reason}") from None

    def adapt(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages and tools in the shape that the template can write, without loss.

        Reasoning gets every name that templates read it by, and arguments of calls become what the template expects, an
        object or its JSON text. A template that knows no tool calls gets them as `<tool_call>` JSON in the answer,
        results as `<tool_response>` in a user turn, and the offer at the end of the system message (before the first
        question, where it refuses one): the convention of Hermes and Qwen.
        """
        if any(len(message) > 2 for message in messages):
            messages = [_as_served(message) for message in messages]
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            if self._arguments is None:
                messages = _calls_as_text(messages)
            else:
                messages = [_with_arguments(message, *self._arguments) for message in messages]
        if not tools:
            return messages, None
        if self._offers:
            return messages, [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        listed = json.dumps(tools, ensure_ascii=False)
        offer = f"You can use these tools:\n{listed}\nTo use one, answer with\n{CALL_FORMAT}"
        first = messages[0]
        if first["role"] == "system":
            return [first | {"content": f"{first['content']}\n\n{offer}"}, *messages[1:]], None
        if self._takes_system or first["role"] != "user":
            return [{"role": "system", "content": offer}, *messages], None
        return [first | {"content": f"{offer}\n\n{first['content']}"}, *messages[1:]], None

    def _tries(self, messages: list[Message], tools: Tools | None = None) -> str:
        try:
            return self.render(messages, tools)
        except RowError:
            return ""

    def _calls(self, kind: str, empty: str | None) -> bool:
        """Whether a call with its arguments as `kind`, and its result, are written; not as Python's repr, not twice."""
        call = {
            "id": "probe0001",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}},
        }
        messages = [
            _PROBE_QUESTION,
            _with_arguments({"role": "assistant", "content": "", "tool_calls": [call]}, kind, empty),
            {"role": "tool", "name": "probe_tool", "tool_call_id": "probe0001", "content": "probe_result"},
        ]
        text = self._tries(messages, [_PROBE_TOOL] if self._offers else None)
        call_text = text.partition("probe question")[2] or text  # the offer may stand before it
        written = all(word in call_text for word in ("probe_tool", "probe_key", "probe_value", "probe_result"))
        return written and "{'probe_key'" not in text and '\\"probe_key' not in text


def _clock(date: str) -> Callable[[str], str]:
    """`strftime_now` of templates that print the date, at `date` (YYYY-MM-DD) for ever."""
    day = datetime.fromisoformat(date)
    return lambda format: day.strftime(format)


def _as_served(message: Message) -> Message:
    """`message` without what is for training only, and with its reasoning under the names that templates read."""
    message = {key: value for key, value in message.items() if key != "weight"}
    reasoning = message.get("reasoning_content")
    return message if not reasoning else message | {"reasoning": reasoning, "thinking": reasoning}


def with_objects(messages: list[Message]) -> list[Message]:
    """`messages` with the arguments of every call as an object, so that nothing is hidden in the escapes of JSON."""
    return [_with_arguments(message, "object") if "tool_calls" in message else message for message in messages]


def _with_arguments(message: Message, kind: str, empty: str | None = "") -> Message:
    """`message` with the arguments of its calls as `kind`, object or text, and `empty` as content where it has none."""
    changed = message | {"content": message.get("content") or ""}
    if message.get("tool_calls"):
        changed["content"] = changed["content"] or empty
        changed["tool_calls"] = []
        for call in message["tool_calls"]:
            value = arguments_of(call)
            text = json.dumps(value, ensure_ascii=False)
            function = call["function"] | {"arguments": value if kind == "object" else text}
            changed["tool_calls"].append(call | {"function": function})
    return changed


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as an object, which may come as its JSON text."""
    value = call["function"].get("arguments")
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise RowError("has a tool call whose arguments are not a JSON object")
    return value


def _calls_as_text(messages: list[Message]) -> list[Message]:
    plain: list[Message] = []
    for message in messages:
        text = message.get("content") or ""
        role = message["role"]
        if message.get("tool_calls"):
            parts = [text] if text else []
            for call in message["tool_calls"]:
                written = {"name": call["function"]["name"], "arguments": arguments_of(call)}
                parts.append(f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>")
            text = "\n".join(parts)
        elif role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        # Results and what is asked after them become one turn: many templates want the roles to alternate.
        if role == "user" and plain and plain[-1]["role"] == "user":
            text = f"{plain.pop()['content']}\n{text}"
        plain.append({"role": role, "content": text})
    return plain
