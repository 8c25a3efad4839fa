"""Texts in, their shingles and MinHash signatures out, as NumPy arrays and whatever the language.

A token is a word, a number, one character of a script that is written without spaces (Chinese, Japanese, Thai …) or
one symbol. Case, Unicode form (NFKC), white space and punctuation do not count; symbols do, since `12 + 5` and `12 * 5`
ask for different things. A shingle is 3 tokens in a row, or 5 where it begins with such a character. Nothing is
refused: a text too short for one is one shingle, whole, and a text without any token is compared as it stands.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

WORDS, CHARACTERS = 3, 5  # tokens of a shingle that begins with a word, with a character of an unspaced script
LANES = 128  # minima a signature holds
PIECE = 1 << 18  # characters hashed at once; a longer text is cut there, as if it had a space
SIGNATURE = np.dtype([("content", "<u8"), ("minima", "<u2", (LANES,))])

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]  # (N + 1,) row i has the elements offsets[i] to offsets[i + 1]

_LETTER, _NUMBER, _CHARACTER, _SYMBOL, _DASH = 1, 2, 3, 4, 5  # kinds of characters; 0 separates tokens
_UNSPACED = r"[[\p{Han}\p{Bopomofo}\p{scx=Hiragana}\p{scx=Katakana}\p{lb=SA}]&&[\p{L}\p{M}\p{N}]]"
_KINDS = {
    _LETTER: r"[\p{L}\p{M}]",
    _NUMBER: r"\p{N}",
    _CHARACTER: _UNSPACED,
    _SYMBOL: r"[\p{S}%&#@*/\\]",
    _DASH: r"[\-‐‒–−]",
}
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # soft hyphens, joiners, variation selectors
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2⁶⁴
_FACTORS = np.array(  # of the tokens of a window by place, odd
    [pow(_BASE, 3 * place + 2, 1 << 64) | 1 for place in range(16)], dtype=np.uint64
)


class Tokens(NamedTuple):
    hashes: Hashes  # (T,)
    unspaced: NDArray[np.bool_]  # (T,) it is a character of a script written without spaces
    offsets: Offsets  # (N + 1,) at least one token a text


class Shingles(NamedTuple):
    hashes: Hashes  # (S,)
    offsets: Offsets  # (N + 1,) at least one shingle a text


def signatures(texts: Sequence[str]) -> NDArray[np.void]:
    """A SIGNATURE for each text, (N,): what it holds is all that `near_duplicates` needs to find candidates.

    `content` is equal for texts of equal tokens. `minima` are the low 16 bits of MinHash minima (Broder 1997; b-bit:
    Li and König 2010) over the shingles: two texts agree in each with the probability of their Jaccard similarity. A
    text's signature depends on nothing but itself and `signature_version()`.
    """
    tokens = _tokens(texts)
    out = np.empty(len(texts), dtype=SIGNATURE)
    out["content"] = _content(tokens)
    shingles = _windows(tokens, WORDS, CHARACTERS, out["content"])
    high = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    for lane, factor in enumerate(_lane_factors()) if len(texts) else ():
        # A multiplication modulo 2³² permutes the hashes; they are well mixed, so no further one is needed.
        minima = np.minimum.reduceat(high * factor, shingles.offsets[:-1])
        out["minima"][:, lane] = minima.astype(np.uint16)  # keeps the low bits; the high ones of a minimum are zero
    return out


def shingle_sets(texts: Sequence[str]) -> list[Hashes]:
    """The distinct shingles of each text, ascending: sets to compare exactly, up to collisions of 64-bit hashes."""
    tokens = _tokens(texts)
    shingles = _windows(tokens, WORDS, CHARACTERS, _content(tokens))
    sets = []
    for start, end in pairwise(shingles.offsets.tolist()):
        hashes = np.sort(shingles.hashes[start:end])
        new = np.empty(len(hashes), dtype=bool)
        new[0] = True
        np.not_equal(hashes[1:], hashes[:-1], out=new[1:])
        sets.append(hashes[new])
    return sets


def jaccard(left: Hashes, right: Hashes) -> float:
    """Jaccard similarity of two shingle sets."""
    both = np.concatenate((left, right))
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def windows(texts: Sequence[str], words: int, characters: int) -> Shingles:
    """Every run of `words` tokens (`characters` where it begins with a character of an unspaced script), in order.

    A text without any, because it is too short, has one of its own: only a text of the same tokens shares it.
    """
    tokens = _tokens(texts)
    return _windows(tokens, words, characters, _content(tokens))


@cache
def signature_version() -> str:
    """Changes whenever a signature would: part of the key of every cache of signatures.

    The character kinds follow the Unicode version of the library that knows them, so they are hashed, too.
    """
    sample = signatures(["The quick brown fox – 12+5", "今天天气很好,我们去公园", "straße ΐ ﬁ", "?!", ""])
    digest = hashlib.sha256(_kinds().tobytes() + unicodedata.unidata_version.encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _tokens(texts: Sequence[str]) -> Tokens:
    pieces: list[str] = []
    counts = []  # pieces of each text
    for text in texts:
        folded = _fold(text)
        before = len(pieces)
        pieces += [folded[at : at + PIECE] for at in range(0, len(folded), PIECE)] or [""]
        counts.append(len(pieces) - before)
    parts = [_hash_tokens(batch) for batch in _batches(pieces)]
    hashes = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, np.uint64)
    unspaced = np.concatenate([part[1] for part in parts]) if parts else np.empty(0, bool)
    sizes = np.concatenate([part[2] for part in parts]) if parts else np.empty(0, np.int64)
    offsets = _offsets(sizes)[_offsets(counts)]
    bare = np.flatnonzero(np.diff(offsets) == 0)  # nothing but punctuation: the folded text is the one token
    if len(bare):
        whole = [
            hashlib.blake2b("".join(_fold(texts[row]).split()).encode("utf-8", "surrogatepass"))
            for row in bare.tolist()
        ]
        hashes = np.insert(hashes, offsets[bare], [int.from_bytes(each.digest()[:8], "little") for each in whole])
        unspaced = np.insert(unspaced, offsets[bare], False)
        offsets = offsets + np.searchsorted(bare, np.arange(len(offsets)), side="left")
    return Tokens(hashes, unspaced, offsets)


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()


def _batches(pieces: list[str]) -> list[list[str]]:
    """Runs of pieces of at most PIECE characters together with a space after each, or of one."""
    batches: list[list[str]] = []
    room = 0
    for piece in pieces:
        room -= len(piece) + 1
        if room < 0:
            batches.append([])
            room = PIECE - len(piece) - 1
        batches[-1].append(piece)
    return batches


def _hash_tokens(pieces: list[str]) -> tuple[Hashes, NDArray[np.bool_], NDArray[np.int64]]:
    """Hashes and script of the tokens in the pieces, and the number of tokens in each piece."""
    codes = np.frombuffer((" ".join(pieces) + " ").encode("utf-32-le", "surrogatepass"), dtype="<u4")  # (C,)
    powers, inverses = _powers()
    kinds = _kinds().take(codes)
    values = codes * powers[: len(codes)]
    dashes = np.flatnonzero(kinds == _DASH)
    if len(dashes):  # the last character is a space, so a dash has a neighbour behind; before the first one looks there
        joins = (kinds[dashes - 1] == _LETTER) & (kinds[dashes + 1] == _LETTER)  # well-known = well known
        kinds[dashes] = np.where(joins, 0, _SYMBOL)
        values[dashes] = np.uint64(ord("-")) * powers[dashes]
    word = (kinds - np.uint8(1)) < 2  # a letter or a number
    alone = kinds >= _CHARACTER
    boundary = np.empty(len(kinds), dtype=bool)
    boundary[0] = True
    boundary[1:] = (word[1:] != word[:-1]) | alone[1:] | alone[:-1]
    edges = np.append(np.flatnonzero(boundary), len(kinds))
    tokens = np.flatnonzero(kinds[edges[:-1]])
    starts, ends = edges[tokens], edges[tokens + 1]
    sums = np.empty(len(codes) + 1, dtype=np.uint64)
    sums[0] = 0
    np.cumsum(values, out=sums[1:])
    # The polynomial of a token's characters, as if it stood at place 0.
    hashes = _mix((sums[ends] - sums[starts]) * inverses[starts])
    first = np.searchsorted(starts, _offsets([len(piece) + 1 for piece in pieces]))
    return hashes, kinds[starts] == _CHARACTER, np.diff(first)


def _content(tokens: Tokens) -> Hashes:
    """A hash of each text's tokens and their order, (N,)."""
    if len(tokens.offsets) == 1:
        return np.empty(0, np.uint64)
    places = np.arange(len(tokens.hashes)) - np.repeat(tokens.offsets[:-1], np.diff(tokens.offsets))
    mixed = _mix(tokens.hashes + places.astype(np.uint64) * np.uint64(_BASE))
    return _mix(np.add.reduceat(mixed, tokens.offsets[:-1]))


def _windows(tokens: Tokens, words: int, characters: int, content: Hashes) -> Shingles:
    count = len(tokens.hashes)
    widest = max(words, characters)
    padded = np.concatenate([tokens.hashes, np.zeros(widest, np.uint64)])
    sums = np.zeros(count, dtype=np.uint64)
    for place in range(words):
        sums += padded[place : place + count] * _FACTORS[place]
    ends = np.arange(count) + words
    if tokens.unspaced.any():
        at = np.flatnonzero(tokens.unspaced)
        sums[at] = 0
        for place in range(characters):
            sums[at] += padded[at + place] * _FACTORS[place]
        ends[at] += characters - words
    fits = ends <= np.repeat(tokens.offsets[1:], np.diff(tokens.offsets))
    hashes = _mix(sums)
    before = _offsets(fits)
    short = np.flatnonzero(np.diff(before[tokens.offsets]) == 0)
    if len(short):
        fits[tokens.offsets[short]] = True
        hashes[tokens.offsets[short]] = content[short]
        before = _offsets(fits)
    return Shingles(hashes[fits], before[tokens.offsets])


def _offsets(sizes: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Offsets:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _mix(values: Hashes) -> Hashes:
    """Makes every bit of a value change every bit of the result, in the manner of MurmurHash3's finaliser."""
    factor = np.uint64(0x9FB21C651E98DF25)
    values = (values ^ (values >> np.uint64(28))) * factor
    values = (values ^ (values >> np.uint64(28))) * factor
    return values ^ (values >> np.uint64(28))


@cache
def _kinds() -> NDArray[np.uint8]:
    """The kind of every Unicode character, (0x110000,)."""
    table = np.zeros(0x110000, dtype=np.uint8)
    every = "".join(map(chr, range(len(table))))
    for kind, pattern in _KINDS.items():
        for run in regex.finditer(f"{pattern}+", every, flags=regex.V1):
            table[run.start() : run.end()] = kind
    return table


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of _BASE modulo 2⁶⁴ and their inverses, each (PIECE + 1,)."""
    factors = np.ones((2, PIECE + 1), dtype=np.uint64)
    factors[0, 1:] = _BASE
    factors[1, 1:] = pow(_BASE, -1, 1 << 64)
    powers, inverses = np.cumprod(factors, axis=1)
    return powers, inverses


@cache
def _lane_factors() -> NDArray[np.uint32]:
    """Odd factors, one a lane: from SHA-256, since a generator of random numbers may change between versions."""
    digests = b"".join(hashlib.sha256(f"lane {lane}".encode()).digest()[:4] for lane in range(LANES))
    return np.frombuffer(digests, dtype="<u4") | np.uint32(1)
