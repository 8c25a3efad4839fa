"""Every known format: the columns that identify it, the columns that it reads, and how a record becomes a row.

To add a format, add an entry to `KNOWN_FORMATS` and its name to `params.Format`.
"""

import json
import string
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from pipeline.chat import Message, alternating
from pipeline.data.columns import CONTEXT_NAMES, named_columns
from pipeline.data.messages import (
    chat_messages,
    dialogue,
    is_dialogue,
    join_turns,
    sharegpt_messages,
    split_thoughts,
    tools_json,
)
from pipeline.data.records import SCORINGS, Rejected, Row, check_text, list_field, scalar_field, shorten, text_field
from pipeline.params import ColumnsParams

OPTIONAL = frozenset(("system", "tools", "functions", "task", "group", "scoring"))
SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # written by `retune ingest`
CONVERSATIONS = ("messages", "conversations", "conversation", "data")  # columns; the first one with a value is read
PAIRS = (("question", "answer"), ("prompt", "response"), ("query", "response"), ("question", "response"))
TURN_PAIRS = (("human", "assistant"), ("input", "output"))  # question and answer in one object
TURN_KEYS = (("sharegpt", {"from"}), ("messages", {"role"}), *(("turn-pairs", {*pair}) for pair in TURN_PAIRS))
ORCA_COLUMNS = ("system_prompt", "question", "response")
TREE_KEYS = ("message_id", "message_tree_id", "parent_id", "role", "text")  # OpenAssistant: one message per record
TREE_KEYS_READ = {*TREE_KEYS, "rank", "deleted", "review_result"}
Record = dict[str, Any]
# Convert a record, or the turns in a column; they add names of columns and keys that are not read to the set.
Converter = Callable[[Record, set[str]], list[Message]]
TurnsConverter = Callable[[list[Any], str, set[str]], list[Message]]
Records = Iterable[tuple[str, Any]]  # (source, record); a record can be a `Rejected`


@dataclass(frozen=True)
class Format:
    """How to recognise a format and to read its records."""

    convert: Converter
    needs: tuple[str, ...] = ()  # columns that identify a record of this format
    also_reads: frozenset[str] = OPTIONAL
    fits: Callable[[Record], bool] = lambda record: True  # a further condition
    description: str = ""  # of its columns, for messages; default: `needs`
    spread: Callable[[Records], Records] = iter  # turns the file's records into records of one conversation each
    columns: ColumnsParams | None = None  # other names of the columns task, group, scoring and tools
    defaults: tuple[str, str | None] = ("default", None)  # task and scoring of a row without them

    def __str__(self) -> str:
        return self.description or ", ".join(self.needs)

    @property
    def reads(self) -> frozenset[str]:
        return self.also_reads.union(self.needs)

    def looks_like(self, record: Record) -> bool:
        return bool(str(self)) and record.keys() >= set(self.needs) and self.fits(record)

    def row(self, record: Record, source: str, unused: set[str]) -> Row:
        """The row of a record: the conversation up to its last trained answer, and the optional columns."""
        messages, repairs = join_turns(self.convert(record, unused))
        if "repairs" in self.reads:
            repairs = [*(record["repairs"] or []), *repairs]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if "weight" not in messages[i]]
        if not trained:
            raise ValueError("marks every answer as not trained" if answers else "has no assistant turn to learn from")
        if trained[-1] + 1 < len(messages):
            repairs.append(f"turns after the last {'' if trained == answers else 'trained '}answer left out")
            messages = messages[: trained[-1] + 1]
        if messages[0]["role"] == "assistant":
            raise ValueError("starts with an answer; expected a question first")
        for message in messages:
            if message["role"] == "assistant" and "think>" in message["content"]:
                split_thoughts(message)
        names = {name: getattr(self.columns, name, None) or name for name in ("task", "group", "scoring", "tools")}
        task, group = (scalar_field(record, names[name]).strip() or None for name in ("task", "group"))
        scoring = record.get(names["scoring"]) or self.defaults[1]
        if scoring not in (None, *SCORINGS):
            raise ValueError(f"scoring is {shorten(scoring)}; expected exact or text")
        tools, functions = record.get(names["tools"]), record.get("functions") if "functions" in self.reads else None
        if tools and functions:
            unused.add("functions")
        return Row(messages, source, tools_json(tools or functions), task or self.defaults[0], group, scoring, repairs)


def _system(record: Record, key: str = "system") -> list[Message]:
    system = text_field(record, key, required=False)
    return [{"role": "system", "content": system}] if system else []


def _history(record: Record, key: str) -> list[Message]:
    pairs = list_field(record, key)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{key} is not a list of [question, answer] pairs")
    return alternating(*(check_text(text, key) for pair in pairs for text in pair))


def _answer(record: Record, key: str, class_names: dict[str, list[str]]) -> str:
    """The answer in a column; a number becomes its class name if the file has class names, else its digits."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = class_names.get(key)
        if names is not None and not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file has classes 0 to {len(names) - 1}")
        value = str(value) if names is None else names[value]
    return check_text(value, key)


def _instances(records: Records) -> Records:
    """Each instance of a self-instruct record as a record like Alpaca's."""
    for source, record in records:
        instances = record.get("instances") if isinstance(record, dict) else None
        if not isinstance(instances, list) or not instances:
            yield source, record  # becomes a rejection
            continue
        task = {key: value for key, value in record.items() if key not in ("instances", "input", "output")}
        for number, instance in enumerate(instances):
            yield f"{source}#{number}", instance | task if isinstance(instance, dict) else instance


def _turn_pairs(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        names = next((pair for pair in TURN_PAIRS if isinstance(turn, dict) and pair[0] in turn), None)
        if names is None:
            raise ValueError(f"a turn is {shorten(turn)}; expected keys human and assistant, or input and output")
        messages += _system(turn) if number == 0 else []
        messages += alternating(*(text_field(turn, name) for name in names))
        unused.update(f"{key}[].{name}" for name in turn.keys() - {*names, *(() if number else ("system",))})
    return messages


def _texts(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    return alternating(*(check_text(turn, key) for turn in turns))


def _from_turns(read: TurnsConverter, record: Record, unused: set[str]) -> list[Message]:
    """A conversation turn by turn, from the first of the `CONVERSATIONS` columns that has a value."""
    filled = [key for key in CONVERSATIONS if record.get(key) is not None]
    unused.update(filled[1:])
    key = filled[0] if filled else next((key for key in CONVERSATIONS if key in record), CONVERSATIONS[0])
    messages = read(list_field(record, key), key, unused)
    system = _system(record)
    if system and messages and messages[0]["role"] == "system":
        if messages[0] != system[0]:
            raise ValueError("has a system column and a different system message in its turns")
        return messages
    return system + messages


def _from_pair(
    pairs: list[tuple[str, str]], system: str, about: str, record: Record, unused: set[str]
) -> list[Message]:
    """A question and its answer from the first pair of columns that the record has; each can be a list of messages.

    With `about`, the name of a context column, the record can have a history, and the question can be a dialogue.
    """
    prompt, response = next((pair for pair in pairs if record.keys() >= set(pair)), pairs[0])
    unused.update(key for pair in pairs for key in pair if key not in (prompt, response) and record.get(key))
    messages = _system(record, system) + (_history(record, "history") if about else [])
    context = text_field(record, about, required=False) if about else ""
    question, answer = record.get(prompt), record.get(response)
    if isinstance(question, list):
        messages += chat_messages(question, prompt, unused)
    elif about and is_dialogue(question):
        if context:
            raise ValueError(f"{prompt} contains a conversation (Human:/Assistant:), and there is a column {about}")
        messages += dialogue(str(question), prompt, open_end=True)
    else:
        text = check_text(question, prompt)
        messages += alternating(f"{text}\n{context}" if context else text)
    if isinstance(answer, list):
        return messages + chat_messages(answer, response, unused)
    return [*messages, {"role": "assistant", "content": _answer(record, response, {})}]


def _best_paths(records: Records) -> Records:
    """The best conversation of each message tree in OpenAssistant's flat files, as a record like those of shards.

    From the first message on, it takes the reply with the lowest rank. All messages are in memory at once, because
    those of a tree can be anywhere in the file.
    """
    by_parent: dict[str, list[tuple[str, Any]]] = defaultdict(list)  # parent's id → messages; "" → first messages
    for source, record in records:
        if isinstance(record, dict):
            by_parent[str(record.get("parent_id") or "")].append((source, record))
        else:
            yield source, record
    for source, first in by_parent.pop("", []):
        tree, replies = [first], dict[str, list[Any]]()
        for message in tree:  # grows in the loop, which ends even for circular parents: each id is popped once
            children = [reply for _, reply in by_parent.pop(str(message.get("message_id")), [])]
            replies.setdefault(str(message.get("message_id")), children)
            tree += children
        path: list[dict[str, Any]] = []
        candidates = [first]
        while usable := [m for m in candidates if not m.get("deleted") and m.get("review_result") is not False]:
            path.append(min(usable, key=_rank))
            candidates = replies.pop(str(path[-1].get("message_id")), [])
        turns = []
        for message in path:
            unread = {key: value for key, value in message.items() if key not in TREE_KEYS_READ}
            turns.append(unread | {"role": message.get("role"), "content": message.get("text")})
        repairs = ["other paths of its message tree left out"] if len(path) < len(tree) else []
        yield source, {"messages": turns, "repairs": repairs}
    for source, record in chain(*by_parent.values()):
        text = json.dumps(record, ensure_ascii=False, default=str)
        yield source, Rejected(source, "replies to a message that is not in the file", text)


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def _from_text(record: Record, unused: set[str]) -> list[Message]:
    text = text_field(record, "text")
    if not is_dialogue(text):
        raise ValueError("has a text without a prompt; add one with --columns template=…,response=text")
    return dialogue(text, "text", open_end=False)


def _shard_sources(records: Records) -> Records:
    """Rows written by `retune ingest`, with their original sources."""
    for source, record in records:
        yield str(record.get("source") or source) if isinstance(record, dict) else source, record


def _from_shard(record: Record, unused: set[str]) -> list[Message]:
    return chat_messages(list_field(record, "messages"), "messages", unused)


def _from_columns(
    columns: ColumnsParams, is_class: bool, class_names: dict[str, list[str]], record: Record, unused: set[str]
) -> list[Message]:
    """A question and its answer from mapped columns; a class name is stripped of surrounding space."""
    messages = _system(record, columns.system) if columns.system else []
    messages += _history(record, columns.history) if columns.history else []
    if columns.template is None:
        question = text_field(record, str(columns.prompt))
    else:
        parts = string.Formatter().parse(columns.template)
        texts = (literal + (scalar_field(record, name) if name else "") for literal, name, _, _ in parts)
        question = check_text("".join(texts), "template")
    answer = _answer(record, str(columns.response), class_names)
    return [*messages, *alternating(question, answer.strip() if is_class else answer)]


def _turns_format(record: Record) -> str | None:
    """The format of a record's conversation, by its first turn; None if it has none."""
    for key in CONVERSATIONS:
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
        keys = first.keys() if isinstance(first, dict) else set()
        for format, names in TURN_KEYS:
            if keys >= names:
                return format
        if key != "data":
            return "sharegpt" if key == "conversations" else "messages"
    return None


def _is_pair(record: Record) -> bool:
    """Whether a record has one question and one answer, and no context column with a value."""
    pairs = [pair for pair in PAIRS if record.keys() >= set(pair)]
    return len(pairs) == 1 and "system_prompt" not in record and not any(record.get(name) for name in CONTEXT_NAMES)


def _turns(format: str, read: TurnsConverter, description: str) -> Format:
    reads = OPTIONAL.union(CONVERSATIONS)
    return Format(partial(_from_turns, read), (), reads, lambda record: _turns_format(record) == format, description)


def _pair(*pairs: tuple[str, str], system: str = "system", about: str = "") -> Format:
    """A format with a question and an answer, in one of these pairs of columns."""
    also_reads = {"history", about} if about else set()
    reads = OPTIONAL.difference(["system"]).union(*pairs, [system], also_reads)
    needs = pairs[0] if len(pairs) == 1 else ()
    return Format(partial(_from_pair, [*pairs], system, about), needs, reads)


_ALPACA = _pair(("instruction", "output"), about="input")
KNOWN_FORMATS: dict[str, Format] = {
    "alpaca": _ALPACA,
    "belle": replace(_ALPACA, needs=()),  # Alpaca with dialogues in the instruction
    "dolly": replace(
        _pair(("instruction", "response"), about="context"),
        fits=lambda record: "output" not in record,
        description="instruction, context, response",
    ),
    "self-instruct": replace(_ALPACA, needs=("instruction", "instances"), spread=_instances),
    "sharegpt": _turns("sharegpt", sharegpt_messages, "conversations with from and value"),
    "messages": _turns("messages", chat_messages, "messages with role, content"),
    "turn-pairs": _turns("turn-pairs", _turn_pairs, "conversation with human, assistant"),
    "ultrachat": _turns("ultrachat", _texts, "data, a list of texts"),
    "openassistant": Format(_from_shard, TREE_KEYS, frozenset(("messages", "repairs")), spread=_best_paths),
    "prompt-completion": _pair(("prompt", "completion")),
    "question-answer": replace(_pair(*PAIRS), fits=_is_pair, description=" or ".join(map(", ".join, PAIRS))),
    "openorca": replace(_pair(("question", "response"), system="system_prompt"), needs=ORCA_COLUMNS),
    # `configure_format` replaces the converter.
    "classification": Format(_from_shard, ("text", "label"), defaults=("classification", "exact")),
    "text": Format(
        _from_text,
        ("text",),
        OPTIONAL - {"system"},
        fits=lambda record: is_dialogue(record["text"]),
        description="text that contains Human: and Assistant:",
    ),
    "shard": Format(_from_shard, (), frozenset(SHARD_COLUMNS), spread=_shard_sources),
}
FORMATS = tuple(name for name in KNOWN_FORMATS if name != "shard")  # the names that `--format` takes


def configure_format(format: str, columns: ColumnsParams | None, class_names: dict[str, list[str]]) -> Format:
    """The format with this name, for the mapping `columns` if it uses one; `class_names` are by column."""
    if format not in ("classification", "columns"):
        return KNOWN_FORMATS[format]
    known, columns = KNOWN_FORMATS.get(format, Format(_from_shard)), columns or ColumnsParams()
    if format == "classification":
        text = None if columns.template else columns.prompt or "text"
        columns = columns.model_copy(update={"prompt": text, "response": columns.response or "label"})
    convert = partial(_from_columns, columns, format == "classification", class_names)
    reads = frozenset((*named_columns(columns), "task", "group", "scoring", "tools"))
    return replace(known, convert=convert, needs=(), also_reads=reads, columns=columns)
