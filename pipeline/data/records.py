"""`Row`, the form in which every conversation is kept, and functions that check the values of a record (ValueError)."""

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Message

SCORINGS = ("exact", "text")  # the values that a row's scoring column may have
TOOL_CALLS = "tool_calls"  # the scoring of a row whose answer calls tools


@dataclass
class Row:
    """One conversation that ends with a trained turn of the assistant."""

    messages: list[Message]
    source: str  # file:line (JSONL, CSV) or file:[index] (other files), for error messages
    tools: str | None = None  # JSON schemas of the available tools, as text
    task: str = "default"  # a label for scores by task
    group: str | None = None  # a key for rows that must stay in one split, e.g. all questions about one thing
    scoring: str | None = None  # "exact" if there is one right answer, else "text"; None: chosen by task
    repairs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rejected:
    source: str
    reason: str
    record: Any


def text_field(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return check_text(value, key, required) if value is not None or required else ""


def check_text(value: Any, key: str, required: bool = True) -> str:
    """`value` with its spaces, which are content; "" if it is blank and not required."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} contains half a surrogate pair; its encoding is broken") from None
    if value and not value.isspace():
        return value
    if required:
        raise ValueError(f"{key} is empty")
    return ""


def scalar_field(record: dict[str, Any], key: str) -> str:
    """A text or number as text; "" if the record has none."""
    value = record.get(key)
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise ValueError(f"{key} is not a number that can be stored exactly; write it as text")
    return str(value) if isinstance(value, int | float) else text_field(record, key, required=False)


def list_field(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if isinstance(value, str) and value.strip():  # a cell of a CSV file
        value = parse_json(value, key)
    if not isinstance(value, list) and value not in (None, "", {}):
        raise ValueError(f"{key} is not a list")
    return value or []


def parse_json(text: Any, key: str) -> Any:
    """The value of JSON text in a column; NaN and half surrogates are refused."""
    try:
        value = json.loads(check_text(text, key, required=False) or "null")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{key} is not JSON") from None
    to_json(value, key)
    return value


def to_json(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:  # NaN, a date, …
        raise ValueError(f"{key} cannot be written as JSON: {error}") from None
    return check_text(text, key)


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
