"""Real chat templates: each trained answer follows the prompt that a server sends, and ends as a generation does."""

import datetime
import json
from typing import Any

import pytest
from chats import CONVERSATIONS, DATED, SYSTEM, TEMPLATES, THOUGHT, stops_of, talk, template_of, trained, trained_runs

from pipeline.chat import Message
from pipeline.chat.conversation import LEFT_OUT, ChatTemplate
from pipeline.chat.rendering import RowError
from pipeline.chat.responses import as_calls
from pipeline.chat.template import NAMED


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


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_pinned(name: str) -> None:
    dates = ("2026-01-31", "2026-02-01", "2026-01-31")
    prompts = [template_of(name, chat_template_date=date).prompt(talk("Hello")) for date in dates]
    assert prompts[0] == prompts[2] != prompts[1]


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
    assert (
        template_of("qwen3").encode([question, {"role": "assistant", "content": "", "tool_calls": nested}]).repairs
        == ()
    )


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
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": as_calls([{"name": "weather", "arguments": {"a": "<é>"}}]),
    }
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
