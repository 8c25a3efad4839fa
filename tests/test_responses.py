"""A model's output is split into thinking, answer and calls, with TRL's real templates and the named ones."""

import json
import sys
from typing import Any

import pytest
import torch
from chats import TEMPLATES, talk, template_of, trained_runs

from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.responses import Answer, as_calls, canonical_calls, read_answer
from pipeline.chat.template import NAMED
from pipeline.cli import talk as try_commands
from pipeline.cli.serving import AnswerStreamer

QUESTION = talk("How is the weather?")
ANSWER = "Good: it is 20 °C.\n\n  - and dry"
THOUGHT = "They ask about the weather.\n\nI look it up."
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "wind": {"type": "boolean"}}
SCHEMA = {"description": "Tells the weather.", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": {"name": name} | SCHEMA} for name in ("get_weather", "get-forecast")]
CALLS = [{"name": "get_weather", "arguments": {"city": "São Paulo, 12", "days": 3, "wind": True}}]
NO_CALLS = ("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5")


def tokens(template: ChatTemplate, text: str) -> list[int]:
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert template.tokenizer.decode(ids) == text
    return ids


def written_by(template: ChatTemplate, answer: dict[str, Any], tools: Any = None) -> tuple[str, str]:
    """The prompt of `answer`, and what a model is trained to write after it."""
    encoded = template.encode([*QUESTION, answer], None if tools is None else json.dumps(tools))
    [(before, written)] = trained_runs(encoded)
    return template.tokenizer.decode(before), template.tokenizer.decode(written)


def read(template: ChatTemplate, prompt: str, written: str, tools: Any = None) -> Answer:
    offered = None if tools is None else json.dumps(tools)
    return read_answer(template, tokens(template, prompt), tokens(template, written), offered)


def parts(answer: Answer) -> tuple[str, str | None, list[Any]]:
    return answer.text, answer.reasoning, list(answer.tool_calls)


@pytest.mark.parametrize("name", [*TEMPLATES, *NAMED])
def test_thinking_and_indentation_of_an_answer_are_kept_and_surrounding_space_is_removed(name: str) -> None:
    template, code = template_of(name), "    return 20\n\n  # dry"
    for content, thought in ((ANSWER, None), (code, None), (ANSWER, THOUGHT)):
        answer = {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})
        prompt, written = written_by(template, answer)
        kept = content if content in written else content.strip()
        assert parts(read(template, prompt, written)) == (kept, thought if thought and thought in written else None, [])


@pytest.mark.parametrize("name", [name for name in [*TEMPLATES, *NAMED] if name not in NO_CALLS])
def test_calls_are_read_with_their_arguments(name: str) -> None:
    template = template_of(name)
    two = [*CALLS, {"name": "get-forecast", "arguments": {"city": "Rome"}}]
    writes_one = name in ("llama3_1", "llama3_2", "gptoss")
    for calls in [CALLS] if writes_one else [CALLS, two]:
        message = {"role": "assistant", "content": "", "tool_calls": as_calls(calls)}
        prompt, written = written_by(template, message, TOOLS)
        assert list(read(template, prompt, written, TOOLS).tool_calls) == calls


IM = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "prompt", "written", "expected"),
    [
        ("gptoss", "<|start|>assistant", "<|channel|>final<|message|>good<|return|>", ("good", None)),
        ("qwen3", IM, "<think>\n\n</think>\n\ngood<|im_end|>", ("good", None)),
        ("qwen3_6", f"{IM}<think>\n", "thoughts</think>\n\ngood<|im_end|>", ("good", "thoughts")),
        ("deepseekv3", "<｜Assistant｜>", "so</think>good<｜end▁of▁sentence｜>", ("good", "so")),
        ("chatml", IM, "<think>so</think>good<|im_end|>", ("good", "so")),
        ("chatml", IM, "</think> closes it<|im_end|>", ("</think> closes it", None)),
        ("qwen2_5", IM, " a <think> b<|im_end|>", ("a <think> b", None)),
        ("qwen3", IM, "<think>a</think><think>b</think>c<|im_end|>", ("c", "a\nb")),
        ("gptoss", "<|start|>assistant", "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>"
         "commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
         '<|message|>{"a": 1}<|call|>', ("Wait.", "so", {"name": "f", "arguments": {"a": 1}})),
        ("gptoss", "<|start|>assistant", "good<|return|>", ("good", None)),
        ("gemma4", "<|turn>model\n", "<|channel>thought\n<channel|>good<turn|>", ("good", None)),
        # Thinking that never ends is not an answer.
        ("qwen3", IM, "<think>\nso much<|im_end|>", None),
        ("qwen3_5_think", f"{IM}<think>\n", "so much<|im_end|>", None),
        ("deepseek_r1_distill", "<｜Assistant｜><think>\n", "so much", None),
        ("gptoss", "<|start|>assistant", "<|channel|>analysis<|message|>so much<|return|>", None),
        ("gemma4", "<|turn>model\n", "<|channel>thought\nso much<turn|>", None),
        ("muse_glimmer", "<|start|>assistant", " to=self<|message|>so much<|eot|>", None),
    ],
)  # fmt: skip
def test_outputs_of_real_models_are_split(name: str, prompt: str, written: str, expected: Any) -> None:
    answer = read(template_of(name), prompt, written)
    assert answer.cut_off == (expected is None)
    if expected is None:
        assert answer.text == "" and str(answer.reasoning).endswith("so much")
    else:
        text, reasoning, *calls = expected
        assert parts(answer) == (text, reasoning, calls)


@pytest.mark.parametrize("call", ['{"name": "f"', '{"name": 3}', '{"name": "f", "arguments": [1]}', "get it", ""])
def test_a_malformed_call_is_text(call: str) -> None:
    written = f"<think>so</think>I call <tool_call>{call}</tool_call><|im_end|>"
    assert parts(read(template_of("qwen3"), IM, written)) == (f"I call <tool_call>{call}</tool_call>", "so", [])


def test_json_without_tags_is_a_call_only_if_the_prompt_names_the_tool() -> None:
    template = template_of("llama3_1")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    answer = '{"name": "Ada", "parameters": {"born": 1815}}'
    assert parts(read(template, f"Extract the name.{header}", f"{answer}<|eot_id|>")) == (answer, None, [])
    called = read(template, f'Tools: "Ada"{header}', f"{answer}<|eot_id|>")
    assert parts(called) == ("", None, [{"name": "Ada", "arguments": {"born": 1815}}])


def test_arguments_have_the_types_of_the_offered_tools() -> None:
    written = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    template, prompt = template_of("qwen3_5_think"), "<think>\n\n</think>\n\n"
    assert read(template, prompt, written, TOOLS).tool_calls[0]["arguments"] == {"city": "7", "days": 7}
    assert read(template, prompt, written).tool_calls[0]["arguments"] == {"city": 7, "days": 7}


def test_equal_calls_have_the_same_canonical_text() -> None:
    first, second = {"name": "f", "arguments": {"a": 1, "b": [2.0]}}, {"name": "g", "arguments": {}}
    same = {"arguments": {"b": [2], "a": 1.0}, "name": "f"}
    assert canonical_calls([first, second]) == canonical_calls([second, same])
    other = {"name": "f", "arguments": {"a": 1, "b": ["2"]}}
    assert canonical_calls([first]) != canonical_calls([other])
    assert json.loads(canonical_calls([first, second])) == [first, second]


def test_calls_of_families_without_a_template_here() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}
    arguments = json.dumps(call["arguments"])
    for text in (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        f"<|tool_call|>[{json.dumps(call)}]<|/tool_call|>",
        f"<|tool_call|>[{json.dumps(call)}]",
        f'<|START_ACTION|>[{{"tool_name": "get_weather", "parameters": {arguments}}}]<|END_ACTION|>',
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        f"[TOOL_CALLS] [{json.dumps(call)}]",
    ):
        for surroundings in ("{}", "Let me see.{}", "{}<|im_end|>"):
            written = surroundings.format(text)
            assert parts(read(template_of("qwen2_5"), IM, written)) == (written.partition(text)[0], None, [call])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("qwen3", "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("deepseekv3", "Is it?\n</think>\n\n", "<｜end▁of▁sentence｜>"),
        ("gptoss", "<|channel|>analysis<|message|>Is it?<|end|><|start|>assistant<|channel|>final<|message|>",
         "<|return|>"),
        ("glm4moe", "\n<think>Is it?</think>\n", "<|user|>"),
    ],
)  # fmt: skip
def test_thinking_and_text_are_streamed_separately(name: str, before: str, after: str) -> None:
    template, text, reasoning = template_of(name), list[str](), list[str]()
    prompt = template.prompt_ids(QUESTION)
    stream = AnswerStreamer(template, prompt, text=text.append, reasoning=reasoning.append)
    for ids in (prompt, *([token] for token in tokens(template, f"{before}{ANSWER} 好 [1] <b>!{after}"))):
        stream.put(torch.tensor([ids]))
    stream.end()
    assert "".join(text) == f"{ANSWER} 好 [1] <b>!"
    assert "".join(reasoning) == ("Is it?" if "Is it?" in before else "")
    assert len(text) > 5


@pytest.mark.parametrize("terminal", [True, False])
def test_chat_dims_the_thinking_and_keeps_it_in_the_message(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Answer("good", [1], True, "Is it?", ({"name": "f", "arguments": {}},))

    class Talk:
        def answer(self, messages: Any, limit: int, on_text: Any, on_reasoning: Any) -> Answer:
            for piece in ("Is", " it?"):
                on_reasoning(piece)
            on_text("good")
            return answer

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    message = try_commands._show(Talk(), [], 8).message()
    assert capsys.readouterr().out == ("\033[2mIs it?\033[0m\n\n" if terminal else "") + "good […]\n"
    assert message["reasoning_content"] == "Is it?"
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    fields = {"answer": "good", "cut_off": True, "reasoning": "Is it?", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert try_commands._fields(answer) == fields
    assert try_commands._fields(Answer("good", [1], False)) == {"answer": "good", "cut_off": False}
