"""Optional filters over single rows, each off until `prepare.filters` turns it on.

A row stays, stays with parts masked (said in its `repairs`), or becomes a `Rejected` with one of a few fixed reasons:
both can be counted. A pure function of the row: it runs in any worker, in any order.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.core.files import sha256_json
from pipeline.data.language import UNDETERMINED, language_of_row
from pipeline.data.personal_data import find_kinds, map_texts, mask_text, texts_of
from pipeline.data.records import Rejected, Row
from pipeline.params import FilterParams

ANSWER_SHORT = "its answer is shorter than prepare.filters.min_answer_chars"
ANSWER_LONG = "its answer is longer than prepare.filters.max_answer_chars"
ROW_SHORT = "shorter than prepare.filters.min_chars"
ROW_LONG = "longer than prepare.filters.max_chars"
LANGUAGE = "not in prepare.filters.languages"
REPETITIVE = "its answer repeats itself more than prepare.filters.max_repetition"
PERSONAL = "holds personal data (prepare.filters.pii)"
LINK = "holds a link (prepare.filters.links)"
REFUSAL = "an answer in it is a refusal (prepare.filters.refusals)"
NESTED = "nested too deeply to be searched"
REASONS = (NESTED, ANSWER_SHORT, ANSWER_LONG, ROW_SHORT, ROW_LONG, LANGUAGE, REPETITIVE, PERSONAL, LINK, REFUSAL)

# Only characters that may stand in an address (RFC 3986): Chinese text follows one without a space.
_LINK = re.compile(
    r"(?:https?|ftp)://[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+"
    r"|www\.(?<![A-Za-z0-9.@/-]....)[A-Za-z0-9-]+\.[A-Za-z0-9\-._~:/?#@!$&()*+,;=%]+"
)
_UNIT = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|\\w+")  # a word, or one character of Chinese or Japanese
_EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")

# "I'm sorry, but as an AI language model I cannot …", "很抱歉，我无法 …".
_AI = (
    r"an?\ (?:\w+[\ -]){0,3}(?:ai|artificial\ intelligence|language\ model|chat\ ?bot|virtual\ assistant)\b"
    r"[a-z\ -]{0,40}[,.]?\s*"
)
_NOT = (
    r"(?:(?:just\ |simply\ )?(?:can['’]?t|cannot|can\ not|won['’]t|will\ not|do\ not|don['’]t|am\ not|must\ decline)"
    r"|(?:am\ )?unable)"
)
_I_CANNOT = rf"(?:i\ {_NOT}|i['’]m\ (?:not|unable))"
_ABLE = (
    r"(?:\ (?:able|allowed|capable|programmed|designed|comfortable|going))?(?:\ (?:to|of|with))?\ (?:be\ able\ to\ )?"
)
_ANSWER = (
    "accurately|access|answer|assist|browse|complete|comply|condone|create|determine|discuss|engage|execute|fulfil|generate"
    "|help|identify|participate|perform|predict|process|produce|promote|provide|respond|retrieve|translate|write"
)
_REFUSAL = re.compile(
    rf"""\s*
    (?P<sorry>(?:
        (?:i['’]m|i\ am|we['’]re)?\s*(?:(?:very|so|really|truly|deeply)\ )?(?:sorry|afraid)\b[,.!]?\s*(?:but\ |that\ )?
      | (?:(?:my\ )?(?:sincere\ )?apologies|i\ apologi[sz]e)\b[,.!]?\s*(?:but\ |for\ [a-z\ ]{{1,40}}[,.]\s*(?:but\ )?)?
      | (?:unfortunately|regret(?:fully|tably))\b[,.]?\s*
    ){{1,3}})?
    (?:
        (?:as|being|since\ i(?:['’]m|\ am)|i(?:['’]m|\ am)(?:\ (?:just|only))?)\ {_AI}
        (?:and\ |but\ |so\ )*(?:{_I_CANNOT}|{_NOT})\b
      | {_I_CANNOT}(?:\ able)?(?:\ to)?\ (?:help|assist)\ (?:you\ )?with\ (?:that|this|your)
      | {_I_CANNOT}(?:\ able)?(?:\ to)?\ (?:fulfill?|comply\ with|complete|provide|generate)
        \ (?:that|this|your|the)\ (?:\w+\ )?(?:request|information|content|assistance)
      | (?(sorry)(?:  # after an apology a verb of answering is enough; "I cannot attend" may be a letter
            {_I_CANNOT}{_ABLE}(?:do\ (?:that|this)|{_ANSWER})
          | i\ (?:do\ not|don['’]t)\ (?:currently\ )?have
            \ (?:access|enough|sufficient|the\ (?:ability|capability)|any\ information|personal|real-time)
        )|(?!))
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_AI_ZH = "作为[一个名款位台种]{0,2}[^，。,]{0,12}(?:AI|人工智能|语言模型|机器人|虚拟助手|智能助手)[^，。,]{0,12}[，,]"
_REFUSAL_ZH = re.compile(
    rf"""\s*(?:
    我?(?:很|非常|十分|真的)?(?:抱歉|对不起|不好意思|遗憾)(?:地?告诉[您你])?[，,。！!\s]*(?:但是?)?[，,]?
    (?:{_AI_ZH})?我?(?:目前|暂时|现在)?还?(?:无法|不能|没有办法|没办法|没有能力|不具备|拒绝)[^，。]{{0,8}}?
    (?:帮|协助|回答|提供|完成|生成|满足|处理|访问|浏览|为[您你]|确定|判断|预测|查看|执行|给出|讨论|写|翻译|支持|回应|参与)
    |{_AI_ZH}(?:所以|因此|但是?)?我(?:目前|暂时|现在)?(?:还)?(?:无法|不能|没有|不会|不具备|并没有|并不|不可以|没办法)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_HOWEVER = re.compile(r"\b(?:however|instead|that said|but (?:i|here|if))\b|但|不过|然而", re.IGNORECASE)


def apply_filters(row: Row, filters: FilterParams) -> Row | Rejected:
    """What becomes of `row`: itself, a masked copy that says so in `repairs`, or why it is dropped.

    A dropped row's record is masked as the filters say: personal data that may not be trained on is not kept either.
    """
    try:
        if filters.links == "mask":
            row = _masked(row, _mask_links)
        personal = filters.pii != "keep" and bool(find_kinds(_everything(row)))
        if personal or (filters.pii != "keep" and row.group and find_kinds(row.group)):
            row = _masked(row, mask_text)
        reason = PERSONAL if filters.pii == "drop" and personal else _reason(row, filters)
    except RecursionError:
        reason = NESTED
    return row if reason is None else Rejected(row.source, reason, row.messages)


def repetition(text: str) -> float:
    """The fraction of `text` that repeats itself, 0 to 1: the larger of two of the measures of Rae et al. 2021 (Gopher,
    table A1, https://arxiv.org/abs/2112.11446): characters in lines that were there before, and characters in n-grams
    that were there before, n = 5 words. In Chinese and Japanese n is 10 characters, about as much text.
    """
    lines = [line.strip() for line in text.splitlines()]
    in_lines = _repeated([line for line in lines if line], 1) if len(lines) > 1 else 0.0
    units = _UNIT.findall(text)
    n = 10 if 2 * sum(map(len, _EAST_ASIAN.findall(text))) > len(units) else 5
    return max(in_lines, _repeated(units, n))


def is_refusal(answer: str) -> bool:
    """Whether `answer` only declines, in English or Chinese: it begins with a refusal, and what follows is short.

    An answer that excuses itself and then helps at length is not one, nor is a letter of regret that was asked for, nor
    a text that quotes or discusses a refusal.
    """
    if match := _REFUSAL.match(answer):
        most = 600  # characters
    elif match := _REFUSAL_ZH.match(answer):
        most = 200  # a Chinese character says as much as three letters
    else:
        return False
    rest = answer[match.end() :]
    return len(rest) <= (most // 3 if _HOWEVER.search(rest) else most)


def _repeated(units: list[str], n: int) -> float:
    """Characters of `units` that lie in an n-gram seen before, as a fraction of all; no character counts twice."""
    grams = list(zip(*(units[i:] for i in range(n)), strict=False))
    if len(set(grams)) == len(grams):  # most texts end here
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated, place = 0, 0
    while place < len(grams):
        if grams[place] in seen:
            repeated += sum(map(len, grams[place]))
            place += n
        else:
            seen.add(grams[place])
            place += 1
    return repeated / sum(map(len, units))


def _reason(row: Row, filters: FilterParams) -> str | None:
    """Why `row` is dropped, the cheapest test first, or None."""
    lengths = [len(_text(message)) for message in row.messages]
    for length, least, most, too_short, too_long in (
        (lengths[-1], filters.min_answer_chars, filters.max_answer_chars, ANSWER_SHORT, ANSWER_LONG),
        (sum(lengths), filters.min_chars, filters.max_chars, ROW_SHORT, ROW_LONG),
    ):
        if least is not None and length < least:
            return too_short
        if most is not None and length > most:
            return too_long
    answers = [message.get("content") or "" for message in row.messages if message["role"] == "assistant"]
    if filters.refusals == "drop" and any(map(is_refusal, answers)):
        return REFUSAL
    if filters.links == "drop" and _may_link(text := _everything(row)) and _LINK.search(text):
        return LINK
    if filters.max_repetition is not None and any(repetition(text) > filters.max_repetition for text in answers):
        return REPETITIVE
    if filters.languages is not None and language_of_row(row.messages) not in (*filters.languages, UNDETERMINED):
        return LANGUAGE
    return None


def _text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _everything(row: Row) -> str:
    """All text that the model would see of `row`, tool calls and tool definitions included."""
    texts = []
    for message in row.messages:
        texts.append(message.get("content") or "")
        texts += texts_of(message.get("tool_calls"))
    return "\n".join([*texts, row.tools or ""])


def _masked(row: Row, mask: Callable[[str], tuple[str, list[str]]]) -> Row:
    found: list[str] = []
    messages = []
    for message in row.messages:
        changed: dict[str, Any] = dict(message)
        for key in ("content", "tool_calls"):
            if message.get(key):
                changed[key], kinds = map_texts(message[key], mask)
                found += kinds
        messages.append(changed)
    tools, kinds = mask(row.tools) if row.tools else (row.tools, [])
    # A group only says what belongs together: under another name it still does.
    group = sha256_json(row.group)[:16] if row.group and mask(row.group)[1] else row.group
    repairs = dict.fromkeys(f"{kind} masked" for kind in [*found, *kinds])
    if not repairs and group == row.group:
        return row
    return replace(row, messages=messages, tools=tools, group=group, repairs=[*row.repairs, *repairs])


def _mask_links(text: str) -> tuple[str, list[str]]:
    masked = _LINK.sub(lambda match: f"<LINK>{match[0][len(_trimmed(match[0])) :]}", text) if _may_link(text) else text
    return masked, ["link"] if masked != text else []


def _may_link(text: str) -> bool:
    return "://" in text or "www." in text


def _trimmed(link: str) -> str:
    """`link` without the punctuation of the sentence or the Markdown around it."""
    opening = {")": "(", "]": "["}
    while link and (link[-1] in ".,;:!?'*" or link.count(link[-1]) > link.count(opening.get(link[-1], link[-1]))):
        link = link[:-1]
    return link
