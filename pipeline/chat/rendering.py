"""Renders messages with a chat template, in transformers' sandbox.

The template writes tools and tool calls itself if it can; else they become text (see `Renderer.adapt`). A template that
is not Jinja or does what the sandbox forbids is refused, and so is a conversation that it cannot render.
"""

import json
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
    """The template, tokenizer or base model cannot be trained with, or is not the one the dataset was made with."""


class RowError(ValueError):
    """This conversation cannot be rendered or trained on; the message says what the row has or is."""


class Renderer:
    """A compiled template. What it can write by itself is found by trying it."""

    def __init__(self, text: str, named_tokens: dict[str, str], kwargs: dict[str, Any], date: str | None) -> None:
        self._variables = named_tokens | kwargs
        if date is not None:
            self._variables |= {"strftime_now": datetime.fromisoformat(date).strftime}
        try:
            self._compiled = _compile_jinja_template(text)
            # Each rendering copies this mapping, and copying a ChainMap is slow.
            self._compiled.globals = dict(self._compiled.globals)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from None
        self._takes_tools = "probe_tool" in self._try([_PROBE_QUESTION], [_PROBE_TOOL])
        forms = [(as_text, empty) for empty in ("", None) for as_text in (False, True)]
        self._call_form = next((form for form in forms if self._writes_calls(*form)), None)
        self._takes_system = self._try([{"role": "system", "content": "probe system"}, _PROBE_QUESTION]) != ""

    def render(self, messages: list[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """The text of `messages` and `tools`, which come from `adapt`."""
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
        except jinja2.TemplateError as error:  # raised by the template itself, e.g. for a system message
            raise RowError(f"is refused by the chat template: {error}") from None
        except Exception as error:  # a template is a program: unexpected values can make it fail in any way
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RowError(f"cannot be rendered by the chat template: {reason}") from None

    def adapt(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages and tools in a form that the template can write, without loss.

        Reasoning gets every key that templates read, and the arguments of calls become what the template expects: an
        object, or its JSON text. If the template cannot write tool calls, they follow the convention of Hermes and
        Qwen: calls as `<tool_call>` JSON in the answer, results as `<tool_response>` in a user turn, and the tools at
        the end of the system message (or before the first question, if the template refuses system messages).
        """
        if any(len(message) > 2 for message in messages):
            messages = [_as_served(message) for message in messages]
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            if self._call_form is None:
                messages = _calls_as_text(messages)
            else:
                messages = [_with_arguments(message, *self._call_form) for message in messages]
        if not tools:
            return messages, None
        if self._takes_tools:
            return messages, [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        listed = json.dumps(tools, ensure_ascii=False)
        offer = f"You can use these tools:\n{listed}\nTo use one, answer with\n{CALL_FORMAT}"
        first = messages[0]
        if first["role"] == "system":
            return [first | {"content": f"{first['content']}\n\n{offer}"}, *messages[1:]], None
        if self._takes_system or first["role"] != "user":
            return [{"role": "system", "content": offer}, *messages], None
        return [first | {"content": f"{offer}\n\n{first['content']}"}, *messages[1:]], None

    def _try(self, messages: list[Message], tools: Tools | None = None) -> str:
        try:
            return self.render(messages, tools)
        except RowError:
            return ""

    def _writes_calls(self, as_text: bool, empty: str | None) -> bool:
        """Whether the template writes a call in this form (see `_with_arguments`) and its result.

        Python's repr of an object, or JSON inside JSON, does not count.
        """
        call = {
            "id": "probe0001",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}},
        }
        messages = [
            _PROBE_QUESTION,
            _with_arguments({"role": "assistant", "content": "", "tool_calls": [call]}, as_text, empty),
            {"role": "tool", "name": "probe_tool", "tool_call_id": "probe0001", "content": "probe_result"},
        ]
        text = self._try(messages, [_PROBE_TOOL] if self._takes_tools else None)
        call_text = text.partition("probe question")[2] or text  # the list of tools may come before the question
        written = all(word in call_text for word in ("probe_tool", "probe_key", "probe_value", "probe_result"))
        return written and "{'probe_key'" not in text and '\\"probe_key' not in text


def _as_served(message: Message) -> Message:
    """`message` without `weight`, which only training reads, and its reasoning under every key that templates read."""
    message = {key: value for key, value in message.items() if key != "weight"}
    reasoning = message.get("reasoning_content")
    return message if not reasoning else message | {"reasoning": reasoning, "thinking": reasoning}


def with_argument_objects(messages: list[Message]) -> list[Message]:
    """`messages` with the arguments of each call as an object, so that no control token hides in JSON escapes."""
    return [_with_arguments(message) if "tool_calls" in message else message for message in messages]


def _with_arguments(message: Message, as_text: bool = False, empty: str | None = "") -> Message:
    """`message` with the arguments of its calls as objects or as JSON text; `empty` replaces a call's empty content."""
    changed = message | {"content": message.get("content") or ""}
    if message.get("tool_calls"):
        changed["content"] = changed["content"] or empty
        changed["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = arguments_of(call)
            written = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
            changed["tool_calls"].append(call | {"function": call["function"] | {"arguments": written}})
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


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Messages with calls and results in the textual form that `Renderer.adapt` describes."""
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
        # A result and the question after it become one turn, because many templates want the roles to alternate.
        if role == "user" and plain and plain[-1]["role"] == "user":
            text = f"{plain.pop()['content']}\n{text}"
        plain.append({"role": role, "content": text})
    return plain
