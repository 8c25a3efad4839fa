"""Finds duplicate rows: MinHash LSH proposes candidates, and the exact Jaccard similarity of their shingles decides.

A row is a duplicate if an earlier, kept row is at least as similar as the threshold. Rows of the test split are
protected: they are never duplicates, rows close to one of them are, and those close to each other share a cluster.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.progress import Progress
from pipeline.data.shingles import LANES, Signatures, jaccard, shingles

RECALL = 0.98  # the average share of pairs at the threshold that the bands find; of more similar pairs they find more
DOUBT = 4.0  # standard deviations by which a signature may underestimate a pair that is still compared
BUCKET_ROWS = 32  # kept rows per bucket; what more rows share without being copies is boilerplate
MAX_TRIES = 8  # candidates that a row is compared with, the most similar first; more would again be boilerplate
CACHED_SETS = 1024  # texts whose shingles are in memory at once
Rows = NDArray[np.int64]  # numbers of rows


@dataclass(frozen=True)
class NearDuplicates:
    duplicate_of: Rows  # (N,) the kept row that this row copies; −1 if it is kept
    jaccard: NDArray[np.float64]  # (N,) the similarity of the two; NaN if it is kept
    cluster: Rows  # (N,) the first row, by rank, of a protected row's cluster; −1 for other rows
    compared: int  # pairs
    crowded: int  # rows for which a copy may be missed: their bucket was full, or they had too many candidates


def near_duplicates(
    signatures: Signatures, text_of: Callable[[int], str], rank: Rows, protected: NDArray[np.bool_], threshold: float
) -> NearDuplicates:
    """Choose duplicates greedily: protected rows come first, then the others, each in the order of their `rank`.

    The ranks are distinct; `text_of` returns the text of a row; `threshold` is between 0.3 and 1.
    """
    buckets = _buckets(signatures, *banding(threshold))
    order = np.lexsort((rank, ~protected))
    position = np.argsort(order)  # of each row in `order`
    kept_rows: dict[int, list[int]] = defaultdict(list)  # by bucket
    shingles_of = lru_cache(CACHED_SETS)(lambda row: shingles(text_of(row)))
    min_agreement = LANES * (threshold - DOUBT * math.sqrt(threshold * (1 - threshold) / LANES))
    duplicate_of, similarity = np.full(len(order), -1), np.full(len(order), np.nan)
    crowded = np.zeros(len(order), dtype=bool)
    clusters, compared = Clusters(), 0  # clusters of positions
    in_buckets = order[(buckets[order] >= 0).any(axis=1)]
    progress = Progress("prepare", len(in_buckets), "rows compared", every=2.0)

    for done, row in enumerate(in_buckets.tolist()):
        progress.update(done)
        row_buckets = buckets[row][buckets[row] >= 0].tolist()
        others = np.array(list({other for bucket in row_buckets for other in kept_rows[bucket]}), dtype=np.int64)
        agreement = np.count_nonzero(signatures[others] == signatures[row], axis=1)
        best_first = others[np.lexsort((position[others], -agreement))]
        tries = 0
        for other in best_first[: np.count_nonzero(agreement >= min_agreement)].tolist():
            if protected[row] and clusters.first(position[row]) == clusters.first(position[other]):
                continue
            if tries == MAX_TRIES:
                crowded[row] = True
                break
            tries += 1
            pair_similarity = jaccard(shingles_of(row), shingles_of(other))
            if pair_similarity < threshold:
                continue
            if not protected[row]:
                duplicate_of[row], similarity[row] = other, pair_similarity
                break
            clusters.join(position[row], position[other])
        compared += tries
        if duplicate_of[row] < 0:
            for bucket in row_buckets:
                if len(kept_rows[bucket]) < BUCKET_ROWS:
                    kept_rows[bucket].append(row)
                else:
                    crowded[row] = True

    cluster = np.full(len(order), -1)
    for row in np.flatnonzero(protected).tolist():
        cluster[row] = order[clusters.first(position[row])]
    return NearDuplicates(duplicate_of, similarity, cluster, compared, int(np.count_nonzero(crowded)))


def banding(threshold: float) -> tuple[int, int]:
    """(bands, minima per band): the widest bands that find RECALL of the pairs at the threshold with LANES minima.

    Two rows agree in a band of r minima with probability Jʳ, and in at least one of b bands with 1 − (1 − Jʳ)ᵇ
    (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4). For 0.8, that gives 17 bands of 7 minima.
    """
    for width in range(LANES, 1, -1):
        probability = threshold**width
        bands = 1 if probability == 1 else math.ceil(math.log(1 - RECALL) / math.log1p(-probability))
        if bands * width <= LANES:
            return bands, width
    raise AssertionError("bands of two minima are enough for a threshold of 0.3")


class Clusters:
    """Sets of joined items (union-find); the representative of a set is its smallest item."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def first(self, item: Any) -> Any:
        while (parent := self.parent.get(item, item)) != item:
            self.parent[item] = self.parent.get(parent, parent)
            item = parent
        return item

    def join(self, item: Any, other: Any) -> None:
        first, second = sorted((self.first(item), self.first(other)))
        self.parent[second] = first


def _buckets(signatures: Signatures, bands: int, width: int) -> NDArray[np.int64]:
    """The bucket of each row in each band, (N, bands); −1 if no other row is in it."""
    buckets = np.full((len(signatures), bands), -1)
    for band in range(bands):
        lanes = pa.py_buffer(np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]))
        keys = pa.Array.from_buffers(pa.binary(2 * width), len(signatures), [None, lanes])
        codes = keys.dictionary_encode().indices.to_numpy().astype(np.int64)
        shared = np.bincount(codes)[codes] > 1
        buckets[shared, band] = codes[shared] * bands + band
    return buckets
