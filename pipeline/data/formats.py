"""Instruction data as people have it, as conversations of one shape.

Comes in: records of a file (see `containers`). Goes out: for every record a `Row`, or a `Rejected` with the reason. A
file that fits no format, or two, is refused with a question that lists what was seen: a wrong guess is worse.
"""

import json
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.containers import (
    CONTAINERS,
    KNOWN,
    Block,
    Unreadable,
    read_blocks,
    records_of,
    split_name,
)
from pipeline.data.containers import FormatError as FormatError
from pipeline.params import ColumnsParams

Message = dict[
    str, Any
]  # role: system | user | assistant | tool; content: text; tool_calls, name, tool_call_id: optional

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
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
SCORINGS = ("exact", "text")
# A dialogue in one text, as BELLE's multi-turn rows, Anthropic's and Guanaco's have it.
SPEAKER = re.compile(r"(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[::]")
SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # what `retune ingest` writes
SAMPLE = 1000  # records at the start of a file by which its format is recognised


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant's turn.

    `task`, `group` and `scoring` are optional columns of the source: a label for scores by task, what must stay in one
    split (e.g. all questions about one thing), and whether there is one right answer ("exact") or not ("text").
    A row whose only message is the assistant's is plain text (see `is_plain_text`); no format but `text` makes one.
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


@dataclass(frozen=True)
class Recipe:
    """How the records of one file become rows; small, so that it travels to other processes."""

    format: str
    columns: ColumnsParams | None = None
    guessed: bool = False  # whether nobody named the format: a record of another one then stops the file


def is_plain_text(messages: list[Message]) -> bool:
    """Whether a row is text to continue rather than an answer to a prompt: no chat template belongs around it."""
    return len(messages) == 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def _turns_have(record: dict[str, Any], key: str, part: str) -> bool:
    turns = record.get(key)
    if isinstance(turns, str):
        return f'"{part}"' in turns
    return isinstance(turns, list) and (not turns or not isinstance(turns[0], dict) or part in turns[0])


SIGNATURES: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "alpaca": ("instruction, output", lambda r: "instruction" in r and "output" in r),
    "self-instruct": ("instruction, instances", lambda r: "instruction" in r and _is_list(r.get("instances"))),
    "sharegpt": (
        "conversations with from and value",
        lambda r: _is_list(r.get("conversations")) and _turns_have(r, "conversations", "from"),
    ),
    "messages": (
        "messages with role and content",
        lambda r: (
            _is_list(r.get("messages"))
            or (_turns_have(r, "conversations", "role") and not _turns_have(r, "conversations", "from"))
        ),
    ),
    "prompt-completion": ("prompt, completion", lambda r: "prompt" in r and "completion" in r),
    "openorca": ("system_prompt, question, response", lambda r: {"system_prompt", "question", "response"} <= r.keys()),
    "ultrachat": (
        "data, a list of texts",
        lambda r: isinstance(r.get("data"), list) and all(isinstance(turn, str) for turn in r["data"]),
    ),
    "classification": ("text, label", lambda r: "text" in r and "label" in r),
    "preference": ("chosen, rejected", lambda r: "chosen" in r and "rejected" in r),
}
FORMATS = (*(name for name in SIGNATURES if name != "preference"), "belle", "text")


def _formats_of(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    found = [name for name, (_, fits) in SIGNATURES.items() if fits(record)]
    # tatsu-lab's Alpaca carries its rendered prompt as `text`: that column counts where nothing else does.
    return ["text"] if not found and "text" in record else found


def detect_format(record: Any) -> str | None:
    """The one format whose keys `record` has, or None when that is not exactly one."""
    found = _formats_of(record)
    return found[0] if len(found) == 1 else None


def find_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or all with a known ending below it in name order.

    What `retune ingest` keeps beside its shards (snapshot.json, rejected.jsonl) is no data.
    """
    if path.is_file():
        if not split_name(path)[1]:
            raise FormatError(f"{path} ends in {path.suffix or 'nothing'}; expected {KNOWN}")
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path} does not exist; name a file that ends in {KNOWN}, or a folder of them")
    files = sorted(p for p in path.rglob("*") if split_name(p)[1] and p.is_file())
    own = {
        p.with_name(name) for p in files if p.name == "snapshot.json" for name in ("snapshot.json", "rejected.jsonl")
    }
    files = [p for p in files if p not in own]
    if not files:
        raise FormatError(f"{path} holds no file that ends in {', '.join(CONTAINERS)}")
    return files


def read_rows(path: Path, format: str = "auto", columns: ColumnsParams | None = None) -> Iterator[Row | Rejected]:
    """Every record of the file `path`, in order, as a `Row` or a `Rejected`: none is left out.

    Raises:
        FormatError: the file is unreadable (see `containers`), empty, of no known format or of two, or lacks a column
            that `columns` names.
    """
    for block, recipe in recognised_blocks(path, format, columns):
        yield from convert(block, recipe)


def recognised_blocks(
    path: Path, format: str = "auto", columns: ColumnsParams | None = None, name: str | None = None
) -> Iterator[tuple[Block, Recipe]]:
    """The blocks of `path`, each with the recipe by which `convert` makes rows of it.

    Raises:
        FormatError: as `read_rows`; a block's own faults show when it is converted.
    """
    stem = split_name(path)[0]
    _, dot, marked = stem.rpartition(".")
    if format == "auto" and dot and marked in FORMATS:
        format = marked
    recipe: Recipe | None = None
    for block in read_blocks(path, name):
        if recipe is None:
            records = [record for _, record in islice(records_of(block), SAMPLE)]
            if not records:
                continue
            recipe = recognise(path, records, format, columns)
        yield block, recipe
    if recipe is None:
        raise FormatError(f"{path} holds no records")


def recognise(path: Path, records: list[Any], format: str, columns: ColumnsParams | None) -> Recipe:
    """The recipe for a file that begins with `records`.

    Raises:
        FormatError: as `read_rows`.
    """
    seen = sorted({key for record in records if isinstance(record, dict) for key in record})
    if split_name(path)[1] == ".parquet" and sorted(SHARD_COLUMNS) == seen:
        return Recipe("shard")
    guessed = format == "auto" and (columns is None or columns.response is None)
    if columns is not None:
        missing = sorted({name for name in _named(columns) if name not in seen})
        if missing:
            raise FormatError(
                f"{path} has no column {', '.join(missing)}, which ingest.columns names; "
                f"it has {', '.join(seen) or 'none'}"
            )
        if columns.response is not None:
            if format not in ("auto", "classification"):
                raise FormatError(f"ingest.columns names a response, so ingest.format must be auto; it is {format}")
            return Recipe("classification" if format == "classification" else "columns", columns)
    if guessed:
        format = _guess(path, records, seen)
    if columns is not None and format != "classification":
        raise FormatError(
            f"{path} is of format {format}; ingest.columns would need a response (and prompt or template)"
        )
    if format in ("alpaca", "belle"):
        # One recipe for both: whether an instruction holds a dialogue is seen row by row.
        dialogue = any(isinstance(r, dict) and _is_dialogue(r.get("instruction")) for r in records)
        format = "belle" if dialogue else format
    return Recipe(format, columns, guessed)


def _guess(path: Path, records: list[Any], seen: list[str]) -> str:
    named = {name for record in records for name in [detect_format(record)] if name}
    if named == {"preference"}:
        raise FormatError(
            f"{path} holds preference pairs (chosen, rejected); Retune trains on single answers: take one with "
            "ingest.columns, e.g. {prompt: prompt, response: chosen}"
        )
    if named == {"text"}:
        raise FormatError(
            f"{path} has text and no prompt ({', '.join(seen)}); expected prompts with answers: --format text trains "
            "on it as plain text, ingest.columns with a template and response: text gives it a prompt"
        )
    if len(named) == 1:
        return named.pop()
    if named:
        what = f"looks like {' and '.join(sorted(named))}"
    elif both := next((found for record in records if len(found := _formats_of(record)) > 1), None):
        what = f"looks like {' and '.join(both)} at once, with {', '.join(seen)}"
    else:
        readable = next((r for r in records if not isinstance(r, Unreadable)), records[0])
        what = f"has {', '.join(seen) if seen else type(readable).__name__}"
    known = "; ".join(f"{name} ({keys})" for name, (keys, _) in SIGNATURES.items() if name != "preference")
    raise FormatError(
        f"{path} {what}; expected one of {known}: name it with --format, map its columns in ingest.columns of "
        "params.yaml, or split the file"
    )


def convert(block: Block, recipe: Recipe) -> Iterator[Row | Rejected]:
    """Every record of `block` as rows or rejections (one record of self-instruct can be several).

    Raises:
        FormatError: a line is not JSON, or a guessed format turns out to be one of two.
    """
    made_by: dict[str, Callable[[dict[str, Any], str], Row | list[Row | Rejected]]] = {
        "alpaca": _from_alpaca,
        "belle": _from_alpaca,
        "self-instruct": _from_self_instruct,
        "sharegpt": _from_sharegpt,
        "messages": _from_messages,
        "prompt-completion": _from_prompt_completion,
        "openorca": _from_openorca,
        "ultrachat": _from_ultrachat,
        "text": _from_text,
        "shard": _from_shard,
    }
    make = made_by.get(recipe.format) or _mapping(recipe, block.labels)
    for source, record in records_of(block):
        try:
            if not isinstance(record, dict):
                if isinstance(record, Unreadable):
                    yield Rejected(source, record.reason, record.text)
                    continue
                raise ValueError(f"is a {type(record).__name__}, not an object")
            made = make(record, source)
        except ValueError as error:
            other = detect_format(record) if recipe.guessed else None
            if other not in (None, "text", "alpaca" if recipe.format == "belle" else recipe.format):
                raise FormatError(
                    f"{block.path} looks like {recipe.format}, but {source} like {other}: name it with --format or "
                    "split the file"
                ) from None
            yield Rejected(source, str(error), record)
            continue
        if isinstance(made, list):
            yield from made
        else:
            yield made


def _from_alpaca(record: dict[str, Any], source: str) -> Row:
    instruction = _text(record, "instruction")
    extra = "" if record.get("input") in (None, "") else _text(record, "input", required=False)
    output = _text(record, "output")
    messages: list[Message] = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    if "history" in record:
        messages += _history(record, "history")
    if _is_dialogue(instruction):
        if extra:
            raise ValueError("instruction holds a conversation (Human:/Assistant:) and there is an input beside it")
        messages += _dialogue(instruction, "instruction", open_end=True)
    else:
        messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return _row(messages, record, source)


def _from_self_instruct(record: dict[str, Any], source: str) -> list[Row | Rejected]:
    instances = _list(record, "instances")
    if not instances:
        raise ValueError("has no instances")
    rows: list[Row | Rejected] = []
    for number, instance in enumerate(instances):
        where = f"{source}#{number}"
        try:
            if not isinstance(instance, dict):
                raise ValueError(f"has an instance that is a {type(instance).__name__}, not an object")
            rows.append(
                _from_alpaca(record | {"input": instance.get("input"), "output": instance.get("output")}, where)
            )
        except ValueError as error:
            rows.append(Rejected(where, str(error), {"instruction": record.get("instruction"), "instance": instance}))
    return rows


def _from_sharegpt(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    if system := _text(record, "system", required=False):
        messages.append({"role": "system", "content": system})
    for turn in _list(record, "conversations"):
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise ValueError(f"a turn is from {_short(speaker)}; expected one of {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            calls = _json(turn.get("value"), "function_call")
            calls = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": _text(turn, "value")})
    return _row(messages, record, source)


def _from_messages(record: dict[str, Any], source: str) -> Row:
    key = "conversations" if record.get("messages") is None and "conversations" in record else "messages"
    return _row(_chat(_list(record, key)), record, source)


def _from_prompt_completion(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record.get(key), list):
            messages += _chat(record[key])
        else:
            messages.append({"role": role, "content": _text(record, key)})
    return _row(messages, record, source)


def _from_openorca(record: dict[str, Any], source: str) -> Row:
    messages: list[Message] = []
    if system := _text(record, "system_prompt", required=False):
        messages.append({"role": "system", "content": system})
    return _row([*messages, *_turns([_text(record, "question"), _text(record, "response")])], record, source)


def _from_ultrachat(record: dict[str, Any], source: str) -> Row:
    return _row(_turns([_checked(turn, "data") for turn in _list(record, "data")]), record, source)


def _from_text(record: dict[str, Any], source: str) -> Row:
    text = _text(record, "text")
    if _is_dialogue(text):
        return _row(_dialogue(text, "text", open_end=False), record, source)
    return _row([{"role": "assistant", "content": text}], {"task": "text"} | record, source, plain=True)


def _from_shard(record: dict[str, Any], source: str) -> Row:
    messages = _chat(_list(record, "messages"))
    row = _row(messages, record, _text(record, "source"), plain=is_plain_text(messages))
    return replace(row, repairs=[*(record["repairs"] or []), *row.repairs])


def _mapping(recipe: Recipe, labels: dict[str, list[str]]) -> Callable[[dict[str, Any], str], Row]:
    """The converter for columns that a person named; classification is text → label unless they say otherwise."""
    columns = recipe.columns or ColumnsParams()
    classes = recipe.format == "classification"
    response = columns.response or "label"
    prompt = columns.prompt or "text"
    template = list(string.Formatter().parse(columns.template)) if columns.template is not None else None

    def make(record: dict[str, Any], source: str) -> Row:
        messages: list[Message] = []
        if columns.system and (system := _text(record, columns.system, required=False)):
            messages.append({"role": "system", "content": system})
        if columns.history:
            messages += _history(record, columns.history)
        if template is None:
            asked = _text(record, prompt)
        else:
            parts = [literal + (_scalar(record, name) if name else "") for literal, name, _, _ in template]
            asked = _checked("".join(parts), "template")
        own = {name: record.get(getattr(columns, name) or name) for name in ("task", "group", "scoring", "tools")}
        if classes:
            own = own | {"task": own["task"] or "classification", "scoring": own["scoring"] or "exact"}
        return _row([*messages, *_turns([asked, _answer(record, response, labels)])], own, source)

    return make


def _named(columns: ColumnsParams) -> list[str]:
    """The columns that a mapping reads."""
    names = [value for key, value in columns.model_dump().items() if key != "template" and value is not None]
    return names + [name for _, name, _, _ in string.Formatter().parse(columns.template or "") if name]


def _answer(record: dict[str, Any], key: str, labels: dict[str, list[str]]) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = labels.get(key)
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = names[value]
    return _checked(value, key)


def _chat(turns: list[Any]) -> list[Message]:
    """OpenAI's messages; text parts of a content are joined, any other part cannot be trained on here."""
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has role {_short(role)}; expected system, user, assistant or tool")
        if turn.get("weight") not in (None, 1):
            raise ValueError("a message has a weight of its own; prepare.train_on says which answers are trained")
        content = turn.get("content")
        if isinstance(content, list):
            content = "".join(_part(part) for part in content)
        message: Message = {"role": ROLES[role], "content": content}
        calls = turn.get("tool_calls")
        if calls is None and turn.get("function_call"):
            calls = [turn["function_call"]]
        if calls:
            if not isinstance(calls, list) or message["role"] != "assistant":
                raise ValueError("tool_calls is not a list in an assistant's message")
            message["tool_calls"] = [_call(call) for call in calls]
        message["content"] = "" if content is None and calls else _checked(content, "content", required=not calls)
        if message["role"] == "tool":
            for key in ("name", "tool_call_id"):
                if turn.get(key) is not None:
                    message[key] = _checked(turn[key], key)
        messages.append(message)
    return messages


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ValueError(f"content has a part of type {_short(kind)}; only text can be trained on")
    return str(part["text"])


def _call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, with its arguments as an object (many files have them as JSON text)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = _json(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {_short(function['name'])} are a {type(arguments).__name__}, not an object")
    _compact(arguments, "arguments")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": _checked(function["name"], "name"), "arguments": arguments},
    }
    return made if call.get("id") is None else {"id": _checked(call["id"], "id")} | made


def _tools(record: dict[str, Any]) -> str | None:
    """The offer of tools in OpenAI's shape, which chat templates expect; bare schemas are wrapped."""
    tools = record.get("tools") or record.get("functions") or None
    if isinstance(tools, str):
        tools = _json(tools, "tools") or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools is not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return _checked(_compact(tools, "tools"), "tools")


def _history(record: dict[str, Any], key: str) -> list[Message]:
    messages: list[Message] = []
    for turn in _list(record, key):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{key} is not a list of [question, answer] pairs")
        messages += _turns([_checked(turn[0], key), _checked(turn[1], key)])
    return messages


def _is_dialogue(text: Any) -> bool:
    """Whether `text` is a conversation written out: it begins with `Human:` and has an `Assistant:` of its own line."""
    if not isinstance(text, str) or "Assistant" not in text:
        return False
    speakers = [match.group(1) for match in SPEAKER.finditer(text.strip())]
    return SPEAKER.match(text.strip()) is not None and speakers[0] == "Human" and "Assistant" in speakers


def _dialogue(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation written out; with `open_end` its last `Assistant:` is left open and not returned."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} holds a conversation whose turns do not alternate between Human: and Assistant:")
    if open_end:
        if speakers[-1] != "Assistant" or contents[-1]:
            raise ValueError(f"{key} holds a conversation (Human:/Assistant:) that does not end with Assistant:")
        contents = contents[:-1]
    return _turns([_checked(content, key) for content in contents])


def _turns(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _row(messages: list[Message], record: dict[str, Any], source: str, plain: bool = False) -> Row:
    repairs = []
    if not messages or messages[-1]["role"] != "assistant":
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("has no assistant turn to learn from")
        repairs = ["turns after the last answer left out"]
        messages = messages[: answers[-1] + 1]
    if messages[0]["role"] == "assistant" and not plain:
        raise ValueError("begins with an answer to nothing")
    scoring = record.get("scoring") or None
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {_short(scoring)}; expected exact or text")
    return Row(
        messages,
        source,
        _tools(record) if "tools" in record or "functions" in record else None,
        (_label(record, "task") or "default") if "task" in record else "default",
        _label(record, "group") if "group" in record else None,
        scoring,
        repairs,
    )


def _label(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    return None if value is None else _scalar(record, key) or None


def _scalar(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise ValueError(f"{key} is a number too large or too strange to be kept exactly; write it as text")
    return str(value) if isinstance(value, int | float) else _checked(value, key, required=False)


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if isinstance(value, str) and value.strip():  # as in a CSV cell
        value = _json(value, key)
    if not value and not isinstance(value, int | float):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def _text(record: dict[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    return _checked(value, key, required) if value is not None or required else ""


def _checked(value: Any, key: str, required: bool = True) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__ if value is not None else 'missing'}; expected text")
    if "\x00" in value:
        raise ValueError(f"{key} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    value = value.strip()
    if required and not value:
        raise ValueError(f"{key} is empty")
    return value


def _json(text: Any, key: str) -> Any:
    """JSON inside a column; NaN and half surrogates are none."""
    try:
        value = json.loads(_checked(text, key, required=False) or "null")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{key} is not JSON") from None
    _compact(value, key)
    return value


def _compact(value: Any, key: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair; its encoding is broken") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{key} holds what JSON cannot write (NaN, a date, …)") from None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
