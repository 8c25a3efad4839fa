"""A few rows as the model sees them, token by token, with what is trained.

They are those of a prepared dataset, or of a data file as it would be prepared, with the verdict on each (kept,
repaired, dropped).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pipeline.chat.fitting import Overlong
from pipeline.chat.rendering import RowError
from pipeline.chat.template import load_contract
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import read_json
from pipeline.data import classes
from pipeline.data.encoding import Encoder, fit_rows, load_encoding
from pipeline.data.filters import apply_filters
from pipeline.data.formats import Ask, find_files, read_rows
from pipeline.data.records import Rejected, Row
from pipeline.params import Params

BYTES = "\ufffd"  # what a tokenizer decodes the part of a character to
LONGEST_CHARACTER = 8  # tokens; a character has at most 4 bytes, some tokenizers put a token before it
STYLES = {  # (trained, every other token): neighbours differ, so that one sees where tokens end
    (False, False): "dim",
    (False, True): "dim underline",
    (True, False): "bold green",
    (True, True): "bold green underline",
}


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
        answer = {
            "place": self.place,
            "verdict": self.verdict,
            "reasons": self.reasons,
            "task": self.task,
            "length": self.length,
            "trained": self.trained,
            "tokens": [{"text": t.text, "ids": t.ids, "trained": t.trained} for t in self.tokens],
        }
        rest = {"id": self.id, "source": self.source, "reference": self.reference, "label": self.label}
        rest["record"] = self.record
        return answer | {key: value for key, value in rest.items() if value is not None}


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
    names = pq.read_table(file, columns=["id", "task"])
    places = list(range(names.num_rows))
    for column, value in (("id", id), ("task", task)):
        if value is not None:
            wanted = set(pc.indices_nonzero(pc.equal(names.column(column), value)).to_pylist())
            if not wanted:
                known = "" if column == "id" else f"; it has {', '.join(sorted(set(names.column(column).to_pylist())))}"
                raise InspectionError(f"no row of the {split} split has {column} {value}{known}")
            places = [place for place in places if place in wanted]
    places = [place for place in places if place >= (row or 0)][:count]
    if not places:
        raise InspectionError(
            f"there is no row {row} in the {split} split, which has {names.num_rows} (0 is the first)"
        )
    contract = read_json(dataset / "contract.json")
    load = classes.load_classes if contract.get("task") == CLASSIFICATION else load_contract
    tokenizer = load(contract).tokenizer
    records = pads.dataset(file).take(pa.array(places)).to_pylist()
    return [
        Shown(
            place=f"{split} row {place}",
            verdict="prepared",
            reasons=[],
            task=record["task"],
            tokens=tokens_of(tokenizer, record["input_ids"], record.get("labels")),
            id=record["id"],
            source=record.get("source"),
            reference=record.get("reference"),
            label=record.get("label"),
        )
        for place, record in zip(places, records, strict=True)
    ]


def inspect_file(
    params: Params, path: Path, row: int | None, task: str | None, count: int, ask: Ask | None = None
) -> list[Shown]:
    """Up to `count` records of a data file or folder as they would be prepared, from number `row` on, or of one task.

    It is read by `ingest.format` and `ingest.columns`, as `retune ingest` does; `ask` as there.
    What only the whole data can tell (duplicates, leaks into the test split, the split itself) is not looked at.

    Raises:
        FormatError, TemplateError: see `read_rows` and `load_encoding`.
        InspectionError: no such row.
    """
    chosen = list(islice(_records(params, path, row or 0, task, ask), count))  # a question about the file comes first
    template, _ = load_encoding(params.prepare, params.train.task)
    shown = [each for number, record in chosen for each in _as_prepared(template, params, number, record)]
    if not shown:
        what = f"no row of task {task}" if task is not None else f"no row {row}"
        raise InspectionError(f"{path} has {what} (0 is the first)")
    return shown


def _records(params: Params, path: Path, first: int, task: str | None, ask: Ask | None) -> Iterator[tuple[int, Any]]:
    format, columns = params.ingest.format, params.ingest.columns
    everything = (record for file in find_files(path) for record in read_rows(file, format, columns, ask))
    for number, record in enumerate(everything):
        if number >= first and (task is None or (isinstance(record, Row) and record.task == task)):
            yield number, record


def _as_prepared(template: Encoder, params: Params, number: int, row: Any) -> list[Shown]:
    place = f"record {number}"
    if not isinstance(row, Row):
        return [Shown(place, "dropped", [f"a row {row.reason}"], "", [], source=row.source, record=row.record)]
    how, filters = params.prepare.on_overlong, params.prepare.filters
    passed = apply_filters(row, filters) if filters.any_on else row
    if isinstance(passed, Rejected):
        return [Shown(place, "dropped", [passed.reason], row.task, [], source=row.source, record=passed.record)]
    row = passed
    [fitted] = fit_rows([row], template, params.prepare)
    if isinstance(fitted, RowError):
        reason = f"the row {fitted}"
        if isinstance(fitted, Overlong) and how == "error":
            reason += "; prepare.on_overlong is error, so it would stop the stage"
        return [Shown(place, "dropped", [reason], row.task, [], source=row.source, record=row.messages)]
    return [
        Shown(
            place=place if len(fitted) == 1 else f"{place}, part {part} of {len(fitted)}",
            verdict="repaired" if (repairs := [*row.repairs, *each.encoded.repairs]) else "kept",
            reasons=repairs,
            task=row.task,
            tokens=tokens_of(template.tokenizer, each.encoded.input_ids, each.encoded.labels),
            source=row.source,
            label=each.messages[-1]["content"] if isinstance(template, classes.TextEncoder) else None,
        )
        for part, each in enumerate(fitted, start=1)
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


def as_text(shown: Shown, colour: bool) -> Text:
    """A row for people: trained tokens green, or without colour in ⟦ ⟧ with a dot between tokens."""
    head = [shown.place, f"task {shown.task}" if shown.task else "", f"id {shown.id}" if shown.id else ""]
    head += [shown.source or "", shown.verdict if shown.verdict != "prepared" else ""]
    if shown.tokens:
        trained = "a prompt, nothing trained" if shown.reference is not None else f"{shown.trained} trained"
        head.append(f"{shown.length} tokens" if shown.label is not None else f"{shown.length} tokens, {trained}")
    text = Text()
    text.append(" · ".join(part for part in head if part) + "\n", "bold" if colour else "")
    for reason in shown.reasons:
        text.append(f"{shown.verdict}: {reason}\n")
    if shown.record is not None:
        text.append(_visible(_plain(shown.record)) + "\n")
    for place, token in enumerate(shown.tokens):
        if colour:
            text.append(_visible(token.text), STYLES[token.trained, place % 2 == 1])
            continue
        previous = shown.tokens[place - 1] if place else None
        changes = token.trained != (previous is not None and previous.trained)
        if changes:
            text.append("⟦" if token.trained else "⟧")
        elif previous is not None and not previous.text.endswith("\n"):
            text.append("·")
        text.append(_visible(token.text))
    if shown.tokens and shown.tokens[-1].trained and not colour:
        text.append("⟧")
    if shown.tokens and not text.plain.endswith("\n"):
        text.append("\n")
    for name, value in (("expected", shown.reference), ("class", shown.label)):
        if value is not None:
            text.append(f"{name}: ", "bold" if colour else "")
            text.append(_visible(value) + "\n")
    return text


def _plain(record: Any) -> str:
    """A record that has no tokens: a conversation turn by turn, anything else as JSON."""
    if isinstance(record, list) and all(isinstance(turn, dict) and "role" in turn for turn in record):
        turns = []
        for turn in record:
            rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
            parts = [turn.get("content") or "", json.dumps(rest, ensure_ascii=False) if rest else ""]
            turns.append(f"{turn['role']}: {' '.join(part for part in parts if part)}")
        return "\n".join(turns)
    return json.dumps(record, ensure_ascii=False, default=str)


def _visible(text: str) -> str:
    """`text` with line breaks marked, and with control characters, which could drive a terminal, as pictures."""
    return text.translate(_PICTURES).replace("\n", "⏎\n")


_PICTURES: dict[int, str] = {
    **{number: chr(0x2400 + number) for number in range(32) if chr(number) != "\n"},
    0x7F: "\u2421",
    **{number: f"\\x{number:02x}" for number in range(0x80, 0xA0)},
}
