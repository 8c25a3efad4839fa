"""Rows longer than the model may train on: what goes, what stays, and that no answer is cut."""

import json

import pytest
from chats import SYSTEM, talk
from conftest import with_
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chat import Message
from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.fitting import PROMPT_CUT, SPLIT, TURNS_LEFT_OUT, Fitted, Overlong, fit
from pipeline.chat.template import load_template
from pipeline.params import Params


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return load_template(params.prepare)[0]


def length(template: ChatTemplate, messages: list[Message], tools: str | None = None) -> int:
    return template.encode(messages, tools).length


def answers(row: Fitted, template: ChatTemplate) -> list[str]:
    return template.tokenizer.decode([id for id in row.encoded.labels if id != -100]).split("<|im_end|>")[:-1]


LONG = [SYSTEM, *talk("first?", "one.", "second?", "two.", "third?", "three.")]
ONE_LONG = talk("q", "an answer that is longer than everything else here")


def test_a_row_that_fits_is_left_as_it_is_and_one_that_does_not_is_named_with_its_length(
    template: ChatTemplate,
) -> None:
    whole = length(template, LONG)
    for how in ("drop", "error", "truncate_prompt", "split"):
        assert fit(template, LONG, None, whole, how) == [Fitted(LONG, template.encode(LONG))]
    for how in ("drop", "error"):
        with pytest.raises(Overlong, match=rf"has {whole} tokens, more than prepare\.max_length \({whole - 1}\)"):
            fit(template, LONG, None, whole - 1, how)


def test_the_oldest_turns_go_first_then_the_beginning_of_the_last_question(template: ChatTemplate) -> None:
    for kept in (LONG[3:], LONG[5:]):
        [fitted] = fit(template, LONG, None, length(template, [SYSTEM, *kept]), "truncate_prompt")
        assert fitted.messages == [SYSTEM, *kept]
        assert fitted.encoded.repairs == (TURNS_LEFT_OUT,)
    messages = [*talk("old?", "old."), *talk(" ".join(f"word{i}" for i in range(40)), "the answer")]
    most = length(template, messages[2:]) - 30
    [fitted] = fit(template, messages, None, most, "truncate_prompt")
    question = fitted.messages[0]["content"]
    assert messages[2]["content"].endswith(question) and question
    assert most - 3 <= fitted.encoded.length <= most
    assert answers(fitted, template) == ["the answer"]
    assert fitted.encoded.repairs == (TURNS_LEFT_OUT, PROMPT_CUT)


@pytest.mark.parametrize(
    ("messages", "room", "spare", "how"),
    [
        (ONE_LONG, ONE_LONG, -1, "truncate_prompt"),  # its answer leaves no room, and is never cut
        (talk("q", "a", "a far longer question than the others", "a", "q", "a"), talk("q", "a"), 3, "split"),
    ],
)
def test_what_cannot_be_made_to_fit_is_refused(
    template: ChatTemplate, messages: list[Message], room: list[Message], spare: int, how: str
) -> None:
    with pytest.raises(Overlong):
        fit(template, messages, None, length(template, room) + spare, how)


def test_with_last_response_splitting_keeps_the_one_answer_that_is_trained(params: Params) -> None:
    last = load_template(with_(params, prepare={"train_on": "last_response"}).prepare)[0]
    [fitted] = fit(last, LONG, None, length(last, LONG) - 1, "split")
    assert fitted.messages == [SYSTEM, *LONG[3:]]
    assert answers(fitted, last) == ["three."]


@pytest.mark.parametrize("how", ["split", "truncate_prompt"])
def test_exchanges_of_weight_0_are_context_and_make_no_rows(template: ChatTemplate, how: str) -> None:
    """However little room there is, every trained answer is trained once, and nothing else is."""
    messages = talk(*(text for i in range(7) for text in (f"question {i}?", f"answer {i}.")))
    for i in (0, 2, 3, 6):
        messages[2 * i + 1] |= {"weight": 0}
    expected = ["answer 1.", "answer 4.", "answer 5."]
    for room in range(1, 8):
        rows = fit(template, messages, None, length(template, talk(*["question 0?", "answer 0."] * room)), how)
        trained = [answer for row in rows for answer in answers(row, template)]
        assert trained == (expected if how == "split" else expected[-len(trained) :])


def test_a_call_stays_with_its_result(template: ChatTemplate) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        *talk("old?", "old."), {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "08:00"}, {"role": "assistant", "content": "8."},
    ]  # fmt: skip
    tools = json.dumps([{"name": "clock"}])
    first, second = fit(template, messages, tools, length(template, messages, tools) - 1, "split")
    assert (first.messages, second.messages) == (messages[:2], messages[2:])


WORD = st.text("abcdefgh ", min_size=1, max_size=30).map(str.strip).filter(bool)
CONVERSATIONS = st.tuples(st.booleans(), st.lists(st.tuples(WORD, WORD), min_size=1, max_size=6))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(CONVERSATIONS, st.integers(20, 90), st.sampled_from(["truncate_prompt", "split"]))
def test_every_answer_is_whole_and_every_row_fits(
    template: ChatTemplate, conversation: tuple[bool, list[tuple[str, str]]], most: int, how: str
) -> None:
    system, pairs = conversation
    messages = [SYSTEM] * system + talk(*(text for pair in pairs for text in pair))
    try:
        rows = fit(template, messages, None, most, how)
    except Overlong:
        shortest = [length(template, [SYSTEM] * system + talk(*pair)) for pair in pairs]
        assert max(shortest) > most if how == "split" else shortest[-1] > most
        return
    trained = []
    for row in rows:
        turns = row.messages[int(system) :]
        assert row.encoded.length <= most
        assert row.messages[: int(system)] == [SYSTEM] * system
        assert [message["role"] for message in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert row.encoded.input_ids == template.encode(row.messages).input_ids
        assert how != "split" or len(rows) == 1 or SPLIT in row.encoded.repairs
        trained += answers(row, template)
    expected = [answer for _, answer in pairs]
    assert trained == (expected if how == "split" else expected[-len(trained) :])
