"""Every known format: the keys by which it is recognised, the columns that it reads, how a record becomes a row.

A new format is an entry of `KNOWN_FORMATS`, with a function where none of those here reads it, and its name in
`params.Format`.
"""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.chat import Message
from pipeline.data import trees
from pipeline.data.columns import CONVERSATIONS, PAIRS, SHARD_COLUMNS, TURN_PAIRS, has_context, named_columns
from pipeline.data.messages import chat_messages, join_turns, sharegpt_messages
from pipeline.data.records import (
    Rejected,
    Row,
    answer_of,
    conversation_of,
    dialogue_turns,
    history_of,
    is_dialogue,
    is_plain_text,
    row_of,
    row_of_turns,
    system_of,
    turns_of,
)
from pipeline.data.values import checked, list_of, scalar_of, short, text_of
from pipeline.params import ColumnsParams

OPTIONAL = frozenset(("system", "tools", "functions", "task", "group", "scoring"))
CONVERSATION = OPTIONAL | {*CONVERSATIONS}
# The set takes up the names of columns and message keys that say something and are not read.
Converter = Callable[[dict[str, Any], str, set[str]], Row | list[Row | Rejected]]


@dataclass(frozen=True)
class Format:
    """What Retune knows of a format; one without `convert` is read by a mapping of columns, or not at all."""

    reads: frozenset[str] = frozenset()
    convert: Converter | None = None
    keys: str = ""  # what its records have, for messages to people
    fits: Callable[[dict[str, Any]], bool] = lambda record: False  # whether a record looks like it


def _instruction(about: str, answer: str, record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """An instruction about the text in the column `about`, and its answer in the column `answer`."""
    instruction = text_of(record, "instruction")
    extra = "" if record.get(about) in (None, "") else text_of(record, about, required=False)
    output = text_of(record, answer)
    messages = system_of(record) if "system" in record else []
    if "history" in record:
        messages += history_of(record, "history")
    if is_dialogue(instruction):
        if extra:
            raise ValueError("instruction holds a conversation (Human:/Assistant:) and there is an input beside it")
        messages += dialogue_turns(instruction, "instruction", open_end=True)
    else:
        messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return row_of(messages, record, source, unused)


_from_alpaca: Callable[[dict[str, Any], str, set[str]], Row] = partial(_instruction, "input", "output")


_from_dolly: Converter = partial(_instruction, "context", "response")


def _from_self_instruct(record: dict[str, Any], source: str, unused: set[str]) -> list[Row | Rejected]:
    instances = list_of(record, "instances")
    if not instances:
        raise ValueError("has no instances")
    rows: list[Row | Rejected] = []
    for number, instance in enumerate(instances):
        where = f"{source}#{number}"
        try:
            if not isinstance(instance, dict):
                raise ValueError(f"has an instance that is a {type(instance).__name__}, not an object")
            unused.update(f"instances[].{key}" for key in instance.keys() - {"input", "output"} if instance[key])
            whole = record | {"input": instance.get("input"), "output": instance.get("output")}
            rows.append(_from_alpaca(whole, where, unused))
        except ValueError as error:
            rows.append(Rejected(where, str(error), {"instruction": record.get("instruction"), "instance": instance}))
    return rows


def _from_sharegpt(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = conversation_of(record, unused)
    return row_of_turns(sharegpt_messages(turns, key, unused), record, source, unused)


def _from_messages(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = conversation_of(record, unused)
    return row_of_turns(chat_messages(turns, key, unused), record, source, unused)


def _from_turn_pairs(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = conversation_of(record, unused)
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        names = next((pair for pair in TURN_PAIRS if isinstance(turn, dict) and pair[0] in turn), None)
        if names is None:
            raise ValueError(f"a turn is {short(turn)}; expected an object with human and assistant (or input, output)")
        if number == 0:
            messages += system_of(turn)
        texts = [text_of(turn, name) for name in names]
        unused.update(f"{key}[].{name}" for name in turn.keys() - {*names, *(() if number else ("system",))})
        messages += turns_of(texts)
    return row_of_turns(messages, record, source, unused)


def _from_question_answer(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    for names in PAIRS:
        if names[0] in record and names[1] in record:
            unused.update(key for pair in PAIRS for key in pair if key not in names and record.get(key))
            return _pair(*names, record, source, unused)
    raise ValueError(f"has {', '.join(record) or 'nothing'}; expected {' or '.join(map(' and '.join, PAIRS))}")


def _pair(prompt: str, response: str, record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """A prompt and its answer; each may also be a list of messages, as TRL has them."""
    messages = system_of(record)
    for key, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(record.get(key), list):
            messages += chat_messages(record[key], key, unused)
        else:
            text = answer_of(record, key, {}) if role == "assistant" else text_of(record, key)
            messages.append({"role": role, "content": text})
    messages, repairs = join_turns(messages)
    return row_of(messages, record, source, unused, repairs=repairs)


def _from_openorca(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages = system_of(record, "system_prompt")
    return row_of(
        [*messages, *turns_of([text_of(record, "question"), text_of(record, "response")])], record, source, unused
    )


def _from_ultrachat(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = conversation_of(record, unused, "data", *CONVERSATIONS)
    return row_of_turns(turns_of([checked(turn, key) for turn in turns]), record, source, unused)


def _from_openassistant(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages: list[Message] = []
    for message in record["path"]:
        role = {"prompter": "user", "assistant": "assistant"}.get(message.get("role"))
        if role is None:
            raise ValueError(f"a message has role {short(message.get('role'))}; expected prompter or assistant")
        messages.append({"role": role, "content": text_of(message, "text")})
        unused.update(key for key in message.keys() - trees.READ if message[key])
    messages, repairs = join_turns(messages)
    repairs += ["other paths of its message tree left out"] if record["left_out"] else []
    return row_of(messages, record, source, unused, repairs=repairs)


def _from_text(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    text = text_of(record, "text")
    if is_dialogue(text):
        return row_of(dialogue_turns(text, "text", open_end=False), record, source, unused)
    return row_of([{"role": "assistant", "content": text}], {"task": "text"} | record, source, unused, plain=True)


def _from_shard(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages = chat_messages(list_of(record, "messages"), "messages", unused)
    row = row_of(messages, record, text_of(record, "source"), unused, plain=is_plain_text(messages))
    return replace(row, repairs=[*(record["repairs"] or []), *row.repairs])


def _mapping(format: str, columns: ColumnsParams | None, labels: dict[str, list[str]]) -> Converter:
    """The converter for columns that a person named; classification is text → label unless they say otherwise."""
    columns = columns or ColumnsParams()
    classes = format == "classification"
    response = columns.response or "label"
    prompt = columns.prompt or "text"
    template = list(string.Formatter().parse(columns.template)) if columns.template is not None else None

    def make(record: dict[str, Any], source: str, unused: set[str]) -> Row:
        messages: list[Message] = []
        if columns.system:
            messages += system_of(record, columns.system)
        if columns.history:
            messages += history_of(record, columns.history)
        if template is None:
            question = text_of(record, prompt)
        else:
            parts = [literal + (scalar_of(record, name) if name else "") for literal, name, _, _ in template]
            question = checked("".join(parts), "template")
        answer = answer_of(record, response, labels)
        others = {name: record.get(getattr(columns, name) or name) for name in ("task", "group", "scoring", "tools")}
        if classes:  # a class is a name, in which spaces at the ends say nothing
            answer = answer.strip()
            others |= {"task": others["task"] or "classification", "scoring": others["scoring"] or "exact"}
        return row_of([*messages, *turns_of([question, answer])], others, source, unused)

    return make


def _turns_kind(record: dict[str, Any]) -> str | None:
    """The format of a record's conversation, by its first turn; None where it has none."""
    for key in CONVERSATIONS:
        turns = record.get(key)
        if isinstance(turns, str) and turns.lstrip()[:1] == "[":  # a cell of a CSV file
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                return "sharegpt" if '"from"' in turns else "messages"
        if isinstance(turns, list):
            first = turns[0] if turns else None
            if isinstance(first, str):
                return "ultrachat"
            if isinstance(first, dict):
                if "from" in first or "role" in first:
                    return "sharegpt" if "from" in first else "messages"
                if any(one in first and two in first for one, two in TURN_PAIRS):
                    return "turn-pairs"
            return "sharegpt" if key == "conversations" else "messages"
    return None


def _is_pair(record: dict[str, Any]) -> bool:
    pairs = [pair for pair in PAIRS if pair[0] in record and pair[1] in record]
    return len(pairs) == 1 and "system_prompt" not in record and not has_context(record)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, str) for turn in value)


_ALPACA = OPTIONAL | {"instruction", "input", "output", "history"}
KNOWN_FORMATS: dict[str, Format] = {
    "alpaca": Format(_ALPACA, _from_alpaca, "instruction, output", lambda r: "instruction" in r and "output" in r),
    "belle": Format(_ALPACA, _from_alpaca),  # Alpaca whose instruction holds a dialogue
    "dolly": Format(
        OPTIONAL | {"instruction", "context", "response", "history"},
        _from_dolly,
        "instruction, context, response",
        lambda r: "instruction" in r and "response" in r and "output" not in r,
    ),
    "self-instruct": Format(
        OPTIONAL | {"instruction", "instances", "history"},
        _from_self_instruct,
        "instruction, instances",
        lambda r: "instruction" in r and isinstance(r.get("instances"), list | str),
    ),
    "sharegpt": Format(
        CONVERSATION,
        _from_sharegpt,
        "conversations with from and value",
        lambda r: _turns_kind(r) == "sharegpt",
    ),
    "messages": Format(
        CONVERSATION, _from_messages, "messages with role and content", lambda r: _turns_kind(r) == "messages"
    ),
    "turn-pairs": Format(
        CONVERSATION,
        _from_turn_pairs,
        "conversation with human and assistant",
        lambda r: _turns_kind(r) == "turn-pairs",
    ),
    "ultrachat": Format(
        CONVERSATION | {"data"},
        _from_ultrachat,
        "data or conversations, a list of texts",
        lambda r: _is_texts(r.get("data")) or _turns_kind(r) == "ultrachat",
    ),
    "openassistant": Format(
        frozenset(("path", "left_out")),
        _from_openassistant,
        ", ".join(sorted(trees.KEYS)),
        lambda r: r.keys() >= trees.KEYS,
    ),
    "prompt-completion": Format(
        OPTIONAL | {"prompt", "completion"},
        partial(_pair, "prompt", "completion"),
        "prompt, completion",
        lambda r: "prompt" in r and "completion" in r,
    ),
    "question-answer": Format(
        OPTIONAL.union(*PAIRS), _from_question_answer, " or ".join(", ".join(pair) for pair in PAIRS), _is_pair
    ),
    "openorca": Format(
        OPTIONAL | {"system_prompt", "question", "response"},
        _from_openorca,
        "system_prompt, question, response",
        lambda r: {"system_prompt", "question", "response"} <= r.keys(),
    ),
    "classification": Format(keys="text, label", fits=lambda r: "text" in r and "label" in r),
    "text": Format(OPTIONAL - {"system"} | {"text"}, _from_text),
    "shard": Format(frozenset(SHARD_COLUMNS), _from_shard),  # what `retune ingest` writes
    "preference": Format(keys="chosen, rejected", fits=lambda r: "chosen" in r and "rejected" in r),
}
FORMATS = tuple(name for name in KNOWN_FORMATS if name not in ("shard", "preference"))  # those that a person can name


def converter(format: str, columns: ColumnsParams | None, labels: dict[str, list[str]]) -> Converter:
    """What makes rows of the records of a format; `labels` are the names of classes, by column."""
    return (KNOWN_FORMATS[format].convert if format in KNOWN_FORMATS else None) or _mapping(format, columns, labels)


def columns_read(format: str, columns: ColumnsParams | None) -> frozenset[str]:
    """The columns that the converter of a format may read; a mapping reads what it names."""
    if format in KNOWN_FORMATS and KNOWN_FORMATS[format].reads:
        return KNOWN_FORMATS[format].reads
    columns = columns or ColumnsParams()
    named = set(named_columns(columns)) | {"task", "group", "scoring", "tools"}
    if format == "classification":
        named |= {columns.response or "label"} | (set() if columns.template else {columns.prompt or "text"})
    return frozenset(named)
