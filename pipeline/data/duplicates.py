"""Signatures of texts in, which row copies which out: MinHash LSH finds the candidates, exact Jaccard decides.

A row is a duplicate of an earlier row that is kept and whose shingles are as similar as the threshold asks. Rows of the
test split are protected: they are never duplicates, what is near to one of them is, and near copies among themselves
share a cluster. Time and memory grow linearly with the rows, whatever they say. A threshold outside 0.3–1 is refused.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shingles import LANES, Hashes, jaccard, shingle_sets
from pipeline.progress import Progress

RECALL = 0.98  # the share that the bands find, on average, of pairs at the very threshold; above it they find more
DOUBT = 4.0  # standard deviations by which a signature may underrate a pair that is compared all the same
LISTED = 32  # kept rows that a bucket lists: what more rows share without being copies is boilerplate
TRIES = 8  # listed rows that a row is compared with, the likest first: boilerplate again
BLOCK = 4096  # rows compared with the kept ones at once
FEW = 32  # rows compared with each other at once
FETCHED = 512  # texts in memory at once
PAIR = np.dtype([("key", "<u8"), ("jaccard", "<f8")])  # a comparison: of which contents, with which result

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
    pairs: NDArray[np.void]  # (P,) PAIR, by key: every pair that was compared, now or as the caller knew
    compared: int  # pairs whose texts were read and compared now
    crowded: int  # rows of which a copy may be missed: a bucket's list was full, or too many likely ones to compare


def near_duplicates(
    signatures: NDArray[np.void],
    text_of: TextOf,
    rank: NDArray[np.int64],
    protected: Flags,
    threshold: float,
    known: NDArray[np.void] | None = None,
) -> NearDuplicates:
    """Duplicates by greedy choice in the order of `rank`, lowest first, after all protected rows.

    `signatures` (N,) are those of `shingles.signatures`; `text_of` gives the texts of ascending row numbers, FETCHED at
    a time. `known` are the `pairs` of an earlier call with signatures of this version: what they tell is not compared
    again. The result depends on texts and ranks, not on the order of the rows (equal ranks go by content), nor on
    `known`. Beside the arguments it takes about 200 bytes a row.

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

    search = _Search(signatures, order, int(protected[order].sum()), text_of, threshold, known)
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
    crowded = int(np.count_nonzero(search.crowded))
    return NearDuplicates(duplicate_of, similarity, cluster, search.pairs(), search.compared, crowded)


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
        self,
        signatures: NDArray[np.void],
        order: Places,
        protected: int,
        text_of: TextOf,
        threshold: float,
        known: NDArray[np.void] | None,
    ) -> None:
        self.contents, self.minima = signatures["content"], signatures["minima"]
        self.order, self.protected = order, protected
        self.text_of, self.threshold = text_of, threshold
        deviation = math.sqrt(threshold * (1 - threshold) / LANES)
        self.agreeing = LANES * (threshold - DOUBT * deviation)  # lanes in which a pair worth comparing agrees
        self.compared = 0
        self.crowded = np.zeros(len(order), dtype=bool)
        self.parent = list(range(protected))
        self.known = np.empty(0, PAIR) if known is None else known
        self.seen = [np.empty(0, PAIR)]

    def index(self, bands: int, width: int) -> None:
        """Put the places into a bucket for each band that they share with others; a bucket has room for its list."""
        keys = _band_keys(self.minima, bands, width)
        self.bucket = keys.view(np.int32)[
            :, : len(self.order)
        ]  # in the memory of the keys; −1: nobody shares this band
        rooms = [np.empty(0, np.uint8)]
        buckets = 0
        for band in range(bands):
            places, groups = _shared(keys[band][self.order])
            self.bucket[band] = -1
            self.bucket[band, places] = groups + buckets
            rooms.append(np.minimum(np.bincount(groups), LISTED).astype(np.uint8))
            buckets += len(rooms[-1])
        self.room = np.concatenate(rooms)
        self.start = np.cumsum(self.room, dtype=np.int64) - self.room
        self.filled = np.zeros_like(self.room)
        self.listed = np.empty(self.room.sum(dtype=np.int64), dtype=np.int32)

    def run(self) -> Iterator[Match]:
        """Every duplicate, by place; protected places that are near join their clusters."""
        active = np.flatnonzero((self.bucket >= 0).any(axis=0))
        progress = Progress("prepare", len(active), "rows compared", every=2.0)
        for at in range(0, len(active), BLOCK):
            progress.update(at)
            yield from self._settle(active[at : at + BLOCK], 0)

    def pairs(self) -> NDArray[np.void]:
        pairs = np.concatenate(self.seen)
        pairs = pairs[np.argsort(pairs["key"], kind="stable")]
        return pairs[np.append(True, pairs["key"][1:] != pairs["key"][:-1])[: len(pairs)]]

    def _settle(self, places: Places, since: int) -> list[Match]:
        """Decide on some places after all that come before them; none is near to a row listed of those before `since`.

        Places that share no bucket are decided by the lists alone. The others are halved, since the second half must
        know which of the first stay, until they are few enough to compare all with all.
        """
        found = self._with_listed(places, since)
        places = _without(places, found)
        buckets, columns = self._buckets(places)
        is_rival = np.zeros(len(places), dtype=bool)
        is_rival[columns[_shared(buckets.astype(np.uint32))[0]]] = True
        self._list(places[~is_rival])
        rivals = places[is_rival]
        if len(rivals) > FEW:
            half = len(rivals) // 2
            return [*found, *self._settle(rivals[:half], rivals[0]), *self._settle(rivals[half:], rivals[0])]
        among = self._among(rivals)
        self._list(_without(rivals, among))
        return found + among

    def first(self, place: int) -> int:
        """The first place of a protected place's cluster."""
        while self.parent[place] != place:
            self.parent[place] = self.parent[self.parent[place]]
            place = self.parent[place]
        return place

    def _with_listed(self, places: Places, since: int) -> list[Match]:
        """The places that are near to a listed row, of several the one with the most similar signature."""
        places, kept = self._candidates(places, since)
        found: list[Match] = []
        for _ in range(TRIES):
            if not len(places):
                return found
            best = np.append(True, places[1:] != places[:-1])
            decided = self._decide(self._near(places[best], kept[best]))
            found += decided
            done = {match[0] for match in decided}
            rest = zip(places[~best].tolist(), kept[~best].tolist(), strict=True)
            again = [pair for pair in rest if pair[0] not in done and not self._joined(*pair)]
            places, kept = np.array(again, dtype=np.int64).reshape(-1, 2).T
        self.crowded[places] = True
        return found

    def _among(self, places: Places) -> list[Match]:
        """The places that are near to an earlier one of these that stays, of several to the most similar."""
        later, earlier = np.tril_indices(len(places), -1)
        later, earlier = places[later], places[earlier]
        worth = self._agreement(later, earlier) >= self.agreeing
        near = self._near(later[worth], earlier[worth])
        return self._decide(sorted(near, key=lambda match: (match[0], -match[2], match[1])))

    def _decide(self, matches: list[Match]) -> list[Match]:
        """Of matches in the order of choice those that hold, one a place: the other place stays."""
        found: dict[int, Match] = {}
        for place, other, near in matches:
            if place < self.protected:
                first, second = sorted((self.first(place), self.first(other)))
                self.parent[second] = first
            elif place not in found and other not in found:
                found[place] = (place, other, near)
        return list(found.values())

    def _joined(self, place: int, other: int) -> bool:
        return place < self.protected and self.first(place) == self.first(other)

    def _candidates(self, places: Places, since: int) -> tuple[Places, Places]:
        """Pairs of a place and a row listed in its buckets with like signatures, by place, the likest first."""
        buckets, columns = self._buckets(places)
        sizes = self.filled[buckets].astype(np.int64)
        slots = np.repeat(self.start[buckets] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        kept, places = self.listed[slots], np.repeat(places[columns], sizes)
        pairs = _distinct((places[kept >= since] << 32) | kept[kept >= since])
        places, kept = pairs >> 32, pairs & 0xFFFFFFFF
        agreed = self._agreement(places, kept)
        worth = np.flatnonzero(agreed >= self.agreeing)
        worth = worth[np.lexsort((kept[worth], -agreed[worth], places[worth]))]
        return places[worth], kept[worth]

    def _near(self, left: Places, right: Places) -> list[Match]:
        """The pairs that reach the threshold, with their similarity."""
        pairs = self._known(left, right)
        missing = np.flatnonzero(np.isnan(pairs["jaccard"]))
        for at in range(0, len(missing), FETCHED // 2):
            some = missing[at : at + FETCHED // 2]
            sets = self._sets({*left[some].tolist(), *right[some].tolist()})
            for pair, a, b in zip(some.tolist(), left[some].tolist(), right[some].tolist(), strict=True):
                pairs["jaccard"][pair] = jaccard(sets[a], sets[b])
        self.compared += len(missing)
        self.seen.append(pairs)
        near = np.flatnonzero(pairs["jaccard"] >= self.threshold)
        return list(zip(left[near].tolist(), right[near].tolist(), pairs["jaccard"][near].tolist(), strict=True))

    def _known(self, left: Places, right: Places) -> NDArray[np.void]:
        """What is known of pairs of places, (P,) PAIR: a similarity, or NaN."""
        contents = self.contents[self.order[left]], self.contents[self.order[right]]
        pairs = np.empty(len(left), PAIR)
        pairs["key"] = np.minimum(*contents) * np.uint64(0x9E3779B97F4A7C15) + np.maximum(*contents)
        pairs["jaccard"] = np.nan
        if len(self.known):
            at = np.minimum(np.searchsorted(self.known["key"], pairs["key"]), len(self.known) - 1)
            hit = self.known["key"][at] == pairs["key"]
            pairs["jaccard"][hit] = self.known["jaccard"][at[hit]]
        return pairs

    def _list(self, places: Places) -> None:
        """Put kept places on the lists of their buckets, as far as there is room."""
        buckets, columns = self._buckets(places)
        by = np.argsort(buckets, kind="stable")
        buckets, kept = buckets[by], places[columns[by]]
        slots = self.filled[buckets] + np.arange(len(buckets)) - np.searchsorted(buckets, buckets)
        fits = slots < self.room[buckets]
        self.crowded[kept[~fits]] = True
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


def _without(places: Places, matches: list[Match]) -> Places:
    return places[~np.isin(places, [match[0] for match in matches])]


def _distinct(values: Places) -> Places:
    """The distinct values, ascending; `np.unique` takes ten times as long."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]
