"""Rows that contain items of a benchmark: verbatim, edited, in other company, in Chinese; and those that do not."""

import random

from pipeline.data.benchmarks import COMMON, Contamination, benchmark, contaminated

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
CHINESE = "小明有十二个苹果,他给了小红三个苹果,又从商店买了五个苹果,请问小明现在一共有多少个苹果?"
SHORT = "What is the capital of France?"
WORDS = [f"word{n}" for n in range(3000)]


def prose(draw: random.Random, length: int) -> str:
    return " ".join(draw.choices(WORDS, k=length))


def test_an_item_inside_a_longer_row_is_found() -> None:
    known, draw = benchmark([QUESTION, CHINESE, SHORT]), random.Random(1)
    rows = [f"{prose(draw, 60)} {text} {prose(draw, 60)}" for text in (QUESTION.upper(), "", CHINESE)]
    assert contaminated(rows, known, 0.5) == [Contamination(0, 0, 1.0), Contamination(2, 1, 1.0)]


def test_an_edited_item_is_found_up_to_the_share_that_is_asked_for() -> None:
    edited = QUESTION.replace("Natalia sold clips to 48", "Maria sold pins to 48")
    [found] = contaminated([edited], benchmark([QUESTION]), 0.5)
    assert 0.5 < found.share < 1
    assert contaminated([edited], benchmark([QUESTION]), found.share) == [found]
    assert contaminated([edited], benchmark([QUESTION]), found.share + 0.01) == []


def test_a_quotation_of_one_phrase_is_no_contamination() -> None:
    row = "In the story she sold half as many clips in May, which was a surprise to everybody in the village."
    assert contaminated([row], benchmark([QUESTION]), 0.5) == []
    assert len(contaminated([row], benchmark([QUESTION]), 0.04)) == 1


def test_a_short_item_is_found_where_it_is_the_whole_text() -> None:
    rows = ["what is the capital of france", f"Answer this: {SHORT}", "What is the capital of Spain?"]
    assert contaminated(rows, benchmark([QUESTION, SHORT]), 0.5) == [Contamination(0, 1, 1.0)]


def test_a_row_names_the_item_of_which_it_has_most() -> None:
    draw = random.Random(2)
    start = prose(draw, 30)
    items = [f"{start} {prose(draw, 10)}", f"{start} {prose(draw, 2)}"]
    [found] = contaminated([items[1]], benchmark(items), 0.5)
    assert (found.item, found.share) == (1, 1.0)
    assert [each.item for each in contaminated([QUESTION], benchmark([SHORT, SHORT, QUESTION, QUESTION]), 0.5)] == [2]


def test_the_benchmarks_own_phrases_tell_nothing_and_items_of_nothing_else_are_named() -> None:
    draw = random.Random(3)
    phrase = "Choose the right answer to the following question from the four options below."
    items = [f"{phrase} {prose(draw, 20)}" for _ in range(COMMON + 1)]
    known = benchmark([*items, phrase])
    assert contaminated([f"{phrase} {prose(draw, 50)}"], known, 0.2) == []
    assert [each.item for each in contaminated(items, known, 0.9)] == list(range(COMMON + 1))
    assert known.unsearchable == (COMMON + 1,)
