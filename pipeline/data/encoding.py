"""Encodes one row at a time: a conversation becomes tokens, labels and the keys by which copies are found.

Work goes shard by shard, in several processes, and is kept: a shard whose bytes, parameters, tokenizer and code are
those of an earlier run is not encoded again. Nothing is left out: a row that cannot be used is a record that says why.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.fitting import Fitted, Overlong, fit
from pipeline.chat.rendering import RowError
from pipeline.chat.responses import canonical_calls, read_answer
from pipeline.chat.template import load_template
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import sha256_json, whole_directory
from pipeline.data import classes
from pipeline.data.default_scoring import short_answer
from pipeline.data.filters import filter_reason, language_of_row
from pipeline.data.records import TOOL_CALLS, Row
from pipeline.data.shards import read_shard
from pipeline.data.shingles import signatures
from pipeline.params import PrepareParams

TOKENS = pa.list_(pa.int32())
KEY = pa.binary(16)  # the first half of a SHA-256
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("reason", pa.string()),  # null: the row can be used
        ("cause", pa.string()),  # of the reason: unusable | overlong | filtered
        ("detail", pa.string()),  # what the reason leaves out, since reasons are counted: lengths
        ("repairs", pa.list_(pa.string())),
        ("record", pa.string()),  # JSON: the conversation
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("split", pa.string()),
        ("scoring", pa.string()),  # null: as its task's answers say
        ("short_answer", pa.string()),  # null: longer than a label
        ("key", KEY),  # prompt and answer
        ("prompt_key", KEY),
        ("asked", pa.list_(KEY)),  # the prompts of all answers of the conversation
        ("input_ids", TOKENS),
        ("labels", TOKENS),
        ("label", pa.string()),  # the class of a text; null: answers are trained
        ("earlier_ids", pa.list_(TOKENS)),  # rows of the answers before, where the template rewrites earlier turns
        ("earlier_labels", pa.list_(TOKENS)),
        # In the test split only, where input_ids are those of the prompt:
        ("group", pa.string()),
        ("messages", pa.string()),  # JSON: the conversation before the answer
        ("tools", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
    ]
)
OVERLONG = "longer than prepare.max_length"
ROWS, TEXT, SIGNATURES = "rows.parquet", "text.arrow", "signatures.npy"
Encoder = ChatTemplate | classes.TextEncoder
CHUNK = 1024  # rows whose tokens are Python lists at once


def encode_shard(params_json: str, train_task: str, shard: Path, folder: Path) -> None:
    """Encode a canonical shard to `folder`, which appears whole.

    `rows.parquet` has `SCHEMA`; `text.arrow` (one string column, to be memory-mapped) and `signatures.npy`, row by row
    the same, are what near duplicates are found by.
    """
    params = PrepareParams.model_validate_json(params_json)
    template = _template(params_json, train_task)
    table = read_shard(shard)
    with whole_directory(folder) as partial:
        text = pa.schema([("text", pa.string())])
        signed = []
        with (
            pq.ParquetWriter(partial / ROWS, SCHEMA, compression="zstd", write_statistics=False) as rows,
            pa.OSFile(str(partial / TEXT), "wb") as file,
            pa.ipc.new_file(file, text) as texts,
        ):
            for start in range(0, len(table), CHUNK):
                chunk = table.slice(start, CHUNK)
                records = encode_rows(rows_of(chunk), template, params)
                compared = [record.pop("text") for record in records]
                rows.write_table(pa.Table.from_pylist(records, schema=SCHEMA))
                texts.write_table(pa.table({"text": compared}, schema=text))
                if params.near_duplicate_threshold is not None:
                    signed.append(signatures(compared))
        if signed:
            np.save(partial / SIGNATURES, np.concatenate(signed))


def load_encoding(params: PrepareParams, train_task: str) -> tuple[Encoder, dict[str, Any]]:
    """What rows are encoded by for `train.task`, and the identity of the base model."""
    return classes.load_encoder(params) if train_task == CLASSIFICATION else load_template(params)


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a shard's table."""
    return [
        Row(**record | {"messages": json.loads(record["messages"]), "repairs": record["repairs"] or []})
        for record in table.to_pylist()
    ]


def encode_rows(rows: list[Row], template: Encoder, params: PrepareParams) -> list[dict[str, Any]]:
    """Each row as a record of `SCHEMA` (several when a long one is split), with the `text` it is compared by."""
    records: list[dict[str, Any]] = []
    for row in rows:
        if reason := filter_reason(row, params.filters):
            records.append(_dropped(row, reason, "filtered"))
            continue
        asked = prompt_keys(row.messages, row.tools)
        group = row.group if row.group is not None else asked[-1]
        split = split_of(group, params)
        try:
            for piece in fit(template, row.messages, row.tools, params.max_length, params.on_overlong):
                keys = asked if piece.messages is row.messages else prompt_keys(piece.messages, row.tools)
                records.append(_record(row, piece, keys, group, split, template))
        except Overlong as error:
            records.append(_dropped(row, OVERLONG, "overlong", str(error)))
        except RowError as error:
            records.append(_dropped(row, f"a row {error}", "unusable"))
    return records


def split_of(group: str, params: PrepareParams) -> str:
    """The split of a row, from its group (its prompt where it names none) and the two fractions alone."""
    place = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32
    if place < params.test_fraction:
        return "test"
    return "validation" if place < params.test_fraction + params.validation_fraction else "train"


def prompt_keys(messages: list[Message], tools: str | None) -> list[str]:
    """A digest of what is asked before each answer, spaces and case folded."""
    turns = [[turn["role"], " ".join(turn["content"].casefold().split()), *_calls(turn)] for turn in messages]
    return [sha256_json([turns[:i], tools]) for i, turn in enumerate(turns) if turn[0] == "assistant"]


def compared_text(messages: list[Message]) -> str:
    """What near duplicates are looked for in: all turns but the system's, which thousands of rows may share."""
    return "\n".join(text for message in messages if message["role"] != "system" for text in _texts(message))


def _calls(message: Message) -> list[str]:
    calls = message.get("tool_calls")
    return [json.dumps(calls, ensure_ascii=False, sort_keys=True)] if calls else []


def _texts(message: Message) -> list[str]:
    """All that a message says: content, reasoning, calls."""
    reasoning = message.get("reasoning_content")
    return [message["content"], *([reasoning] if reasoning else []), *_calls(message)]


def _record(row: Row, piece: Fitted, keys: list[str], group: str, split: str, template: Encoder) -> dict[str, Any]:
    messages, tools = piece.messages, row.tools
    answer = "\n".join(_texts(messages[-1]))
    record = {
        "source": row.source,
        "repairs": [*row.repairs, *piece.encoded.repairs],
        "record": json.dumps(messages, ensure_ascii=False),
        "id": sha256_json(messages)[:16],
        "task": row.task,
        "language": language_of_row(messages),
        "split": split,
        "scoring": TOOL_CALLS if messages[-1].get("tool_calls") else row.scoring,
        "short_answer": short_answer(messages[-1]),
        "key": hashlib.sha256((keys[-1] + answer).encode()).digest()[:16],
        "prompt_key": bytes.fromhex(keys[-1][:32]),
        "asked": [bytes.fromhex(key[:32]) for key in keys],
        "input_ids": piece.encoded.input_ids,
        "labels": piece.encoded.labels,
        "label": messages[-1]["content"] if isinstance(template, classes.TextEncoder) else None,
        "earlier_ids": [row.input_ids for row in piece.encoded.earlier],
        "earlier_labels": [row.labels for row in piece.encoded.earlier],
        "text": compared_text(messages),
    }
    if split == "test":
        prompt, prompt_ids = template.prompt(messages[:-1], tools)
        if piece.encoded.input_ids[: len(prompt_ids)] != prompt_ids:
            raise RowError("has other tokens in its prompt alone than before its answer")
        record |= {"group": group, "tools": tools, "prompt": prompt, "input_ids": prompt_ids}
        record["messages"] = json.dumps(messages[:-1], ensure_ascii=False)
        record |= _reference(piece, template, tools)
    return record


def _reference(piece: Fitted, template: Encoder, tools: str | None) -> dict[str, str]:
    """The `reference`, in the words that a generation is read in; of calls that cannot be read back their text."""
    last = piece.messages[-1]
    if not last.get("tool_calls") or not isinstance(template, ChatTemplate):
        return {"reference": str(last["content"])}
    # How a call is written is the template's affair: it is what the trained tokens of the last turn say.
    ids, labels = piece.encoded.input_ids, piece.encoded.labels
    # Without what the template appends after the end token.
    start = end = max((place for place, label in enumerate(labels, start=1) if label >= 0), default=0)
    while start and labels[start - 1] >= 0:
        start -= 1
    answer = read_answer(template, ids[:start], ids[start:end], tools)
    if answer.tool_calls:
        return {"reference": canonical_calls(answer.tool_calls)}
    return {"reference": answer.text, "scoring": "text"}


def _dropped(row: Row, reason: str, cause: str, detail: str | None = None) -> dict[str, Any]:
    record = json.dumps(row.messages, ensure_ascii=False, default=str)
    why = {"reason": reason, "cause": cause, "detail": detail}
    return {"source": row.source, "repairs": [], "record": record, "text": ""} | why


@lru_cache(maxsize=1)
def _template(params_json: str, train_task: str) -> Encoder:
    return load_encoding(PrepareParams.model_validate_json(params_json), train_task)[0]
