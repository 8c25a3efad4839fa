"""Which row copies which: MinHash LSH finds the candidates, the exact Jaccard similarity of their shingles decides.

A row is a duplicate of an earlier row that is kept and whose shingles are as similar as the threshold asks. Rows of the
test split are protected: they are never duplicates, what is near to one of them is, and near copies among themselves
share a cluster. Time grows linearly with the rows, whatever they say.
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

RECALL = 0.98  # the share that the bands find, on average, of pairs at the very threshold; above it they find more
DOUBT = 4.0  # standard deviations by which a signature may underrate a pair that is compared all the same
LISTED = 32  # kept rows that a bucket lists: what more rows share without being copies is boilerplate
TRIES = 8  # listed rows that a row is compared with, the likest first: boilerplate again
SETS = 1024  # texts whose shingles are in memory at once
MIXER = np.array([pow(0x9E3779B97F4A7C15, place + 1, 1 << 64) for place in range(LANES)], dtype=np.uint64)


@dataclass(frozen=True)
class NearDuplicates:
    duplicate_of: NDArray[np.int64]  # (N,) the kept row that this row copies; −1: it is kept
    jaccard: NDArray[np.float64]  # (N,) the similarity of the two; NaN: it is kept
    cluster: NDArray[np.int64]  # (N,) for a protected row the first row of its cluster, by rank; −1 for the others
    compared: int  # pairs
    crowded: int  # rows of which a copy may be missed: a bucket's list was full, or too many likely ones to compare


def near_duplicates(
    signatures: Signatures,
    text_of: Callable[[int], str],
    rank: NDArray[np.int64],
    protected: NDArray[np.bool_],
    threshold: float,
) -> NearDuplicates:
    """Duplicates by greedy choice in the order of `rank` (distinct), lowest first, after all protected rows.

    `text_of` gives the text of a row, `threshold` is from 0.3 (`params`) to 1. The result depends on texts and ranks,
    not on the order of the rows.
    """
    buckets = _buckets(signatures, *banding(threshold))
    order = np.lexsort((rank, ~protected))
    place = np.argsort(order)
    listed: dict[int, list[int]] = defaultdict(list)  # kept rows by bucket
    shingles_of = lru_cache(SETS)(lambda row: shingles(text_of(row)))
    agreeing = LANES * (threshold - DOUBT * math.sqrt(threshold * (1 - threshold) / LANES))
    duplicate_of, similarity = np.full(len(order), -1), np.full(len(order), np.nan)
    crowded = np.zeros(len(order), dtype=bool)
    clusters, compared = Clusters(), 0  # of places in that order
    alike = order[(buckets[order] >= 0).any(axis=1)]
    progress = Progress("prepare", len(alike), "rows compared", every=2.0)

    for done, row in enumerate(alike.tolist()):
        progress.update(done)
        shared = buckets[row][buckets[row] >= 0].tolist()
        others = np.array(list({other for bucket in shared for other in listed[bucket]}), dtype=np.int64)
        agreed = np.count_nonzero(signatures[others] == signatures[row], axis=1)
        likest = others[np.lexsort((place[others], -agreed))][: np.count_nonzero(agreed >= agreeing)]
        tries = 0
        for other in likest.tolist():
            if protected[row] and clusters.first(place[row]) == clusters.first(place[other]):
                continue
            if tries == TRIES:
                crowded[row] = True
                break
            tries += 1
            near = jaccard(shingles_of(row), shingles_of(other))
            if near < threshold:
                continue
            if not protected[row]:
                duplicate_of[row], similarity[row] = other, near
                break
            clusters.join(place[row], place[other])
        compared += tries
        if duplicate_of[row] < 0:
            for bucket in shared:
                if len(listed[bucket]) < LISTED:
                    listed[bucket].append(row)
                else:
                    crowded[row] = True

    cluster = np.full(len(order), -1)
    for row in np.flatnonzero(protected).tolist():
        cluster[row] = order[clusters.first(place[row])]
    return NearDuplicates(duplicate_of, similarity, cluster, compared, int(np.count_nonzero(crowded)))


def banding(threshold: float) -> tuple[int, int]:
    """Bands, and minima of each: the widest that find RECALL of the pairs at the threshold with the lanes there are.

    Two rows agree in a band of r minima with probability Jʳ, in at least one of b with 1 − (1 − Jʳ)ᵇ (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4): 17 of 7 for 0.8. Wide bands make fewer false candidates.
    """
    for width in range(LANES, 1, -1):
        found = threshold**width
        bands = 1 if found == 1 else math.ceil(math.log(1 - RECALL) / math.log1p(-found))
        if bands * width <= LANES:
            return bands, width
    raise AssertionError("two minima a band are enough for 0.3")


class Clusters:
    """Items that are joined, by a union-find forest whose roots are the least of their items."""

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
    """The bucket that each row has in each band, (N, bands); −1 where no other row is in it.

    Some unlike bands share a bucket by chance; a comparison tells.
    """
    buckets = np.full((len(signatures), bands), -1)
    for band in range(bands):
        lanes = signatures[:, band * width : (band + 1) * width].astype(np.uint64)
        codes = pa.array(lanes @ MIXER[:width]).dictionary_encode().indices.to_numpy().astype(np.int64)
        shared = np.bincount(codes)[codes] > 1
        buckets[shared, band] = codes[shared] * bands + band
    return buckets
