"""Shows rows as the model sees them, token by token, with the trained tokens marked."""

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pipeline.chat.template import load_contract
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import read_json
from pipeline.data import classes
from pipeline.data.encoding import Encoder, encode_rows, load_encoding
from pipeline.data.formats import Ask, find_files, read_rows
from pipeline.data.records import Rejected, Row
from pipeline.params import Params, PrepareParams

SHOWN_CHARACTERS = 4096  # of a row that is dropped
PARTIAL_CHARACTER = "\ufffd"  # what an incomplete character is decoded to
MAX_CHARACTER_TOKENS = 8  # a character has at most 4 bytes; some tokenizers put a token before it
# Symbols for control characters, which could change the terminal; line breaks are marked.
VISIBLE = {number: chr(0x2400 + number) for number in range(32)} | {0x0A: "⏎\n", 0x7F: "\u2421"}
VISIBLE |= {number: f"\\x{number:02x}" for number in range(0x80, 0xA0)}


class InspectionError(ValueError):
    """The dataset or the row does not exist."""


@dataclass(frozen=True)
class Token:
    text: str  # of one token, or of several that make up one character
    ids: list[int]
    trained: bool


@dataclass(frozen=True)
class InspectedRow:
    place: str  # split or file, and the row's number in it
    verdict: str  # prepared | kept | repaired | dropped
    reasons: list[str]  # for a repair or drop
    task: str
    tokens: list[Token]
    id: str | None = None
    source: str | None = None
    reference: str | None = None  # of a test row, whose tokens are only the prompt
    label: str | None = None  # the class of the text, with train.task sequence-classification
    record: Any = None  # of a row without tokens

    @property
    def length(self) -> int:
        return sum(len(token.ids) for token in self.tokens)

    @property
    def trained(self) -> int:
        return sum(len(token.ids) * token.trained for token in self.tokens)

    def as_json(self) -> dict[str, Any]:
        values = asdict(self) | {"length": self.length, "trained": self.trained}
        return {key: value for key, value in values.items() if value is not None}


def inspect_dataset(
    dataset: Path, split: str, row: int | None, id: str | None, task: str | None, count: int
) -> list[InspectedRow]:
    """Up to `count` rows of a prepared split, from number `row` on (0 is the first), with this id and task."""
    file = dataset / f"{split}.parquet"
    if not file.is_file():
        raise InspectionError(f"{file} does not exist; run `dvc repro prepare`, or give a data file to inspect")
    rows = pq.read_table(file, columns=["id", "task"]).to_pylist()
    wanted = {key: value for key, value in (("id", id), ("task", task)) if value is not None}
    numbers = [i for i, keys in enumerate(rows) if i >= (row or 0) and wanted.items() <= keys.items()][:count]
    if not numbers:
        what = ", ".join(f"{key} {value}" for key, value in ({"row": row} | wanted).items() if value is not None)
        tasks = ", ".join(sorted({keys["task"] for keys in rows})[:20])
        raise InspectionError(f"the {split} split has no {what}; it has {len(rows)} rows of the tasks {tasks}")
    contract = read_json(dataset / "contract.json")
    load = classes.load_classes if contract.get("task") == CLASSIFICATION else load_contract
    tokenizer = load(contract).tokenizer
    records = pads.dataset(file).take(pa.array(numbers)).to_pylist()
    return [
        InspectedRow(
            place=f"{split} row {number}",
            verdict="prepared",
            reasons=[],
            tokens=decode_tokens(tokenizer, record["input_ids"], record.get("labels")),
            **{key: record.get(key) for key in ("task", "id", "source", "reference", "label")},
        )
        for number, record in zip(numbers, records, strict=True)
    ]


def inspect_file(
    params: Params, path: Path, row: int | None, task: str | None, count: int, ask: Ask | None = None
) -> list[InspectedRow]:
    """Up to `count` records of a file or folder as prepare would encode them, without looking for copies and leaks."""
    format, columns = params.ingest.format, params.ingest.columns
    records = (record for file in find_files(path) for record in read_rows(file, format, columns, ask))
    numbered = ((i, record) for i, record in enumerate(records) if i >= (row or 0))
    matching = (pair for pair in numbered if task is None or getattr(pair[1], "task", None) == task)
    selected = list(islice(matching, count))  # before the slow loading of the model: it may ask about the file
    if not selected:
        what = f"no row of task {task}" if task is not None else f"no row {row}"
        raise InspectionError(f"{path} has {what} (0 is the first)")
    template, _ = load_encoding(params.prepare, params.train.task)
    # Show every row as a training row, because a test row would have only its prompt.
    prepare = params.prepare.model_copy(update={"test_fraction": 0.0, "validation_fraction": 0.0})
    return [row for number, record in selected for row in _as_prepared(template, prepare, f"record {number}", record)]


def _as_prepared(template: Encoder, params: PrepareParams, place: str, row: Row | Rejected) -> list[InspectedRow]:
    if isinstance(row, Rejected):
        return [InspectedRow(place, "dropped", [row.reason], "", [], source=row.source, record=row.record)]
    pieces = []  # long rows are split, and a template that rewrites earlier turns needs a row for each answer
    for record in encode_rows([row], template, params):
        if reason := record.get("detail") or record.get("reason"):
            return [InspectedRow(place, "dropped", [reason], row.task, [], source=row.source, record=row.messages)]
        earlier = zip(record["earlier_ids"], record["earlier_labels"], strict=True)
        pieces += [(record, *row) for row in (*earlier, (record["input_ids"], record["labels"]))]
    return [
        InspectedRow(
            place=place if len(pieces) == 1 else f"{place}, part {part} of {len(pieces)}",
            verdict="repaired" if record["repairs"] else "kept",
            reasons=record["repairs"],
            task=row.task,
            tokens=decode_tokens(template.tokenizer, ids, labels),
            source=row.source,
            label=record["label"],
        )
        for part, (record, ids, labels) in enumerate(pieces, start=1)
    ]


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int] | None = None) -> list[Token]:
    """`ids` (T,) with their texts, which joined are the text of all ids. Without labels, no token is trained."""
    trained = [label != -100 for label in labels or [-100] * len(ids)]
    tokens: list[Token] = []
    before: list[int] = []  # decoded with the next token, since SentencePiece drops the space of a token alone
    group: list[int] = []
    for i, token_id in enumerate(ids):
        group.append(token_id)
        text_before, text = tokenizer.decode(before), tokenizer.decode(before + group)
        text = text[len(text_before) :] if text.startswith(text_before) else tokenizer.decode(group)
        is_partial = text.endswith(PARTIAL_CHARACTER) and len(group) < MAX_CHARACTER_TOKENS
        if is_partial and trained[i : i + 2] == [trained[i]] * 2:  # the next token may complete the character
            continue
        tokens.append(Token(text, group, trained[i]))
        before, group = group, []
    return tokens


def as_text(row: InspectedRow) -> Text:
    """A row as text for a terminal: trained tokens in ⟦ ⟧ and green, a dot between tokens."""
    verdict = row.verdict if row.verdict != "prepared" else ""
    head = [row.place, row.task and f"task {row.task}", row.id and f"id {row.id}", row.source, verdict]
    if row.tokens:
        trained = "a prompt, nothing trained" if row.reference is not None else f"{row.trained} trained"
        head.append(f"{row.length} tokens" if row.label is not None else f"{row.length} tokens, {trained}")
    text = Text().append(" · ".join(part for part in head if part) + "\n", "bold")
    for reason in row.reasons:
        text.append(f"{row.verdict}: {reason}\n")
    if row.record is not None:
        record = json.dumps(row.record, ensure_ascii=False, default=str)
        cut = f"… ({len(record):,} characters)" if len(record) > SHOWN_CHARACTERS else ""
        text.append(record[:SHOWN_CHARACTERS].translate(VISIBLE) + cut + "\n")
    before = Token("\n", [], False)
    for token in row.tokens:
        if token.trained != before.trained:
            text.append("⟦" if token.trained else "⟧")
        elif not before.text.endswith("\n"):
            text.append("·")
        text.append(token.text.translate(VISIBLE), "green" if token.trained else "dim")
        before = token
    if before.trained:
        text.append("⟧")
    if row.tokens and not text.plain.endswith("\n"):
        text.append("\n")
    for name, value in (("expected", row.reference), ("class", row.label)):
        if value is not None:
            text.append(f"{name}: {value.translate(VISIBLE)}\n")
    return text
