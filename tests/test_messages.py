"""What a turn says beside its text: reasoning, whether it is trained, its calls; and turns in an odd order."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.formats import read_rows
from pipeline.data.records import Rejected, Row

QUESTION = {"role": "user", "content": "Q"}


def read(folder: Path, *records: Any, name: str = "data.json") -> list[Row | Rejected]:
    (folder / name).write_text(json.dumps(records))
    return list(read_rows(folder / name))


def row(folder: Path, record: Any) -> Row:
    [each] = read(folder, record)
    assert isinstance(each, Row), each
    return each


def reason(folder: Path, record: Any) -> str:
    [each] = read(folder, record)
    assert isinstance(each, Rejected), each
    return each.reason


def talk(*turns: Any) -> dict[str, Any]:
    return {"messages": [dict(zip(("role", "content"), turn, strict=True)) | more for *turn, more in turns]}


THOUGHT = {"role": "assistant", "content": "A", "reasoning_content": "T"}


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "A", "reasoning_content": "T"},
        {"content": "A", "reasoning": "T"},
        {"content": "A", "thinking": "T", "reasoning": "T"},
        {"content": [{"type": "reasoning", "text": "T"}, {"type": "text", "text": "A"}]},
        {"content": [{"type": "thinking", "thinking": "T"}, {"type": "text", "value": "A"}]},
        {"content": "<think>T</think>A"},
        {"content": "<think>\nT\n</think>\n\nA"},
        {"content": "T\n</think>\n\nA"},  # as DeepSeek R1 answers: the prompt opened it
    ],
)
def test_reasoning_of_every_spelling_is_kept_apart_from_the_answer(tmp_path: Path, answer: dict[str, Any]) -> None:
    assert row(tmp_path, {"messages": [QUESTION, {"role": "assistant"} | answer]}).messages == [QUESTION, THOUGHT]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Q", "output": "<think>T</think>A"},
        {"prompt": "Q", "completion": "<think>T</think> A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>\nT</think>\nA"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "thinking": "T"}]},
    ],
)
def test_every_format_keeps_reasoning(tmp_path: Path, record: dict[str, Any]) -> None:
    assert row(tmp_path, record).messages == [QUESTION, THOUGHT]


def test_an_indented_answer_keeps_its_indentation_behind_its_thoughts(tmp_path: Path) -> None:
    [_, answer] = row(tmp_path, {"instruction": "Q", "output": "<think>\nT\n</think>\n\n    y = x\n"}).messages
    assert answer["content"] == "    y = x\n"


def test_empty_thoughts_are_none_and_a_users_marks_are_text(tmp_path: Path) -> None:
    question = "What does <think>x</think> do?"
    messages = row(tmp_path, {"instruction": question, "output": "<think>\n\n</think>\n\nA"}).messages
    assert messages == [{"role": "user", "content": question}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ({"content": "<think>T"}, "do not end"),
        ({"content": "<think>T</think>\n"}, "is empty"),
        ({"content": "A <think>T</think> B"}, "in the middle"),
        ({"content": "<think>T</think>A<think>T</think>B"}, "in the middle"),
        ({"content": "<think>T</think>A", "reasoning": "T"}, "twice"),
        ({"content": "A", "reasoning": "T", "thinking": "U"}, "two different texts of reasoning"),
        ({"content": "A", "reasoning": {"steps": 2}}, "reasoning is dict"),
        ({"content": [{"type": "text", "text": 3}]}, "without text"),
    ],
)
def test_reasoning_that_could_mean_two_things_is_rejected(tmp_path: Path, answer: dict[str, Any], what: str) -> None:
    assert what in reason(tmp_path, {"messages": [QUESTION, {"role": "assistant"} | answer]})


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_a_turn_that_is_not_trained_says_so_in_one_way(tmp_path: Path, flag: dict[str, Any]) -> None:
    yes = {key: type(value)(1) for key, value in flag.items()}
    expected = [{}, {"weight": 0}, {}, {}]
    record = talk(("user", "Q", flag), ("assistant", "A", flag), ("user", "R", {}), ("assistant", "B", yes))
    sharegpt = [
        {"from": "gpt" if turn["role"] == "assistant" else "human", "value": turn["content"]}
        | {key: value for key, value in turn.items() if key in flag}
        for turn in record["messages"]
    ]
    for each in (record, {"conversations": sharegpt}):
        messages = row(tmp_path, each).messages
        assert [{k: v for k, v in m.items() if k not in ("role", "content")} for m in messages] == expected


def test_what_follows_the_last_trained_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    each = row(
        tmp_path, talk(("user", "Q", {}), ("assistant", "A", {}), ("user", "R", {}), ("assistant", "B", {"weight": 0}))
    )
    assert [message["content"] for message in each.messages] == ["Q", "A"]
    assert each.repairs == ["turns after the last trained answer left out"]


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        ({"weight": 0.5}, "weight 0.5"),
        ({"loss_weight": "1"}, "loss_weight '1'"),
        ({"train": "no"}, "train 'no'"),
        ({"weight": 1, "train": False}, "weight 1, train False"),
        ({"weight": 0}, "marks every answer as not trained"),
    ],
)
def test_other_weights_and_rows_without_a_trained_turn_are_rejected(
    tmp_path: Path, flag: dict[str, Any], what: str
) -> None:
    assert what in reason(tmp_path, talk(("user", "Q", {}), ("assistant", "A", flag)))


def test_a_users_turn_cannot_be_trained(tmp_path: Path) -> None:
    assert "a user turn has train True" in reason(
        tmp_path, talk(("user", "Q", {"train": True}), ("assistant", "A", {}))
    )


CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]


@pytest.mark.parametrize("as_text", [True, False])
def test_function_calls_in_a_row_are_the_calls_of_one_turn(tmp_path: Path, as_text: bool) -> None:
    calls = [{"from": "function_call", "value": json.dumps(call) if as_text else call} for call in CALLS]
    results = [{"from": "observation", "value": value} for value in ("snow", "sun")]
    turns = [{"from": "human", "value": "Q"}, *calls, *results, {"from": "gpt", "value": "A"}]
    each = row(tmp_path, {"conversations": turns})
    tool_calls = [{"type": "function", "function": call} for call in CALLS]
    parallel = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
        *({"role": "tool", "content": value} for value in ("snow", "sun")),
        {"role": "assistant", "content": "A"},
    ]
    assert each.messages == row(tmp_path, {"messages": parallel}).messages == parallel
    assert each.repairs == []


def test_turns_of_one_role_in_a_row_are_joined_and_counted(tmp_path: Path) -> None:
    turns = [
        ("user", "Q", {}),
        ("user", "R", {}),
        ("assistant", "A", {}),
        ("assistant", "B", {"tool_calls": CALLS[:1]}),
    ]
    each = row(tmp_path, talk(*turns))
    call = {"type": "function", "function": CALLS[0]}
    assert each.messages == [
        {"role": "user", "content": "Q\n\nR"},
        {"role": "assistant", "content": "A\n\nB", "tool_calls": [call]},
    ]
    assert each.repairs == ["consecutive user turns joined", "consecutive assistant turns joined"]


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([("assistant", "A", {}), ("user", "Q", {}), ("assistant", "B", {})], "begins with an answer"),
        ([("user", "Q", {})], "no assistant turn"),
        ([("user", "Q", {}), ("assistant", "", {})], "content is empty"),
        ([("user", "Q", {}), ("assistant", " \n", {})], "content is empty"),
        ([("user", 3, {}), ("assistant", "A", {})], "content is int"),
        ([("user", {"text": "Q"}, {}), ("assistant", "A", {})], "content is dict"),
        ([("user", "Q", {}), ("assistant", "A", {"weight": 0}), ("assistant", "B", {})], "one is not trained"),
        (
            [("user", "Q", {}), ("assistant", "A", {}), ("assistant", "B", {"thinking": "T"})],
            "has reasoning in the second",
        ),
        ([("user", "Q", {}), ("assistant", "", {"tool_calls": CALLS}), ("assistant", "A", {})], "after a tool call"),
    ],
)
def test_turns_in_an_order_that_no_server_sees_are_rejected(tmp_path: Path, turns: list[Any], what: str) -> None:
    assert what in reason(tmp_path, talk(*turns))


def test_a_conversation_that_ends_with_the_user_loses_that_turn(tmp_path: Path) -> None:
    each = row(tmp_path, talk(("user", "Q", {}), ("assistant", "A", {}), ("user", "R", {})))
    assert (len(each.messages), len(each.repairs)) == (2, 1)


def test_a_system_message_in_the_middle_stays_where_it_is(tmp_path: Path) -> None:
    turns = [("user", "Q", {}), ("assistant", "A", {}), ("system", "S", {}), ("user", "R", {}), ("assistant", "B", {})]
    assert [m["role"] for m in row(tmp_path, talk(*turns)).messages] == [role for role, *_ in turns]


def test_a_system_column_comes_first_and_may_not_contradict_the_turns(tmp_path: Path) -> None:
    turns = [("system", "S", {}), ("user", "Q", {}), ("assistant", "A", {})]
    without = talk(*turns[1:]) | {"system": "S"}
    assert row(tmp_path, without).messages == row(tmp_path, talk(*turns) | {"system": "S"}).messages
    assert "another system message" in reason(tmp_path, talk(*turns) | {"system": "T"})


@pytest.mark.parametrize("text", ["    y = x / 2\n    return y\n", " A", "A\n\n"])
def test_spaces_around_an_answer_are_content(tmp_path: Path, text: str) -> None:
    for record in (
        {"prompt": "Q", "completion": text},
        {"instruction": "Q", "output": text},
        {"messages": [QUESTION, {"role": "assistant", "content": text}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}]},
    ):
        assert row(tmp_path, record).messages[-1]["content"] == text


def test_nulls_that_parquet_invents_are_no_keys_of_a_call(tmp_path: Path) -> None:
    def record(name: str, key: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {key: {"type": "string"}}}
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": {key: "2"}}}
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
        return {"tools": tools, "messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    records = [record("book", "guests"), record("dial", "person")]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    plain = [vars(each) | {"source": ""} for each in read(tmp_path, *records)]
    assert [vars(each) | {"source": ""} for each in read_rows(tmp_path / "data.parquet")] == plain


def test_a_null_that_json_writes_stays_an_argument(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"limit": None}}}
    messages = row(tmp_path, {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}]}).messages
    assert messages[-1]["tool_calls"] == [call]
