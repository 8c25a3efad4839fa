"""Turns with reasoning, calls and weights or in an unusual order; filters; the language of a text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_formats import QUESTION, answered, read, row

from pipeline.data.filters import UNDETERMINED, filter_reason, language_of, language_of_row
from pipeline.data.formats import read_rows
from pipeline.data.records import Rejected, Row
from pipeline.params import FilterParams
from pipeline.settings import load_params

THOUGHT = {"role": "assistant", "content": "A", "reasoning_content": "T"}
CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
TOOL_CALLS = [{"type": "function", "function": call} for call in CALLS]


def talk(*turns: Any) -> dict[str, Any]:
    """Turns as (role, content) or (role, content, other keys)."""
    return {"messages": [{"role": role, "content": content, **dict(*more)} for role, content, *more in turns]}


def sharegpt(*turns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value, **dict(*more)} for speaker, value, *more in turns]}


@pytest.mark.parametrize(
    "record",
    [
        answered(content="A", reasoning_content="T"),
        answered(content="A", reasoning="T"),
        answered(content="A", thinking="T", reasoning="T"),
        answered(content=[{"type": "reasoning", "text": "T"}, {"type": "text", "text": "A"}]),
        answered(content=[{"type": "thinking", "thinking": "T"}, {"type": "text", "value": "A"}]),
        answered(content="<think>T</think>A"),
        answered(content="<think>\nT\n</think>\n\nA"),
        answered(content="T\n</think>\n\nA"),  # DeepSeek R1, whose prompt ends with <think>
        {"instruction": "Q", "output": "<think>T</think>A"},
        {"prompt": "Q", "completion": "<think>T</think> A"},
        sharegpt(("human", "Q"), ("gpt", "<think>\nT</think>\nA")),
        sharegpt(("human", "Q"), ("gpt", "A", {"thinking": "T"})),
    ],
)
def test_reasoning_of_every_spelling_is_kept_apart_from_the_answer(tmp_path: Path, record: dict[str, Any]) -> None:
    assert row(tmp_path, record).messages == [QUESTION, THOUGHT]


@pytest.mark.parametrize(
    ("question", "output", "answer"),
    [
        ("Q", "<think>\nT\n</think>\n\n    y = x\n", {"content": "    y = x\n", "reasoning_content": "T"}),
        ("What does <think>x</think> do?", "<think>\n\n</think>\n\nA", {"content": "A"}),
        ("Q", "    y = x / 2\n    return y\n", {"content": "    y = x / 2\n    return y\n"}),
        ("Q", "A\n\n", {"content": "A\n\n"}),
    ],
)
def test_spaces_of_an_answer_and_think_tags_of_a_user_are_content(
    tmp_path: Path, question: str, output: str, answer: dict[str, Any]
) -> None:
    expected = [{"role": "user", "content": question}, {"role": "assistant"} | answer]
    for record in (
        {"instruction": question, "output": output},
        {"prompt": question, "completion": output},
        sharegpt(("human", question), ("gpt", output)),
    ):
        assert row(tmp_path, record).messages == expected


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_every_flag_of_an_untrained_turn_becomes_weight_0(tmp_path: Path, flag: dict[str, Any]) -> None:
    trained = {key: type(value)(1) for key, value in flag.items()}
    turns = [("Q", flag), ("A", flag), ("R",), ("B", trained)]
    for record in (
        talk(*((("user", "assistant")[i % 2], *turn) for i, turn in enumerate(turns))),
        sharegpt(*((("human", "gpt")[i % 2], *turn) for i, turn in enumerate(turns))),
    ):
        assert [message.get("weight") for message in row(tmp_path, record).messages] == [None, 0, None, None]


def test_turns_after_the_last_trained_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B", {"weight": 0})]
    shortened = row(tmp_path, talk(*turns))
    assert [message["content"] for message in shortened.messages] == ["Q", "A"]
    assert shortened.repairs == ["turns after the last trained answer left out"]
    assert row(tmp_path, talk(*turns[:3])).repairs == ["turns after the last answer left out"]


@pytest.mark.parametrize("as_text", [True, False])
def test_consecutive_function_calls_become_the_calls_of_one_turn(tmp_path: Path, as_text: bool) -> None:
    calls = [("function_call", json.dumps(call) if as_text else call) for call in CALLS]
    results = [("observation", value) for value in ("snow", "sun")]
    joined = row(tmp_path, sharegpt(("human", "Q"), *calls, *results, ("gpt", "A")))
    parallel = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": TOOL_CALLS},
        *({"role": "tool", "content": value} for value in ("snow", "sun")),
        {"role": "assistant", "content": "A"},
    ]
    assert joined.messages == row(tmp_path, {"messages": parallel}).messages == parallel
    assert joined.repairs == []


def test_consecutive_turns_of_one_role_are_joined_and_counted(tmp_path: Path) -> None:
    last = ("assistant", "B", {"tool_calls": CALLS[:1]})
    joined = row(tmp_path, talk(("user", "Q"), ("user", "R"), ("assistant", "A"), last))
    assert joined.messages == [
        {"role": "user", "content": "Q\n\nR"},
        {"role": "assistant", "content": "A\n\nB", "tool_calls": TOOL_CALLS[:1]},
    ]
    assert joined.repairs == ["consecutive user turns joined", "consecutive assistant turns joined"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (answered(content="<think>T"), "<think> without </think>"),
        (answered(content="<think>T</think>\n"), "is empty"),
        (answered(content="A <think>T</think> B"), "in the middle"),
        (answered(content="<think>T</think>A<think>T</think>B"), "in the middle"),
        (answered(content="<think>T</think>A", reasoning="T"), "twice"),
        (answered(content="A", reasoning="T", thinking="U"), "two different texts of reasoning"),
        (answered(content="A", reasoning={"steps": 2}), "reasoning is dict"),
        (answered(content=[{"type": "text", "text": 3}]), "without text"),
        (answered(content="A", weight=0.5), "weight 0.5"),
        (answered(content="A", loss_weight="1"), "loss_weight '1'"),
        (answered(content="A", weight=1, train=False), "weight 1, train False"),
        (answered(content="A", weight=0), "marks every answer as not trained"),
        (talk(("user", "Q", {"train": True}), ("assistant", "A")), "of role user has train True"),
        (talk(("user", "Q"), ("assistant", "A", {"weight": 0}), ("assistant", "B")), "cannot be joined"),
        (talk(("user", "Q"), ("assistant", "A"), ("assistant", "B", {"thinking": "T"})), "cannot be joined"),
        (talk(("user", "Q"), ("assistant", "", {"tool_calls": CALLS}), ("assistant", "A")), "cannot be joined"),
        (talk(("system", "S"), ("user", "Q"), ("assistant", "A")) | {"system": "T"}, "system column"),
    ],
)
def test_a_conversation_that_is_ambiguous_or_cannot_be_served_is_rejected(
    tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    [rejected] = read(tmp_path, record)
    assert isinstance(rejected, Rejected) and reason in rejected.reason


def test_system_messages_stay_in_place_and_a_system_column_comes_first(tmp_path: Path) -> None:
    turns = [("user", "Q"), ("assistant", "A"), ("system", "S"), ("user", "R"), ("assistant", "B")]
    messages = row(tmp_path, talk(*turns) | {"system": "F"}).messages
    assert [(message["role"], message["content"]) for message in messages] == [("system", "F"), *turns]
    first = talk(("system", "F"), *turns)
    assert row(tmp_path, first | {"system": "F"}).messages == row(tmp_path, first).messages == messages


def test_null_arguments_of_a_call_are_dropped_from_parquet_and_kept_from_json(tmp_path: Path) -> None:
    def record(name: str, key: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {key: {"type": "string"}}}
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": {key: "2"}}}
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
        return {"tools": tools} | answered(content="", tool_calls=[call])

    records = [record("book", "guests"), record("dial", "person")]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    from_json = [vars(row) | {"source": ""} for row in read(tmp_path, *records)]
    assert [vars(row) | {"source": ""} for row in read_rows(tmp_path / "data.parquet")] == from_json
    call = {"type": "function", "function": {"name": "f", "arguments": {"limit": None}}}
    assert row(tmp_path, answered(tool_calls=[call])).messages[-1]["tool_calls"] == [call]


OFF = load_params(ROOT / "params.yaml").prepare.filters


def row_of(answer: str, question: str = "Say something.") -> Row:
    return Row([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source="f.json:[0]")


@pytest.mark.parametrize(
    ("values", "kept", "dropped"),
    [
        ({"min_answer_chars": 3}, row_of("abc"), row_of("ab")),
        ({"max_answer_chars": 3}, row_of("abc"), row_of("abcd")),
        ({"min_chars": 5}, row_of("abc", "de"), row_of("ab", "de")),
        ({"max_chars": 5}, row_of("abc", "de"), row_of("abc", "def")),
        ({"languages": ["zh"]}, row_of("巴黎是法国的首都。"), row_of("Paris est la capitale, voilà.")),
        ({"languages": ["fr"]}, row_of("42", "42?"), row_of("Paris is the capital of France.")),
    ],
)
def test_a_filter_drops_rows_and_its_reason_names_it(values: dict[str, Any], kept: Row, dropped: Row) -> None:
    [name] = values
    filters = FilterParams.model_validate(OFF.model_dump() | values)
    assert filter_reason(dropped, OFF) is filter_reason(kept, filters) is None
    assert f"prepare.filters.{name}" in str(filter_reason(dropped, filters))


CODE = "```python\nprint('Bonjour tout le monde')\n```"
LINK = "https://example.org/le/chat/dort/sur/le/canape"
TEXTS = [
    ("en", "Describe a process of making crepes."),
    ("en", "SHOUTING IN CAPITALS IS RUDE."),
    ("fr", "Le chat dort sur le canapé depuis hier soir."),
    ("de", "Die Katze schläft seit gestern auf dem Sofa."),
    ("es", "El gato duerme en el sofá desde ayer."),
    ("ru", "Париж является столицей Франции, и это большой город."),
    ("zh", "巴黎是法国的首都。"),
    ("zh", "你好"),
    ("zh", "请用 Python 写一个 quicksort 函数，并解释 pivot 的选择。"),
    ("ja", "パリはフランスの首都です。"),
    ("ko", "파리는 프랑스의 수도입니다."),
    ("en", "The Chinese word for hello is 你好, which every student learns on the first day."),
    *((UNDETERMINED, text) for text in ("", "42", "3.14159", "Berlin", "red", CODE, LINK, "🙂🙂🙂")),
]


@pytest.mark.parametrize(("code", "text"), TEXTS)
def test_the_language_of_a_text_is_detected_or_undetermined(code: str, text: str) -> None:
    assert language_of(text) == code


def test_a_short_answer_has_the_language_of_its_conversation() -> None:
    question = {"role": "user", "content": "Wie viele Tage hat das Jahr, wenn es kein Schaltjahr ist?"}
    assert language_of_row([question, {"role": "assistant", "content": "365"}]) == "de"
    assert language_of_row([question, {"role": "assistant", "content": "Il y en a trois cent soixante-cinq."}]) == "fr"
    assert language_of_row([question, {"role": "assistant", "content": None, "tool_calls": []}]) == "de"
