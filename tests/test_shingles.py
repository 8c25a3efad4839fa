"""Shingles against a slow and plain definition of them, and signatures that are the same everywhere."""

import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shingles import jaccard, shingles, signatures

ENGLISH = "Name three primary colours and say how a painter mixes them."
CHINESE = "请写一首关于春天的诗,不要超过四行。"
UNSPACED = regex.compile(
    r"[[\p{Han}\p{Bopomofo}\p{scx=Hiragana}\p{scx=Katakana}\p{lb=SA}]&&[\p{L}\p{M}\p{N}]]", flags=regex.V1
)
TEXTS = st.text(st.sampled_from("aB9é ß\n.,-+*今天ニャไทย한ﬁ①\u00ad\ud800🙂") | st.characters(), max_size=40)


def plain_tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", regex.sub(r"\p{Default_Ignorable_Code_Point}", "", text)).casefold()
    tokens, inside = [], False
    for before, character, behind in zip(f" {text}", text, f"{text} "[1:], strict=False):
        single = UNSPACED.match(character)
        word = not single and regex.match(r"[\p{L}\p{M}\p{N}]", character)
        if character in "-‐‒–−":
            letters = [regex.match(r"[\p{L}\p{M}]", each) and not UNSPACED.match(each) for each in (before, behind)]
            if not all(letters):
                tokens.append("-")
        elif word and inside:
            tokens[-1] += character
        elif word or single or regex.match(r"[\p{S}%&#@*/\\]", character):
            tokens.append(character)
        inside = bool(word)
    return tokens or ["whole " + "".join(text.split())]


def plain_shingles(text: str) -> set[tuple[str, ...]]:
    tokens = plain_tokens(text)
    widths = [5 if UNSPACED.match(token) else 3 for token in tokens]
    found = {tuple(tokens[at : at + width]) for at, width in enumerate(widths) if at + width <= len(tokens)}
    return found or {("short", *tokens)}


def similarity(left: str, right: str) -> float:
    return jaccard(shingles(left), shingles(right))


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_the_similarity_of_any_two_texts_is_that_of_plainly_counted_shingles(texts: list[str]) -> None:
    fast, plain = [shingles(text) for text in texts], [plain_shingles(text) for text in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert jaccard(fast[i], fast[j]) == len(plain[i] & plain[j]) / len(plain[i] | plain[j])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (ENGLISH, ENGLISH.upper().replace(" ", "\n  ")),
        ("A well-known fact: “yes”!", "a well known fact, 'yes'"),
        ("①  ﬁve Ｆｏｏ", "1 five foo"),
        ("Straße", "STRASSE"),
        ("cafe\u0301 noir", "café noir"),
        (CHINESE, "请写一首关于春天的诗 不要超过四行"),
        ("2019–2020 − 1", "2019-2020 - 1"),
        ("soft\u00adware", "software"),
    ],
)
def test_case_spaces_punctuation_and_unicode_forms_do_not_count(left: str, right: str) -> None:
    assert similarity(left, right) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 12 + 5?", "What is 12 * 5?"),
        ("What is 12 - 5?", "What is 12 5?"),
        ("5%", "5"),
        ("3.14", "314"),
        ("yes", "no"),
        ("?", "!"),
        ("", "?"),
        ("你好", "您好"),
        ("🙂", "🙁"),
    ],
)
def test_short_texts_are_the_same_only_when_all_that_counts_is(left: str, right: str) -> None:
    assert similarity(left, right) < 0.5


def test_languages_without_spaces_are_compared_by_character_and_mixed_text_by_both() -> None:
    one_character = similarity("今天天气很好我们一起去公园散步吧", "今天天气很好我们一起去公园跑步吧")
    assert 0.3 < one_character < 0.8
    assert similarity("用 Python 写一个函数 that sorts a list", "用 Python 写一个函数 that sorts a list 吧") > 0.7
    assert similarity("สวัสดีครับวันนี้อากาศดีมาก", "สวัสดีครับวันนี้อากาศร้อนมาก") > 0.3


def test_signatures_are_the_same_in_every_process_and_on_every_machine() -> None:
    # Written down once: a change of these numbers makes every cached signature worthless, so it must be meant.
    assert signatures([ENGLISH, CHINESE, ""])[:, 0].tolist() == [37986, 42000, 48824]
