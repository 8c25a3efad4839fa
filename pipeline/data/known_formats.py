"""Every known format: the columns by which it is recognised, those that it reads, how a record becomes a row.

A new format is an entry of `KNOWN_FORMATS`, with a function where none of those here reads it, and its name in
`params.Format`.
"""

import json
import string
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from pipeline.chat import Message
from pipeline.data.columns import CONTEXT_NAMES, named_columns
from pipeline.data.messages import (
    alternating,
    chat_messages,
    dialogue,
    is_dialogue,
    join_turns,
    sharegpt_messages,
    split_thoughts,
    tools_of,
)
from pipeline.data.records import SCORINGS, Rejected, Row, checked, list_of, scalar_of, short, text_of
from pipeline.params import ColumnsParams

OPTIONAL = frozenset(("system", "tools", "functions", "task", "group", "scoring"))
SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # what `retune ingest` writes
CONVERSATIONS = ("messages", "conversations", "conversation", "data")  # the first of them that a record has is read
PAIRS = (("question", "answer"), ("prompt", "response"), ("query", "response"), ("question", "response"))
TURN_PAIRS = (("human", "assistant"), ("input", "output"))  # question and answer in one object
TURNS = (("sharegpt", {"from"}), ("messages", {"role"}), *(("turn-pairs", {*pair}) for pair in TURN_PAIRS))
TREE_KEYS = ("message_id", "message_tree_id", "parent_id", "role", "text")  # OpenAssistant: one message a record
TREE_READ = {*TREE_KEYS, "rank", "deleted", "review_result"}
# The set takes up the names of columns and message keys that say something and are not read.
Converter = Callable[[dict[str, Any], set[str]], list[Message]]
Records = Iterable[tuple[str, Any]]  # each with its source; a `Rejected` among them stays one


@dataclass(frozen=True)
class Format:
    """What Retune knows of a format."""

    convert: Converter
    needs: tuple[str, ...] = ()  # a record with all of these looks like it
    also_reads: frozenset[str] = OPTIONAL
    fits: Callable[[dict[str, Any]], bool] = lambda record: True  # what else is asked of such a record
    keys: str = ""  # what its records have, for people, where it is not `needs`
    spread: Callable[[Records], Records] = iter  # records of the file as records of one conversation each
    columns: ColumnsParams | None = None  # where task, group, scoring and tools have other names
    defaults: tuple[str, str | None] = ("default", None)  # task and scoring of a row that names none

    def __str__(self) -> str:
        return self.keys or ", ".join(self.needs)

    @property
    def reads(self) -> frozenset[str]:
        return self.also_reads.union(self.needs)

    def looks_like(self, record: dict[str, Any]) -> bool:
        return bool(str(self)) and record.keys() >= set(self.needs) and self.fits(record)

    def row(self, record: dict[str, Any], source: str, unused: set[str]) -> Row:
        """The row of a record: its conversation up to its last trained answer, with its optional columns."""
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
            raise ValueError("begins with an answer to nothing")
        for message in messages:
            if message["role"] == "assistant" and "think>" in message["content"]:
                split_thoughts(message)
        names = {name: getattr(self.columns, name, None) or name for name in ("task", "group", "scoring", "tools")}
        task, group = (scalar_of(record, names[name]).strip() or None for name in ("task", "group"))
        scoring = record.get(names["scoring"]) or self.defaults[1]
        if scoring not in (None, *SCORINGS):
            raise ValueError(f"scoring is {short(scoring)}; expected exact or text")
        tools, functions = record.get(names["tools"]), record.get("functions") if "functions" in self.reads else None
        if tools and functions:
            unused.add("functions")
        return Row(messages, source, tools_of(tools or functions), task or self.defaults[0], group, scoring, repairs)


def _system(record: dict[str, Any], key: str = "system") -> list[Message]:
    system = text_of(record, key, required=False)
    return [{"role": "system", "content": system}] if system else []


def _history(record: dict[str, Any], key: str) -> list[Message]:
    pairs = list_of(record, key)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{key} is not a list of [question, answer] pairs")
    return alternating([checked(text, key) for pair in pairs for text in pair])


def _answer(record: dict[str, Any], key: str, class_names: dict[str, list[str]]) -> str:
    """The answer in a column; a number is the name of the class that the file gives it, else its digits."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        names = class_names.get(key)
        if names is not None and not 0 <= value < len(names):
            raise ValueError(f"{key} is {value}; the file names classes 0 to {len(names) - 1}")
        value = str(value) if names is None else names[value]
    return checked(value, key)


def _instances(records: Records) -> Records:
    """Every instance of a self-instruct record as a record of Alpaca's shape."""
    for source, record in records:
        instances = record.get("instances") if isinstance(record, dict) else None
        if not isinstance(instances, list) or not instances:
            yield source, record  # its instruction has no output, or it is a `Rejected`
            continue
        task = {key: value for key, value in record.items() if key not in ("instances", "input", "output")}
        for number, instance in enumerate(instances):
            yield f"{source}#{number}", instance | task if isinstance(instance, dict) else instance


def _turn_pairs(turns: list[Any], key: str, unused: set[str]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        names = next((pair for pair in TURN_PAIRS if isinstance(turn, dict) and pair[0] in turn), None)
        if names is None:
            raise ValueError(f"a turn is {short(turn)}; expected an object with human and assistant (or input, output)")
        messages += _system(turn) if number == 0 else []
        messages += alternating([text_of(turn, name) for name in names])
        unused.update(f"{key}[].{name}" for name in turn.keys() - {*names, *(() if number else ("system",))})
    return messages


def _from_turns(
    read: Callable[[list[Any], str, set[str]], list[Message]], record: dict[str, Any], unused: set[str]
) -> list[Message]:
    """A conversation turn by turn, in the first of the columns for one that the record has."""
    filled = [key for key in CONVERSATIONS if record.get(key) is not None]
    unused.update(filled[1:])
    key = filled[0] if filled else next((key for key in CONVERSATIONS if key in record), CONVERSATIONS[0])
    messages = read(list_of(record, key), key, unused)
    system = _system(record)
    if system and messages and messages[0]["role"] == "system":
        if messages[0] != system[0]:
            raise ValueError("has a system column and another system message in its turns")
        return messages
    return system + messages


def _from_pair(
    pairs: list[tuple[str, str]], system: str, about: str, record: dict[str, Any], unused: set[str]
) -> list[Message]:
    """A question and its answer in the first pair of columns that the record has; each may be a list of messages, too.

    With the name of a column that a question may be `about`, it may have a history, or be a dialogue written out.
    """
    prompt, response = next((pair for pair in pairs if record.keys() >= set(pair)), pairs[0])
    unused.update(key for pair in pairs for key in pair if key not in (prompt, response) and record.get(key))
    messages = _system(record, system) + (_history(record, "history") if about else [])
    context = text_of(record, about, required=False) if about else ""
    question, answer = record.get(prompt), record.get(response)
    if isinstance(question, list):
        messages += chat_messages(question, prompt, unused)
    elif not about or not is_dialogue(question):
        text = checked(question, prompt)
        messages.append({"role": "user", "content": f"{text}\n{context}" if context else text})
    elif context:
        raise ValueError(f"{prompt} holds a conversation (Human:/Assistant:) next to a column {about}")
    else:
        messages += dialogue(str(question), prompt, open_end=True)
    if isinstance(answer, list):
        return messages + chat_messages(answer, response, unused)
    return [*messages, {"role": "assistant", "content": _answer(record, response, {})}]


def _best_paths(records: Records) -> Records:
    """The best conversation of each tree of OpenAssistant's flat files, in which a message a record names its parent.

    That is, from the first message on, the answer with the lowest rank; as a record of a shard's shape. A message that
    no first message leads to is a `Rejected`. All messages of a file are in memory at once: a tree has no place in it.
    """
    waiting: dict[str, list[tuple[str, Any]]] = defaultdict(list)  # by the id of their parent; "" begins a tree
    for source, record in records:
        if isinstance(record, dict):
            waiting[str(record.get("parent_id") or "")].append((source, record))
        else:
            yield source, record
    for source, first in waiting.pop("", []):
        tree, replies = [first], dict[str, list[Any]]()
        for message in tree:  # grows on the way; what was taken once is not waiting any more, so no circle is endless
            taken = [reply for _, reply in waiting.pop(str(message.get("message_id")), [])]
            replies.setdefault(str(message.get("message_id")), taken)
            tree += taken
        path: list[dict[str, Any]] = []
        answers = [first]
        while usable := [
            each for each in answers if not each.get("deleted") and each.get("review_result") is not False
        ]:
            path.append(min(usable, key=_rank))
            answers = replies.pop(str(path[-1].get("message_id")), [])
        turns = []
        for message in path:
            unread = {key: value for key, value in message.items() if key not in TREE_READ}
            turns.append(unread | {"role": message.get("role"), "content": message.get("text")})
        repairs = ["other paths of its message tree left out"] if len(path) < len(tree) else []
        yield source, {"messages": turns, "repairs": repairs}
    for source, record in chain(*waiting.values()):
        text = json.dumps(record, ensure_ascii=False, default=str)
        yield source, Rejected(source, "answers a message that is not in the file", text)


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def _from_text(record: dict[str, Any], unused: set[str]) -> list[Message]:
    text = text_of(record, "text")
    if not is_dialogue(text):
        raise ValueError("has a text without a prompt; give it one with --columns template=…,response=text")
    return dialogue(text, "text", open_end=False)


def _shard_sources(records: Records) -> Records:
    """Rows as `retune ingest` wrote them, with the sources that they had then."""
    for source, record in records:
        yield str(record.get("source") or source) if isinstance(record, dict) else source, record


def _from_shard(record: dict[str, Any], unused: set[str]) -> list[Message]:
    return chat_messages(list_of(record, "messages"), "messages", unused)


def _from_columns(
    columns: ColumnsParams, is_class: bool, class_names: dict[str, list[str]], record: dict[str, Any], unused: set[str]
) -> list[Message]:
    """A question and its answer in the columns that a person named; in a class, spaces at the ends say nothing."""
    messages = _system(record, columns.system) if columns.system else []
    messages += _history(record, columns.history) if columns.history else []
    if columns.template is None:
        question = text_of(record, str(columns.prompt))
    else:
        parts = string.Formatter().parse(columns.template)
        texts = (literal + (scalar_of(record, name) if name else "") for literal, name, _, _ in parts)
        question = checked("".join(texts), "template")
    answer = _answer(record, str(columns.response), class_names)
    return [*messages, *alternating([question, answer.strip() if is_class else answer])]


def _turns_kind(record: dict[str, Any]) -> str | None:
    """The format of a record's conversation, by its first turn; None where it has none."""
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
        for kind, names in TURNS:
            if keys >= names:
                return kind
        if key != "data":
            return "sharegpt" if key == "conversations" else "messages"
    return None


def _is_pair(record: dict[str, Any]) -> bool:
    """Whether a record has one question and one answer, and no text in another column that the question is about."""
    pairs = [pair for pair in PAIRS if pair[0] in record and pair[1] in record]
    return len(pairs) == 1 and "system_prompt" not in record and not any(record.get(name) for name in CONTEXT_NAMES)


def _turns(kind: str, read: Callable[[list[Any], str, set[str]], list[Message]], keys: str) -> Format:
    reads = OPTIONAL.union(CONVERSATIONS)
    return Format(partial(_from_turns, read), (), reads, lambda record: _turns_kind(record) == kind, keys)


def _pair(*pairs: tuple[str, str], system: str = "system", about: str = "") -> Format:
    """A format with one of these pairs of columns."""
    also_reads = {"history", about} if about else set()
    reads = OPTIONAL.difference(["system"]).union(*pairs, [system], also_reads)
    needs = pairs[0] if len(pairs) == 1 else ()
    return Format(partial(_from_pair, [*pairs], system, about), needs, reads)


_ALPACA = _pair(("instruction", "output"), about="input")
KNOWN_FORMATS: dict[str, Format] = {
    "alpaca": _ALPACA,
    "belle": replace(_ALPACA, needs=()),  # Alpaca with dialogues in it
    "dolly": replace(
        _pair(("instruction", "response"), about="context"),
        fits=lambda record: "output" not in record,
        keys="instruction, context, response",
    ),
    "self-instruct": replace(_ALPACA, needs=("instruction", "instances"), spread=_instances),
    "sharegpt": _turns("sharegpt", sharegpt_messages, "conversations with from and value"),
    "messages": _turns("messages", chat_messages, "messages with role, content"),
    "turn-pairs": _turns("turn-pairs", _turn_pairs, "conversation with human, assistant"),
    "ultrachat": _turns(
        "ultrachat", lambda turns, key, _: alternating([checked(turn, key) for turn in turns]), "data, a list of texts"
    ),
    "openassistant": Format(_from_shard, TREE_KEYS, frozenset(("messages", "repairs")), spread=_best_paths),
    "prompt-completion": _pair(("prompt", "completion")),
    "question-answer": replace(_pair(*PAIRS), fits=_is_pair, keys=" or ".join(map(", ".join, PAIRS))),
    "openorca": replace(
        _pair(("question", "response"), system="system_prompt"), needs=("system_prompt", "question", "response")
    ),
    "classification": Format(_from_shard, ("text", "label"), defaults=("classification", "exact")),  # see `reading`
    "text": Format(
        _from_text,
        ("text",),
        OPTIONAL - {"system"},
        fits=lambda record: is_dialogue(record["text"]),
        keys="text that holds Human: and Assistant:",
    ),
    "shard": Format(_from_shard, (), frozenset(SHARD_COLUMNS), spread=_shard_sources),
}
FORMATS = tuple(name for name in KNOWN_FORMATS if name != "shard")  # those that a person can name


def reading(format: str, columns: ColumnsParams | None, class_names: dict[str, list[str]]) -> Format:
    """How the records of a format, or of a mapping, are read; `class_names` are by column."""
    if format not in ("classification", "columns"):
        return KNOWN_FORMATS[format]
    known, columns = KNOWN_FORMATS.get(format, Format(_from_shard)), columns or ColumnsParams()
    if format == "classification":
        text = None if columns.template else columns.prompt or "text"
        columns = columns.model_copy(update={"prompt": text, "response": columns.response or "label"})
    convert = partial(_from_columns, columns, format == "classification", class_names)
    reads = frozenset((*named_columns(columns), "task", "group", "scoring", "tools"))
    return replace(known, convert=convert, needs=(), also_reads=reads, columns=columns)
