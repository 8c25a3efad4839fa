"""Rows that are longer than the model may train on, made to fit without cutting an answer.

Each conversation gives the rows that take its place, with what was done to them. One that fits in no way that
`prepare.on_overlong` allows is an `Overlong` error.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate, Conversation, Encoded
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


def fit_batch(
    template: Any, conversations: Sequence[Conversation], max_length: int, on_overlong: str
) -> list[list[Fitted] | RowError]:
    """For each conversation the rows that take its place, or the `RowError` that says why there are none.

    A conversation of no more than `max_length` tokens stays as it is. `truncate_prompt` leaves out the oldest exchanges
    (a question with all that follows up to the next), never the system message or the last exchange, then cuts the
    start of the last question. `split` makes rows of whole exchanges, each with the system message, so that every
    trained answer is trained once; with `train_on: last_response` only the last row has one, and the others are not
    made. `drop` and `error` change nothing.
    """
    fitted: list[list[Fitted] | RowError] = []
    for (messages, tools), encoded in zip(conversations, template.encode_batch(conversations), strict=True):
        if isinstance(encoded, RowError):
            fitted.append(encoded)
        elif encoded.length <= max_length:
            fitted.append([Fitted(messages, encoded)])
        else:
            try:
                fitted.append(_Overlong(template, tools, max_length).made_to_fit(messages, encoded, on_overlong))
            except RowError as error:
                fitted.append(error)
    return fitted


@dataclass(frozen=True)
class _Overlong:
    template: ChatTemplate
    tools: str | None
    max_length: int

    def made_to_fit(self, messages: list[Message], encoded: Encoded, how: str) -> list[Fitted]:
        length = encoded.length
        system = [message for message in messages[:1] if message["role"] == "system"]
        exchanges = _exchanges(messages[len(system) :])
        if how == "split" and self.template.train_on == "all_responses":
            return self._split(system, exchanges, length)
        if how in ("split", "truncate_prompt"):
            return [self._truncated(system, exchanges, length, cut=how == "truncate_prompt")]
        raise Overlong(f"has {length} tokens, more than prepare.max_length ({self.max_length})")

    def _split(self, system: list[Message], exchanges: list[list[Message]], length: int) -> list[Fitted]:
        rows: list[Fitted] = []
        current: list[Message] = []
        for exchange in exchanges:
            longer = self._encoded(system + current + exchange)
            if longer is None and current:
                current = []
                longer = self._encoded(system + exchange)
            elif current:
                rows.pop()
            if longer is None:
                raise Overlong(
                    f"has {length} tokens, more than prepare.max_length ({self.max_length}), and a single exchange of "
                    "it is longer already"
                )
            current = current + exchange
            rows.append(Fitted(system + current, _repaired(longer, SPLIT)))
        return rows

    def _truncated(self, system: list[Message], exchanges: list[list[Message]], length: int, cut: bool) -> Fitted:
        def without(number: int) -> list[Message]:
            return system + [message for exchange in exchanges[number:] for message in exchange]

        left_out = bisect_left(range(1, len(exchanges)), True, key=lambda n: self._encoded(without(n)) is not None) + 1
        if left_out < len(exchanges) and (encoded := self._encoded(without(left_out))):
            return Fitted(without(left_out), _repaired(encoded, TURNS_LEFT_OUT))
        last = without(len(exchanges) - 1)
        place = len(system)
        if cut and last[place]["role"] == "user":
            question = last[place]["content"]

            def shortened(characters: int) -> list[Message]:
                return [*last[:place], last[place] | {"content": question[characters:].lstrip()}, *last[place + 1 :]]

            # Fewer characters are fewer tokens, but for a token or two where the cut falls: hence the second loop.
            first = (
                bisect_left(range(1, len(question)), True, key=lambda n: self._encoded(shortened(n)) is not None) + 1
            )
            for characters in range(first, min(first + 8, len(question))):
                encoded = self._encoded(shortened(characters)) if question[characters:].strip() else None
                if encoded is not None:
                    repairs = (TURNS_LEFT_OUT, PROMPT_CUT) if len(exchanges) > 1 else (PROMPT_CUT,)
                    return Fitted(shortened(characters), _repaired(encoded, *repairs))
        raise Overlong(
            f"has {length} tokens, more than prepare.max_length ({self.max_length}), and its last answer leaves no "
            "room for the question"
        )

    def _encoded(self, messages: list[Message]) -> Encoded | None:
        encoded = self.template.encode(messages, self.tools)
        return encoded if encoded.length <= self.max_length else None


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


def _repaired(encoded: Encoded, *repairs: str) -> Encoded:
    return replace(encoded, repairs=(*encoded.repairs, *repairs))


def fit_text(template: ChatTemplate, text: str, max_length: int, on_overlong: str) -> list[Fitted]:
    """Plain text as rows of at most `max_length` tokens, all of them trained, the last with the end token.

    There is no prompt to cut: `truncate_prompt` and `split` both cut the text into pieces.

    Raises:
        Overlong: it is longer, and `on_overlong` is drop or error.
        RowError: see `ChatTemplate.encode_text`.
    """
    encoded = template.encode_text(text)
    length = len(encoded.input_ids)
    message: Message = {"role": "assistant", "content": text}
    if length <= max_length:
        return [Fitted([message], encoded)]
    if on_overlong not in ("split", "truncate_prompt"):
        raise Overlong(f"has {length} tokens, more than prepare.max_length ({max_length})")
    pieces = []
    for start in range(0, length, max_length):
        ids = encoded.input_ids[start : start + max_length]
        # The content tells the pieces apart; what is trained are the tokens.
        part = message | {"content": template.tokenizer.decode(ids)}
        pieces.append(Fitted([part], _repaired(Encoded(ids, list(ids), encoded.repairs), SPLIT)))
    return pieces
