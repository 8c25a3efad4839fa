"""Packed rows stay apart, need no padding and have the loss of single rows."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from trl.trainer import add_fused_lm_head

from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.training.attention import use_packed_attention
from pipeline.training.packing import Collate, count_tokens, pack_rows, split_batch, training_sequences
from pipeline.weights.loading import load_base


@pytest.fixture
def model(dataset: Path) -> Any:
    return load_base(read_json(dataset / "contract.json")["model"], None).eval()


def packed(dataset: Path, numbers: list[int]) -> dict[str, Any]:
    rows = pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]).to_pylist()
    chosen = [rows[number] for number in numbers]
    return {
        "input_ids": sum((row["input_ids"] for row in chosen), []),
        "labels": sum((row["labels"] for row in chosen), []),
        "rows": numbers,
        "seq_lengths": [len(row["input_ids"]) for row in chosen],
    }


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "rows"}


def test_each_row_has_the_loss_that_it_has_by_itself(model: Any, dataset: Path, params: Params) -> None:
    sequences = training_sequences(dataset / "train.parquet", params.train)
    rows = pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]).to_pylist()
    alone, in_sequence = {}, {}
    with torch.no_grad():
        for sequence in sequences.select(range(4)):
            for number in sorted(set(sequence["rows"])):
                ids, labels = (torch.tensor([rows[number][key]]) for key in ("input_ids", "labels"))
                alone[number] = float(model(input_ids=ids, labels=labels).loss)
        assert use_packed_attention(model, sequences) == "row by row"
        add_fused_lm_head(model)
        for sequence in sequences.select(range(4)):
            for piece in split_batch(Collate(0, packed=True)([sequence]), 1000):
                [number] = piece["rows"].tolist()
                count = (piece["labels"][:, 1:] != -100).sum()
                in_sequence[number] = -float(model(**inputs(piece), fused_lm_head=True).log_probs.sum() / count)
            batch = Collate(0, packed=True)([sequence])
            total = -float(model(**inputs(batch), fused_lm_head=True).log_probs.sum())
            counts = {n: sum(label != -100 for label in rows[n]["labels"][1:]) for n in batch["rows"].tolist()}
            assert total == pytest.approx(sum(alone[n] * counts[n] for n in counts), rel=1e-5)
    assert len(alone) > 8
    assert in_sequence == pytest.approx(alone, abs=1e-5)


def test_a_batch_is_split_between_its_rows(dataset: Path) -> None:
    rows = [{key: packed(dataset, [n])[key] for key in ("input_ids", "labels", "rows")} for n in range(5)]
    packed_batch = Collate(0, packed=True)([packed(dataset, [0, 1, 2]), packed(dataset, [3, 4])])
    for batch in (packed_batch, Collate(0, packed=False)(rows)):
        for number in (1, 2, 3, 5, 9):
            parts = split_batch(batch, number)
            assert len(parts) == min(number, 5)
            assert [row for part in parts for row in part["rows"].tolist()] == [0, 1, 2, 3, 4]
            assert sum(map(count_tokens, parts)) == count_tokens(batch)


def test_packed_batches_have_no_padding(dataset: Path, params: Params) -> None:
    sequences = training_sequences(dataset / "train.parquet", params.train)
    batches = [Collate(0, packed=True)([sequences[i], sequences[-1 - i]]) for i in range(5)]
    assert sum(map(count_tokens, batches)) == sum(batch["input_ids"].numel() for batch in batches)


def test_a_row_longer_than_a_packed_sequence_is_not_cut(dataset: Path, params: Params) -> None:
    rows = pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()
    sequences = training_sequences(dataset / "train.parquet", with_(params, train={"packed_length": 40}).train)
    assert sorted(n for lengths in sequences["seq_lengths"] for n in lengths) == sorted(map(len, rows))
    assert sorted(sum(sequences["input_ids"], [])) == sorted(sum(rows, []))


def test_every_row_is_in_one_sequence_and_sequences_are_full(params: Params) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(5, 120, (2000,), generator=draw)] + [900, 512, 513]
    sequences = pack_rows(lengths, 512, seed=1)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in rows) for rows in sequences]
    assert all(total <= 512 or len(rows) == 1 for total, rows in zip(totals, sequences, strict=True))
    assert sum(totals) / len(totals) > 0.95 * 512
    assert sequences != pack_rows(lengths, 512, seed=2)
