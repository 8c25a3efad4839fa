"""Values of records, checked: text that can be written again, JSON inside of text, and how they are shown in a reason.

Every fault is a ValueError that continues the sentence "a row …".
"""

import json
from typing import Any


def text_of(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return checked(value, key, required) if value is not None or required else ""


def checked(value: Any, key: str, required: bool = True) -> str:
    """`value` as it is, its spaces too, which are content; "" where it is nothing but spaces and not required."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    if not value or value.isspace():
        if required:
            raise ValueError(f"{key} is empty")
        return ""
    return value


def label_of(record: dict[str, Any], key: str) -> str | None:
    return None if record.get(key) is None else scalar_of(record, key).strip() or None


def scalar_of(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise ValueError(f"{key} is a number too large or too strange to be kept exactly; write it as text")
    return str(value) if isinstance(value, int | float) else checked(value, key, required=False)


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
    compact(value, key)
    return value


def compact(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{key} holds what JSON cannot write (NaN, a date, …)") from None
    return text


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
