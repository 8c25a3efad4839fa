"""The prompt that a server sends and the answer that the model has to write, for each trained answer.

The prompt is everything before the answer, rendered with the generation prompt. Both are text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat import REASONING_KEYS, Message
from pipeline.chat.rendering import Renderer, RowError, Tools, arguments_of

PLACEHOLDER = "\ufdd3"  # a noncharacter that stands for the content of a message, to find where it is rendered
PROBE_ANSWER = "probe answer"  # the same for `ChatTemplate.render`, which refuses noncharacters
REASONING_DROPPED = "reasoning left out: the prompt closes the thinking, or the chat template has no place for it"
REASONING_INLINE = "reasoning written into the answer, since the chat template has no place for it"

# The end of a prompt that has opened the thinking, and the closing tag for each kind of opening.
_OPENED = re.compile(
    r"(?:<(?P<tag>[\w:]*(?:think|thought|reason)\w*)>|\[(?P<bracket>[A-Z]*THINK[A-Z]*)\]|<\|START_(?P<start>THINK[A-Z]*)\|>"
    r"|<\|(?P<channel>channel)>\w*)(?P<space>\s*)\Z"
)
_CLOSERS = {"tag": "</{}>", "bracket": "[/{}]", "start": "<|END_{}|>", "channel": "<{}|>"}
_CLOSED = re.compile(
    r"(?:</[\w:]*(?:think|thought|reason)\w*>|\[/[A-Z]*THINK[A-Z]*\]|<\|END_[A-Z]*THINK[A-Z]*\|>|<channel\|>)\s*\Z"
)


@dataclass(frozen=True)
class Turn:
    """One trained answer and its prompt."""

    index: int  # of the assistant's message
    prompt: str
    answer: str  # with the token that ends the turn
    rest: str  # what the template writes after that; not generated, so not trained
    repairs: tuple[str, ...] = ()


def opened_thinking(prompt: str) -> tuple[str, str] | None:
    """The closing tag of the thinking that `prompt` opens, and the white space after the opening tag; else None."""
    match = _OPENED.search(prompt[-200:])
    if match is None:
        return None
    kind = next(kind for kind in _CLOSERS if match[kind])
    return _CLOSERS[kind].format(match[kind]), match["space"]


class TurnWriter:
    """Makes turns with `stops`, the texts of tokens that end one; `end` is added if the template writes none."""

    def __init__(self, renderer: Renderer, stops: Sequence[str], end: str, reasoning: str) -> None:
        self._renderer = renderer
        self._stops = stops
        self._reasoning = reasoning
        self._end = {calls: self._next_header(calls) or end for calls in (False, True)}

    def turn(self, messages: list[Message], tools: Tools | None, index: int) -> Turn:
        """The turn of the answer at `index` of adapted `messages`; RowError if the template cannot write it."""
        before, message = messages[:index], messages[index]
        plain = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        prompt = self._renderer.render(before, tools, add_generation_prompt=True)
        finished = self._renderer.render([*before, message], tools)
        opened = opened_thinking(prompt)
        reasoning = str(message.get("reasoning_content") or "").strip()
        reasoning_is_written = not reasoning
        if reasoning and not _CLOSED.search(prompt[-200:]):  # a prompt that closes the thinking wants none
            reasoning_is_written = finished != self._renderer.render([*before, plain], tools)
        answer = finished[len(prompt) :] if finished.startswith(prompt) else ""
        repairs: tuple[str, ...] = ()
        if not answer or not reasoning_is_written or (opened and opened[0] not in answer):
            answer = self._answer_from_content(before, plain, tools)
            if opened:
                closer, space = opened
                answer = (f"{reasoning}\n{closer}\n\n" if space else f"{reasoning}{closer}") + answer
            elif reasoning and self._reasoning == "refuse":
                raise RowError("has reasoning that the chat template has no place for (prepare.reasoning is refuse)")
            elif reasoning and self._reasoning == "inline":
                answer, repairs = f"<think>\n{reasoning}\n</think>\n\n{answer}", (REASONING_INLINE,)
            elif reasoning:
                repairs = (REASONING_DROPPED,)
        return Turn(index, prompt, *self._split_at_end(answer, bool(message.get("tool_calls"))), repairs)

    def _answer_from_content(self, before: list[Message], message: Message, tools: Tools | None) -> str:
        """The rendered answer from the beginning of its content, without what the template writes before it."""
        marked = {"role": "assistant", "content": PLACEHOLDER}
        head, placeholder, _ = self._renderer.render([*before, marked], tools).rpartition(PLACEHOLDER)
        if not placeholder:
            raise RowError("has an answer that the chat template leaves out")
        finished = self._renderer.render([*before, message], tools)
        shared = next((i for i, (a, b) in enumerate(zip(head, finished, strict=False)) if a != b), len(head))
        return finished[shared:]

    def _split_at_end(self, answer: str, calls: bool) -> tuple[str, str]:
        """`answer` up to and including the token that ends the turn, and the rest."""
        end = max((start + len(stop) for stop in self._stops if (start := answer.rfind(stop)) >= 0), default=0)
        if end and not answer[end:].strip():
            return answer[:end], answer[end:]
        return answer + self._end[calls], ""

    def _next_header(self, calls: bool) -> str | None:
        """The token that begins the next turn (a result, else a question), if it also ends this one (GLM, ChatGLM)."""
        question = {"role": "user", "content": "probe question"}
        answer: Message = {"role": "assistant", "content": PROBE_ANSWER}
        following = {"role": "user", "content": PLACEHOLDER}
        if calls:
            function = {"name": "probe", "arguments": {}}
            answer |= {"tool_calls": [{"id": "probe0001", "type": "function", "function": function}]}
            following = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": PLACEHOLDER}
        rendered = self._renderer.attempt([question, answer, following])
        between = rendered.partition(PROBE_ANSWER)[2].partition(PLACEHOLDER)[0]
        stops = [(start, stop) for stop in self._stops if (start := between.find(stop)) >= 0]
        return min(stops)[1] if stops else None


def left_out(messages: list[Message], text: str) -> str | None:
    """The first part of `messages` that is missing in `text`, their rendering, such as "a tool result"; else None.

    Parts must appear in order, except a system message. Reasoning may be missing: templates drop that of earlier turns.
    """
    start = 0
    for message in messages:
        role, call_end = message["role"], start
        content_end = _end_of(message.get("content") or "", text, 0 if role == "system" else start)
        if content_end < 0:
            return {"system": "a system message", "tool": "a tool result"}.get(role, "a text")
        for call in message.get("tool_calls") or ():
            for part in (call["function"]["name"], *_texts_in(arguments_of(call))):
                call_end = _end_of(part, text, call_end)
                if call_end < 0:
                    return "a tool call"
        if role != "system":
            start = max(content_end, call_end)
    return None


def _end_of(part: str, text: str, start: int) -> int:
    """The end of `part` in `text` after `start`, as it is, as JSON writes it, or with other white space; else -1."""
    part = part.strip()
    for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]):
        if (found := text.find(form, start)) >= 0:
            return found + len(form)
    match = re.compile(r"\s+".join(map(re.escape, part.split()))).search(text, start)
    return match.end() if match else -1


def _texts_in(value: Any) -> list[str]:
    """The texts in a call's arguments; numbers and booleans are left out because they are written in many ways."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _texts_in(item)]
    return [value] if isinstance(value, str) else []
