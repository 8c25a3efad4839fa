"""Which rows contain an item of a benchmark: by the phrases of the item that the row has, too.

A phrase is 8 words or 13 characters of a script written without spaces, case and punctuation folded as in `shingles`.
GPT-3 (Brown et al. 2020, appendix C) took 8 to 13 words, ignored n-grams that too many documents have, and acted on one
match; one match is often a quotation, so as in Tülu 3 (Lambert et al. 2024) a share of the item must be there. An item
too short for one phrase is found where it is the whole text, and those without any are named.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.shingles import shingles

WORDS, CHARACTERS = 8, 13  # tokens of a phrase
COMMON = 10  # a phrase that more items have is the benchmark's own and tells nothing


@dataclass(frozen=True)
class Benchmark:
    owners: dict[str, list[int]]  # phrase → the items that have it
    sizes: Counter[int]  # item → its phrases
    unsearchable: tuple[int, ...]  # items that have no phrase but the benchmark's own


@dataclass(frozen=True)
class Contamination:
    row: int  # place in the texts
    item: int  # the item of the benchmark of which the row has most
    share: float  # of the item's phrases, 0–1


def benchmark(items: Sequence[str]) -> Benchmark:
    """Index the items; of equal ones the first stands for all."""
    firsts: dict[frozenset[str], int] = {}
    for item, text in enumerate(items):
        firsts.setdefault(frozenset(shingles(text, WORDS, CHARACTERS)), item)
    owners: dict[str, list[int]] = defaultdict(list)
    for phrases, item in firsts.items():
        for phrase in phrases:
            owners[phrase].append(item)
    owners = {phrase: found for phrase, found in owners.items() if len(found) <= COMMON}
    sizes = Counter(item for found in owners.values() for item in found)
    return Benchmark(owners, sizes, tuple(item for item in firsts.values() if item not in sizes))


def contaminated(texts: Sequence[str], known: Benchmark, min_share: float) -> list[Contamination]:
    """The texts that have at least `min_share` (above 0, up to 1) of an item's phrases, ascending."""
    found = []
    for row, text in enumerate(texts):
        phrases = shingles(text, WORDS, CHARACTERS)
        shared = Counter(item for phrase in phrases for item in known.owners.get(phrase, ()))
        if not shared:
            continue
        share, item = max((count / known.sizes[item], -item) for item, count in shared.items())
        if share >= min_share:
            found.append(Contamination(row, -item, share))
    return found
