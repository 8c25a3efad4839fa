"""Instruction data of every known format, whole or broken, as rows and rejections."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.formats import FormatError, Rejected, Row, find_files, read_rows

ALPACA = {"instruction": "Q", "input": "", "output": "A"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def read(tmp_path: Path, *records: Any, format: str = "auto") -> list[Row | Rejected]:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(list(records)))
    return list(read_rows(path, format))


def row(tmp_path: Path, record: Any) -> Row:
    [read_row] = read(tmp_path, record)
    assert isinstance(read_row, Row), read_row
    return read_row


def turns(read_row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read_row.messages]


def test_alpaca_becomes_system_history_question_and_answer(tmp_path: Path) -> None:
    record = {"system": "S", "instruction": "Q2", "input": "I", "output": "A2", "history": [["Q1", "A1"]]}
    assert turns(row(tmp_path, record)) == [
        ("system", "S"),
        ("user", "Q1"),
        ("assistant", "A1"),
        ("user", "Q2\nI"),
        ("assistant", "A2"),
    ]


def test_alpaca_without_input_asks_the_instruction_alone(tmp_path: Path) -> None:
    assert turns(row(tmp_path, {"instruction": "Q", "output": "A"})) == [("user", "Q"), ("assistant", "A")]


def test_sharegpt_keeps_tool_calls_results_and_the_schema_of_the_tools(tmp_path: Path) -> None:
    tools = [{"name": "clock", "description": "Zeit, 时间", "parameters": {}}]
    record = {
        "system": "S",
        "tools": json.dumps(tools),
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "clock"}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon."},
        ],
    }
    read_row = row(tmp_path, record)
    assert [role for role, _ in turns(read_row)] == ["system", "user", "assistant", "tool", "assistant"]
    assert read_row.tools is not None
    assert json.loads(read_row.tools) == tools


def test_tools_as_objects_are_kept_as_json(tmp_path: Path) -> None:
    tools = [{"name": "clock"}]
    read_row = row(tmp_path, MESSAGES | {"tools": tools})
    assert read_row.tools is not None
    assert json.loads(read_row.tools) == tools


@pytest.mark.parametrize("tools", ["", "[]", [], None])
def test_an_empty_offer_of_tools_is_none(tmp_path: Path, tools: Any) -> None:
    assert row(tmp_path, SHAREGPT | {"tools": tools}).tools is None


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    assert turns(row(tmp_path, MESSAGES)) == [("user", "Q"), ("assistant", "A")]


def test_turns_after_the_last_answer_are_left_out_and_reported(tmp_path: Path) -> None:
    read_row = row(tmp_path, {"messages": [*MESSAGES["messages"], {"role": "user", "content": "Q2"}]})
    assert read_row.messages[-1]["role"] == "assistant"
    assert read_row.repairs == ["turns after the last answer left out"]


def test_optional_columns_are_kept(tmp_path: Path) -> None:
    read_row = row(tmp_path, ALPACA | {"task": "sum", "group": "g", "scoring": "text"})
    assert (read_row.task, read_row.group, read_row.scoring) == ("sum", "g", "text")


def test_group_zero_is_a_group(tmp_path: Path) -> None:
    assert row(tmp_path, ALPACA | {"group": 0}).group == "0"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_jsonl_reads_the_same_with_bom_crlf_and_blank_lines(tmp_path: Path, start: bytes, end: bytes) -> None:
    lines = [json.dumps(ALPACA | {"output": str(i)}).encode() for i in range(3)]
    (tmp_path / "data.jsonl").write_bytes(start + end.join([lines[0], b"", *lines[1:]]) + end)
    rows = list(read_rows(tmp_path / "data.jsonl"))
    assert [turns(r)[-1][1] for r in rows if isinstance(r, Row)] == ["0", "1", "2"]
    assert [r.source for r in rows] == ["data.jsonl:1", "data.jsonl:3", "data.jsonl:4"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_do_not_split_a_jsonl_record(tmp_path: Path, separator: str) -> None:
    record = ALPACA | {"output": f"a{separator}b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    [read_row] = read_rows(tmp_path / "data.jsonl")
    assert isinstance(read_row, Row)
    assert turns(read_row)[-1][1] == f"a{separator}b"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("data.jsonl", f'{json.dumps(ALPACA)}\n{{"instruction": "Q"', 2),
        ("data.json", '[\n{"instruction": "Q",\n"output": "A', 3),
        ("data.json", '[{"instruction": "Q", "output": ' + "9" * 5000 + "}]", 1),
        ("data.json", "[" * 100_000, 1),
    ],
)
def test_what_is_not_json_is_refused_with_file_and_line(tmp_path: Path, name: str, text: str, line: int) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=rf"{name}, line {line}\b"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([{"question": "Q", "answer": "A"}], r"has \['answer', 'question'\]"),
        ([ALPACA, SHAREGPT], "looks like alpaca and sharegpt"),
        ([ALPACA | SHAREGPT], "has .*conversations.*instruction"),
        ([["Q", "A"]], "has list"),
    ],
)
def test_a_file_of_no_or_two_formats_asks_which_it_is(tmp_path: Path, records: list[Any], what: str) -> None:
    with pytest.raises(FormatError, match=rf"{what}.*; expected Alpaca .*: name it with --format or split the file"):
        read(tmp_path, *records)


def test_naming_the_format_answers_the_question(tmp_path: Path) -> None:
    [read_row] = read(tmp_path, ALPACA | {"instruction": "other"} | SHAREGPT, format="sharegpt")
    assert isinstance(read_row, Row)
    assert turns(read_row)[0][1] == "Q"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (json.dumps(ALPACA).encode(), "holds one dict; expected a list"),
        ('[{"instruction": "größer"}]'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_file_without_a_list_of_records_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(FormatError, match=what):
        list(read_rows(tmp_path / "data.json"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": None}, "output is missing"),
        ({"output": ["A"]}, "output is list"),
        ({"output": float("nan")}, "output is float"),
        ({"output": {"text": "A"}}, "output is dict"),
        ({"output": ""}, "output is empty"),
        ({"output": " \n\t"}, "output is empty"),
        ({"instruction": "a\x00b"}, "instruction holds a NUL"),
        ({"output": "a\ud83d"}, "output holds half a surrogate pair"),
        ({"input": 3}, "input is int"),
        ({"history": [["Q"]]}, "history is not a list"),
        ({"history": 5}, "history is not a list"),
        ({"history": [["Q", "\ud83d"]]}, "half a surrogate"),
        ({"history": [["Q", "a\x00"]]}, "NUL"),
        ({"history": [["Q", " "]]}, "empty"),
        ({"task": "\ud83d"}, "half a surrogate"),
        ({"group": "\ud83d"}, "half a surrogate"),
        ({"tools": "\ud83d"}, "tools"),
        ({"tools": [{"name": "\ud83d"}]}, "half a surrogate"),
        ({"tools": "{not JSON"}, "tools .*JSON"),
        ({"scoring": "fuzzy"}, "scoring is 'fuzzy'; expected exact or text"),
    ],
)
def test_a_broken_record_is_rejected_with_a_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    whole, broken = read(tmp_path, ALPACA, ALPACA | change)
    assert isinstance(whole, Row)
    assert isinstance(broken, Rejected)
    assert broken.source == "data.json:[1]"
    assert re.search(reason, broken.reason)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "has no assistant turn"),
        ([{"from": "human", "value": "Q"}], "has no assistant turn"),
        ([{"from": "gpt", "value": "A"}], "begins with an answer to nothing"),
        ([{"from": "narrator", "value": "Q"}], "a turn is from 'narrator'"),
        ([{"from": ["gpt"], "value": "Q"}], "a turn is from"),
        (["Q", "A"], "a turn is from 'Q'"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "A"}], "value is missing"),
    ],
)
def test_a_broken_conversation_is_rejected_with_a_reason(tmp_path: Path, conversation: list[Any], reason: str) -> None:
    [broken] = read(tmp_path, {"conversations": conversation})
    assert isinstance(broken, Rejected)
    assert reason in broken.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
TEXT = st.sampled_from(["Q", "A", "", "\ud83d"]) | JSON
EXTRA = {"system": TEXT, "tools": TEXT, "task": JSON, "group": JSON, "scoring": st.sampled_from(["exact", "text", 1])}


def turn(speaker: str, content: str) -> st.SearchStrategy[Any]:
    roles = ["human", "gpt", "user", "assistant", "system", "tool"]
    return JSON | st.fixed_dictionaries({}, optional={speaker: st.sampled_from(roles) | JSON, content: TEXT})


RECORDS = {
    "alpaca": st.fixed_dictionaries(
        {"instruction": TEXT, "output": TEXT},
        optional=EXTRA | {"input": TEXT, "history": st.lists(st.lists(TEXT, max_size=3), max_size=2) | JSON},
    ),
    "sharegpt": st.fixed_dictionaries(
        {"conversations": st.lists(turn("from", "value"), max_size=4) | JSON}, optional=EXTRA
    ),
    "messages": st.fixed_dictionaries(
        {"messages": st.lists(turn("role", "content"), max_size=4) | JSON}, optional=EXTRA
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.mark.parametrize("format", RECORDS)
@settings(derandomize=True, deadline=None, max_examples=150)
@given(draw=st.data())
def test_every_record_becomes_a_row_or_a_rejection(folder: Path, format: str, draw: st.DataObject) -> None:
    records = draw.draw(st.lists(RECORDS[format] | JSON, min_size=1, max_size=4))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    rows = list(read_rows(path, format))
    assert [r.source for r in rows] == [f"data.json:[{i}]" for i in range(len(records))]
    for each in rows:
        if isinstance(each, Row):
            assert each.messages[-1]["role"] == "assistant"
            for message in each.messages:
                assert message["content"].strip()
            json.dumps(vars(each), ensure_ascii=False).encode()  # half a surrogate would not survive this
        else:
            assert each.reason


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(max_size=60))
@example('{"instruction": "Q", "output": "A"}\n{}\n[]')
def test_arbitrary_text_is_read_or_refused_with_a_sentence(folder: Path, text: str) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        rows = list(read_rows(path))
    except FormatError:
        return
    assert len(rows) == sum(bool(line.strip()) for line in text.split("\n"))


def test_a_folder_gives_its_data_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.json", "a.jsonl", "sub/c.json", "readme.md"):
        (tmp_path / name).write_text("[]")
    assert [p.name for p in find_files(tmp_path)] == ["a.jsonl", "b.json", "c.json"]


@pytest.mark.parametrize(("name", "what"), [("rows.csv", "ends in .csv"), ("none", "does not exist"), ("", "holds no")])
def test_a_path_without_data_files_is_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "rows.csv").write_text("Q,A\n")
    with pytest.raises(FormatError, match=what):
        find_files(tmp_path / name)
