"""Unread columns are reported, columns that change the meaning are refused, and a suggested mapping works."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.columns import format_columns, parse_columns
from pipeline.data.formats import UnclearFormatError, open_rows, read_rows
from pipeline.data.readers import FormatError
from pipeline.data.records import Row
from pipeline.params import ColumnsParams

TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def write(folder: Path, *records: Any) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, {"category"}),
        ({"instruction": "Q", "output": "A", "id": None, "extra": "", "tags": []}, set()),
        ({"messages": [TALK[0] | {"name": "Ada", "id": 3}, TALK[1]]}, {"messages[].name", "messages[].id"}),
        ({"messages": [TALK[0] | {"thinking": "T"}, TALK[1]]}, {"messages[].thinking"}),
        ({"messages": TALK, "conversations": [{"role": "user", "content": "Q"}]}, {"conversations"}),
        (
            {"conversations": [{"from": "human", "value": "Q", "n": 1}, {"from": "gpt", "value": "A"}]},
            {"conversations[].n"},
        ),
        ({"prompt": "Q", "response": "A", "source": "x", "label": 1}, {"source", "label"}),
        ({"conversation": [{"human": "Q", "assistant": "A", "turn": 1}]}, {"conversation[].turn"}),
        ({"instruction": "Q", "instances": [{"input": "", "output": "A", "id": 1}]}, {"id"}),
        ({"text": "Q", "label": "A", "id": 1}, {"id"}),
        ({"messages": TALK, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, {"functions"}),
        ({"q": "Q", "a": "A", "task": "t", "images": ["x.png"], "label": False}, {"images", "label"}),  # mapped
    ],
)
def test_columns_and_keys_that_are_not_read_are_reported(
    tmp_path: Path, record: dict[str, Any], unused: set[str]
) -> None:
    columns = ColumnsParams(template="{q}?", response="a") if "q" in record else None
    file = open_rows(write(tmp_path, record), columns=columns)
    assert [type(row) for row in file.rows] == [Row]
    assert file.unused == unused


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {"id": "1", "customer_question": "Q?", "agent_answer": "A"},
            {"prompt": "customer_question", "response": "agent_answer"},
        ),
        ({"a": "Q", "b": "A much longer text"}, {"prompt": "a", "response": "b"}),
        ({"passage": "P", "query": "Q", "reply": "A"}, {"template": "{query}\n{passage}", "response": "reply"}),
        ({"title": "T", "summary": "S", "url": "https://example.org"}, {"prompt": "title", "response": "summary"}),
        ({"prompt one": "Q", "yes": "A", "n": 3}, {"prompt": "prompt one", "response": "yes"}),
        ({"Label": "good", "Text": "A long text"}, {"prompt": "Text", "response": "Label"}),
        ({"sentiment_label": "good", "review": "A long text"}, {"prompt": "review", "response": "sentiment_label"}),
    ],
)
def test_the_error_about_unknown_columns_suggests_a_mapping_that_works(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str]
) -> None:
    path = write(tmp_path, record)
    with pytest.raises(UnclearFormatError) as error:
        list(read_rows(path))
    guess = error.value.columns
    assert guess is not None and guess.model_dump(exclude_none=True) == columns
    assert shlex.quote(format_columns(guess)) in str(error.value)
    assert all(isinstance(row, Row) for row in read_rows(path, "auto", guess))


@pytest.mark.parametrize(
    ("mapping", "record", "corrected"),
    [
        ("prompt=text,response=LABEL", {"Text": "Q", "Label": "A"}, "prompt=Text,response=Label"),
        ("prompt=text,response=lable", {"text": "Q", "label": "A"}, "prompt=text,response=label"),
        ("template={Ask}? {b},response=a", {"ask": "Q", "b": "B", "a": "A"}, "response=a,template={ask}? {b}"),
    ],
)
def test_a_misspelt_column_of_a_mapping_is_corrected(
    tmp_path: Path, mapping: str, record: dict[str, Any], corrected: str
) -> None:
    path = write(tmp_path, record)
    with pytest.raises(UnclearFormatError) as error:
        open_rows(path, columns=parse_columns(mapping))
    assert error.value.columns == parse_columns(corrected) and f"{shlex.quote(corrected)}?" in str(error.value)
    assert [type(row) for row in open_rows(path, columns=error.value.columns).rows] == [Row]


def test_a_mapping_that_does_not_fit_a_file_of_a_known_format_is_answered_with_the_format(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "Q", "label": "A"})
    with pytest.raises(UnclearFormatError) as error:
        open_rows(path, columns=ColumnsParams(prompt="body", response="verdict"))
    assert (error.value.formats, error.value.columns) == (["classification"], None)
    assert "classification" in str(error.value) and "--columns" not in str(error.value)


NAME = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="=,\\"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(bool)
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(NAME, NAME)
def test_a_mapping_survives_the_command_line(prompt: str, response: str) -> None:
    template = ColumnsParams(template="Title, {title}\n{body}", response=response)
    for columns in (ColumnsParams(prompt=prompt, response=response), template):
        assert parse_columns(format_columns(columns)) == columns


BROKEN = ["", "question", "prompt=", "question=prompt,response=x", "prompt=q", "template={,response=a"]
BROKEN += ["template={q.x!r},response=a", "template={},response=a", "prompt=q,response=a,template={q}"]


@pytest.mark.parametrize("text", BROKEN)
def test_an_invalid_mapping_on_the_command_line_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_columns(text)
