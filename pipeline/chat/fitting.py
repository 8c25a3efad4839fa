"""Rows that are longer than the model may train on, made to fit without cutting an answer.

Each conversation gives the rows that take its place, with what was done to them. One that fits in no way that
`prepare.on_overlong` allows is an `Overlong` error.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pipeline.chat import Message
from pipeline.chat.conversation import Encoded
from pipeline.chat.rendering import RowError

TURNS_LEFT_OUT = "oldest turns left out to fit prepare.max_length"
PROMPT_CUT = "start of the last prompt cut to fit prepare.max_length"
SPLIT = "split into rows that fit prepare.max_length"


class Overlong(RowError):
    """A row with more than `prepare.max_length` tokens that cannot be made to fit as asked."""


@dataclass(frozen=True)
class Fitted:
    messages: list[Message]
    encoded: Encoded  # repairs included


Fits = Callable[..., Fitted | None]  # messages, and what was done to them: the row, if it is short enough


def fit(template: Any, messages: list[Message], tools: str | None, max_length: int, on_overlong: str) -> list[Fitted]:
    """The rows that take the place of a conversation.

    One of no more than `max_length` tokens stays as it is. `truncate_prompt` leaves out the oldest exchanges (a
    question with all that follows up to the next), never the system message or the last exchange, then cuts the start
    of the last question. `split` makes rows of whole exchanges, each with the system message, so that every trained
    answer is trained once; with `train_on: last_response` only the row with the last answer is made.
    `drop` and `error` change nothing.

    Raises:
        Overlong: it fits in no way that `on_overlong` allows.
        RowError: see `ChatTemplate.encode`.
    """
    encoded: Encoded = template.encode(messages, tools)
    if encoded.length <= max_length:
        return [Fitted(messages, encoded)]
    too_long = f"has {encoded.length} tokens, more than prepare.max_length ({max_length})"
    system = [message for message in messages[:1] if message["role"] == "system"]
    exchanges = _exchanges(messages[len(system) :])
    while not _is_trained(exchanges[-1]):  # what follows the last trained answer is no part of a row
        exchanges.pop()

    def fits(shorter: list[Message], *repairs: str) -> Fitted | None:
        encoded: Encoded = template.encode([*system, *shorter], tools)
        repaired = replace(encoded, repairs=(*encoded.repairs, *repairs))
        return Fitted([*system, *shorter], repaired) if encoded.length <= max_length else None

    if on_overlong == "split" and template.train_on == "all_responses":
        rows = _split(exchanges, fits)
        if rows is None:
            raise Overlong(f"{too_long}, and a single exchange of it is longer already")
        return rows
    if on_overlong not in ("split", "truncate_prompt"):
        raise Overlong(too_long)
    row = _without_oldest(exchanges, fits)
    if row is None and on_overlong == "truncate_prompt":
        row = _with_less_question(exchanges[-1], len(exchanges) > 1, fits)
    if row is None:
        raise Overlong(f"{too_long}, and its last answer leaves no room for the question")
    return [row]


def _split(exchanges: list[list[Message]], fits: Fits) -> list[Fitted] | None:
    rows: list[Fitted] = []
    current: list[Message] = []
    extends_last_row = False
    for exchange in exchanges:
        if not _is_trained(exchange):  # context for the exchanges that follow it, if they fit together
            current += exchange
            continue
        row = fits([*current, *exchange], SPLIT)
        if row is None:
            current = []
            row = fits(exchange, SPLIT)
        elif extends_last_row:
            rows.pop()
        if row is None:
            return None
        current += exchange
        rows.append(row)
        extends_last_row = True
    return rows


def _is_trained(exchange: list[Message]) -> bool:
    return any(message["role"] == "assistant" and message.get("weight", 1) for message in exchange)


def _without_oldest(exchanges: list[list[Message]], fits: Fits) -> Fitted | None:
    def without(number: int) -> Fitted | None:
        return fits(list(chain(*exchanges[number:])), TURNS_LEFT_OUT)

    number = bisect_left(range(1, len(exchanges)), True, key=lambda n: without(n) is not None) + 1
    return without(number) if number < len(exchanges) else None


def _with_less_question(exchange: list[Message], shortened: bool, fits: Fits) -> Fitted | None:
    """`exchange` with the start of its question cut; `shortened`: turns before it are left out already."""
    first, *others = exchange
    question = first["content"]
    repairs = (TURNS_LEFT_OUT, PROMPT_CUT) if shortened else (PROMPT_CUT,)

    def cut(characters: int) -> Fitted | None:
        rest = question[characters:].lstrip()
        return fits([first | {"content": rest}, *others], *repairs) if rest else None

    if first["role"] != "user":
        return None
    # Fewer characters are fewer tokens, but for a token or two where the cut falls: hence the second loop.
    start = bisect_left(range(1, len(question)), True, key=lambda n: cut(n) is not None) + 1
    return next(filter(None, map(cut, range(start, min(start + 8, len(question))))), None)


def _exchanges(messages: list[Message]) -> list[list[Message]]:
    """`messages` in parts that each begin with a question and hold every answer up to the next question."""
    parts: list[list[Message]] = []
    answered = True
    for message in messages:
        if not parts or (message["role"] == "user" and answered):
            parts.append([])
            answered = False
        parts[-1].append(message)
        answered = answered or message["role"] == "assistant"
    return parts
