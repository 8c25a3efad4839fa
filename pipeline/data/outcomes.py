"""Decides what becomes of each encoded row: exact and near copies, and rows that leak into the test split, are dropped.

Rows of the test split are compared only with each other, so no other row decides what the test split is.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.duplicates import Clusters, Rows, near_duplicates
from pipeline.data.encoding import ROWS, SIGNATURES, TEXT

DUPLICATE = "exact duplicate of an earlier row"
NEAR_DUPLICATE = "near duplicate of an earlier row"
LEAKED = "its prompt is in the test split too"
NEAR_TEST = "near copy of a test row"
RANK = {"test": 0, "validation": 1, "train": 2}  # of two near copies, the one with the lower rank is kept


@dataclass(frozen=True)
class Outcomes:
    """By row, in the order of the shards; N rows."""

    kept: NDArray[np.bool_]  # (N,)
    reason: NDArray[np.object_]  # (N,) str; None if the row is kept
    cause: NDArray[np.object_]  # (N,) unusable | overlong | filtered | duplicate | leaked; None if the row is kept
    split: NDArray[np.object_]  # (N,) str; None if the row could not be encoded
    copy_of: NDArray[np.int64]  # (N,) the row that a dropped row copies or leaks; −1 if there is none
    similarity: NDArray[np.float64]  # (N,) Jaccard similarity of the two, 1 for exact copies; NaN if not measured
    cluster: NDArray[np.int64]  # (N,) the first of a test row's near copies in the test split; −1 for other rows
    sources: pa.ChunkedArray  # (N,) file and line
    details: pa.ChunkedArray  # (N,) the reason with its values; null if it has none
    texts: pa.ChunkedArray  # (N,) memory-mapped, so not limited by memory
    crowded: int = 0  # rows with so many candidates that a near copy may have been missed


def decide_outcomes(folders: list[Path], threshold: float | None) -> Outcomes:
    """Compare all rows of the encoded shards in `folders`; without a `threshold`, find only exact copies."""
    columns = ["source", "reason", "cause", "detail", "split", "key", "prompt_key", "prompt_keys"]
    rows = pa.concat_tables(pq.read_table(folder / ROWS, columns=columns) for folder in folders)
    reason, cause, split = (rows[name].to_numpy() for name in ("reason", "cause", "split"))
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
    is_test = split == "test"
    for in_part in (is_test, ~is_test):
        (numbers,) = np.nonzero(outcomes.kept & in_part)
        # Codes are numbered by first appearance: the first row with a key is the one whose code is a new maximum.
        keys = rows["key"].take(pa.array(numbers)).combine_chunks().dictionary_encode()
        codes = keys.indices.to_numpy().astype(np.int64)
        is_first = codes > np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1]
        originals = numbers[is_first][codes[~is_first]]
        _drop(outcomes, numbers[~is_first], DUPLICATE, "duplicate", originals, 1.0)
    _drop_leaks(outcomes, rows["prompt_key"], rows["prompt_keys"].combine_chunks(), is_test)
    crowded = 0 if threshold is None else _drop_near_copies(outcomes, folders, threshold)
    return replace(outcomes, crowded=crowded)


def _drop_leaks(
    outcomes: Outcomes, prompt_key: pa.ChunkedArray, prompt_keys: pa.ListArray, is_test: NDArray[np.bool_]
) -> None:
    """Drop the rows outside the test split that ask, in any turn, what a test row asks."""
    (tests,) = np.nonzero(outcomes.kept & is_test)
    test_indices = pc.index_in(prompt_keys.flatten(), value_set=prompt_key.take(pa.array(tests)).combine_chunks())
    found, rows = test_indices.is_valid(), pc.list_parent_indices(prompt_keys)
    leaking, first_hit = np.unique(rows.filter(found).to_numpy(), return_index=True)
    leaked = tests[test_indices.filter(found).to_numpy()[first_hit]]
    dropped = outcomes.kept[leaking] & ~is_test[leaking]
    _drop(outcomes, leaking[dropped], LEAKED, "leaked", leaked[dropped], np.nan)


def _drop_near_copies(outcomes: Outcomes, folders: list[Path], threshold: float) -> int:
    """Drop near copies and set the clusters of test rows; returns the number of crowded rows."""
    (numbers,) = np.nonzero(outcomes.kept)
    signatures = np.concatenate([np.load(folder / SIGNATURES) for folder in folders])[numbers]
    split = outcomes.split[numbers]
    rank = sum(RANK[name] * (split == name) for name in RANK) * len(outcomes.reason) + numbers
    near = near_duplicates(
        signatures, lambda index: outcomes.texts[int(numbers[index])].as_py(), rank, split == "test", threshold
    )
    (copies,) = np.nonzero(near.duplicate_of >= 0)
    originals = numbers[near.duplicate_of[copies]]
    leaks = outcomes.split[originals] == "test"
    for selected, reason, cause in ((leaks, NEAR_TEST, "leaked"), (~leaks, NEAR_DUPLICATE, "duplicate")):
        _drop(outcomes, numbers[copies[selected]], reason, cause, originals[selected], near.jaccard[copies[selected]])
    protected = near.cluster >= 0
    outcomes.cluster[numbers[protected]] = numbers[near.cluster[protected]]
    return near.crowded


def _drop(outcomes: Outcomes, rows: Rows, reason: str, cause: str, originals: Rows, similarity: Any) -> None:
    outcomes.kept[rows] = False
    outcomes.reason[rows], outcomes.cause[rows] = reason, cause
    outcomes.copy_of[rows], outcomes.similarity[rows] = originals, similarity


def merge_groups(groups: list[str], clusters: NDArray[np.int64]) -> list[str]:
    """The group of each test row, where near copies and all rows that share a group with them become one group."""
    merged = Clusters()
    members: dict[int, str] = {}  # cluster → a group in it
    for cluster, group in zip(clusters.tolist(), groups, strict=True):
        if cluster >= 0:
            merged.join(group, members.setdefault(cluster, group))
    return [merged.first(group) for group in groups]
