"""What becomes of each row when all are known: exact and near copies, and what the test split asks or nearly says.

Rows of the test split are compared first and among themselves only: nothing but themselves decides whether they belong
to it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.duplicates import Clusters, near_duplicates
from pipeline.data.encoding import ROWS, SIGNATURES, TEXT

SPLITS = ("train", "validation", "test")
DUPLICATE = "exact duplicate of an earlier row"
NEAR_DUPLICATE = "near duplicate of an earlier row"
LEAKED = "its prompt is in the test split too"
NEAR_TEST = "near copy of a test row"
RANK = {"test": 0, "validation": 1, "train": 2}  # of two near copies the one with the lower rank stays


@dataclass(frozen=True)
class Outcomes:
    """By row, in the order of the shards; N rows."""

    kept: NDArray[np.bool_]  # (N,)
    reason: NDArray[np.object_]  # (N,) str, None where the row is kept
    cause: NDArray[np.object_]  # (N,) unusable | overlong | filtered | duplicate | leaked; None: kept
    split: NDArray[np.object_]  # (N,) str, None where the row could not be encoded
    copy_of: NDArray[np.int64]  # (N,) the row that a dropped one copies or leaks; −1: none
    similarity: NDArray[np.float64]  # (N,) Jaccard similarity of the two, 1 for exact copies; NaN where not measured
    cluster: NDArray[np.int64]  # (N,) of a test row: the first of its near copies in the test split; −1 elsewhere
    sources: pa.ChunkedArray  # (N,) file and line
    details: pa.ChunkedArray  # (N,) what the reason leaves out; null: nothing
    texts: pa.ChunkedArray  # (N,) in memory-mapped files: their size is no matter
    crowded: int = 0  # rows with so many likely copies that one may have been missed


def decide(folders: list[Path], threshold: float | None) -> Outcomes:
    """Compare all rows of the encoded shards in `folders`; without a `threshold` for exact copies only."""
    columns = ["source", "reason", "cause", "detail", "split", "key", "prompt_key", "asked"]
    rows = pa.concat_tables(pq.read_table(folder / ROWS, columns=columns) for folder in folders)
    reason, cause, split = (_objects(rows[name]) for name in ("reason", "cause", "split"))
    texts = [pa.ipc.open_file(pa.memory_map(str(folder / TEXT))).read_all() for folder in folders]
    count = len(rows)
    outcomes = Outcomes(
        rows["reason"].is_null().to_numpy(),
        reason,
        cause,
        split,
        copy_of=np.full(count, -1),
        similarity=np.full(count, np.nan),
        cluster=np.full(count, -1),
        sources=rows["source"],
        details=rows["detail"],
        texts=pa.concat_tables(texts)["text"],
    )
    test = split == "test"
    for part in (test, ~test):
        (numbers,) = np.nonzero(outcomes.kept & part)
        # Codes count up in order of first appearance: a row is the first of its key where its code is a new maximum.
        codes = _codes(rows["key"].take(pa.array(numbers)))
        first = codes > np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1]
        _drop(outcomes, numbers[~first], DUPLICATE, "duplicate", numbers[first][codes[~first]], 1.0)
    (tests,) = np.nonzero(outcomes.kept & test)
    asked = rows["asked"].combine_chunks()
    places = pc.index_in(asked.flatten(), value_set=rows["prompt_key"].take(pa.array(tests)).combine_chunks())
    hits, owners = places.is_valid(), pc.list_parent_indices(asked)
    leaking, which = np.unique(owners.filter(hits).to_numpy(), return_index=True)
    leaked = tests[places.filter(hits).to_numpy()[which]]
    other = outcomes.kept[leaking] & ~test[leaking]
    _drop(outcomes, leaking[other], LEAKED, "leaked", leaked[other], np.nan)
    if threshold is None:
        return outcomes
    return replace(outcomes, crowded=_near(outcomes, folders, threshold))


def _near(outcomes: Outcomes, folders: list[Path], threshold: float) -> int:
    """Mark near copies; returns how many rows had too many likely ones to compare them all."""
    (numbers,) = np.nonzero(outcomes.kept)
    signatures = np.concatenate([np.load(folder / SIGNATURES) for folder in folders])[numbers]
    split = outcomes.split[numbers]
    rank = sum(RANK[name] * (split == name) for name in RANK) * len(outcomes.reason) + numbers
    near = near_duplicates(
        signatures, lambda place: outcomes.texts[int(numbers[place])].as_py(), rank, split == "test", threshold
    )
    (places,) = np.nonzero(near.duplicate_of >= 0)
    originals = numbers[near.duplicate_of[places]]
    leaks = outcomes.split[originals] == "test"
    for which, why, kind in ((leaks, NEAR_TEST, "leaked"), (~leaks, NEAR_DUPLICATE, "duplicate")):
        _drop(outcomes, numbers[places[which]], why, kind, originals[which], near.jaccard[places[which]])
    protected = near.cluster >= 0
    outcomes.cluster[numbers[protected]] = numbers[near.cluster[protected]]
    return near.crowded


def _drop(
    outcomes: Outcomes, numbers: NDArray[np.int64], reason: str, cause: str, of: NDArray[np.int64], similarity: Any
) -> None:
    outcomes.kept[numbers] = False
    outcomes.reason[numbers], outcomes.cause[numbers] = reason, cause
    outcomes.copy_of[numbers], outcomes.similarity[numbers] = of, similarity


def _objects(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """Strings as references to few objects: what repeats is there once."""
    encoded = column.combine_chunks().dictionary_encode()
    words = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    return words[encoded.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)


def joined_groups(groups: list[str], clusters: NDArray[np.int64]) -> list[str]:
    """The group of each test row; near copies, and all that shares a group with them, are one: they fail together."""
    joined = Clusters()
    members: dict[int, str] = {}  # cluster → a group in it
    for cluster, group in zip(clusters.tolist(), groups, strict=True):
        if cluster >= 0:
            joined.join(group, members.setdefault(cluster, group))
    return [joined.first(group) for group in groups]
