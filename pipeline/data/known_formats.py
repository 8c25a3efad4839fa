"""Every known format: the columns by which it is recognised, those that it reads, how a record becomes a row.

A new format is an entry of `KNOWN_FORMATS`, with a function where none of those here reads it, and its name in
`params.Format`.
"""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.chat import Message
from pipeline.data.messages import chat_messages, join_turns, sharegpt_messages, split_thoughts, tools_of
from pipeline.data.records import SCORINGS, Rejected, Row, checked, list_of, scalar_of, short, text_of
from pipeline.params import ColumnsParams

OPTIONAL = frozenset(("system", "tools", "functions", "task", "group", "scoring"))
SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # what `retune ingest` writes
CONVERSATIONS = ("messages", "conversations", "conversation")  # the first of them that a record has is read
PAIRS = (("question", "answer"), ("prompt", "response"), ("query", "response"), ("question", "response"))
TURN_PAIRS = (("human", "assistant"), ("input", "output"))  # question and answer in one object
TREE_KEYS = ("message_id", "message_tree_id", "parent_id", "role", "text")  # OpenAssistant: one message a record
TREE_READ = {*TREE_KEYS, "rank", "deleted", "review_result"}
CONTEXT_NAMES = ("context", "passage", "document", "paragraph", "background", "evidence", "input")
# A dialogue in one text, as BELLE's multi-turn rows, Anthropic's and Guanaco's have it.
SPEAKER = re.compile("(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[:\uff1a]")

# The set takes up the names of columns and message keys that say something and are not read.
Converter = Callable[[dict[str, Any], str, set[str]], Row | list[Row | Rejected]]


@dataclass(frozen=True)
class Format:
    """What Retune knows of a format; one without `convert` is read by a mapping of columns, or not at all."""

    convert: Converter | None = None
    needs: tuple[str, ...] = ()  # a record with all of these looks like it
    also_reads: frozenset[str] = OPTIONAL
    fits: Callable[[dict[str, Any]], bool] = lambda record: True  # what else is asked of such a record
    keys: str = ""  # what its records have, for people, where it is not `needs`

    def __str__(self) -> str:
        return self.keys or ", ".join(self.needs)

    @property
    def reads(self) -> frozenset[str]:
        return self.also_reads.union(self.needs)

    def looks_like(self, record: dict[str, Any]) -> bool:
        return bool(self.needs or self.keys) and record.keys() >= set(self.needs) and self.fits(record)


def row_of(
    messages: list[Message], record: dict[str, Any], source: str, unused: set[str], repairs: list[str] | None = None
) -> Row:
    """The row of a conversation up to its last trained answer, with the optional columns of its record."""
    repairs = repairs or []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in answers if "weight" not in messages[i]]
    if not trained:
        raise ValueError("marks every answer as not trained" if answers else "has no assistant turn to learn from")
    if trained[-1] + 1 < len(messages):
        repairs.append(f"turns after the last {'' if trained == answers else 'trained '}answer left out")
        messages = messages[: trained[-1] + 1]
    if messages[0]["role"] == "assistant":
        raise ValueError("begins with an answer to nothing")
    for message in messages:
        if message["role"] == "assistant" and "think>" in message["content"]:
            split_thoughts(message)
    scoring = record.get("scoring") or None
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {short(scoring)}; expected exact or text")
    task, group = (scalar_of(record, key).strip() or None for key in ("task", "group"))
    return Row(messages, source, tools_of(record, unused), task or "default", group, scoring, repairs)


def _system(record: dict[str, Any], key: str = "system") -> list[Message]:
    system = text_of(record, key, required=False)
    return [{"role": "system", "content": system}] if system else []


def _alternating(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _history(record: dict[str, Any], key: str = "history") -> list[Message]:
    pairs = list_of(record, key)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{key} is not a list of [question, answer] pairs")
    return _alternating([checked(text, key) for pair in pairs for text in pair])


def _answer(record: dict[str, Any], key: str, class_names: dict[str, list[str]]) -> str:
    """The answer in a column; a number is the name of the class that the file gives it, else its digits."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = class_names.get(key)
        if names is not None and not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = str(value) if names is None else names[value]
    return checked(value, key)


def is_dialogue(text: Any) -> bool:
    """Whether `text` is a conversation written out: it begins with `Human:` and has an `Assistant:` of its own line."""
    if not isinstance(text, str) or "Assistant" not in text:
        return False
    first = SPEAKER.match(text.strip())
    return first is not None and first[1] == "Human" and "Assistant" in SPEAKER.findall(text.strip())


def _dialogue(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation written out; with `open_end` its last `Assistant:` is left open and not returned."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} holds a conversation whose turns do not alternate between Human: and Assistant:")
    if open_end and (speakers[-1] != "Assistant" or contents[-1]):
        raise ValueError(f"{key} holds a conversation (Human:/Assistant:) that does not end with Assistant:")
    return _alternating([checked(content, key) for content in (contents[:-1] if open_end else contents)])


def _from_instruction(about: str, answer: str, record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """An instruction about the text in the column `about`, and its answer in the column `answer`."""
    instruction, context = text_of(record, "instruction"), text_of(record, about, required=False)
    messages = _system(record) + _history(record)
    if not is_dialogue(instruction):
        messages.append({"role": "user", "content": f"{instruction}\n{context}" if context else instruction})
    elif context:
        raise ValueError(f"instruction holds a conversation (Human:/Assistant:) next to a column {about}")
    else:
        messages += _dialogue(instruction, "instruction", open_end=True)
    messages.append({"role": "assistant", "content": text_of(record, answer)})
    return row_of(messages, record, source, unused)


_from_alpaca = partial(_from_instruction, "input", "output")


def _from_self_instruct(record: dict[str, Any], source: str, unused: set[str]) -> list[Row | Rejected]:
    instances = list_of(record, "instances")
    if not instances:
        raise ValueError("has no instances")
    rows: list[Row | Rejected] = []
    for number, instance in enumerate(instances):
        instance_source = f"{source}#{number}"
        try:
            if not isinstance(instance, dict):
                raise ValueError(f"has an instance that is a {type(instance).__name__}, not an object")
            unused.update(f"instances[].{key}" for key in instance.keys() - {"input", "output"} if instance[key])
            whole = record | {"input": instance.get("input"), "output": instance.get("output")}
            rows.append(_from_alpaca(whole, instance_source, unused))
        except ValueError as error:
            part = {"instruction": record.get("instruction"), "instance": instance}
            rows.append(Rejected(instance_source, str(error), part))
    return rows


def _turn_pairs(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        names = next((pair for pair in TURN_PAIRS if isinstance(turn, dict) and pair[0] in turn), None)
        if names is None:
            raise ValueError(f"a turn is {short(turn)}; expected an object with human and assistant (or input, output)")
        messages += _system(turn) if number == 0 else []
        messages += _alternating([text_of(turn, name) for name in names])
        unused.update(f"{key}[].{name}" for name in turn.keys() - {*names, *(() if number else ("system",))})
    return messages


def _texts(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    return _alternating([checked(turn, key) for turn in turns])


def _from_turns(
    read: Callable[[list[Any], str, set[str]], list[Message]], record: dict[str, Any], source: str, unused: set[str]
) -> Row:
    """A conversation turn by turn, in the first of the columns for one that the record has."""
    names = ("data", *CONVERSATIONS) if read is _texts else CONVERSATIONS
    filled = [key for key in names if record.get(key) is not None]
    unused.update(filled[1:])
    key = filled[0] if filled else next((key for key in names if key in record), names[0])
    messages = read(list_of(record, key), key, unused)
    if system := _system(record):
        if not messages or messages[0]["role"] != "system":
            messages = system + messages
        elif messages[0] != system[0]:
            raise ValueError("has a system column and another system message in its turns")
    messages, repairs = join_turns(messages)
    return row_of(messages, record, source, unused, repairs)


def _from_pair(prompt: str, response: str, system: str, record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """A prompt and its answer; each may also be a list of messages, as TRL has them."""
    messages = _system(record, system)
    for key, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(record.get(key), list):
            messages += chat_messages(record[key], key, unused)
        else:
            text = _answer(record, key, {}) if role == "assistant" else text_of(record, key)
            messages.append({"role": role, "content": text})
    messages, repairs = join_turns(messages)
    return row_of(messages, record, source, unused, repairs)


def _from_question_answer(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    names = next((pair for pair in PAIRS if pair[0] in record and pair[1] in record), None)
    if names is None:
        raise ValueError(f"has {', '.join(record) or 'nothing'}; expected {' or '.join(map(' and '.join, PAIRS))}")
    unused.update(key for pair in PAIRS for key in pair if key not in names and record.get(key))
    return _from_pair(*names, "system", record, source, unused)


def _from_tree(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """The best path of a message tree, as `formats.best_paths` gives it."""
    messages: list[Message] = []
    for message in record["path"]:
        role = message.get("role")
        if role not in ("prompter", "assistant"):
            raise ValueError(f"a message has role {short(role)}; expected prompter or assistant")
        messages.append({"role": "user" if role == "prompter" else role, "content": text_of(message, "text")})
        unused.update(key for key in message.keys() - TREE_READ if message[key])
    messages, repairs = join_turns(messages)
    repairs += ["other paths of its message tree left out"] if record["left_out"] else []
    return row_of(messages, record, source, unused, repairs)


def _from_text(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    text = text_of(record, "text")
    if not is_dialogue(text):
        raise ValueError("has a text without a prompt; give it one with --columns template=…,response=text")
    return row_of(_dialogue(text, "text", open_end=False), record, source, unused)


def _from_shard(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages = chat_messages(list_of(record, "messages"), "messages", unused)
    row = row_of(messages, record, text_of(record, "source"), unused)
    return replace(row, repairs=[*(record["repairs"] or []), *row.repairs])


def _mapping(format: str, columns: ColumnsParams, class_names: dict[str, list[str]]) -> Converter:
    """The converter for columns that a person named; classification is text → label unless they say otherwise."""
    template = list(string.Formatter().parse(columns.template)) if columns.template is not None else None

    def convert(record: dict[str, Any], source: str, unused: set[str]) -> Row:
        messages = _system(record, columns.system) if columns.system else []
        messages += _history(record, columns.history) if columns.history else []
        if template is None:
            question = text_of(record, columns.prompt or "text")
        else:
            parts = [literal + (scalar_of(record, name) if name else "") for literal, name, _, _ in template]
            question = checked("".join(parts), "template")
        answer = _answer(record, columns.response or "label", class_names)
        others = {name: record.get(getattr(columns, name) or name) for name in ("task", "group", "scoring", "tools")}
        if format == "classification":  # a class is a name, in which spaces at the ends say nothing
            answer = answer.strip()
            others |= {"task": others["task"] or "classification", "scoring": others["scoring"] or "exact"}
        return row_of([*messages, *_alternating([question, answer])], others, source, unused)

    return convert


def _turns_kind(record: dict[str, Any]) -> str | None:
    """The format of a record's conversation, by its first turn; None where it has none."""
    for key in (*CONVERSATIONS, "data"):  # UltraChat's has texts in `data`
        turns = record.get(key)
        if isinstance(turns, str) and turns.lstrip()[:1] == "[":  # a cell of a CSV file
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                return "sharegpt" if '"from"' in turns else "messages"
        if not isinstance(turns, list):
            continue
        first = turns[0] if turns else None
        if isinstance(first, str):
            return "ultrachat"
        if isinstance(first, dict) and ("from" in first or "role" in first):
            return "sharegpt" if "from" in first else "messages"
        if isinstance(first, dict) and any(one in first and two in first for one, two in TURN_PAIRS):
            return "turn-pairs"
        if key != "data":
            return "sharegpt" if key == "conversations" else "messages"
    return None


def _is_pair(record: dict[str, Any]) -> bool:
    """Whether a record has one question and one answer, and no text in another column that the question is about."""
    pairs = [pair for pair in PAIRS if pair[0] in record and pair[1] in record]
    return len(pairs) == 1 and "system_prompt" not in record and not any(record.get(name) for name in CONTEXT_NAMES)


def _turns(kind: str, read: Callable[[list[Any], str, set[str]], list[Message]], keys: str) -> Format:
    also_reads = OPTIONAL.union(CONVERSATIONS, ["data"] if read is _texts else [])
    return Format(partial(_from_turns, read), (), also_reads, lambda record: _turns_kind(record) == kind, keys)


_HISTORY = OPTIONAL | {"history"}
KNOWN_FORMATS: dict[str, Format] = {
    "alpaca": Format(_from_alpaca, ("instruction", "output"), _HISTORY | {"input"}),
    "belle": Format(_from_alpaca, (), _HISTORY | {"instruction", "input", "output"}),  # Alpaca with dialogues in it
    "dolly": Format(
        partial(_from_instruction, "context", "response"),
        ("instruction", "response"),
        _HISTORY | {"context"},
        fits=lambda record: "output" not in record,
        keys="instruction, context, response",
    ),
    "self-instruct": Format(_from_self_instruct, ("instruction", "instances"), _HISTORY),
    "sharegpt": _turns("sharegpt", sharegpt_messages, "conversations with from and value"),
    "messages": _turns("messages", chat_messages, "messages with role, content"),
    "turn-pairs": _turns("turn-pairs", _turn_pairs, "conversation with human, assistant"),
    "ultrachat": _turns("ultrachat", _texts, "data, a list of texts"),
    "openassistant": Format(_from_tree, TREE_KEYS, frozenset(("path", "left_out"))),
    "prompt-completion": Format(partial(_from_pair, "prompt", "completion", "system"), ("prompt", "completion")),
    "question-answer": Format(
        _from_question_answer, (), OPTIONAL.union(*PAIRS), fits=_is_pair, keys=" or ".join(map(", ".join, PAIRS))
    ),
    "openorca": Format(
        partial(_from_pair, "question", "response", "system_prompt"),
        ("system_prompt", "question", "response"),
        OPTIONAL - {"system"},
    ),
    "classification": Format(None, ("text", "label")),
    "text": Format(
        _from_text,
        ("text",),
        OPTIONAL - {"system"},
        fits=lambda record: is_dialogue(record["text"]),
        keys="text that holds Human: and Assistant:",
    ),
    "shard": Format(_from_shard, (), frozenset(SHARD_COLUMNS)),
    "preference": Format(None, ("chosen", "rejected")),
}
FORMATS = tuple(name for name in KNOWN_FORMATS if name not in ("shard", "preference"))  # those that a person can name


def converter(format: str, columns: ColumnsParams | None, class_names: dict[str, list[str]]) -> Converter:
    """What makes rows of the records of a format; `class_names` are by column."""
    known = KNOWN_FORMATS.get(format, Format())
    return known.convert or _mapping(format, columns or ColumnsParams(), class_names)
