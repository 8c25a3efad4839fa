"""The metrics: `text_metrics.py` is a local `evaluate` module, since the Hub's need a network.

Here is how answers are folded before they are compared, and what counts as a word in any script.
"""

import regex

# One token: a Han, kana, Hangul, Thai, Lao, Khmer or Burmese character with its marks, or a run of other letters and
# digits. ASCII text gives the tokens of rouge-score.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_SPACELESS}]\p{{M}}*|(?:(?![{_SPACELESS}_])\w)+")
_HAN = regex.compile(r"\p{Han}")
_BY_CHARACTER = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def words(text: str) -> list[str]:
    return list(_WORD.findall(text.lower()))


def tokeniser_for(text: str) -> str:
    """sacrebleu's tokeniser for `text`: zh for Chinese, char for Japanese, Thai, Lao, Khmer and Burmese, else 13a.

    `char` needs no dictionary, which MeCab's would, and whose version would be part of every score. Chinese with a rare
    kana in it stays Chinese; English words in a Chinese text are left whole by `zh`.
    """
    by_character = len(_BY_CHARACTER.findall(text))
    if by_character and 5 * by_character > len(_HAN.findall(text)):
        return "char"
    return "zh" if _HAN.search(text) else "13a"
