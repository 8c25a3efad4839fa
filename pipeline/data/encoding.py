"""Encodes a shard's rows: tokens, labels, keys that copies are found by, or the reason why a row cannot be used."""

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
from pipeline.data.filters import calls_as_text, filter_reason, language_of_row
from pipeline.data.records import TOOL_CALLS, Row
from pipeline.data.shards import read_shard
from pipeline.data.shingles import signatures
from pipeline.params import PrepareParams

TOKENS = pa.list_(pa.int32())
KEY = pa.binary(16)  # the first half of a SHA-256
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("reason", pa.string()),  # why the row cannot be used; null if it can
        ("cause", pa.string()),  # unusable | overlong | filtered
        ("detail", pa.string()),  # the reason with values, which `reason` omits because rows are counted by it
        ("repairs", pa.list_(pa.string())),
        ("record", pa.string()),  # JSON: the conversation
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("split", pa.string()),
        ("scoring", pa.string()),  # null: chosen by task
        ("short_answer", pa.string()),  # null: longer than a label
        ("key", KEY),  # of prompt and answer
        ("prompt_key", KEY),  # of the last answer
        ("prompt_keys", pa.list_(KEY)),  # of all answers in the conversation
        ("input_ids", TOKENS),  # in the test split, of the prompt only
        ("labels", TOKENS),
        ("label", pa.string()),  # the class of a text; null if answers are trained
        ("answer_tokens", pa.int32()),  # of the last answer
        ("earlier_ids", pa.list_(TOKENS)),  # for templates that rewrite earlier turns: a row for each earlier answer
        ("earlier_labels", pa.list_(TOKENS)),
        # Only in the test split:
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
    """Encode a canonical shard to `folder`, which appears only when it is complete.

    `rows.parquet` has `SCHEMA`. To find near duplicates, `text.arrow` (one string column, to be memory-mapped) and
    `signatures.npy` have the text and the signature of each row.
    """
    params = PrepareParams.model_validate_json(params_json)
    template = _template(params_json, train_task)
    table = read_shard(shard)
    texts: list[str] = []
    with whole_directory(folder) as partial:
        with pq.ParquetWriter(partial / ROWS, SCHEMA, compression="zstd", write_statistics=False) as writer:
            for start in range(0, len(table), CHUNK):
                rows = [
                    Row(**record | {"messages": json.loads(record["messages"]), "repairs": record["repairs"] or []})
                    for record in table.slice(start, CHUNK).to_pylist()
                ]
                records = encode_rows(rows, template, params)
                texts += [record.pop("text") for record in records]
                writer.write_table(pa.Table.from_pylist(records, schema=SCHEMA))
        text_table = pa.table({"text": pa.array(texts, pa.string())})
        with pa.ipc.new_file(partial / TEXT, text_table.schema) as file:
            file.write_table(text_table)
        if params.near_duplicate_threshold is not None:
            chunks = [signatures(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
            np.save(partial / SIGNATURES, np.concatenate(chunks))


def load_encoding(params: PrepareParams, train_task: str) -> tuple[Encoder, dict[str, Any]]:
    """The encoder for `train.task`, and the identity of the base model."""
    return classes.load_encoder(params) if train_task == CLASSIFICATION else load_template(params)


def encode_rows(rows: list[Row], template: Encoder, params: PrepareParams) -> list[dict[str, Any]]:
    """Records of `SCHEMA`, with the `text` for finding near duplicates; a long row can become several records."""
    records: list[dict[str, Any]] = []
    for row in rows:
        if reason := filter_reason(row, params.filters):
            records.append(_dropped(row, reason, "filtered"))
            continue
        row_keys = prompt_keys(row.messages, row.tools)
        group = row.group if row.group is not None else row_keys[-1]
        split = assign_split(group, params)
        try:
            for piece in fit(template, row.messages, row.tools, params.max_length, params.on_overlong):
                keys = row_keys if piece.messages is row.messages else prompt_keys(piece.messages, row.tools)
                records.append(_record(row, piece, keys, group, split, template))
        except Overlong as error:
            records.append(_dropped(row, OVERLONG, "overlong", str(error)))
        except RowError as error:
            records.append(_dropped(row, str(error), "unusable"))
    return records


def assign_split(group: str, params: PrepareParams) -> str:
    """The split of all rows of a group; it depends only on the group's hash and the two fractions."""
    position = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32
    if position < params.test_fraction:
        return "test"
    return "validation" if position < params.test_fraction + params.validation_fraction else "train"


def prompt_keys(messages: list[Message], tools: str | None) -> list[str]:
    """For each answer, a digest of the conversation before it, with spaces and case folded."""
    turns = [[turn["role"], " ".join(turn["content"].casefold().split()), *calls_as_text(turn)] for turn in messages]
    return [sha256_json([turns[:i], tools]) for i, turn in enumerate(turns) if turn[0] == "assistant"]


def _texts(message: Message) -> list[str]:
    """Content, reasoning and calls of a message."""
    reasoning = message.get("reasoning_content")
    return [message["content"], *([reasoning] if reasoning else []), *calls_as_text(message)]


def _record(row: Row, piece: Fitted, keys: list[str], group: str, split: str, template: Encoder) -> dict[str, Any]:
    messages, tools = piece.messages, row.tools
    answer = "\n".join(_texts(messages[-1]))
    start, end = _last_answer(piece.encoded.labels)
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
        "prompt_keys": [bytes.fromhex(key[:32]) for key in keys],
        "input_ids": piece.encoded.input_ids,
        "labels": piece.encoded.labels,
        "answer_tokens": end - start,
        "label": messages[-1]["content"] if isinstance(template, classes.TextEncoder) else None,
        "earlier_ids": [earlier.input_ids for earlier in piece.encoded.earlier],
        "earlier_labels": [earlier.labels for earlier in piece.encoded.earlier],
        # Without system messages, which thousands of rows may share.
        "text": "\n".join(text for turn in messages if turn["role"] != "system" for text in _texts(turn)),
    }
    if split == "test":
        prompt, prompt_ids = template.prompt(messages[:-1], tools)
        if piece.encoded.input_ids[: len(prompt_ids)] != prompt_ids:
            raise RowError("has a prompt whose tokens change when the answer follows")
        record |= {"group": group, "tools": tools, "prompt": prompt, "input_ids": prompt_ids}
        record["messages"] = json.dumps(messages[:-1], ensure_ascii=False)
        record["reference"] = messages[-1]["content"]
        if messages[-1].get("tool_calls") and isinstance(template, ChatTemplate):
            # The template decides how calls are written, so read them from the trained tokens of the last turn.
            read = read_answer(template, piece.encoded.input_ids[:start], piece.encoded.input_ids[start:end], tools)
            record["reference"] = canonical_calls(read.tool_calls) if read.tool_calls else read.text
            record["scoring"] = TOOL_CALLS if read.tool_calls else "text"
    return record


def _last_answer(labels: list[int]) -> tuple[int, int]:
    """The beginning and the end of the last run of trained tokens."""
    end = len(labels)
    while end and labels[end - 1] < 0:
        end -= 1
    start = end
    while start and labels[start - 1] >= 0:
        start -= 1
    return start, end


def _dropped(row: Row, reason: str, cause: str, detail: str | None = None) -> dict[str, Any]:
    record = json.dumps(row.messages, ensure_ascii=False, default=str)
    fields = {"source": row.source, "repairs": [], "record": record, "text": ""}
    return fields | {"reason": reason, "cause": cause, "detail": detail}


@lru_cache(maxsize=1)
def _template(params_json: str, train_task: str) -> Encoder:
    return load_encoding(PrepareParams.model_validate_json(params_json), train_task)[0]
