"""A conversation that a record holds, as a `Row`: what every format shares.

A record that is not a conversation is a ValueError that continues the sentence "a row …", and becomes a `Rejected` in
`formats.convert`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Message
from pipeline.data.columns import CONVERSATIONS
from pipeline.data.messages import join_turns, split_thoughts, tools_of
from pipeline.data.values import checked, label_of, list_of, short, text_of

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


def is_plain_text(messages: list[Message]) -> bool:
    """Whether a row is text to continue rather than an answer to a prompt: no chat template belongs around it."""
    return len(messages) == 1


def answer_of(record: dict[str, Any], key: str, labels: dict[str, list[str]]) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = labels.get(key)
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = names[value]
    return checked(value, key)


def system_of(record: dict[str, Any], key: str = "system") -> list[Message]:
    system = text_of(record, key, required=False)
    return [{"role": "system", "content": system}] if system else []


def conversation_of(record: dict[str, Any], unused: set[str], *names: str) -> tuple[str, list[Any]]:
    """The name of the column that holds the turns, and the turns."""
    names = names or CONVERSATIONS
    there = [key for key in names if record.get(key) is not None]
    unused.update(there[1:])
    key = there[0] if there else next((key for key in names if key in record), names[0])
    return key, list_of(record, key)


def history_of(record: dict[str, Any], key: str) -> list[Message]:
    messages: list[Message] = []
    for turn in list_of(record, key):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{key} is not a list of [question, answer] pairs")
        messages += turns_of([checked(turn[0], key), checked(turn[1], key)])
    return messages


def is_dialogue(text: Any) -> bool:
    """Whether `text` is a conversation written out: it begins with `Human:` and has an `Assistant:` of its own line."""
    if not isinstance(text, str) or "Assistant" not in text:
        return False
    speakers = [match.group(1) for match in SPEAKER.finditer(text.strip())]
    return SPEAKER.match(text.strip()) is not None and speakers[0] == "Human" and "Assistant" in speakers


def dialogue_turns(text: str, key: str, open_end: bool) -> list[Message]:
    """The turns of a conversation written out; with `open_end` its last `Assistant:` is left open and not returned."""
    _, *parts = SPEAKER.split(text.strip())
    speakers, contents = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers != [("Human", "Assistant")[i % 2] for i in range(len(speakers))]:
        raise ValueError(f"{key} holds a conversation whose turns do not alternate between Human: and Assistant:")
    if open_end:
        if speakers[-1] != "Assistant" or contents[-1]:
            raise ValueError(f"{key} holds a conversation (Human:/Assistant:) that does not end with Assistant:")
        contents = contents[:-1]
    return turns_of([checked(content, key) for content in contents])


def turns_of(contents: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def row_of_turns(messages: list[Message], record: dict[str, Any], source: str, unused: set[str]) -> Row:
    """The row of a conversation given turn by turn, with the system message of its own column first."""
    if system := system_of(record):
        if not messages or messages[0]["role"] != "system":
            messages = system + messages
        elif messages[0] != system[0]:
            raise ValueError("has a system column and another system message in its turns")
    messages, repairs = join_turns(messages)
    return row_of(messages, record, source, unused, repairs=repairs)


def row_of(
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
