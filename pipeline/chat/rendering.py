"""Renders messages with a chat template, in transformers' sandbox.

A template that cannot write tools or tool calls gets a prelude that makes them text; it ships with the template, so a
server renders them alike.
"""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import _compile_jinja_template  # the sandbox of apply_chat_template

from pipeline.chat import Message

Tools = list[dict[str, Any]]

FALLBACKS = Path(__file__).parent / "fallbacks"
_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]}
_FUNCTION = {"name": "probe_tool", "description": "probe", "parameters": _PARAMETERS}
_PROBE_TOOL = {"type": "function", "function": _FUNCTION}
_PROBE_QUESTION = {"role": "user", "content": "probe question"}


class TemplateError(ValueError):
    """The template, tokenizer or base model cannot be trained with, or is not the one the dataset was made with."""


class RowError(ValueError):
    """This conversation cannot be rendered or trained on; the message says what the row has or is."""


class Renderer:
    """A compiled template. What it can write by itself is found by trying it."""

    def __init__(self, text: str, named_tokens: dict[str, str], kwargs: dict[str, Any], date: str | None) -> None:
        self._variables = named_tokens | kwargs
        if date is not None:
            self._variables |= {"strftime_now": datetime.fromisoformat(date).strftime}
        self._text = text
        self._compile(text)
        tools = [_PROBE_TOOL] if "probe_tool" in self.attempt([_PROBE_QUESTION], [_PROBE_TOOL]) else None
        forms = [(as_text, empty) for empty in ("", None) for as_text in (False, True)]
        written = [form for form in forms if self._writes_calls(tools, *form)]
        self._call_form = (written or forms)[0]
        self.prelude = "" if written else _fallback("calls")
        if tools is None:
            takes_system = self.attempt([{"role": "system", "content": "probe system"}, _PROBE_QUESTION]) != ""
            self.prelude += f"{{%- set takes_system = {takes_system} -%}}" + _fallback("tools")
        if self.prelude:
            self.prelude = _fallback("text") + self.prelude
            self._compile(self.prelude + text)

    def variables(self) -> set[str]:
        """The names that the template reads and a caller can set."""
        return jinja2.meta.find_undeclared_variables(self._compiled.environment.parse(self._text))

    def _compile(self, text: str) -> None:
        try:
            self._compiled = _compile_jinja_template(text)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from None
        # Each rendering copies this mapping, and copying a ChainMap is slow.
        self._compiled.globals = dict(self._compiled.globals)

    def render(self, messages: list[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """The text of `messages` and `tools`, which come from `adapt`."""
        try:
            values = {"messages": messages, "tools": tools, "documents": None} | self._variables
            return self._compiled.render(values, add_generation_prompt=add_generation_prompt)
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template does what its sandbox forbids: {error}") from None
        except jinja2.TemplateError as error:  # raised by the template itself, e.g. for a system message
            raise RowError(f"is refused by the chat template: {error}") from None
        except Exception as error:  # a template is a program: unexpected values can make it fail in any way
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RowError(f"cannot be rendered by the chat template: {reason}") from None

    def adapt(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages and tools in a form that the template can write, without loss."""
        if any(len(message) > 2 for message in messages):
            messages = [_as_served(message) for message in messages]
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            messages = [with_arguments(message, *self._call_form) for message in messages]
        if not tools:
            return messages, None
        return messages, [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]

    def attempt(self, messages: list[Message], tools: Tools | None = None) -> str:
        """As `render`; "" if the template refuses the messages."""
        try:
            return self.render(messages, tools)
        except RowError:
            return ""

    def _writes_calls(self, tools: Tools | None, as_text: bool, empty: str | None) -> bool:
        """Whether the template writes a call in this form and its result, not as a Python repr or JSON inside JSON."""
        function = {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}}
        call = {"id": "probe0001", "type": "function", "function": function}
        messages = [
            _PROBE_QUESTION,
            with_arguments({"role": "assistant", "content": "", "tool_calls": [call]}, as_text, empty),
            {"role": "tool", "name": "probe_tool", "tool_call_id": "probe0001", "content": "probe_result"},
        ]
        text = self.attempt(messages, tools)
        call_text = text.partition("probe question")[2] or text  # the list of tools may come before the question
        written = all(word in call_text for word in ("probe_tool", "probe_key", "probe_value", "probe_result"))
        return written and "{'probe_key'" not in text and '\\"probe_key' not in text


def _as_served(message: Message) -> Message:
    """`message` without `weight`, which only training reads, and its reasoning under every key that templates read."""
    message = {key: value for key, value in message.items() if key != "weight"}
    reasoning = message.get("reasoning_content")
    return message if not reasoning else message | {"reasoning": reasoning, "thinking": reasoning}


def with_arguments(message: Message, as_text: bool = False, empty: str | None = "") -> Message:
    """`message` with the arguments of its calls as objects or as JSON text; `empty` replaces a call's empty content."""
    changed = message | {"content": message.get("content") or ""}
    if message.get("tool_calls"):
        changed["content"] = changed["content"] or empty
        changed["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = arguments_of(call)
            form = {"arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments}
            changed["tool_calls"].append(call | {"function": call["function"] | form})
    return changed


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, given as an object or as its JSON text."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise RowError("has a tool call whose arguments are not a JSON object")
    return arguments


def _fallback(name: str) -> str:
    return (FALLBACKS / f"{name}.jinja").read_text(encoding="utf-8")
