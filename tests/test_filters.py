"""Each filter drops the rows it is for; a text's language is right, or "und"."""

from typing import Any

import pytest
from conftest import ROOT

from pipeline.data.filters import UNDETERMINED, filter_reason, language_of, language_of_row
from pipeline.data.records import Row
from pipeline.params import FilterParams
from pipeline.settings import load_params

OFF = load_params(ROOT / "params.yaml").prepare.filters


def row(answer: str, question: str = "Say something.") -> Row:
    return Row([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source="f.json:[0]")


@pytest.mark.parametrize(
    ("values", "kept", "dropped"),
    [
        ({"min_answer_chars": 3}, row("abc"), row("ab")),
        ({"max_answer_chars": 3}, row("abc"), row("abcd")),
        ({"min_chars": 5}, row("abc", "de"), row("ab", "de")),
        ({"max_chars": 5}, row("abc", "de"), row("abc", "def")),
        ({"languages": ["zh"]}, row("巴黎是法国的首都。"), row("Paris est la capitale, voilà.")),
        ({"languages": ["fr"]}, row("42", "42?"), row("Paris is the capital of France.")),
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
