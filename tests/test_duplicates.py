"""Near duplicates: which texts are alike, agreement with brute force on planted copies, and linear cost."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.data.duplicates import NearDuplicates, near_duplicates
from pipeline.data.shingles import jaccard, shingles, signatures

ENGLISH = [f"{a}{b}" for a in ("ba", "co", "di", "fu", "ge", "lo", "mi") for b in ("rn", "st", "lt", "nd", "mp", "ck")]
CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 400)]


def random_words(draw: random.Random, chinese: bool, length: int) -> list[str]:
    return draw.choices(CHINESE if chinese else ENGLISH, k=length)


def edit(draw: random.Random, words: Sequence[str], chinese: bool, edits: int) -> list[str]:
    """A copy with words replaced, inserted or deleted, and two parts swapped after many edits."""
    copy = list(words)
    for number in range(edits):
        i = draw.randrange(len(copy) - 1)
        copy[i : i + draw.randint(0, 1)] = random_words(draw, chinese, draw.randint(0, 1))
        if number == 5:
            copy = copy[i:] + copy[:i]
        copy += random_words(draw, chinese, 3 - len(copy))
    return copy


def texts_with_copies(draw: random.Random, originals: int) -> list[str]:
    """Texts in two languages, each with up to three copies with zero to nine edits."""
    texts = []
    for _ in range(originals):
        chinese = draw.random() < 0.5
        words = random_words(draw, chinese, draw.randint(4, 160))
        rows = [words, *(edit(draw, words, chinese, draw.choice((0, 1, 2, 4, 9))) for _ in range(draw.randint(0, 3)))]
        texts += [("" if chinese else " ").join(row) for row in rows]
    draw.shuffle(texts)
    return texts


def search(
    texts: Sequence[str], threshold: float = 0.8, rank: Sequence[int] | None = None, protected: Sequence[int] = ()
) -> NearDuplicates:
    is_protected = np.zeros(len(texts), dtype=bool)
    is_protected[list(protected)] = True
    ranks = np.arange(len(texts)) if rank is None else np.array(rank)
    return near_duplicates(signatures(texts), texts.__getitem__, ranks, is_protected, threshold)


def seeded() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def compared() -> tuple[list[str], np.ndarray]:
    """Texts with planted copies, and the similarity of every pair, (N, N)."""
    texts = texts_with_copies(seeded(), 200)
    sets = [shingles(text) for text in texts]
    return texts, np.array(
        [[jaccard(left, right) for right in sets[:row]] + [0.0] * (len(sets) - row) for row, left in enumerate(sets)]
    )


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_planted_copies_are_found_and_no_other_rows(compared: tuple[list[str], np.ndarray], threshold: float) -> None:
    texts, similar = compared
    copies = np.zeros(len(texts), dtype=bool)
    for row in range(len(texts)):  # the greedy choice with every pair compared
        copies[row] = (similar[row, :row][~copies[:row]] >= threshold).any()
    result = search(texts, threshold)
    dropped = result.duplicate_of >= 0
    originals = result.duplicate_of[dropped]
    assert (originals < np.flatnonzero(dropped)).all() and not dropped[originals].any()
    assert (result.jaccard[dropped] == similar[np.flatnonzero(dropped), originals]).all()
    assert (result.jaccard[dropped] >= threshold).all()
    recall, precision = (copies & dropped).sum() / copies.sum(), (copies & dropped).sum() / dropped.sum()
    print(f"{len(texts)} rows, {copies.sum()} copies: precision {precision:.3f}, recall {recall:.3f}")
    assert copies.sum() > 30
    assert precision >= 0.95 and recall >= 0.95


def test_the_result_does_not_depend_on_the_order_of_the_rows() -> None:
    draw = seeded()
    texts = sorted(set(texts_with_copies(draw, 150)))
    protected = draw.sample(range(len(texts)), 60)
    ranks = draw.sample(range(len(texts)), len(texts))
    first = search(texts, rank=ranks, protected=protected)
    shuffled = draw.sample(range(len(texts)), len(texts))
    new_row = {row: i for i, row in enumerate(shuffled)} | {-1: -1}
    second = search(
        [texts[row] for row in shuffled],
        rank=[ranks[row] for row in shuffled],
        protected=[new_row[row] for row in protected],
    )
    assert [new_row[row] for row in first.duplicate_of[shuffled].tolist()] == second.duplicate_of.tolist()
    assert [new_row[row] for row in first.cluster[shuffled].tolist()] == second.cluster.tolist()


def test_of_two_copies_the_row_with_the_lower_rank_is_kept_and_a_dropped_row_has_no_copies() -> None:
    pair = ["the same words in this row as there", "The same words in this row, as there!"]
    assert search(pair, rank=[1, 2]).duplicate_of.tolist() == [-1, 0]
    assert search(pair, rank=[2, 1]).duplicate_of.tolist() == [1, -1]
    words = [f"w{n}" for n in range(60)]
    chain = [" ".join(words[at : at + 40]) for at in (0, 3, 6)]
    assert search(chain, 0.8).duplicate_of.tolist() == [-1, 0, -1]
    assert search(chain, 0.7).duplicate_of.tolist() == [-1, 0, 0]


def test_near_copies_within_the_test_split_share_a_cluster() -> None:
    words = [f"w{n}" for n in range(60)]
    chain = [" ".join(words[at : at + 40]) for at in (0, 3, 6)]
    texts = [*chain, "something else that is in the test split", "not in the test split at all", chain[2]]
    result = search(texts, rank=[3, 2, 1, 0, 4, 9], protected=[0, 1, 2, 3, 5])
    assert result.cluster.tolist() == [2, 2, 2, 3, -1, 2]
    assert (result.duplicate_of == -1).all()


@pytest.mark.parametrize("shape", ["equal", "near", "boilerplate", "chain", "test split"])
def test_the_number_of_comparisons_is_linear_whatever_the_rows_are(shape: str) -> None:
    """The rows of each shape are all candidates for each other, so a naive search would compare every pair."""
    words = [f"w{n}" for n in range(100)]
    shapes = {
        "equal": lambda row: words,
        "near": lambda row: [*words, str(row)],
        "boilerplate": lambda row: [*words, *(f"x{row}y{n}" for n in range(16))],
        "chain": lambda row: [f"w{row * 3 + n}" for n in range(60)],
        "test split": lambda row: [*words, str(row)],
    }
    compared = []
    for rows in (250, 1000):
        texts = [" ".join(shapes[shape](row)) for row in range(rows)]
        result = search(texts, protected=range(0, rows, 2) if shape == "test split" else ())
        dropped = int((result.duplicate_of >= 0).sum())
        if shape in ("equal", "near"):
            assert dropped == rows - 1
        if shape == "test split":
            assert dropped == rows / 2 and set(result.cluster.tolist()) == {0, -1}
        if shape == "boilerplate":
            assert dropped == 0 and result.crowded > 0
        compared.append(result.compared)
    assert compared[1] <= 5 * compared[0]
    assert compared[1] <= 32 * 1000


SENTENCE = "Name three primary colours and say how a painter mixes them."
POEM = "请写一首关于春天的诗,不要超过四行。"


def similarity(left: str, right: str) -> float:
    return jaccard(shingles(left), shingles(right))


@pytest.mark.parametrize(
    ("alike", "left", "right"),
    [
        (True, SENTENCE, SENTENCE.upper().replace(" ", "\n  ")),
        (True, "A well-known fact: “yes”!", "a well known fact, 'yes'"),
        (True, "①  ﬁve Ｆｏｏ", "1 five foo"),
        (True, "Straße", "STRASSE"),
        (True, "cafe\u0301 noir", "café noir"),
        (True, POEM, "请写一首关于春天的诗 不要超过四行"),
        (True, "2019–2020 − 1", "2019-2020 - 1"),
        (True, "soft\u00adware", "software"),
        (False, "What is 12 + 5?", "What is 12 * 5?"),
        (False, "What is 12 - 5?", "What is 12 5?"),
        (False, "5%", "5"),
        (False, "3.14", "314"),
        (False, "yes", "no"),
        (False, "?", "!"),
        (False, "", "?"),
        (False, "你好", "您好"),
        (False, "🙂", "🙁"),
    ],
)
def test_case_spaces_punctuation_and_unicode_forms_are_ignored_and_nothing_else(
    alike: bool, left: str, right: str
) -> None:
    assert similarity(left, right) == 1 if alike else similarity(left, right) < 0.5


def test_languages_without_spaces_are_compared_by_character_and_mixed_text_by_both() -> None:
    one_character = similarity("今天天气很好我们一起去公园散步吧", "今天天气很好我们一起去公园跑步吧")
    assert 0.3 < one_character < 0.8
    assert similarity("用 Python 写一个函数 that sorts a list", "用 Python 写一个函数 that sorts a list 吧") > 0.7
    assert similarity("สวัสดีครับวันนี้อากาศดีมาก", "สวัสดีครับวันนี้อากาศร้อนมาก") > 0.3


def test_signatures_are_the_same_in_every_process_and_on_every_machine() -> None:
    # If these numbers change, every cached signature is invalid.
    assert signatures([SENTENCE, POEM, ""])[:, 0].tolist() == [37986, 42000, 48824]
