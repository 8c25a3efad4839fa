"""Instruction data as people have it (Alpaca, ShareGPT, OpenAI messages; JSON or JSONL), as rows of one shape.

Comes in: a file. Goes out: for every record a `Row`, or a `Rejected` that says why. A file that fits no format, or two,
is refused with a question: a wrong guess is worse.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]  # {"role": system | user | assistant | tool, "content": text}

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
SUFFIXES = {".json", ".jsonl"}
FORMATS = ("alpaca", "sharegpt", "messages")
SCORINGS = ("exact", "text")


class FormatError(ValueError):
    """A file that cannot be read as instruction data; the message names file, line and way out."""


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant's turn.

    `task`, `group` and `scoring` are optional columns of the source: a label for scores by task, what must stay in one
    split (e.g. all questions about one thing), and whether there is one right answer ("exact") or not ("text").
    """

    messages: list[Message]
    source: str  # file:line (JSONL) or file:index (JSON), for messages to people
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


def detect_format(record: Any) -> str | None:
    """The one format whose keys `record` has, or None when that is not exactly one."""
    if not isinstance(record, dict):
        return None
    found = [
        name
        for name, fits in (
            ("alpaca", "instruction" in record and "output" in record),
            ("sharegpt", isinstance(record.get("conversations"), list)),
            ("messages", isinstance(record.get("messages"), list)),
        )
        if fits
    ]
    return found[0] if len(found) == 1 else None


def find_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or all .json and .jsonl below it in name order."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected .json or .jsonl")
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path} does not exist; name a .json or .jsonl file, or a folder of them")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise FormatError(f"{path} holds no .json or .jsonl file")
    return files


def read_rows(path: Path, format: str = "auto") -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order, as a `Row` or a `Rejected`: none is left out.

    Raises:
        FormatError: the file is not UTF-8, not JSON, empty, or of no known format.
    """
    records = list(_read_records(path))
    if not records:
        raise FormatError(f"{path} holds no records")
    _, dot, marked = path.stem.rpartition(".")
    if format == "auto" and dot and marked in FORMATS:
        format = marked
    if format == "auto":
        formats = {detect_format(record) for _, record in records} - {None}
        if len(formats) != 1:
            keys = sorted(records[0][1]) if isinstance(records[0][1], dict) else type(records[0][1]).__name__
            what = f"looks like {' and '.join(sorted(map(str, formats)))}" if formats else f"has {keys}"
            raise FormatError(
                f"{path} {what}; expected Alpaca (instruction, input, output), ShareGPT (conversations) or messages: "
                "name it with --format or split the file"
            )
        format = str(formats.pop())
    convert = {"alpaca": _from_alpaca, "sharegpt": _from_sharegpt, "messages": _from_messages}[format]
    for source, record in records:
        try:
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}, not an object")
            yield convert(record, source)
        except ValueError as error:
            yield Rejected(source, str(error), record)


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
    if path.suffix == ".jsonl":
        # Not splitlines(): U+2028 and friends are legal inside JSON strings.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path.name}:{number}", _parse(line, path, number)
    else:
        records = _parse(text, path, 1) if text.strip() else []
        if not isinstance(records, list):
            raise FormatError(f"{path} holds one {type(records).__name__}; expected a list of records")
        for index, record in enumerate(records):
            yield f"{path.name}:[{index}]", record


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise FormatError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}") from None
    except ValueError as error:  # a number with thousands of digits
        raise FormatError(f"{path}, line {first_line}: {error}") from None
    except RecursionError:
        raise FormatError(f"{path}, line {first_line}: nested too deeply to be instruction data") from None


def _from_alpaca(record: dict[str, Any], source: str) -> Row:
    instruction = _text(record, "instruction")
    extra = _text(record, "input", required=False)
    messages = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError("history is not a list of [question, answer] pairs")
    for question, answer in history:
        messages += [
            {"role": "user", "content": _checked(question, "history")},
            {"role": "assistant", "content": _checked(answer, "history")},
        ]
    prompt = f"{instruction}\n{extra}" if extra else instruction
    messages += [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text(record, "output")},
    ]
    return _row(messages, record, source)


def _from_sharegpt(record: dict[str, Any], source: str) -> Row:
    messages = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    for turn in record["conversations"] if isinstance(record.get("conversations"), list) else []:
        if not isinstance(turn, dict) or turn.get("from") not in list(SHAREGPT_ROLES):
            speaker = turn.get("from") if isinstance(turn, dict) else turn
            raise ValueError(f"a turn is from {speaker!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": _text(turn, "value")})
    return _row(messages, record, source)


def _from_messages(record: dict[str, Any], source: str) -> Row:
    messages = []
    for turn in record["messages"] if isinstance(record.get("messages"), list) else []:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant", "tool"):
            role = turn.get("role") if isinstance(turn, dict) else turn
            raise ValueError(f"a message has role {role!r}; expected system, user, assistant or tool")
        messages.append({"role": turn["role"], "content": _text(turn, "content")})
    return _row(messages, record, source)


def _row(messages: list[Message], record: dict[str, Any], source: str) -> Row:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("has no assistant turn to learn from")
    repairs = ["turns after the last answer left out"] if answers[-1] + 1 < len(messages) else []
    messages = messages[: answers[-1] + 1]
    if messages[0]["role"] == "assistant":
        raise ValueError("begins with an answer to nothing")
    tools = record.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(_checked(tools, "tools")) or None
        except json.JSONDecodeError:
            raise ValueError("tools is not JSON") from None
    if tools is not None:
        tools = _checked(json.dumps(tools, ensure_ascii=False), "tools")
    scoring = record.get("scoring")
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {scoring!r}; expected exact or text")
    return Row(
        messages=messages,
        source=source,
        tools=tools,
        task=_checked(str(record.get("task") or "default"), "task"),
        group=_checked(str(record["group"]), "group") if record.get("group") not in (None, "") else None,
        scoring=scoring,
        repairs=repairs,
    )


def _text(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return "" if value is None and not required else _checked(value, key, required)


def _checked(value: Any, key: str, required: bool = True) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    if required and not value.strip():
        raise ValueError(f"{key} is empty")
    return value.strip()
