"""Filters over single rows: off they change nothing, on they say what they did."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import filters as reasons
from pipeline.data.filters import apply_filters, repetition
from pipeline.data.personal_data import find_kinds, texts_of
from pipeline.data.records import Rejected, Row
from pipeline.params import FilterParams
from pipeline.settings import load_params

OFF = load_params(ROOT / "params.yaml").prepare.filters


def on(**values: Any) -> FilterParams:
    return FilterParams.model_validate(OFF.model_dump() | values)


def row(answer: str, question: str = "Say something.", **more: Any) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(messages=turns, source="f.json:[0]", **more)


def why(verdict: Row | Rejected) -> str | None:
    return verdict.reason if isinstance(verdict, Rejected) else None


def test_the_project_ships_with_every_filter_off() -> None:
    assert not OFF.any_on
    sample = row("I'm sorry, but I can't help with that. See https://example.org or a@b.org. " * 9)
    assert apply_filters(sample, OFF) is sample


REFUSAL = "I'm sorry, but I can't help with that."


@pytest.mark.parametrize(
    ("values", "kept", "dropped", "reason"),
    [
        ({"min_answer_chars": 3}, row("abc"), row("ab"), reasons.ANSWER_SHORT),
        ({"max_answer_chars": 3}, row("abc"), row("abcd"), reasons.ANSWER_LONG),
        ({"min_chars": 5}, row("abc", "de"), row("ab", "de"), reasons.ROW_SHORT),
        ({"max_chars": 5}, row("abc", "de"), row("abc", "def"), reasons.ROW_LONG),
        ({"languages": ["zh"]}, row("巴黎是法国的首都。"), row("Paris est la capitale, voilà."), reasons.LANGUAGE),
        ({"languages": ["fr"]}, row("42", "42?"), row("Paris is the capital of France."), reasons.LANGUAGE),
        ({"max_repetition": 0.3}, row("Each word stands here only once."), row("on and on " * 9), reasons.REPETITIVE),
        ({"pii": "drop"}, row("Call me."), row("Mail a@b.org."), reasons.PERSONAL),
        ({"pii": "drop"}, row("Call me."), row("Done.", "我的身份证号11010519491231002X"), reasons.PERSONAL),
        ({"links": "drop"}, row("Read the book."), row("Read https://example.org/a."), reasons.LINK),
        ({"refusals": "drop"}, row("Yes, I can.", REFUSAL), row(REFUSAL), reasons.REFUSAL),
        ({"refusals": "drop"}, row("好的。"), row("很抱歉，我无法回答这个问题。"), reasons.REFUSAL),
    ],
)
def test_a_filter_drops_what_it_is_for(values: dict[str, Any], kept: Row, dropped: Row, reason: str) -> None:
    assert on(**values).any_on
    assert apply_filters(kept, on(**values)) is kept
    assert why(apply_filters(dropped, on(**values))) == reason
    assert reason in reasons.REASONS


@pytest.mark.parametrize(("text", "masked"), [
    ("see https://example.org/a_(b)?q=1#x.", "see <LINK>."),
    ("[here](http://example.org/a), (www.example.org)", "[here](<LINK>), (<LINK>)"),
    ("网址https://例子.example 和https://example.org/路径，谢谢", "网址https://例子.example 和<LINK>路径，谢谢"),
    ("ftp://example.org/file!", "<LINK>!"),
    ("http:// alone, www. alone, awww.example.org, file.www", "http:// alone, www. alone, awww.example.org, file.www"),
])  # fmt: skip
def test_links_are_masked_without_the_text_around_them(text: str, masked: str) -> None:
    made = apply_filters(row(text), on(links="mask"))
    assert isinstance(made, Row)
    assert made.messages[-1]["content"] == masked
    assert made.repairs == (["link masked"] if masked != text else [])


def test_masking_reaches_tool_calls_results_definitions_and_the_group() -> None:
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": ["a@b.org"], "phone": 13800138000}}}
    text_call = {"type": "function", "function": {"name": "mail", "arguments": '{"text": "x\\n13800138000"}'}}
    turns: list[Any] = [
        {"role": "system", "content": "You are a@b.org."},
        {"role": "user", "content": "Mail a@b.org."},
        {"role": "assistant", "content": None, "tool_calls": [call, text_call]},
        {"role": "tool", "content": '{"sent_to": "a@b.org", "phone": 13800138000}', "name": "mail"},
        {"role": "assistant", "content": "Done."},
    ]
    full = Row(messages=turns, source="f", tools='[{"example": "a@b.org"}]', group="a@b.org", repairs=["before"])
    made = apply_filters(full, on(pii="mask"))
    assert isinstance(made, Row)
    assert not [text for text in texts_of([made.messages, made.tools, made.group]) if find_kinds(text)]
    assert made.messages[3]["content"] == '{"sent_to": "<EMAIL>", "phone": "<PHONE>"}'
    assert made.messages[4] == turns[4] and made.messages[3]["name"] == "mail"  # type: ignore[comparison-overlap]
    assert sorted(made.repairs) == ["before", "e-mail address masked", "telephone number masked"]
    assert full.messages[1]["content"] == "Mail a@b.org."  # the row that came in is as it was
    assert apply_filters(replace(full, repairs=[]), on(pii="drop")) == Rejected("f", reasons.PERSONAL, made.messages)


def test_a_dropped_row_keeps_no_personal_data_that_may_not_be_kept() -> None:
    verdict = apply_filters(row("a@b.org"), on(pii="mask", min_answer_chars=100))
    assert isinstance(verdict, Rejected)
    assert verdict.record[-1]["content"] == "<EMAIL>"


def test_a_tool_call_nested_beyond_reason_is_dropped() -> None:
    arguments: Any = "a@b.org"
    for _ in range(5000):
        arguments = [arguments]
    turns: list[Any] = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]}]
    assert why(apply_filters(Row(messages=turns, source="f"), on(pii="mask"))) == reasons.NESTED


def test_groups_that_name_a_person_stay_apart() -> None:
    groups = [apply_filters(row("x", group=group), on(pii="mask")) for group in ("a@b.org", "c@d.org", "a@b.org")]
    first, second, third = (made.group for made in groups if isinstance(made, Row))
    assert first == third != second and first is not None and "@" not in first


def test_repetition_is_the_fraction_that_was_there_before() -> None:
    assert repetition("") == repetition("word") == 0
    assert repetition("one two three four five " * 10) == pytest.approx(0.9)
    assert repetition("a line\n" * 4) == pytest.approx(0.75)
    assert repetition("今天天气很好我们去公园散步" * 10) > 0.8
    # A term that a Chinese text keeps using is no repetition: ten characters are about five words.
    assert repetition("人工智能是一门科学。人工智能能够下棋。学习人工智能需要数学。人工智能改变了许多行业。") == 0


TEXT = st.one_of(st.text(max_size=60), st.sampled_from([
    "Mail a@b.org.", "I'm sorry, but I can't help with that.", "https://example.org", "so it goes on and on " * 9,
    "巴黎是法国的首都。", "Paris est la capitale de la France, voilà.", '{"a": 13800138000}', "x 4111 1111 1111 1111",
]))  # fmt: skip
PARAMS = st.fixed_dictionaries({}, optional={
    "min_answer_chars": st.integers(1, 5), "max_chars": st.integers(20, 200), "languages": st.just(["en"]),
    "max_repetition": st.just(0.3), "pii": st.sampled_from(["keep", "mask", "drop"]),
    "links": st.sampled_from(["keep", "mask", "drop"]), "refusals": st.sampled_from(["keep", "drop"]),
})  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=5), PARAMS)
def test_every_row_is_kept_or_dropped_for_a_known_reason_and_again_the_same(
    texts: list[tuple[str, str]], values: dict[str, Any]
) -> None:
    rows = [row(answer, question) for question, answer in texts]
    verdicts = [apply_filters(each, on(**values)) for each in rows]
    kept = [verdict for verdict in verdicts if isinstance(verdict, Row)]
    dropped = [verdict for verdict in verdicts if isinstance(verdict, Rejected)]
    assert len(kept) + len(dropped) == len(rows)
    assert all(verdict.reason in reasons.REASONS for verdict in dropped)
    for each in kept:
        if values.get("pii", "keep") != "keep":
            assert not [text for text in texts_of(each.messages) if find_kinds(text)]
        if values.get("languages") is None and values.get("max_chars") is None:  # a mask changes what these measure
            assert apply_filters(each, on(**values)) == each
