"""Records of every known format, valid or broken, become rows or rejections."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.formats import find_files, read_rows
from pipeline.data.known_formats import FORMATS, configure_format
from pipeline.data.readers import FormatError
from pipeline.data.records import Rejected, Row
from pipeline.params import ColumnsParams, Format

ALPACA = {"instruction": "Q", "input": "", "output": "A"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
MESSAGES = {"messages": [QUESTION, ANSWER]}
PARTS_OF_TEXT = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
PICTURE = [*PARTS_OF_TEXT, {"type": "image_url", "image_url": {"url": "x"}}]


def read(folder: Path, *records: Any, format: str = "auto", columns: Any = None) -> list[Row | Rejected]:
    (folder / "data.json").write_text(json.dumps(list(records)))
    return list(read_rows(folder / "data.json", format, columns))


def row(tmp_path: Path, record: Any) -> Row:
    [read_row] = read(tmp_path, record)
    assert isinstance(read_row, Row), read_row
    return read_row


def turns(read_row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read_row.messages]


def said(*texts: str, system: str | None = None) -> list[tuple[str, str]]:
    """Turns of user and assistant, alternating."""
    before = [] if system is None else [("system", system)]
    return before + [("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def alpaca(instruction: str, answer: str = "A2", **others: str) -> dict[str, Any]:
    return {"instruction": instruction, "output": answer, **others}


def answered(**message: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant"} | message]}


def called(**function: Any) -> dict[str, Any]:
    return answered(tool_calls=[{"function": function}])


EVERY_COLUMN = ColumnsParams(prompt="q", response="a", system="s", history="h", task="kind", group="about")
TEMPLATE = ColumnsParams(response="text", template='Write {n} lines about "{title}" {{JSON}}')
LEFT_OUT = ["turns after the last answer left out"]


@pytest.mark.parametrize(
    ("record", "expected", "others"),
    [
        (
            {"system": "S", "instruction": "Q2", "input": "I", "output": "A2", "history": [["Q1", "A1"]]},
            said("Q1", "A1", "Q2\nI", "A2", system="S"),
            {},
        ),
        (alpaca("Q", "A"), said("Q", "A"), {"task": "default", "group": None, "scoring": None, "tools": None}),
        (MESSAGES, said("Q", "A"), {"repairs": []}),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, said("Q", "A"), {"repairs": LEFT_OUT}),
        ({"data": ["Q", "A", "Q2"]}, said("Q", "A"), {"repairs": LEFT_OUT}),
        ({"messages": [{"role": "user", "content": PARTS_OF_TEXT}, ANSWER]}, said("Q?", "A"), {}),
        ({"instruction": "Q", "context": "C", "response": "A"}, said("Q\nC", "A"), {}),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, said("Q", "A", system="S"), {}),
        ({"question": "1+1?", "answer": 2}, said("1+1?", "2"), {}),
        (ALPACA | {"task": "sum", "group": "g", "scoring": "text"}, said("Q", "A"),
         {"task": "sum", "group": "g", "scoring": "text"}),
        (ALPACA | {"group": 0, "images": []}, said("Q", "A"), {"group": "0"}),
        ({"text": "### Human: Q\n### Assistant: A"}, said("Q", "A"), {}),
        *((SHAREGPT | {"tools": none}, said("Q", "A"), {"tools": None}) for none in ("", "[]", [], None)),
        # a dialogue in one field, and one that is only quoted
        (alpaca("Human:Q1\nAssistant:A1\nHuman:Q2\nAssistant:", input=""), said("Q1", "A1", "Q2", "A2"), {}),
        (alpaca("Human: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:"), said("Q1", "A1", "Q2", "A2"), {}),
        (alpaca("Human:Q1\nAssistant:A1\nHuman:Q2\nAssistant:\n"), said("Q1", "A1", "Q2", "A2"), {}),
        (alpaca("Continue:\nHuman: hi\nAssistant: hello"), said("Continue:\nHuman: hi\nAssistant: hello", "A2"), {}),
        # with mapped columns
        ({"q": "Q2", "a": "A2", "s": "S", "h": [["Q1", "A1"]], "kind": "sum", "about": 7},
         said("Q1", "A1", "Q2", "A2", system="S"), {"columns": EVERY_COLUMN, "task": "sum", "group": "7"}),
        ({"title": "{n}", "n": 3, "text": "T"}, said('Write 3 lines about "{n}" {JSON}', "T"), {"columns": TEMPLATE}),
    ],
)  # fmt: skip
def test_a_record_becomes_these_turns(
    tmp_path: Path, record: Any, expected: list[tuple[str, str]], others: dict[str, Any]
) -> None:
    others = dict(others)
    [read_row] = read(tmp_path, record, columns=others.pop("columns", None))
    assert isinstance(read_row, Row), read_row
    assert turns(read_row) == expected
    assert {name: getattr(read_row, name) for name in others} == others


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        *(
            (ALPACA | change, reason)
            for change, reason in [
                ({"output": None}, "output is missing"),
                ({"output": ["A"]}, "a message has role 'A'"),
                ({"output": float("nan")}, "output is float"),
                ({"output": " \n\t"}, "output is empty"),
                ({"instruction": "a\x00b"}, "instruction .*NUL"),
                ({"output": "a\ud83d"}, "output .*half a surrogate pair"),
                ({"input": 3}, "input is int"),
                ({"history": [["Q"]]}, "history is not a list"),
                ({"history": 5}, "history is not a list"),
                ({"group": 10**30}, "write it as text"),
                ({"group": float("nan")}, "write it as text"),
                ({"tools": [{"name": "\ud83d"}]}, "half a surrogate"),
                ({"tools": "{not JSON"}, "tools .*JSON"),
                ({"scoring": "fuzzy"}, "scoring is 'fuzzy'; expected exact or text"),
                # unpaired preference data, whose bad answers would be trained too; pictures and sound
                ({"label": True}, "column label "),
                ({"label": "FALSE"}, "column label "),
                ({"kto_tag": False}, "column kto_tag "),
                ({"images": ["x"]}, "has images, and only text"),
                ({"audio": "x"}, "has audio, and only text"),
            ]
        ),
        *(
            ({"conversations": conversation}, reason)
            for conversation, reason in [
                ([], "has no assistant turn"),
                ([{"from": "human", "value": "Q"}], "has no assistant turn"),
                ([{"from": "gpt", "value": "A"}], "starts with an answer"),
                ([{"from": "narrator", "value": "Q"}], "a message has role 'narrator'"),
                ([SHAREGPT["conversations"][0], "A"], "a message has role 'A'"),
                (["Q", " "], "conversations is empty"),
                ([{"from": "human", "value": None}, {"from": "gpt", "value": "A"}], "content is missing"),
            ]
        ),
        (called(name="f", arguments="{"), "arguments is not JSON"),
        (called(name="f", arguments="[1]"), "arguments of 'f' are a list"),
        (called(name="f", arguments='{"x": NaN}'), "arguments cannot be written"),
        (answered(tool_calls=[{}]), "has no function name"),
        (answered(tool_calls=1), "tool_calls is not a list"),
        (answered(content=None), "content is missing"),
        ({"messages": [{"role": "user", "content": PICTURE}, ANSWER]}, "content has a part of type 'image_url'"),
        ({"question": "1/2?", "answer": 0.5}, "answer is float"),
        (alpaca("Human: Q\nAssistant: A"), "does not end with Assistant:"),
        (alpaca("Human: Q\nHuman: Q\nAssistant:"), "do not alternate"),
        (alpaca("Human: Q\nAssistant:", input="I"), "column input"),
    ],
)
def test_a_broken_record_is_rejected_with_a_reason(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    [broken] = read(tmp_path, record)
    assert isinstance(broken, Rejected)
    assert broken.source == "data.json:[0]"
    assert re.search(reason, broken.reason)


def test_every_spelling_of_a_tool_call_gives_the_same_messages(tmp_path: Path) -> None:
    text, arguments = '{"zone": "UTC"}', {"zone": "UTC"}
    result = {"role": "tool", "name": "clock", "tool_call_id": "c1", "content": "12:00"}
    for role, spelling in (
        ("tool", {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": text}}]}),
        ("tool", {"tool_calls": [{"id": "c1", "function": {"name": "clock", "arguments": arguments}}]}),
        ("function", {"function_call": {"name": "clock", "arguments": text}}),
    ):
        call = {"role": "assistant", "content": None} | spelling
        messages = row(tmp_path, {"messages": [QUESTION, call, result | {"role": role}, ANSWER]}).messages
        assert messages[1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": arguments}
        assert messages[2] == result


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"prompt": "Q", "completion": "A"}, "prompt-completion"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt-completion"),
        ({"system_prompt": "", "question": "Q", "response": "A", "id": "x"}, "openorca"),
        ({"id": "1", "data": ["Q", "A"]}, "ultrachat"),
        ({"prompt": "Q", "prompt_id": "1", "messages": [QUESTION, ANSWER]}, "messages"),
        ({"conversations": [QUESTION, ANSWER]}, "messages"),
        ({"instruction": "Q", "instances": [{"input": "", "output": "A"}]}, "self-instruct"),
        ({"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction …"}, "alpaca"),
        ({"text": "Q", "label": "A"}, "classification"),
        ({"messages": json.dumps([QUESTION, ANSWER])}, "messages"),  # a cell of a CSV file
        ({"conversation": [QUESTION, ANSWER]}, "messages"),
        ({"conversation": [{"human": "Q", "assistant": "A"}]}, "turn-pairs"),
        ({"conversations": [{"input": "Q", "output": "A"}]}, "turn-pairs"),
        ({"conversations": ["Q", "A"]}, "ultrachat"),
        ({"messages": json.dumps(["Q", "A"])}, "ultrachat"),
        ({"conversation": SHAREGPT["conversations"]}, "sharegpt"),
        ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, "dolly"),
        ({"question": "Q", "answer": "A"}, "question-answer"),
        ({"prompt": "Q", "response": "A"}, "question-answer"),
        ({"prompt": [QUESTION], "response": "A"}, "question-answer"),
        ({"query": "Q", "response": "A", "type": "x"}, "question-answer"),
    ],
)
def test_a_format_is_recognised_by_its_keys(tmp_path: Path, record: dict[str, Any], format: str) -> None:
    assert turns(row(tmp_path, record)) == said("Q", "A")
    assert turns(read(tmp_path, record, format=format)[0]) == said("Q", "A")  # type: ignore[arg-type]


def tree(*messages: tuple[str, str | None, float | None, dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAssistant messages from (id, parent, rank, other keys); ids start with Q for questions, A for answers."""
    roles = {"Q": "prompter", "A": "assistant"}
    return [
        {"message_id": id, "parent_id": parent, "rank": rank, "text": id, "message_tree_id": "t", "lang": "en"}
        | {"role": roles[id[0]], **others}
        for id, parent, rank, others in messages
    ]


def test_the_best_path_of_each_message_tree_is_a_row_whatever_the_order(tmp_path: Path) -> None:
    messages = tree(
        ("Q1", None, None, {}), ("A1", "Q1", 1.0, {}), ("A2", "Q1", 0.0, {}), ("A3", "Q1", -1.0, {"deleted": True}),
        ("Q2", "A2", None, {}), ("A4", "Q2", None, {}),
        ("Q9", None, None, {}), ("A9", "Q9", None, {}), ("A8", "lost", None, {}),
    )  # fmt: skip
    for records in (messages, messages[::-1]):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        rows = list(read_rows(tmp_path / "data.jsonl"))
        by_size = sorted((row for row in rows if isinstance(row, Row)), key=lambda row: len(row.messages))
        assert [[m["content"] for m in row.messages] for row in by_size] == [["Q9", "A9"], ["Q1", "A2", "Q2", "A4"]]
        assert [len(row.repairs) for row in by_size] == [0, 1]
        [rejected] = [r for r in rows if isinstance(r, Rejected)]
        assert json.loads(rejected.record)["message_id"] == "A8"
        assert {r.source for r in rows} == {f"data.jsonl:{records.index(messages[i]) + 1}" for i in (0, 6, 8)}


def test_messages_whose_parents_form_a_circle_are_rejected(tmp_path: Path) -> None:
    records = tree(("Q1", None, None, {}), ("A1", "Q1", None, {}), ("A2", "A3", None, {}), ("A3", "A2", None, {}))
    assert [type(row) for row in read(tmp_path, *records)] == [Row, Rejected, Rejected]


def test_every_instance_of_self_instruct_is_a_row(tmp_path: Path) -> None:
    instances = [{"input": "I", "output": "A"}, {"input": "", "output": "B"}, {"output": ""}]
    first, second, third = read(tmp_path, {"instruction": "Q", "instances": instances})
    assert isinstance(first, Row) and turns(first) == said("Q\nI", "A")
    assert isinstance(second, Row) and second.source == "data.json:[0]#1"
    assert isinstance(third, Rejected) and third.reason == "output is empty"


def test_classes_become_their_names_and_digits_without_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
    table = pa.table({"text": ["bad", "good", "unknown"], "label": [0, 1, -1]})
    pq.write_table(table, tmp_path / "plain.parquet")
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "named.parquet")
    question = ColumnsParams(template="Is it neg or pos?\n{text}")
    first, second, third = read_rows(tmp_path / "named.parquet", "auto", question)
    assert isinstance(first, Row) and isinstance(second, Row) and isinstance(third, Rejected)
    assert turns(first) == said("Is it neg or pos?\nbad", "neg")
    assert (second.messages[1]["content"], second.scoring, second.task) == ("pos", "exact", "classification")
    assert "label is -1" in third.reason
    plain = [r.messages[1]["content"] for r in read_rows(tmp_path / "plain.parquet") if isinstance(r, Row)]
    assert plain == ["0", "1", "-1"]


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([{"ask": "Q", "say": "A"}], "ask, say .*--columns prompt=ask,response=say,.*: alpaca "),
        ([], "no records"),
        ([ALPACA, SHAREGPT], "looks like alpaca and sharegpt; "),
        ([ALPACA | SHAREGPT], "conversations, input, instruction, output and looks like alpaca and sharegpt;"),
        ([["Q", "A"]], "type list .*known format"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], "preference pairs .*response=chosen"),
        ([ALPACA | {"chosen": "A", "rejected": "B"}], "preference pairs .*response=chosen"),
        ([{"text": "T", "id": 1}], "id, text .*known format.*--columns template=…,response=…"),
    ],
)
def test_a_file_that_fits_no_format_or_two_is_refused(tmp_path: Path, records: list[Any], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        read(tmp_path, *records)


KEYS = "from value role content thinking weight train tool_calls function name arguments human assistant input output "
KEYS += "messages repairs parent_id message_id text rank"
SPEAKERS = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "prompter"])
PARTS = ["Human:", "Assistant:", "\nHuman:", "\nAssistant:", "<think>", "</think>", "\n", "A", "exact", "\ud83d"]
VALUE = st.recursive(
    st.none()
    | st.sampled_from([0, 1, True, False, 2.5, float("nan"), 10**30])
    | SPEAKERS
    | st.lists(st.sampled_from(PARTS), max_size=5).map("".join)
    | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"from": SPEAKERS, "value": VALUE}) | st.fixed_dictionaries(
    {"role": SPEAKERS, "content": VALUE}, optional={"tool_calls": VALUE, "thinking": VALUE, "weight": VALUE}
)


COLUMNS = ColumnsParams(response="a", template="{q}?", system="s", history="h", tools="t", task="k", group="g")


@pytest.mark.parametrize("format", sorted({*FORMATS, "columns"} - {"belle", "dolly", "openorca", "classification"}))
@settings(derandomize=True, deadline=None, max_examples=20)
@given(draw=st.data())
def test_every_record_becomes_rows_or_rejections(tmp_path_factory: Any, format: str, draw: st.DataObject) -> None:
    columns = COLUMNS if format == "columns" else None
    names = sorted(configure_format(format, columns, {}).reads)
    record = st.fixed_dictionaries({}, optional=dict.fromkeys(names, VALUE | st.lists(TURN, max_size=4)))
    records: list[Any] = draw.draw(st.lists(record | VALUE, min_size=1, max_size=4))
    path = tmp_path_factory.getbasetemp() / "data.json"
    path.write_text(json.dumps([dict.fromkeys(names, ""), *records]))  # the first record has every column
    rows = list(read_rows(path, "auto" if columns else format, columns))
    sources = {row.source.partition("#")[0] for row in rows}
    assert format == "openassistant" or sources == {f"data.json:[{i}]" for i in range(len(records) + 1)}
    for row in rows:
        if isinstance(row, Rejected):
            assert row.reason
            continue
        assert row.messages[-1]["role"] == "assistant"
        assert row.messages[0]["role"] != "assistant"
        assert all(message["content"].strip() or message["tool_calls"] for message in row.messages)
        json.dumps(vars(row), ensure_ascii=False, allow_nan=False).encode()  # fails for half a surrogate pair


def test_params_accept_every_format() -> None:
    assert set(get_args(Format)) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("names", "data"),
    [
        (("b.json", "a.jsonl.gz", "sub/c.parquet", "readme.md", "rejected.jsonl"),
         ["a.jsonl.gz", "b.json", "rejected.jsonl", "c.parquet"]),
        (("rows-0123.parquet", "snapshot.json", "rejected.jsonl"), ["rows-0123.parquet"]),  # notes of an ingest
    ],
)  # fmt: skip
def test_a_folder_gives_its_data_files_in_name_order(tmp_path: Path, names: tuple[str, ...], data: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_text("[]")
    assert [file.name for file in find_files(tmp_path)] == data
