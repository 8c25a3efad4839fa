"""A few rows as the model sees them, token by token, with what is trained.

They are those of a prepared dataset, or of a data file as it would be prepared, with the verdict on each (kept,
repaired, dropped).
"""

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

BYTES = "\ufffd"  # what a tokenizer decodes the part of a character to
LONGEST_CHARACTER = 8  # tokens; a character has at most 4 bytes, some tokenizers put a token before it
# Control characters, which could drive a terminal, as pictures; line breaks are marked.
PICTURES = {number: chr(0x2400 + number) for number in range(32)} | {0x0A: "⏎\n", 0x7F: "\u2421"}
PICTURES |= {number: f"\\x{number:02x}" for number in range(0x80, 0xA0)}


class InspectionError(ValueError):
    """There is no such dataset or row to look at."""


@dataclass(frozen=True)
class Token:
    text: str  # of one token, or of the few that make up one character
    ids: list[int]
    trained: bool


@dataclass(frozen=True)
class Shown:
    place: str  # split or file, and the row in it
    verdict: str  # prepared | kept | repaired | dropped
    reasons: list[str]  # of a repair or drop
    task: str
    tokens: list[Token]
    id: str | None = None
    source: str | None = None
    reference: str | None = None  # of a test row, whose tokens are the prompt
    label: str | None = None  # the class of the text, with train.task sequence-classification
    record: Any = None  # of a row that never became tokens

    @property
    def length(self) -> int:
        return sum(len(token.ids) for token in self.tokens)

    @property
    def trained(self) -> int:
        return sum(len(token.ids) for token in self.tokens if token.trained)

    def as_json(self) -> dict[str, Any]:
        values = asdict(self) | {"length": self.length, "trained": self.trained}
        return {key: value for key, value in values.items() if value is not None}


def inspect_dataset(
    dataset: Path, split: str, row: int | None, id: str | None, task: str | None, count: int
) -> list[Shown]:
    """Up to `count` rows of a prepared split: from number `row` on (0 is the first), with that id, or of that task.

    Raises:
        InspectionError: no dataset, or no such row.
        TemplateError: base model or tokenizer is not what the dataset was prepared for.
    """
    file = dataset / f"{split}.parquet"
    if not file.is_file():
        raise InspectionError(f"{file} does not exist; run `dvc repro prepare`, or name a data file to look into")
    names = pq.read_table(file, columns=["id", "task"]).to_pylist()
    named = {key: value for key, value in (("id", id), ("task", task)) if value is not None}
    numbers = [n for n, name in enumerate(names) if n >= (row or 0) and named.items() <= name.items()][:count]
    if not numbers:
        asked = ", ".join(f"{key} {value}" for key, value in ({"row": row} | named).items() if value is not None)
        tasks = ", ".join(sorted({name["task"] for name in names})[:20])
        raise InspectionError(f"the {split} split has no {asked}; it has {len(names)} rows, of {tasks}")
    contract = read_json(dataset / "contract.json")
    load = classes.load_classes if contract.get("task") == CLASSIFICATION else load_contract
    tokenizer = load(contract).tokenizer
    records = pads.dataset(file).take(pa.array(numbers)).to_pylist()
    return [
        Shown(
            place=f"{split} row {number}",
            verdict="prepared",
            reasons=[],
            task=record["task"],
            tokens=tokens_of(tokenizer, record["input_ids"], record.get("labels")),
            **{key: record.get(key) for key in ("id", "source", "reference", "label")},
        )
        for number, record in zip(numbers, records, strict=True)
    ]


def inspect_file(
    params: Params, path: Path, row: int | None, task: str | None, count: int, ask: Ask | None = None
) -> list[Shown]:
    """Up to `count` records of a data file or folder as they would be prepared, from number `row` on, or of one task.

    It is read as by `retune ingest`. What only the whole data can tell (copies, leaks, the split) is not looked at.
    """
    format, columns = params.ingest.format, params.ingest.columns
    records = (record for file in find_files(path) for record in read_rows(file, format, columns, ask))
    wanted = (
        (number, record)
        for number, record in enumerate(records)
        if number >= (row or 0) and (task is None or (isinstance(record, Row) and record.task == task))
    )
    chosen = list(islice(wanted, count))  # a question about the file comes first
    if not chosen:
        what = f"no row of task {task}" if task is not None else f"no row {row}"
        raise InspectionError(f"{path} has {what} (0 is the first)")
    template, _ = load_encoding(params.prepare, params.train.task)
    # Every row is shown as one to train on: test rows would have their prompt alone.
    prepare = params.prepare.model_copy(update={"test_fraction": 0.0, "validation_fraction": 0.0})
    return [each for number, record in chosen for each in _as_prepared(template, prepare, f"record {number}", record)]


def _as_prepared(template: Encoder, params: PrepareParams, place: str, row: Row | Rejected) -> list[Shown]:
    if isinstance(row, Rejected):
        return [Shown(place, "dropped", [f"a row {row.reason}"], "", [], source=row.source, record=row.record)]
    records = encode_rows([row], template, params)
    if why := records[0].get("detail") or records[0].get("reason"):
        return [Shown(place, "dropped", [why], row.task, [], source=row.source, record=row.messages)]
    return [
        Shown(
            place=place if len(records) == 1 else f"{place}, part {part} of {len(records)}",
            verdict="repaired" if record["repairs"] else "kept",
            reasons=record["repairs"],
            task=row.task,
            tokens=tokens_of(template.tokenizer, record["input_ids"], record["labels"]),
            source=row.source,
            label=record["label"],
        )
        for part, record in enumerate(records, start=1)
    ]


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int] | None = None) -> list[Token]:
    """`ids` (T,) with the text of each; their texts together are the text of all. Without labels, none is trained."""
    tokens: list[Token] = []
    before: list[int] = []  # a token alone may decode otherwise than after another: SentencePiece drops its space
    group: list[int] = []
    for place, number in enumerate(ids):
        group.append(number)
        known = tokenizer.decode(before)
        both = tokenizer.decode(before + group)
        text = both[len(known) :] if both.startswith(known) else tokenizer.decode(group)
        unfinished = text.endswith(BYTES) and place + 1 < len(ids) and len(group) < LONGEST_CHARACTER
        if unfinished and (labels is None or (labels[place] == -100) == (labels[place + 1] == -100)):
            continue
        tokens.append(Token(text, group, labels is not None and labels[place] != -100))
        before, group = group, []
    return tokens


def as_text(shown: Shown) -> Text:
    """A row for people: trained tokens in ⟦ ⟧ and green, a dot between tokens."""
    head = [shown.place, f"task {shown.task}" if shown.task else "", f"id {shown.id}" if shown.id else ""]
    head += [shown.source or "", shown.verdict if shown.verdict != "prepared" else ""]
    if shown.tokens:
        trained = "a prompt, nothing trained" if shown.reference is not None else f"{shown.trained} trained"
        head.append(f"{shown.length} tokens" if shown.label is not None else f"{shown.length} tokens, {trained}")
    text = Text()
    text.append(" · ".join(part for part in head if part) + "\n", "bold")
    for reason in shown.reasons:
        text.append(f"{shown.verdict}: {reason}\n")
    if shown.record is not None:
        text.append(json.dumps(shown.record, ensure_ascii=False, default=str).translate(PICTURES) + "\n")
    before = Token("\n", [], False)
    for token in shown.tokens:
        if token.trained != before.trained:
            text.append("⟦" if token.trained else "⟧")
        elif not before.text.endswith("\n"):
            text.append("·")
        text.append(token.text.translate(PICTURES), "green" if token.trained else "dim")
        before = token
    if before.trained:
        text.append("⟧")
    if shown.tokens and not text.plain.endswith("\n"):
        text.append("\n")
    for name, value in (("expected", shown.reference), ("class", shown.label)):
        if value is not None:
            text.append(f"{name}: {value.translate(PICTURES)}\n")
    return text
