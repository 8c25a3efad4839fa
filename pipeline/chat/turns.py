"""What a server asks and what the model then has to write, for each answer of a conversation.

The prompt of an answer is the rendering of everything before it with the generation prompt; the answer is what has to
follow, up to and including a token that ends the turn. Both are text: `conversation` makes tokens of them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat import Message
from pipeline.chat.rendering import Renderer, RowError, Tools, arguments_of

PLACE = "\ufdd3"  # a noncharacter that stands for an answer's content while its place is looked for
PROBE_ANSWER = "probe answer"  # for probes of a whole template, which refuses noncharacters in texts
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_DROPPED = "reasoning left out: the prompt closes the thinking, or the chat template has no place for it"
REASONING_INLINE = "reasoning written into the answer, since the chat template has no place for it"

# A text that ends in one of these has opened the thinking: the name of its tag, and what closes it.
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
    """One trained answer: the prompt that a server sends before it, and what the model has to write."""

    index: int  # of the assistant's message
    prompt: str
    answer: str  # with the token that ends the turn
    rest: str  # what the template writes after that, which nobody generates
    repairs: tuple[str, ...] = ()


def opened_thinking(prompt: str) -> tuple[str, str] | None:
    """What closes the thinking that `prompt` has opened, and the white space behind its opening; None without one."""
    match = _OPENED.search(prompt[-200:])
    if match is None:
        return None
    kind = next(kind for kind in _CLOSERS if match[kind])
    return _CLOSERS[kind].format(match[kind]), match["space"]


class TurnWriter:
    """Prompts and answers of one chat template.

    `stops` are the texts of the tokens that end a turn; `end` ends a generation where the template writes none.
    """

    def __init__(self, renderer: Renderer, stops: Sequence[str], end: str, reasoning: str) -> None:
        self._renderer = renderer
        self._stops = stops
        self._reasoning = reasoning
        self._end = {calls: self._next_header(calls) or end for calls in (False, True)}

    def turn(self, messages: list[Message], tools: Tools | None, index: int) -> Turn:
        """The answer at `index` of adapted `messages`; a RowError where the template leaves it out."""
        before, message = messages[:index], messages[index]
        plain = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        prompt = self._renderer.render(before, tools, add_generation_prompt=True)
        finished = self._renderer.render([*before, message], tools)
        opened = opened_thinking(prompt)
        reasoning = str(message.get("reasoning_content") or "").strip()
        written = not reasoning
        if reasoning and not _CLOSED.search(prompt[-200:]):  # else the server wants an answer without any
            written = finished != self._renderer.render([*before, plain], tools)
        answer = finished[len(prompt) :] if finished.startswith(prompt) else ""
        repairs: tuple[str, ...] = ()
        if not answer or not written or (opened and opened[0] not in answer):
            answer = self._from_content(before, plain, tools)
            if opened:
                closer, space = opened
                answer = (f"{reasoning}\n{closer}\n\n" if space else f"{reasoning}{closer}") + answer
            elif reasoning and self._reasoning == "refuse":
                raise RowError("has reasoning that the chat template has no place for (prepare.reasoning is refuse)")
            elif reasoning and self._reasoning == "inline":
                answer, repairs = f"<think>\n{reasoning}\n</think>\n\n{answer}", (REASONING_INLINE,)
            elif reasoning:
                repairs = (REASONING_DROPPED,)
        return Turn(index, prompt, *self._ended(answer, bool(message.get("tool_calls"))), repairs)

    def _from_content(self, before: list[Message], message: Message, tools: Tools | None) -> str:
        """The answer `message` from where its content begins, whatever the template writes before that."""
        marked = {"role": "assistant", "content": PLACE}
        head, mark, _ = self._renderer.render([*before, marked], tools).rpartition(PLACE)
        if not mark:
            raise RowError("has an answer that the chat template leaves out")
        finished = self._renderer.render([*before, message], tools)
        shared = next((i for i, (a, b) in enumerate(zip(head, finished, strict=False)) if a != b), len(head))
        return finished[shared:]

    def _ended(self, answer: str, calls: bool) -> tuple[str, str]:
        """`answer` up to and including the token that ends the turn, and what follows it."""
        last = max((place + len(stop) for stop in self._stops if (place := answer.rfind(stop)) >= 0), default=0)
        if last and not answer[last:].strip():
            return answer[:last], answer[last:]
        return answer + self._end[calls], ""

    def _next_header(self, calls: bool) -> str | None:
        """The token that the next turn begins with, where that ends this one (GLM, ChatGLM).

        After a call the next turn is its result, else a question.
        """
        question = {"role": "user", "content": "probe question"}
        answer: Message = {"role": "assistant", "content": PROBE_ANSWER}
        following = {"role": "user", "content": PLACE}
        if calls:
            function = {"name": "probe", "arguments": {}}
            answer |= {"tool_calls": [{"id": "probe0001", "type": "function", "function": function}]}
            following = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": PLACE}
        try:
            both = self._renderer.render([question, answer, following], None)
        except RowError:
            return None
        rest = both.partition(PROBE_ANSWER)[2].partition(PLACE)[0]
        places = [(place, stop) for stop in self._stops if (place := rest.find(stop)) >= 0]
        return min(places)[1] if places else None


def left_out(messages: list[Message], text: str) -> str | None:
    """What of `messages` does not stand in `text`, their rendering, in order: e.g. "a tool result"; None if all does.

    Reasoning is not looked for: templates drop that of earlier turns on purpose. A system message may stand anywhere.
    """
    start = 0
    for message in messages:
        role, place = message["role"], start
        end = _end_of(message.get("content") or "", text, 0 if role == "system" else start)
        if end < 0:
            return {"system": "a system message", "tool": "a tool result"}.get(role, "a content")
        for call in message.get("tool_calls") or ():
            for part in (call["function"]["name"], *_leaves(arguments_of(call))):
                place = _end_of(part, text, place)
                if place < 0:
                    return "a tool call"
        if role != "system":
            start = max(end, place)
    return None


def _end_of(part: str, text: str, start: int) -> int:
    """Where `part` ends in `text` from `start` on, as it is, as JSON writes it, or with other white space; else −1."""
    part = part.strip()
    if (place := text.find(part, start)) >= 0:  # nearly always
        return place + len(part)
    for form in (json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]):
        if (place := text.find(form, start)) >= 0:
            return place + len(form)
    match = re.compile(r"\s+".join(map(re.escape, part.split()))).search(text, start)
    return match.end() if match else -1


def _leaves(value: Any) -> list[str]:
    """The texts in a call's arguments; numbers and truth values are written in too many ways to be looked for."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) else []
