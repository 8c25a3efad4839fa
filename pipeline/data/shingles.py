"""Sets of shingles of texts in any language, and their MinHash signatures.

A token is a word, a number, a symbol, or one character of a script without spaces (Chinese, Japanese, Thai …). Case,
Unicode form (NFKC), white space and punctuation are ignored; symbols count, since `12 + 5` and `12 * 5` are different
questions. A shingle is 3 consecutive tokens, or 5 if the first one is a character of a script without spaces. A text
that is too short for one is a single shingle; a text without tokens is compared without its white space.
"""

import re
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import regex
from numpy.typing import NDArray
from rensa import RMinHash

WORDS, CHARACTERS = 3, 5  # tokens in a shingle that starts with a word, or with a character of an unspaced script
LANES = 128  # minima in a signature

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
    """MinHash minima of each text's shingles: two texts agree in each lane with the probability of their similarity."""
    digests = RMinHash.digests_from_token_sets([shingles(text) for text in texts], LANES, 42)
    # The low 16 bits are enough (b-bit minwise hashing, Li and König 2010).
    return np.array(digests, dtype=np.uint32).reshape(-1, LANES).astype(np.uint16)


def signature_version() -> str:
    """A text that changes whenever signatures could; part of every cache key."""
    return f"rensa {version('rensa')}, regex {version('regex')}, Unicode {unicodedata.unidata_version}"


def shingles(text: str) -> set[str]:
    """The shingles of `text`; see the module's docstring."""
    folded = text.lower()
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold().translate(_DASHES)
    tokens = (_ASCII_TOKEN if folded.isascii() else _TOKEN).findall(folded) or ["".join(folded.split())]
    if folded.isascii() or not _ANY_UNSPACED.search(folded):
        runs = {" ".join(run) for run in zip(*(tokens[start:] for start in range(WORDS)), strict=False)}
    else:
        widths = [CHARACTERS if _ANY_UNSPACED.match(token) else WORDS for token in tokens]
        ends = [start + width for start, width in enumerate(widths)]
        runs = {" ".join(tokens[start:end]) for start, end in enumerate(ends) if end <= len(tokens)}
    return runs or {" ".join(tokens)}


def jaccard(left: set[str], right: set[str]) -> float:
    """Jaccard similarity of two sets of shingles."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
