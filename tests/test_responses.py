"""What a model writes is read back in its parts, by the real templates that TRL ships and by the named ones."""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import trl
from conftest import byte_level
from transformers import PreTrainedTokenizerFast

from pipeline.chat.conversation import ChatTemplate
from pipeline.chat.responses import Response, as_calls, canonical_calls, read_response
from pipeline.chat.template import NAMED, named_text
from pipeline.cli import talk as try_commands
from pipeline.cli.serving import _Pieces
from pipeline.scoring.generation import Answer, to_answer
from pipeline.scoring.items import score_items

FOLDER = Path(trl.__file__).parent / "chat_templates"
NO_TEXT = ("_training", "_vl", "idefics", "llava", "smolvlm")
TRL = sorted(path.stem for path in FOLDER.glob("*.jinja") if not any(part in path.stem for part in NO_TEXT))
CONTROL = re.compile(r"<\|[^|<>\s{}]+\|>|<[a-z_]+_of_turn>|<｜[^｜{}]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]")
STOPS = {  # what ends a turn where it is not <|im_end|>; the first that is part of the template's name counts
    "gemma4": ["<turn|>", "<|tool_response>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"], "glm": ["<|user|>", "<|observation|>"], "gptoss": ["<|return|>", "<|call|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"], "cohere": ["<|END_OF_TURN_TOKEN|>"], "llama3": ["<|eot_id|>"],
    "phi": ["<|end|>"], "muse": ["<|eot|>"], "mistral": ["</s>"], "chatglm3": ["<|user|>", "<|observation|>", "</s>"],
}  # fmt: skip
QUESTION = [{"role": "user", "content": "How is the weather?"}]
ANSWER = "Good: it is 20 °C.\n\n  - and dry"
THOUGHT = "They ask about the weather.\n\nI look it up."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "wind": {"type": "boolean"}},
            },
        },
    }
    for name in ("get_weather", "get-forecast")
]
CALLS = [{"name": "get_weather", "arguments": {"city": "São Paulo, 12", "days": 3, "wind": True}}]
NO_REASONING = ("cohere", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5",
                "qwen2_5", "qwen3_instruct_2507", *NAMED)  # fmt: skip
NO_CALLS = ("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5")


@cache
def template_of(name: str) -> ChatTemplate:
    """The template with a tokenizer that has its control tokens."""
    text = named_text(name) if name in NAMED else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    stops = next((stops for part, stops in STOPS.items() if part in name), ["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=stops[0], bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*CONTROL.findall(text), *stops})})
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, text, frozenset(tokenizer.convert_tokens_to_ids(stops)))


def tokens(template: ChatTemplate, text: str) -> list[int]:
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert template.tokenizer.decode(ids) == text
    return ids


def render(template: ChatTemplate, messages: list[Any], prompt: bool = False, tools: Any = None) -> str:
    return template.render(messages, None if tools is None else json.dumps(tools), prompt)


def served(template: ChatTemplate, answer: dict[str, Any], tools: Any = None) -> tuple[str, str]:
    """The prompt of `answer`, and what a model is trained to write behind it."""
    encoded = template.encode([*QUESTION, answer], None if tools is None else json.dumps(tools))
    [start] = [k for k, label in enumerate(encoded.labels) if label >= 0 and (k == 0 or encoded.labels[k - 1] < 0)]
    written = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label >= 0]
    decode = template.tokenizer.decode
    return decode(encoded.input_ids[:start]), decode(written)


def read(template: ChatTemplate, prompt: str, written: str, tools: Any = None) -> Response:
    offered = None if tools is None else json.dumps(tools)
    return read_response(template, tokens(template, prompt), tokens(template, written), offered)


@pytest.mark.parametrize("name", [*TRL, *NAMED])
def test_an_answer_is_read_without_what_surrounds_it(name: str) -> None:
    template = template_of(name)
    prompt, written = served(template, {"role": "assistant", "content": ANSWER})
    assert read(template, prompt, written) == Response(ANSWER)


@pytest.mark.parametrize("name", [*TRL, *NAMED])
def test_the_indentation_of_an_answer_is_kept_where_the_template_keeps_it(name: str) -> None:
    template, code = template_of(name), "    return 20\n\n  # dry"
    prompt, written = served(template, {"role": "assistant", "content": code})
    assert read(template, prompt, written).content == (code if code in written else code.strip())


@pytest.mark.parametrize("name", [name for name in TRL if name not in NO_REASONING])
def test_thinking_is_read_apart_from_the_answer(name: str) -> None:
    template = template_of(name)
    answer = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    prompt, written = served(template, answer)
    if THOUGHT not in written:
        pytest.skip("this template's default is to answer without thinking")
    assert read(template, prompt, written) == Response(ANSWER, THOUGHT)


@pytest.mark.parametrize("name", [name for name in [*TRL, *NAMED] if name not in NO_CALLS])
@pytest.mark.parametrize("number", [1, 2])
def test_calls_are_read_with_their_arguments(name: str, number: int) -> None:
    template = template_of(name)
    if number == 2 and name in ("llama3_1", "llama3_2", "gptoss"):
        pytest.skip("this template has room for one call")
    calls = [*CALLS, {"name": "get-forecast", "arguments": {"city": "Rome"}}][:number]
    message = {"role": "assistant", "content": "", "tool_calls": as_calls(calls)}
    prompt, written = served(template, message, TOOLS)
    assert list(read(template, prompt, written, TOOLS).tool_calls) == calls


@pytest.mark.parametrize(
    ("name", "prompt", "written", "response"),
    [
        ("gptoss", "<|start|>assistant", "<|channel|>final<|message|>good<|return|>", Response("good")),
        ("qwen3", "<|im_start|>assistant\n", "<think>\n\n</think>\n\ngood<|im_end|>", Response("good")),
        ("qwen3_6", "<|im_start|>assistant\n<think>\n", "thoughts</think>\n\ngood<|im_end|>",
         Response("good", "thoughts")),
        ("deepseekv3", "<｜Assistant｜>", "so</think>good<｜end▁of▁sentence｜>", Response("good", "so")),
        ("chatml", "<|im_start|>assistant\n", "<think>so</think>good<|im_end|>", Response("good", "so")),
        ("chatml", "<|im_start|>assistant\n", "</think> closes it<|im_end|>", Response("</think> closes it")),
        ("qwen2_5", "<|im_start|>assistant\n", " a <think> b<|im_end|>", Response("a <think> b")),
        ("qwen3", "<|im_start|>assistant\n", "<think>a</think><think>b</think>c<|im_end|>", Response("c", "a\nb")),
        ("gptoss", "<|start|>assistant", "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>"
         "commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
         '<|message|>{"a": 1}<|call|>', Response("Wait.", "so", ({"name": "f", "arguments": {"a": 1}},))),
        ("gptoss", "<|start|>assistant", "good<|return|>", Response("good")),
        ("gemma4", "<|turn>model\n", "<|channel>thought\n<channel|>good<turn|>", Response("good")),
    ],
)  # fmt: skip
def test_what_real_models_write(name: str, prompt: str, written: str, response: Response) -> None:
    assert read(template_of(name), prompt, written) == response


@pytest.mark.parametrize(
    ("name", "prompt", "written"),
    [
        ("qwen3", "<|im_start|>assistant\n", "<think>\nso much<|im_end|>"),
        ("qwen3_5_think", "<|im_start|>assistant\n<think>\n", "so much<|im_end|>"),
        ("deepseek_r1_distill", "<｜Assistant｜><think>\n", "so much"),
        ("nemotron_3_nano", "<|im_start|>assistant\n<think>\n", "so much<|im_end|>"),
        ("gptoss", "<|start|>assistant", "<|channel|>analysis<|message|>so much<|return|>"),
        ("gemma4", "<|turn>model\n", "<|channel>thought\nso much<turn|>"),
        ("muse_glimmer", "<|start|>assistant", " to=self<|message|>so much<|eot|>"),
    ],
)
def test_thinking_without_an_end_is_no_answer(name: str, prompt: str, written: str) -> None:
    template = template_of(name)
    response = read(template, prompt, written)
    assert not response.finished
    assert response.content == ""
    assert (response.reasoning or "").removeprefix("thought").strip() == "so much"
    assert to_answer(tokens(template, written), template, tokens(template, prompt)).cut_off


@pytest.mark.parametrize("call", ['{"name": "f"', '{"name": 3}', '{"name": "f", "arguments": [1]}', "get it", ""])
def test_a_call_that_is_none_is_text(call: str) -> None:
    written = f"<think>so</think>I call <tool_call>{call}</tool_call><|im_end|>"
    response = read(template_of("qwen3"), "<|im_start|>assistant\n", written)
    assert response == Response(f"I call <tool_call>{call}</tool_call>", "so")


def test_json_without_a_mark_is_a_call_only_of_a_tool_on_offer() -> None:
    template = template_of("llama3_1")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    answer = '{"name": "Ada", "parameters": {"born": 1815}}'
    assert read(template, f"Extract the name.{header}", f"{answer}<|eot_id|>") == Response(answer)
    called = read(template, f'Tools: "Ada"{header}', f"{answer}<|eot_id|>")
    assert called == Response("", None, ({"name": "Ada", "arguments": {"born": 1815}},))


def test_arguments_have_the_types_of_the_tools() -> None:
    written = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    template, prompt = template_of("qwen3_5_think"), "<think>\n\n</think>\n\n"
    assert read(template, prompt, written, TOOLS).tool_calls[0]["arguments"] == {"city": "7", "days": 7}
    assert read(template, prompt, written).tool_calls[0]["arguments"] == {"city": 7, "days": 7}


def test_equal_calls_are_equal_text() -> None:
    first, second = {"name": "f", "arguments": {"a": 1, "b": [2.0]}}, {"name": "g", "arguments": {}}
    same = {"arguments": {"b": [2], "a": 1.0}, "name": "f"}
    assert canonical_calls([first, second]) == canonical_calls([second, same])
    other = {"name": "f", "arguments": {"a": 1, "b": ["2"]}}
    assert canonical_calls([first]) != canonical_calls([other])
    assert json.loads(canonical_calls([first, second])) == [first, second]


def test_other_families_calls() -> None:
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
            response = read(template_of("qwen2_5"), "<|im_start|>assistant\n", written)
            assert list(response.tool_calls) == [call], written
            assert response.content == written.partition(text)[0]


THINKING = {  # template: what the model writes before the answer, and after it
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_6": ("Is it?\n</think>\n\n", "<|im_end|>"),
    "deepseekv3": ("Is it?\n</think>\n\n", "<｜end▁of▁sentence｜>"),
    "gptoss": (
        "<|channel|>analysis<|message|>Is it?<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "glm4moe": ("\n<think>Is it?</think>\n", "<|user|>"),
}


@pytest.mark.parametrize("name", THINKING)
def test_a_thinking_model_is_scored_by_its_contents_alone(name: str) -> None:
    template, (before, after) = template_of(name), THINKING[name]
    contents = ["good", "bad", "It is a box of 12 red balls.", "", "a blue box"]
    references = ["good", "good", "It is a box of 12 blue balls.", "x", "a blue box"]
    prompt = tokens(template, render(template, QUESTION, True))
    texts = {name: pa.array(references) for name in ("id", "task", "language", "group", "prompt", "reference")}
    texts["messages"] = pa.array([QUESTION] * 5)
    test = pa.table(texts | {"scoring": ["exact"] * 5, "input_ids": [prompt] * 5, "tools": pa.nulls(5, pa.string())})
    losses = ([1.0] * 5, [2] * 5)
    thinking = [to_answer(tokens(template, before + content + after), template, prompt) for content in contents]
    plain = [Answer(content, answer.ids, False) for content, answer in zip(contents, thinking, strict=True)]
    assert score_items(test, thinking, losses)[0] == score_items(test, plain, losses)[0]
    assert score_items(test, thinking, losses)[0]["accuracy"].to_pylist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_streams_in_its_parts(name: str) -> None:
    template, (before, after) = template_of(name), THINKING[name]
    prompt = tokens(template, render(template, QUESTION, True))
    ids = tokens(template, f"{before}{ANSWER} 好 [1] <b>!{after}")
    pieces: dict[str, list[str]] = {"content": [], "reasoning": []}
    stream = _Pieces(template, prompt, pieces["content"].append, pieces["reasoning"].append)
    stream.put(torch.tensor([prompt]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces["content"]) == f"{ANSWER} 好 [1] <b>!"
    assert "".join(pieces["reasoning"]) == ("Is it?" if "Is it?" in before else "")
    assert len(pieces["content"]) > 5


@pytest.mark.parametrize("terminal", [True, False])
def test_chat_dims_the_thinking_and_gives_it_back_to_the_template(
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
    messages = try_commands._exchange(Talk(), 8, [], "So?")
    assert capsys.readouterr().out == ("\033[2mIs it?\033[0m\n\n" if terminal else "") + "good […]\n"
    assert messages[-1]["reasoning_content"] == "Is it?"
    assert messages[-1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    fields = {"answer": "good", "cut_off": True, "reasoning": "Is it?", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert try_commands._fields(answer) == fields
    assert try_commands._fields(Answer("good", [1], False)) == {"answer": "good", "cut_off": False}
