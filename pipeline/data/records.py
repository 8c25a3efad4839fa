"""A conversation that a record holds, as a `Row`, and the values of records, checked.

A value that cannot be used is a ValueError that continues the sentence "a row …"; its record becomes a `Rejected`.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Message

SCORINGS = ("exact", "text")  # what a row may say
TOOL_CALLS = "tool_calls"  # of a row whose answer calls tools


@dataclass
class Row:
    """One conversation that ends with a trained turn of the assistant.

    `task`, `group` and `scoring` are optional columns of the source: a label for scores by task, what must stay in one
    split (e.g. all questions about one thing), and whether there is one right answer ("exact") or not ("text").
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


def text_of(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return checked(value, key, required) if value is not None or required else ""


def checked(value: Any, key: str, required: bool = True) -> str:
    """`value` as it is, its spaces too, which are content; "" where it is nothing but spaces and not required."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    if value and not value.isspace():
        return value
    if required:
        raise ValueError(f"{key} is empty")
    return ""


def scalar_of(record: dict[str, Any], key: str) -> str:
    """A text or number as text; "" where there is none."""
    value = record.get(key)
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise ValueError(f"{key} is a number too large or too strange to be kept exactly; write it as text")
    return str(value) if isinstance(value, int | float) else text_of(record, key, required=False)


def list_of(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if isinstance(value, str) and value.strip():  # as in a CSV cell
        value = parse_json(value, key)
    if not value and not isinstance(value, int | float):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def parse_json(text: Any, key: str) -> Any:
    """JSON inside a column; NaN and half surrogates are refused."""
    try:
        value = json.loads(checked(text, key, required=False) or "null")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{key} is not JSON") from None
    to_json(value, key)
    return value


def to_json(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:  # NaN, a date, …
        raise ValueError(f"{key} cannot be written as JSON: {error}") from None
    return checked(text, key)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
