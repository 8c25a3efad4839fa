"""Answers that only decline, in English and Chinese: "I'm sorry, but as an AI language model I cannot …".

An answer that excuses itself and then helps at length is not one, nor is a letter of regret that was asked for, nor a
text that quotes or discusses a refusal.
"""

import re

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


def is_refusal(answer: str) -> bool:
    """Whether `answer` only declines: it begins with a refusal, and what follows is short."""
    if match := _REFUSAL.match(answer):
        most = 600  # characters
    elif match := _REFUSAL_ZH.match(answer):
        most = 200  # a Chinese character says as much as three letters
    else:
        return False
    rest = answer[match.end() :]
    return len(rest) <= (most // 3 if _HOWEVER.search(rest) else most)
