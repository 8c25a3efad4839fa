"""A record of each format as a conversation of one shape.

A record becomes a `Row`. One that is not a conversation is a ValueError that continues the sentence "a row …", and
becomes a `Rejected` in `formats.convert`.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipeline.chat import Message
from pipeline.data import trees
from pipeline.data.columns import CONVERSATIONS, PAIRS, TURN_PAIRS
from pipeline.data.messages import chat_messages, join_turns, sharegpt_messages, split_thoughts, tools_of
from pipeline.data.values import checked, label_of, list_of, scalar_of, short, text_of
from pipeline.params import ColumnsParams

SCORINGS = ("exact", "text")  # what a row may say
TOOL_CALLS = "tool_calls"  # of a row whose answer calls tools
# A dialogue in one text, as BELLE's multi-turn rows, Anthropic's and Guanaco's have it.
SPEAKER = re.compile("(?:^|\n)[ \t]*(?:#{1,3} *)?(Human|Assistant)[ \t]*[:\uff1a]")
TRAILING = "turns after the last answer left out"


@dataclass  # making a frozen one takes a tenth of all the time of reading rows
class Row:
    """One conversation that ends with a trained turn of the assistant.

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


# The set takes up the names of columns and message keys that say something and are not read.
Converter = Callable[[dict[str, Any], str, set[str]], Row | list[Row | Rejected]]


def is_plain_text(messages: list[Message]) -> bool:
    """Whether a row is text to continue rather than an answer to a prompt: no chat template belongs around it."""
    return len(messages) == 1


def converter(format: str, columns: ColumnsParams | None, labels: dict[str, list[str]]) -> Converter:
    """What makes rows of the records of a format; `labels` are the names of classes, by column."""
    converters: dict[str, Converter] = {
        "alpaca": _from_alpaca,
        "belle": _from_alpaca,
        "dolly": _from_dolly,
        "self-instruct": _from_self_instruct,
        "sharegpt": _from_sharegpt,
        "messages": _from_messages,
        "turn-pairs": _from_turn_pairs,
        "prompt-completion": _from_prompt_completion,
        "question-answer": _from_question_answer,
        "openorca": _from_openorca,
        "ultrachat": _from_ultrachat,
        "openassistant": _from_openassistant,
        "text": _from_text,
        "shard": _from_shard,
    }
    return converters.get(format) or _mapping(format, columns, labels)


def _instruction(about: str, answer: str, record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """An instruction about the text in the column `about`, and its answer in the column `answer`."""
    instruction = text_of(record, "instruction")
    extra = "" if record.get(about) in (None, "") else text_of(record, about, required=False)
    output = text_of(record, answer)
    messages = _system(record) if "system" in record else []
    if "history" in record:
        messages += _history(record, "history")
    if is_dialogue(instruction):
        if extra:
            raise ValueError("instruction holds a conversation (Human:/Assistant:) and there is an input beside it")
        messages += _dialogue(instruction, "instruction", open_end=True)
    else:
        messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return _row(messages, record, source, unused)


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
    key, turns = _conversation(record, unused)
    return _talk(sharegpt_messages(turns, key, unused), record, source, unused)


def _from_messages(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = _conversation(record, unused)
    return _talk(chat_messages(turns, key, unused), record, source, unused)


def _from_turn_pairs(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = _conversation(record, unused)
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        names = next((pair for pair in TURN_PAIRS if isinstance(turn, dict) and pair[0] in turn), None)
        if names is None:
            raise ValueError(f"a turn is {short(turn)}; expected an object with human and assistant (or input, output)")
        if number == 0:
            messages += _system(turn)
        texts = [text_of(turn, name) for name in names]
        unused.update(f"{key}[].{name}" for name in turn.keys() - {*names, *(() if number else ("system",))})
        messages += _turns(texts)
    return _talk(messages, record, source, unused)


def _from_prompt_completion(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    return _pair(record, "prompt", "completion", source, unused)


def _from_question_answer(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    for names in PAIRS:
        if names[0] in record and names[1] in record:
            unused.update(key for pair in PAIRS for key in pair if key not in names and record.get(key))
            return _pair(record, *names, source, unused)
    raise ValueError(f"has {', '.join(record) or 'nothing'}; expected {' or '.join(map(' and '.join, PAIRS))}")


def _pair(record: dict[str, Any], prompt: str, response: str, source: str, unused: set[str]) -> Row:
    """A prompt and its answer; each may also be a list of messages, as TRL has them."""
    messages = _system(record)
    for key, role in ((prompt, "user"), (response, "assistant")):
        if isinstance(record.get(key), list):
            messages += chat_messages(record[key], key, unused)
        else:
            text = _answer(record, key, {}) if role == "assistant" else text_of(record, key)
            messages.append({"role": role, "content": text})
    messages, repairs = join_turns(messages)
    return _row(messages, record, source, unused, repairs=repairs)


def _from_openorca(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages = _system(record, "system_prompt")
    return _row(
        [*messages, *_turns([text_of(record, "question"), text_of(record, "response")])], record, source, unused
    )


def _from_ultrachat(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    key, turns = _conversation(record, unused, "data", *CONVERSATIONS)
    return _talk(_turns([checked(turn, key) for turn in turns]), record, source, unused)


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
    return _row(messages, record, source, unused, repairs=repairs)


def _from_text(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    text = text_of(record, "text")
    if is_dialogue(text):
        return _row(_dialogue(text, "text", open_end=False), record, source, unused)
    return _row([{"role": "assistant", "content": text}], {"task": "text"} | record, source, unused, plain=True)


def _from_shard(record: dict[str, Any], source: str, unused: set[str]) -> Row:
    messages = chat_messages(list_of(record, "messages"), "messages", unused)
    row = _row(messages, record, text_of(record, "source"), unused, plain=is_plain_text(messages))
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
            messages += _system(record, columns.system)
        if columns.history:
            messages += _history(record, columns.history)
        if template is None:
            question = text_of(record, prompt)
        else:
            parts = [literal + (scalar_of(record, name) if name else "") for literal, name, _, _ in template]
            question = checked("".join(parts), "template")
        answer = _answer(record, response, labels)
        others = {name: record.get(getattr(columns, name) or name) for name in ("task", "group", "scoring", "tools")}
        if classes:  # a class is a name, in which spaces at the ends say nothing
            answer = answer.strip()
            others |= {"task": others["task"] or "classification", "scoring": others["scoring"] or "exact"}
        return _row([*messages, *_turns([question, answer])], others, source, unused)

    return make


def _answer(record: dict[str, Any], key: str, labels: dict[str, list[str]]) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = labels.get(key)
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = names[value]
    return checked(value, key)


def _system(record: dict[str, Any], key: str = "system") -> list[Message]:
    system = text_of(record, key, required=False)
    return [{"role": "system", "content": system}] if system else []


def _conversation(record: dict[str, Any], unused: set[str], *names: str) -> tuple[str, list[Any]]:
    """The name of the column that holds the turns, and the turns."""
    names = names or CONVERSATIONS
    there = [key for key in names if record.get(key) is not None]
    unused.update(there[1:])
    key = there[0] if there else next((key for key in names if key in record), names[0])
    return key, list_of(record, key)


def _history(record: dict[str, Any], key: str) -> list[Message]:
    messages: list[Message] = []
    for turn in list_of(record, key):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{key} is not a list of [question, answer] pairs")
        messages += _turns([checked(turn[0], key), checked(turn[1], key)])
    return messages


def is_dialogue(text: Any) -> bool:
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
    return _turns([checked(content, key) for content in contents])


def _turns(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _talk(messages: list[Message], record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """The row of a conversation given turn by turn, with the system message of its own column first."""
    if system := _system(record):
        if not messages or messages[0]["role"] != "system":
            messages = system + messages
        elif messages[0] != system[0]:
            raise ValueError("has a system column and another system message in its turns")
    messages, repairs = join_turns(messages)
    return _row(messages, record, source, unused, repairs=repairs)


def _row(
    messages: list[Message],
    record: dict[str, Any],
    source: str,
    unused: set[str],
    plain: bool = False,
    repairs: list[str] | None = None,
) -> Row:
    repairs = repairs or []
    if not messages or messages[-1]["role"] != "assistant" or "weight" in messages[-1]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if "weight" not in messages[i]]
        if not trained:
            raise ValueError("marks every answer as not trained" if answers else "has no assistant turn to learn from")
        repairs.append("turns after the last trained answer left out" if trained != answers else TRAILING)
        messages = messages[: trained[-1] + 1]
    if not plain:
        if messages[0]["role"] == "assistant":
            raise ValueError("begins with an answer to nothing")
        if ">" in messages[-1]["content"] or len(messages) > 2:
            for message in messages:
                if message["role"] == "assistant" and "think>" in message["content"]:
                    split_thoughts(message)
    scoring = record.get("scoring") or None
    if scoring is not None and scoring not in SCORINGS:
        raise ValueError(f"scoring is {short(scoring)}; expected exact or text")
    return Row(
        messages,
        source,
        tools_of(record, unused) if "tools" in record or "functions" in record else None,
        (label_of(record, "task") or "default") if "task" in record else "default",
        label_of(record, "group") if "group" in record else None,
        scoring,
        repairs,
    )
