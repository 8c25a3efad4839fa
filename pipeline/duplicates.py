"""Signatures of texts in, which row copies which out: MinHash LSH finds the candidates, exact Jaccard decides.

A row is a duplicate of an earlier row that is kept and whose shingles are as similar as the threshold asks. Rows of the
test split are protected: they are never duplicates, what is near to one of them is, and near copies among themselves
share a cluster. Time and memory grow linearly with the rows, whatever they say. A threshold outside 0.3–1 is refused.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.shingles import LANES, Hashes, jaccard, shingle_sets

RECALL = 0.98  # the share that the bands find, on average, of pairs at the very threshold; above it they find more
DOUBT = 4.0  # standard deviations by which a signature may underrate a pair that is compared all the same
LISTED = 32  # kept rows that a bucket lists: what more rows share without being copies is boilerplate
BLOCK = 4096  # rows compared with the kept ones at once
FETCHED = 512  # texts in memory at once

Places = NDArray[np.int64]
Flags = NDArray[np.bool_]
TextOf = Callable[[NDArray[np.int64]], list[str]]
Match = tuple[int, int, float]  # a row, the earlier kept row that it copies, their similarity


class DuplicatesError(ValueError):
    """The threshold is out of range."""


@dataclass(frozen=True)
class NearDuplicates:
    duplicate_of: NDArray[np.int64]  # (N,) the kept row that this row copies; −1: it is kept
    jaccard: NDArray[np.float64]  # (N,) the similarity of the two; NaN: it is kept
    cluster: NDArray[np.int64]  # (N,) for a protected row the first row of its cluster, by rank; −1 for the others
    compared: int  # pairs whose shingles were compared
    crowded: int  # kept rows left off the list of a full bucket: a copy that no other bucket finds is missed


def near_duplicates(
    signatures: NDArray[np.void], text_of: TextOf, rank: NDArray[np.int64], protected: Flags, threshold: float
) -> NearDuplicates:
    """Duplicates by greedy choice in the order of `rank`, lowest first, after all protected rows.

    `signatures` (N,) are those of `shingles.signatures`; `text_of` gives the texts of ascending row numbers, FETCHED at
    a time. The result depends on texts and ranks, not on the order of the rows (equal ranks go by content). Beside the
    arguments it takes about 200 bytes a row.

    Raises:
        DuplicatesError: the threshold is not within 0.3 to 1.
    """
    bands, width = banding(threshold)
    order = np.lexsort((signatures["content"], rank, ~protected))
    places, groups = _shared(signatures["content"][order])
    firsts = places[np.searchsorted(groups, groups)]
    repeated = places != firsts  # texts of equal tokens: nothing to compare
    copies, originals = order[places[repeated]], order[firsts[repeated]]
    order = np.delete(order, places[repeated])

    search = _Search(signatures["minima"], order, int(protected[order].sum()), text_of, threshold)
    search.index(bands, width)
    duplicate_of = np.full(len(signatures), -1)
    similarity = np.full(len(signatures), np.nan)
    for place, kept, near in search.run():
        duplicate_of[order[place]], similarity[order[place]] = order[kept], near
    cluster = np.full(len(signatures), -1)
    cluster[order[: search.protected]] = order[[search.first(place) for place in range(search.protected)]]

    kept_too = duplicate_of[originals] < 0
    duplicate_of[copies] = np.where(kept_too, originals, duplicate_of[originals])
    similarity[copies] = np.where(kept_too, 1.0, similarity[originals])
    cluster[copies] = cluster[originals]
    duplicate_of[protected], similarity[protected], cluster[~protected] = -1, np.nan, -1
    return NearDuplicates(duplicate_of, similarity, cluster, search.compared, search.crowded)


def banding(threshold: float) -> tuple[int, int]:
    """Bands, and minima of each: the widest that find RECALL of the pairs at the threshold with the lanes there are.

    Two rows agree in a band of r minima with probability Jʳ, in at least one of b with 1 − (1 − Jʳ)ᵇ (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4): 17 of 7 for 0.8. Wide bands make fewer false candidates.

    Raises:
        DuplicatesError: the threshold is not within 0.3 to 1.
    """
    if not 0.3 <= threshold <= 1:
        raise DuplicatesError(
            f"the threshold for near duplicates is {threshold:g}; it must lie within 0.3 and 1: rows that share less "
            "are no copies, and nearly all pairs of rows would have to be compared"
        )
    for width in range(LANES, 1, -1):
        found = threshold**width
        bands = 1 if found == 1 else math.ceil(math.log(1 - RECALL) / math.log1p(-found))
        if bands * width <= LANES:
            return bands, width
    raise AssertionError("two minima a band are enough for 0.3")


class _Search:
    """Greedy search over places: rows in the order of choice, protected ones first, no two of equal content."""

    def __init__(
        self, minima: NDArray[np.uint16], order: Places, protected: int, text_of: TextOf, threshold: float
    ) -> None:
        self.minima, self.order, self.protected = minima, order, protected
        self.text_of, self.threshold = text_of, threshold
        deviation = math.sqrt(threshold * (1 - threshold) / LANES)
        self.agreeing = LANES * (threshold - DOUBT * deviation)  # lanes in which a pair worth comparing agrees
        self.compared = self.crowded = 0
        self.parent = list(range(protected))

    def index(self, bands: int, width: int) -> None:
        """Put the places into a bucket for each band that they share with others; a bucket has room for its list."""
        self.bucket = np.full((bands, len(self.order)), -1, dtype=np.int32)
        rooms = [np.empty(0, np.int64)]
        buckets = 0
        for band, keys in enumerate(_band_keys(self.minima, bands, width)):
            places, groups = _shared(keys[self.order])
            self.bucket[band, places] = groups + buckets
            rooms.append(np.minimum(np.bincount(groups), LISTED))
            buckets += len(rooms[-1])
        self.room = np.concatenate(rooms)
        self.start = np.cumsum(self.room) - self.room
        self.filled = np.zeros(len(self.room), dtype=np.int64)
        self.listed = np.empty(self.room.sum(), dtype=np.int32)

    def run(self) -> list[Match]:
        """Every duplicate, by place; protected places that are near join their clusters."""
        found: list[Match] = []
        active = np.flatnonzero((self.bucket >= 0).any(axis=0))
        for at in range(0, len(active), BLOCK):
            places = active[at : at + BLOCK]
            for step in (self._with_listed, self._among):
                matches = step(places)
                found += matches
                places = places[~np.isin(places, [match[0] for match in matches])]
            self._list(places)
        return found

    def first(self, place: int) -> int:
        """The first place of a protected place's cluster."""
        while self.parent[place] != place:
            self.parent[place] = self.parent[self.parent[place]]
            place = self.parent[place]
        return place

    def _join(self, place: int, other: int) -> None:
        first, second = sorted((self.first(place), self.first(other)))
        self.parent[second] = first

    def _with_listed(self, places: Places) -> list[Match]:
        """The places that are near to a listed row, of several the one with the most similar signature."""
        places, kept = self._candidates(places)
        found: list[Match] = []
        while len(places):
            best = np.append(True, places[1:] != places[:-1])
            done = set()
            for place, listed, near in self._near(places[best], kept[best]):
                if place < self.protected:
                    self._join(place, listed)
                else:
                    found.append((place, listed, near))
                    done.add(place)
            again = np.flatnonzero(~best)
            is_open = [
                place not in done
                and (place >= self.protected or self.first(place) != self.first(listed))
                for place, listed in zip(places[again].tolist(), kept[again].tolist(), strict=True)
            ]
            again = again[np.array(is_open, dtype=bool)]
            places, kept = places[again], kept[again]
        return found

    def _candidates(self, places: Places) -> tuple[Places, Places]:
        """Pairs of a place and a listed row of its buckets with like signatures, by place, the likest first."""
        buckets, columns = self._buckets(places)
        sizes = self.filled[buckets]
        slots = np.repeat(self.start[buckets] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        pairs = _distinct((np.repeat(places[columns], sizes) << 32) | self.listed[slots])
        places, kept = pairs >> 32, pairs & 0xFFFFFFFF
        agreed = self._agreement(places, kept)
        worth = np.flatnonzero(agreed >= self.agreeing)
        worth = worth[np.lexsort((kept[worth], -agreed[worth], places[worth]))]
        return places[worth], kept[worth]

    def _near(self, left: Places, right: Places) -> list[Match]:
        """The pairs that reach the threshold, with their similarity."""
        self.compared += len(left)
        found = []
        for at in range(0, len(left), FETCHED // 2):
            pairs = list(zip(left[at : at + FETCHED // 2].tolist(), right[at : at + FETCHED // 2].tolist(), strict=True))
            sets = self._sets({place for pair in pairs for place in pair})
            found += [(a, b, near) for a, b in pairs if (near := jaccard(sets[a], sets[b])) >= self.threshold]
        return found

    def _among(self, places: Places) -> list[Match]:
        """The places that are near to an earlier one of these that stays, one after the other."""
        buckets, columns = self._buckets(places)
        entries, groups = _shared(buckets.astype(np.uint32))
        crowd: dict[int, list[int]] = defaultdict(list)  # place → buckets that it shares with others of the places
        for place, group in sorted(zip(places[columns[entries]].tolist(), groups.tolist(), strict=True)):
            crowd[place].append(group)
        waiting = list(crowd)
        staying: dict[int, list[int]] = defaultdict(list)  # bucket → places
        sets: dict[int, Hashes] = {}
        found: list[Match] = []
        for index, place in enumerate(waiting):
            others = np.array(sorted({other for group in crowd[place] for other in staying[group]}), dtype=np.int64)
            agreed = self._agreement(np.full(len(others), place), others)
            worth = np.flatnonzero(agreed >= self.agreeing)
            stays = True
            for other in others[worth[np.argsort(-agreed[worth], kind="stable")]].tolist():
                if place < self.protected and self.first(place) == self.first(other):
                    continue
                for missing in (other, place):
                    if missing not in sets:  # those that follow will be asked for soon
                        following = waiting[index : index + FETCHED]
                        sets |= self._sets({missing, *following} - sets.keys())
                self.compared += 1
                near = jaccard(sets[place], sets[other])
                if near < self.threshold:
                    continue
                if place >= self.protected:
                    found.append((place, other, near))
                    stays = False
                    break
                self._join(place, other)
            if stays:
                for group in crowd[place]:
                    if len(staying[group]) < LISTED:
                        staying[group].append(place)
        return found

    def _list(self, places: Places) -> None:
        """Put kept places on the lists of their buckets, as far as there is room."""
        buckets, columns = self._buckets(places)
        by = np.argsort(buckets, kind="stable")
        buckets, kept = buckets[by], places[columns[by]]
        slots = self.filled[buckets] + np.arange(len(buckets)) - np.searchsorted(buckets, buckets)
        fits = slots < self.room[buckets]
        self.crowded += len(_distinct(kept[~fits]))
        self.listed[self.start[buckets[fits]] + slots[fits]] = kept[fits]
        np.add.at(self.filled, buckets[fits], 1)

    def _buckets(self, places: Places) -> tuple[Places, Places]:
        """The buckets of the places, and for each the column of its place in `places`, by band and place."""
        buckets = self.bucket[:, places]
        bands, columns = np.nonzero(buckets >= 0)
        return buckets[bands, columns].astype(np.int64), columns

    def _agreement(self, left: Places, right: Places) -> NDArray[np.int64]:
        """Lanes in which the signatures of pairs of places agree, (P,)."""
        agreed = np.empty(len(left), dtype=np.int64)
        for at in range(0, len(left), BLOCK):
            some = slice(at, at + BLOCK)
            same = self.minima[self.order[left[some]]] == self.minima[self.order[right[some]]]
            agreed[some] = np.count_nonzero(same, axis=1)
        return agreed

    def _sets(self, places: set[int]) -> dict[int, Hashes]:
        rows = np.sort(self.order[list(places)])
        sets = dict(zip(rows.tolist(), shingle_sets(self.text_of(rows)), strict=True))
        return {place: sets[int(self.order[place])] for place in places}


def _band_keys(minima: NDArray[np.uint16], bands: int, width: int) -> NDArray[np.uint32]:
    """A key of each row's minima in each band, (bands, N). Some unlike minima have one key; a comparison tells."""
    keys = np.zeros((bands, len(minima)), dtype=np.uint32)
    for at in range(0, len(minima), BLOCK):
        lanes = np.ascontiguousarray(minima[at : at + BLOCK].T)
        for band in range(bands):
            block = keys[band, at : at + BLOCK]
            for lane in lanes[band * width : (band + 1) * width]:
                block ^= lane
                block *= np.uint32(0x9E3779B1)
                block ^= block >> np.uint32(15)
    return keys


def _shared(keys: NDArray[np.unsignedinteger]) -> tuple[Places, Places]:
    """Where the keys are that occur more than once, and the group of each, from 0; by group, then place."""
    by = np.arange(len(keys))
    for shift in range(0, 8 * keys.itemsize, 16):  # NumPy has a radix sort for 16 bits: linear, and three times as fast
        digits = (keys >> np.asarray(shift, dtype=keys.dtype)).astype(np.uint16)
        by = by[np.argsort(digits[by], kind="stable")]
    ordered = keys[by]
    same = np.zeros(len(by) + 1, dtype=bool)  # as the one before
    np.equal(ordered[1:], ordered[:-1], out=same[1:-1])
    shared = same[:-1] | same[1:]
    return by[shared], np.cumsum(~same[:-1][shared]) - 1


def _distinct(values: Places) -> Places:
    """The distinct values, ascending; `np.unique` takes ten times as long."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]
