"""Shingles ignore case, spaces, punctuation and Unicode form; signatures are the same on every machine."""

import pytest

from pipeline.data.shingles import jaccard, shingles, signatures

ENGLISH = "Name three primary colours and say how a painter mixes them."
CHINESE = "请写一首关于春天的诗,不要超过四行。"


def similarity(left: str, right: str) -> float:
    return jaccard(shingles(left), shingles(right))


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
def test_case_spaces_punctuation_and_unicode_forms_are_ignored(left: str, right: str) -> None:
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
def test_short_texts_with_different_tokens_are_not_similar(left: str, right: str) -> None:
    assert similarity(left, right) < 0.5


def test_languages_without_spaces_are_compared_by_character_and_mixed_text_by_both() -> None:
    one_character = similarity("今天天气很好我们一起去公园散步吧", "今天天气很好我们一起去公园跑步吧")
    assert 0.3 < one_character < 0.8
    assert similarity("用 Python 写一个函数 that sorts a list", "用 Python 写一个函数 that sorts a list 吧") > 0.7
    assert similarity("สวัสดีครับวันนี้อากาศดีมาก", "สวัสดีครับวันนี้อากาศร้อนมาก") > 0.3


def test_signatures_are_the_same_in_every_process_and_on_every_machine() -> None:
    # If these numbers change, every cached signature is invalid.
    assert signatures([ENGLISH, CHINESE, ""])[:, 0].tolist() == [37986, 42000, 48824]
