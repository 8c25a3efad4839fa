"""Rows as training sequences without padding: several rows share one, isolated from each other, and none is cut.

A batch carries `rows`, the numbers of its rows, so that a step can name them and be split between rows when memory runs
out. `attention.py` keeps packed rows apart.
"""

from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.params import TrainParams

Batch = dict[str, Any]
OPEN_LINES = 16


def training_sequences(path: Path, params: TrainParams) -> Dataset:
    """Rows as training sequences: one each, or packed to `packed_length`; `seq_lengths` keeps packed rows apart.

    A row longer than `packed_length` is a sequence of its own; none is cut.
    """
    table = pq.read_table(path, columns=["input_ids", "labels"]).combine_chunks()
    lengths = np.asarray(table.column("input_ids").combine_chunks().value_lengths(), dtype=np.int64)
    if not params.packing or not len(lengths):
        return Dataset(table.append_column("rows", _lists(np.arange(len(lengths)), np.ones_like(lengths))))
    lines = fill_lines(lengths.tolist(), params.packed_length, params.seed)
    order = np.concatenate(lines)
    taken = table.take(pa.array(order)).combine_chunks()
    line_lengths = np.array([lengths[line].sum() for line in lines])
    columns = {name: _lists(taken.column(name).combine_chunks().flatten(), line_lengths) for name in taken.column_names}
    sizes = np.array([len(line) for line in lines])
    columns |= {"rows": _lists(order, sizes), "seq_lengths": _lists(lengths[order], sizes)}
    return Dataset(pa.table(columns))


def _lists(values: Any, lengths: np.ndarray[Any, Any]) -> pa.Array:
    return pa.LargeListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]), pa.array(values))


def fill_lines(lengths: list[int], line: int, seed: int) -> list[list[int]]:
    """Row numbers by line: each row, in random order, goes where it leaves the least room among the open lines.

    TRL packs the longest rows first, which fills lines a little better, but puts rows of like length, so often of one
    task, into one step: on the sample that cost 4 % of validation loss. Room at a line's end costs nothing here, since
    lines are not padded.
    """
    filled: list[list[int]] = []
    open_lines: list[tuple[int, list[int]]] = []  # room, rows
    for row in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        fitting = [each for each in open_lines if each[0] >= lengths[row]]
        fullest = min(fitting, key=itemgetter(0), default=(line, list[int]()))
        if fitting:
            open_lines.remove(fullest)
        room, rows = fullest[0] - lengths[row], [*fullest[1], row]
        if room > 0:
            open_lines.append((room, rows))
        else:
            filled.append(rows)
        if len(open_lines) > OPEN_LINES:
            fullest = min(open_lines, key=itemgetter(0))
            open_lines.remove(fullest)
            filled.append(fullest[1])
    return filled + [rows for _, rows in open_lines]


class Collate:
    """Sequences as one batch, by TRL's collator, with the numbers of their `rows`, (R,).

    Packed, they follow each other in one line: `input_ids` is (1, T) and `cu_seq_lens_q` says where each row starts.
    """

    def __init__(self, pad_token_id: int, packed: bool) -> None:
        self.collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=packed)

    def __call__(self, sequences: list[Batch]) -> Batch:
        batch = self.collate(sequences)
        batch["rows"] = torch.tensor([row for sequence in sequences for row in sequence["rows"]])
        return batch


def lengths_of(sequences: Dataset) -> list[int]:
    """Tokens of each sequence; the tokens themselves stay in Arrow's memory."""
    return pc.list_value_length(sequences.data.column("input_ids")).to_pylist()


def tokens_in(batch: Batch) -> int:
    """Real ones: packed lines have no padding, and no mask."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def pieces(batch: Batch, number: int) -> list[Batch]:
    """`batch` as up to `number` batches of about as many rows each; their rows are those of `batch`."""
    if number == 1:
        return [batch]
    parts = [part for part in torch.arange(len(batch["rows"])).tensor_split(number) if len(part)]
    if "cu_seq_lens_q" not in batch:
        return [{key: value[part] for key, value in batch.items()} for part in parts]
    line = {key: batch[key].flatten().tolist() for key in ("input_ids", "labels", "rows")}
    rows = rows_of(line | {"seq_lengths": batch["cu_seq_lens_q"].diff().tolist()})
    collate = Collate(0, packed=True)  # nothing is padded
    return [collate([rows[i] for i in part.tolist()]) for part in parts]


def short_row(sequences: Dataset) -> Batch:
    """The shortest row of the first lines, of those that have some context if there are any."""
    lines = list(sequences.select(range(min(len(sequences), 64))))
    rows = [row for line in lines for row in (rows_of(line) if "seq_lengths" in line else [line])]
    return min(rows, key=lambda row: (len(row["input_ids"]) < 16, len(row["input_ids"])))


def rows_of(line: Batch) -> list[Batch]:
    bounds = [0, *torch.tensor(line["seq_lengths"]).cumsum(0).tolist()]
    return [
        {key: line[key][a:b] for key in ("input_ids", "labels")} | {"rows": [row], "seq_lengths": [b - a]}
        for row, (a, b) in zip(line["rows"], pairwise(bounds), strict=True)
    ]
