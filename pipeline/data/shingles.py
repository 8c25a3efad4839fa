"""Texts as sets of shingles, whatever the language, and their MinHash signatures.

A token is a word, a number, one character of a script that is written without spaces (Chinese, Japanese, Thai …) or
one symbol. Case, Unicode form (NFKC), white space and punctuation do not count; symbols do, since `12 + 5` and `12 * 5`
ask for different things. A shingle is 3 tokens in a row, or 5 where it begins with such a character; a text too short
for one is one shingle, whole, and a text without any token is compared as it is.
"""

import re
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import regex
from numpy.typing import NDArray
from rensa import RMinHash

WORDS, CHARACTERS = 3, 5  # tokens of a shingle that begins with a word, with a character of an unspaced script
LANES = 128  # minima of a signature

Signatures = NDArray[np.uint16]  # (N, LANES)

_UNSPACED = r"[[\p{Han}\p{Bopomofo}\p{scx=Hiragana}\p{scx=Katakana}\p{lb=SA}]&&[\p{L}\p{M}\p{N}]]"
_LETTER = rf"[[\p{{L}}\p{{M}}]--{_UNSPACED}]"
_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+"
_DASH = rf"(?<!{_LETTER})-|-(?!{_LETTER})"  # well-known = well known
_TOKEN = regex.compile(rf"{_WORD}|{_UNSPACED}|[\p{{S}}%&#@*/\\]|{_DASH}", flags=regex.V1)
_ASCII_TOKEN = re.compile(r"[a-z0-9]+|[$+<=>^`|~%&#@*/\\]|(?<![a-z])-|-(?![a-z])")  # the same, 4 times as fast
_ANY_UNSPACED = regex.compile(_UNSPACED, flags=regex.V1)
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # soft hyphens, joiners, variation selectors
_DASHES = str.maketrans(dict.fromkeys("‐‒–−", "-"))


def signatures(texts: Sequence[str]) -> Signatures:
    """MinHash minima of each text's shingles: two texts agree in each with the probability of their similarity.

    The low 16 bits are enough (b-bit minwise hashing, Li and König 2010).
    """
    digests = RMinHash.digests_from_token_sets([shingles(text) for text in texts], LANES, 42)
    return np.array(digests, dtype=np.uint32).reshape(-1, LANES).astype(np.uint16)


def signature_version() -> str:
    """Changes whenever a signature could: part of the key of every cache of signatures."""
    return f"rensa {version('rensa')}, regex {version('regex')}, Unicode {unicodedata.unidata_version}"


def shingles(text: str) -> set[str]:
    """Every run of WORDS tokens, or of CHARACTERS where it begins with a character of an unspaced script."""
    folded = _fold(text)
    tokens = (_ASCII_TOKEN if folded.isascii() else _TOKEN).findall(folded) or ["".join(folded.split())]
    if folded.isascii() or not _ANY_UNSPACED.search(folded):
        runs = {" ".join(run) for run in zip(*(tokens[start:] for start in range(WORDS)), strict=False)}
    else:
        widths = [CHARACTERS if _ANY_UNSPACED.match(token) else WORDS for token in tokens]
        ends = [start + width for start, width in enumerate(widths)]
        runs = {" ".join(tokens[start:end]) for start, end in enumerate(ends) if end <= len(tokens)}
    return runs or {" ".join(tokens)}


def jaccard(left: set[str], right: set[str]) -> float:
    """Jaccard similarity of two texts' shingles."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold().translate(_DASHES)
