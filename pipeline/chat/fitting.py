"""Makes conversations that are longer than the model may train on fit, without cutting an answer."""

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
    """A row has more than `prepare.max_length` tokens, and `prepare.on_overlong` cannot make it fit."""


@dataclass(frozen=True)
class Fitted:
    messages: list[Message]
    encoded: Encoded  # its repairs say what was done to make it fit


FitRow = Callable[..., Fitted | None]  # makes a row of messages and the names of repairs; None if it is too long


def fit(template: Any, messages: list[Message], tools: str | None, max_length: int, on_overlong: str) -> list[Fitted]:
    """The rows that replace a conversation; one with at most `max_length` tokens is returned unchanged.

    An exchange is a question and everything up to the next question. `truncate_prompt` leaves out the oldest exchanges,
    but never the system message or the last exchange; if that is not enough, it cuts the start of the last question.
    `split` makes rows of whole exchanges, each with the system message, and trains every answer once; with `train_on:
    last_response` it makes only the row with the last answer. Raises Overlong, or a RowError as `ChatTemplate.encode`.
    """
    encoded: Encoded = template.encode(messages, tools)
    if encoded.length <= max_length:
        return [Fitted(messages, encoded)]
    system = [message for message in messages[:1] if message["role"] == "system"]
    exchanges = _exchanges(messages[len(system) :])
    while not _is_trained(exchanges[-1]):  # a row ends with a trained answer
        exchanges.pop()

    def fit_row(shorter: list[Message], *repairs: str) -> Fitted | None:
        encoded: Encoded = template.encode([*system, *shorter], tools)
        repaired = replace(encoded, repairs=(*encoded.repairs, *repairs))
        return Fitted([*system, *shorter], repaired) if encoded.length <= max_length else None

    rows: list[Fitted] = []
    if on_overlong == "split" and template.train_on == "all_responses":
        rows = _split(exchanges, fit_row)
    elif on_overlong in ("split", "truncate_prompt"):
        row = _without_oldest(exchanges, fit_row)
        if row is None and on_overlong == "truncate_prompt":
            row = _with_shorter_question(exchanges[-1], len(exchanges) > 1, fit_row)
        rows = [row] if row else []
    if not rows:
        even = "" if on_overlong in ("drop", "error") else ", even if shortened without cutting an answer"
        raise Overlong(f"has {encoded.length} tokens, more than prepare.max_length ({max_length}){even}")
    return rows


def _split(exchanges: list[list[Message]], fit_row: FitRow) -> list[Fitted]:
    """Rows of as many exchanges as fit together; none if an exchange alone is too long."""
    rows: list[Fitted] = []
    current: list[Message] = []
    for exchange in exchanges:
        if not _is_trained(exchange):  # context for the exchanges that follow it, if they fit together
            current += exchange
            continue
        row = fit_row([*current, *exchange], SPLIT)
        if row is None:
            current = []
            row = fit_row(exchange, SPLIT)
        elif rows:  # it extends the last row
            rows.pop()
        if row is None:
            return []
        current += exchange
        rows.append(row)
    return rows


def _is_trained(exchange: list[Message]) -> bool:
    return any(message["role"] == "assistant" and message.get("weight", 1) for message in exchange)


def _without_oldest(exchanges: list[list[Message]], fit_row: FitRow) -> Fitted | None:
    def without(number: int) -> Fitted | None:
        return fit_row(list(chain(*exchanges[number:])), TURNS_LEFT_OUT)

    number = bisect_left(range(1, len(exchanges)), True, key=lambda n: without(n) is not None) + 1
    return without(number) if number < len(exchanges) else None


def _with_shorter_question(exchange: list[Message], turns_left_out: bool, fit_row: FitRow) -> Fitted | None:
    """`exchange` with the start of its question cut; `turns_left_out` if there were earlier exchanges."""
    first, *others = exchange
    question = first["content"]
    repairs = (TURNS_LEFT_OUT, PROMPT_CUT) if turns_left_out else (PROMPT_CUT,)

    def cut(characters: int) -> Fitted | None:
        shorter = question[characters:].lstrip()
        return fit_row([first | {"content": shorter}, *others], *repairs) if shorter else None

    if first["role"] != "user":
        return None
    # Fewer characters usually give fewer tokens, but the cut may add one or two, so the next few cuts are tried too.
    start = bisect_left(range(1, len(question)), True, key=lambda n: cut(n) is not None) + 1
    return next(filter(None, map(cut, range(start, min(start + 8, len(question))))), None)


def _exchanges(messages: list[Message]) -> list[list[Message]]:
    """`messages` in exchanges: each begins with a question and contains everything up to the next question."""
    exchanges: list[list[Message]] = []
    answered = True
    for message in messages:
        if not exchanges or (message["role"] == "user" and answered):
            exchanges.append([])
            answered = False
        exchanges[-1].append(message)
        answered = answered or message["role"] == "assistant"
    return exchanges
