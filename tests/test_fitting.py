"""Rows longer than the model may train on: what goes, what stays, and that no answer is cut."""

import json

import pytest
from conftest import with_
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.fitting import PROMPT_CUT, SPLIT, TURNS_LEFT_OUT, Fitted, Overlong, fit_batch
from pipeline.chat.template import load_template
from pipeline.params import Params

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return load_template(params.prepare)[0]


@pytest.fixture(scope="module")
def last(params: Params) -> ChatTemplate:
    return load_template(with_(params, prepare={"train_on": "last_response"}).prepare)[0]


def talk(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def length(template: ChatTemplate, messages: list[Message], tools: str | None = None) -> int:
    return len(template.encode(messages, tools).input_ids)


def answers(template: ChatTemplate, labels: list[int]) -> list[str]:
    trained = template.tokenizer.decode([label for label in labels if label != -100])
    return trained.split("<|im_end|>")[:-1]


def fit(template: ChatTemplate, messages: list[Message], tools: str | None, most: int, how: str) -> list[Fitted]:
    [fitted] = fit_batch(template, [(messages, tools)], most, how)
    if isinstance(fitted, Exception):
        raise fitted
    return fitted


LONG = [SYSTEM, *talk("first?", "one.", "second?", "two.", "third?", "three.")]


@pytest.mark.parametrize("how", ["drop", "error", "truncate_prompt", "split"])
def test_a_row_that_fits_is_left_as_it_is(template: ChatTemplate, how: str) -> None:
    [fitted] = fit(template, LONG, None, length(template, LONG), how)
    assert fitted.messages == LONG
    assert fitted.encoded == template.encode(LONG)


@pytest.mark.parametrize("how", ["drop", "error"])
def test_a_row_that_is_too_long_is_named_with_its_length(template: ChatTemplate, how: str) -> None:
    most = length(template, LONG) - 1
    with pytest.raises(Overlong, match=rf"has {most + 1} tokens, more than prepare\.max_length \({most}\)"):
        fit(template, LONG, None, most, how)


def test_the_oldest_turns_go_first_and_the_system_message_stays(template: ChatTemplate) -> None:
    [fitted] = fit(template, LONG, None, length(template, LONG) - 1, "truncate_prompt")
    assert fitted.messages == [SYSTEM, *LONG[3:]]
    assert fitted.encoded.repairs == (TURNS_LEFT_OUT,)
    [fitted] = fit(template, LONG, None, length(template, [SYSTEM, *LONG[3:]]) - 1, "truncate_prompt")
    assert fitted.messages == [SYSTEM, *LONG[5:]]


def test_the_last_question_then_loses_its_beginning_and_no_more_than_it_must(template: ChatTemplate) -> None:
    messages = [*talk("old?", "old."), *talk(" ".join(f"word{i}" for i in range(40)), "the answer")]
    most = length(template, messages[2:]) - 30
    [fitted] = fit(template, messages, None, most, "truncate_prompt")
    question = fitted.messages[0]["content"]
    assert messages[2]["content"].endswith(question) and question
    assert most - 3 <= len(fitted.encoded.input_ids) <= most
    assert answers(template, fitted.encoded.labels) == ["the answer"]
    assert fitted.encoded.repairs == (TURNS_LEFT_OUT, PROMPT_CUT)


def test_an_answer_that_leaves_no_room_is_never_cut(template: ChatTemplate) -> None:
    messages = talk("q", "an answer that is longer than everything else here")
    with pytest.raises(Overlong, match="last answer leaves no room"):
        fit(template, messages, None, length(template, messages) - 1, "truncate_prompt")


def test_what_cannot_be_split_is_refused(template: ChatTemplate) -> None:
    most = length(template, talk("q", "a")) + 3
    with pytest.raises(Overlong, match="single exchange of it is longer already"):
        fit(template, talk("q", "a", "a far longer question than the others", "a", "q", "a"), None, most, "split")


def test_with_last_response_splitting_keeps_the_one_answer_that_is_trained(last: ChatTemplate) -> None:
    [fitted] = fit(last, LONG, None, length(last, LONG) - 1, "split")
    assert fitted.messages == [SYSTEM, *LONG[3:]]
    assert answers(last, fitted.encoded.labels) == ["three."]


def test_a_call_stays_with_its_result(template: ChatTemplate) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        *talk("old?", "old."),
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "08:00"},
        {"role": "assistant", "content": "8."},
    ]
    tools = json.dumps([{"name": "clock"}])
    first, second = fit(template, messages, tools, length(template, messages, tools) - 1, "split")
    assert (first.messages, second.messages) == (messages[:2], messages[2:])


WORD = st.text("abcdefgh ", min_size=1, max_size=30).map(str.strip).filter(bool)
CONVERSATIONS = st.tuples(st.booleans(), st.lists(st.tuples(WORD, WORD), min_size=1, max_size=6))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(CONVERSATIONS, st.integers(20, 90), st.sampled_from(["truncate_prompt", "split"]))
def test_every_answer_is_whole_and_every_row_fits(
    template: ChatTemplate, conversation: tuple[bool, list[tuple[str, str]]], most: int, how: str
) -> None:
    system, pairs = conversation
    messages = [SYSTEM] * system + talk(*(text for pair in pairs for text in pair))
    [rows] = fit_batch(template, [(messages, None)], most, how)
    if isinstance(rows, Overlong):
        shortest = [length(template, [SYSTEM] * system + talk(*pair)) for pair in pairs]
        assert max(shortest) > most if how == "split" else shortest[-1] > most
        return
    assert not isinstance(rows, Exception)
    trained = []
    for row in rows:
        assert len(row.encoded.input_ids) <= most
        assert row.messages[: int(system)] == [SYSTEM] * system
        assert [message["role"] for message in row.messages[int(system) :]] == ["user", "assistant"] * (
            len(row.messages[int(system) :]) // 2
        )
        assert row.encoded.input_ids == template.encode(row.messages).input_ids
        trained += answers(template, row.encoded.labels)
    expected = [answer for _, answer in pairs]
    if how == "split":
        assert trained == expected
        assert all(SPLIT in row.encoded.repairs for row in rows) or len(rows) == 1
    else:
        assert trained == expected[-len(trained) :]
