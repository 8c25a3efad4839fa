"""Rows as a server sees them: each answer follows its prompt, and rows that are too long are cut between answers."""

import datetime
import json
from typing import Any

import pytest
from chats import CONVERSATIONS, DATED, SYSTEM, TEMPLATES, THOUGHT, stops_of, talk, template_of, trained, trained_runs
from conftest import with_
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chat import Message
from pipeline.chat.conversation import LEFT_OUT, ChatTemplate
from pipeline.chat.fitting import PROMPT_CUT, SPLIT, TURNS_LEFT_OUT, Fitted, Overlong, fit
from pipeline.chat.rendering import RowError
from pipeline.chat.responses import as_calls
from pipeline.chat.template import NAMED, load_template
from pipeline.params import Params


def served(template: ChatTemplate, messages: list[Message], **kwargs: Any) -> str:
    """The prompt that transformers makes of `messages`."""
    return str(template.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs))


@pytest.mark.parametrize("train_on", ["all_responses", "last_response"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_trained_answer_follows_the_prompt_that_a_server_sends(name: str, train_on: str) -> None:
    today = datetime.date.today().isoformat()
    template = template_of(name, train_on=train_on, chat_template_date=today)
    tokenizer = template.tokenizer
    for messages in CONVERSATIONS.values():
        try:
            served(template, messages[:1])
        except Exception:
            continue  # the template refuses system messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained_answers = answers if train_on == "all_responses" else answers[-1:]
        for index, (before, ids) in zip(trained_answers, trained_runs(template.encode(messages)), strict=True):
            prompt, answer = served(template, messages[:index]), tokenizer.decode(ids)
            assert tokenizer.decode(before) == prompt
            assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert messages[index]["content"].strip() in answer
            assert answer.endswith(tuple(stops_of(name)))
            opened = prompt.rstrip().endswith("<think>")
            assert answer.count("</think>") == answer.count("<think>") + opened
            writes_reasoning = opened or (
                THOUGHT in template.render(CONVERSATIONS["reasoning"])
                and not served(template, CONVERSATIONS["reasoning"][:1]).rstrip().endswith(("</think>", "<channel|>"))
            )
            assert (THOUGHT in answer) == ("reasoning_content" in messages[index] and writes_reasoning)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_template_arguments_are_passed_as_a_server_passes_them(name: str) -> None:
    template = template_of(name, chat_template_kwargs={"enable_thinking": False})
    messages = CONVERSATIONS["reasoning, two turns"]
    for index, (before, ids) in zip((1, 3), trained_runs(template.encode(messages)), strict=True):
        assert template.tokenizer.decode(before) == served(template, messages[:index], enable_thinking=False)
        assert THOUGHT not in template.tokenizer.decode(ids)


def test_reasoning_that_a_template_cannot_write_is_dropped_or_written_into_the_answer_or_refused() -> None:
    for reasoning, written in (("drop", "Four it is."), ("inline", f"<think>\n{THOUGHT}\n</think>\n\nFour it is.")):
        template = template_of("llama3", reasoning=reasoning)
        assert trained(template, CONVERSATIONS["reasoning"]) == [f"{written}<|eot_id|>"]
        assert len(template.encode(CONVERSATIONS["reasoning"]).repairs) == 1
    template = template_of("llama3", reasoning="refuse")
    with pytest.raises(RowError):
        template.encode(CONVERSATIONS["reasoning"])
    template.encode(CONVERSATIONS["one turn"])


def test_a_row_that_the_template_shortens_is_refused_or_counted() -> None:
    calls = as_calls([{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")])
    question, answer = talk("Weather in Oslo and Rome?", "Snow in Oslo, sun in Rome.")
    results = [{"role": "tool", "name": "weather", "content": sky} for sky in ("snow", "sun")]
    parallel = [question, {"role": "assistant", "content": "", "tool_calls": calls}, *results, answer]
    later = [*talk("Hello", "Hi."), {"role": "system", "content": "One word only."}, *talk("How are you?", "Fine.")]
    for messages, keeps in ((parallel, "qwen3"), (later, "deepseek_r1_distill")):
        with pytest.raises(RowError):
            template_of("gptoss").encode(messages)  # it writes the first of several calls, and the first system message
        assert template_of("gptoss", on_left_out="keep").encode(messages).repairs == (LEFT_OUT,)
        assert template_of(keeps).encode(messages).repairs == ()
    nested = as_calls([{"name": "run", "arguments": {"code": '{"a": "x\\"y"}'}}])  # JSON in the text of an argument
    answer = {"role": "assistant", "content": "", "tool_calls": nested}
    assert template_of("qwen3").encode([question, answer]).repairs == ()


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer", "qwen3", "nemotron_3_nano", "llama3"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"reasoning_effort": "low"}])
def test_the_shipped_template_needs_neither_arguments_nor_date(name: str, kwargs: dict[str, Any]) -> None:
    date = "2024-02-29" if name in DATED else None
    template = template_of(name, chat_template_date=date, chat_template_kwargs=kwargs)
    for messages in CONVERSATIONS.values():
        prompt = served(template, messages[:-1], chat_template=template.served_text())
        assert prompt == template.prompt(messages[:-1])[0]


@pytest.mark.parametrize("name", [*TEMPLATES, *NAMED])
def test_the_shipped_template_writes_tools_calls_and_results_as_in_training(name: str) -> None:
    template = template_of(name, chat_template_date="2024-02-29" if name in DATED else None)
    function = {"name": "weather", "description": "Wie ist's?", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    calls = as_calls([{"name": "weather", "arguments": {"a": "<é>"}}])
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "snow"}
    question, *rest = talk("Weather in Oslo?", "Snow.", "And now?", "Sun.")
    for messages in ([SYSTEM, question, call, result, *rest], [question, call, result, *rest]):
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # DeepSeek's templates take the arguments of calls as text, so a server that passes objects cannot use them.
        for index in answers[:1] if name.startswith("deepseek") else answers:
            try:
                prompt = template.prompt(messages[:index], json.dumps(tools))[0]
            except RowError:
                continue  # it refuses system messages
            shipped = template.served_text()
            assert served(template, messages[:index], tools=tools, chat_template=shipped) == prompt
            if "text_of" in shipped and "is string" in template.text:  # servers may send contents as lists of parts
                parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages[:index]]
                assert served(template, parts, tools=tools, chat_template=shipped) == prompt
            assert "weather" in prompt and ("snow" in prompt or index < answers[1])


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return load_template(params.prepare)[0]


def length(template: ChatTemplate, messages: list[Message], tools: str | None = None) -> int:
    return template.encode(messages, tools).length


def answers_of(row: Fitted, template: ChatTemplate) -> list[str]:
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
    assert answers_of(fitted, template) == ["the answer"]
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
    assert answers_of(fitted, last) == ["three."]


@pytest.mark.parametrize("how", ["split", "truncate_prompt"])
def test_exchanges_of_weight_0_are_context_and_make_no_rows(template: ChatTemplate, how: str) -> None:
    """However little room there is, every trained answer is trained once, and nothing else is."""
    messages = talk(*(text for i in range(7) for text in (f"question {i}?", f"answer {i}.")))
    for i in (0, 2, 3, 6):
        messages[2 * i + 1] |= {"weight": 0}
    expected = ["answer 1.", "answer 4.", "answer 5."]
    for room in range(1, 8):
        rows = fit(template, messages, None, length(template, talk(*["question 0?", "answer 0."] * room)), how)
        trained = [answer for row in rows for answer in answers_of(row, template)]
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
TALKS = st.tuples(st.booleans(), st.lists(st.tuples(WORD, WORD), min_size=1, max_size=6))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(TALKS, st.integers(20, 90), st.sampled_from(["truncate_prompt", "split"]))
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
        trained += answers_of(row, template)
    expected = [answer for _, answer in pairs]
    assert trained == (expected if how == "split" else expected[-len(trained) :])
