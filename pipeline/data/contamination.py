"""Texts of a benchmark in, which rows contain one of its items out: by the n-grams of the item that the row has, too.

An n-gram is 8 words or 13 characters of a script written without spaces, case and punctuation folded as in `shingles`.
GPT-3 (Brown et al. 2020, appendix C) took 8 to 13 words, ignored n-grams that too many documents have, and acted on one
match; one match is often a quotation, so as in Tülu 3 (Lambert et al. 2024) a share of the item must be there. Nothing
is refused: an item too short for one n-gram is found where it is the whole text, and those without any are named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shingles import Hashes, signatures, windows

WORDS, CHARACTERS = 8, 13  # tokens of an n-gram
COMMON = 10  # an n-gram that more items have is a phrase of the benchmark's own and tells nothing
FILTER_BITS = 22


@dataclass(frozen=True)
class Benchmark:
    """The n-grams of a benchmark's items: some kilobytes an item, built once and sent to the workers."""

    grams: Hashes  # (G,) distinct, ascending
    offsets: NDArray[np.int64]  # (G + 1,) of each n-gram in `owners`
    owners: NDArray[np.int64]  # the items that have it
    sizes: NDArray[np.int64]  # (I,) n-grams of each item that count
    unsearchable: tuple[int, ...]  # items that have no n-gram but the benchmark's own phrases
    likely: NDArray[np.bool_]  # (2 ** FILTER_BITS,) by the high bits of an n-gram; false: it is not among them


@dataclass(frozen=True)
class Contamination:
    row: int  # place in the texts
    item: int  # the item of the benchmark of which the row has most
    share: float  # of the item's n-grams, 0–1


def benchmark(items: Sequence[str]) -> Benchmark:
    """Index the items; of equal ones the first stands for all."""
    _, firsts = np.unique(signatures(items)["content"], return_index=True)
    firsts = np.sort(firsts)
    hashes, owners = _grams([items[item] for item in firsts])
    owners = firsts[owners]
    opens = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    counts = np.diff(np.append(np.flatnonzero(opens), len(hashes)))  # items of each n-gram
    counts_by_owner = np.repeat(counts, counts)
    owners = owners[counts_by_owner <= COMMON]
    grams, counts = hashes[opens][counts <= COMMON], counts[counts <= COMMON]
    sizes = np.bincount(owners, minlength=len(items))
    likely = np.zeros(1 << FILTER_BITS, dtype=bool)
    likely[_high_bits(grams)] = True
    unsearchable = tuple(firsts[sizes[firsts] == 0].tolist())
    return Benchmark(grams, np.append(0, np.cumsum(counts)), owners, sizes, unsearchable, likely)


def contaminated(texts: Sequence[str], known: Benchmark, min_share: float) -> list[Contamination]:
    """The texts that have at least `min_share` (above 0, up to 1) of an item's n-grams, ascending.

    A text's verdict depends on nothing but itself and the benchmark: texts may come in any batches, in any process.
    """
    hashes, rows = _grams(texts, known.likely)
    if not len(known.grams) or not len(hashes):
        return []
    at = np.minimum(np.searchsorted(known.grams, hashes), len(known.grams) - 1)
    hit = known.grams[at] == hashes
    at, rows = at[hit], rows[hit]
    sizes = known.offsets[at + 1] - known.offsets[at]
    slots = np.repeat(known.offsets[at] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    items = known.owners[slots]
    pairs, shared = np.unique(np.repeat(rows, sizes) * len(known.sizes) + items, return_counts=True)
    rows, items = np.divmod(pairs, len(known.sizes))
    shares = shared / known.sizes[items]
    by = np.lexsort((items, -shares, rows))
    best = by[np.append(True, rows[by][1:] != rows[by][:-1])[: len(by)]]
    best = best[shares[best] >= min_share]
    found = zip(rows[best].tolist(), items[best].tolist(), shares[best].tolist(), strict=True)
    return [Contamination(*each) for each in found]


def _grams(texts: Sequence[str], likely: NDArray[np.bool_] | None = None) -> tuple[Hashes, NDArray[np.int64]]:
    """The distinct n-grams of each text that are likely, and the text of each; by n-gram, then text."""
    found = windows(texts, WORDS, CHARACTERS)
    owners = np.repeat(np.arange(len(texts)), np.diff(found.offsets))
    hashes = found.hashes
    if likely is not None:
        maybe = likely[_high_bits(hashes)]
        hashes, owners = hashes[maybe], owners[maybe]
    by = np.lexsort((owners, hashes))
    hashes, owners = hashes[by], owners[by]
    new = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))[: len(by)]
    return hashes[new], owners[new]


def _high_bits(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)
