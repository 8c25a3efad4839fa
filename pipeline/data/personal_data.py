"""Personal data and secrets in a text: found by precise patterns and, where a kind has one, its check digits.

Each finding is replaced by a typed placeholder, such as <EMAIL>. A number that may as well be a quantity, a date, a
version or code is left alone: a mask in the wrong place teaches a model nonsense. Names and street addresses are not
looked for.
"""

import contextlib
import functools
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stdnum import iban, luhn
from stdnum.cn import ric

# Chinese has no spaces around a number, so \b and \w, which count its characters as letters, are of no use here. The
# first character of a match is consumed before what stands ahead of it is looked at: the search then skips by it.
_ALONE = r"(?<![A-Za-z0-9_.,/$¥€£].)(?<![0-9][-:].)"
_ENDS = r"(?![A-Za-z0-9_%])(?![.,:/-][0-9])"


@dataclass(frozen=True)
class Kind:
    """One kind of personal data: its placeholder is `<NAME>`, `words` are for people."""

    name: str
    words: str
    pattern: re.Pattern[str]
    accepts: Callable[[re.Match[str]], bool]


def find_kinds(text: str) -> list[str]:
    """What kinds of personal data `text` holds, in words, each once; in JSON also behind its escapes."""
    return mask_text(text)[1]


def mask_text(text: str) -> tuple[str, list[str]]:
    """`text` with personal data replaced, and the kinds replaced, in words; JSON stays JSON.

    Masking again changes nothing.
    """
    masked = text
    found: list[str] = []
    # A replacement can uncover another finding beside it, so until none is left; each round has fewer digits or @s.
    while kinds := [kind for kind in KINDS if _holds(kind, masked)]:
        for kind in kinds:
            masked = kind.pattern.sub(functools.partial(_replacement, kind), masked)
            found.append(kind.words)
    # Where a placeholder took a bare number's place, or an escape (\\n) hid a finding, values are masked one by one.
    if _leaves(text) and (not _leaves(masked) or any(map(find_kinds, _leaves(masked)))):
        with contextlib.suppress(RecursionError):
            tree, more = map_texts(json.loads(text), mask_text)
            masked, found = json.dumps(tree, ensure_ascii=False), [*found, *more]
    return masked, _union(found)


def map_texts(value: Any, change: Callable[[str], tuple[str, list[str]]]) -> tuple[Any, list[str]]:
    """`change` applied to every text, number and key in a tree of JSON values, and what it found in all of them.

    A number becomes a text only where `change` found something in it.
    """
    if isinstance(value, str):
        return change(value)
    found: list[str] = []
    if isinstance(value, int | float) and not isinstance(value, bool):
        changed, found = change(str(value))
        return (changed if found else value), found
    if isinstance(value, list):
        items = [map_texts(item, change) for item in value]
        return [item for item, _ in items], _union(*(kinds for _, kinds in items))
    if isinstance(value, dict):
        tree: dict[str, Any] = {}
        for key, item in value.items():
            name, in_name = change(str(key))
            changed, in_item = map_texts(item, change)
            while name in tree:  # two addresses as keys: neither value is lost
                name += "_"
            tree[name] = changed
            found = _union(found, in_name, in_item)
        return tree, found
    return value, found


def texts_of(value: Any) -> Iterator[str]:
    """Every text, number and key in a tree of JSON values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _leaves(text: str) -> list[str]:
    """The texts, numbers and keys in `text` when it is a JSON object or list, of sane depth; else none."""
    if text.lstrip()[:1] not in ("{", "["):
        return []
    try:
        return list(texts_of(json.loads(text)))
    except (ValueError, RecursionError):
        return []


def _holds(kind: Kind, text: str) -> bool:
    return any(kind.accepts(match) for match in kind.pattern.finditer(text))


def _replacement(kind: Kind, match: re.Match[str]) -> str:
    if not kind.accepts(match):
        return match[0]
    value = match.groupdict().get("value") or match[0]
    return match[0].replace(value, f"<{kind.name}>")


def _union(*lists: list[str]) -> list[str]:
    return list(dict.fromkeys(word for words in lists for word in words))


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9]", "", match[0])


def _is_secret(match: re.Match[str]) -> bool:
    value = match.groupdict().get("value")
    if value is None:  # a form that only keys have
        return True
    digit, lower, upper = (any(map(test, value)) for test in (str.isdigit, str.islower, str.isupper))
    return digit and ((lower and upper) or re.fullmatch(r"(?:sk-)?[0-9a-f]{32,}", value) is not None)


def _is_email(match: re.Match[str]) -> bool:
    local, domain = match[0].split("@")
    # `git@github.com:…` is how a repository is written, `package@1.0.0-beta.rc` how a version is.
    return local != "git" and not re.match(r"[0-9]+\.[0-9]+\.", domain)


def _is_card(match: re.Match[str]) -> bool:
    """An issuer's prefix and length (ISO/IEC 7812), then Luhn's check digit, which alone passes every tenth number."""
    number = _digits(match)
    issuers = (
        (r"4", (13, 16, 19)),  # Visa
        (r"5[1-5]|2(?:2[2-9]|[3-6]|7[01])", (16,)),  # Mastercard
        (r"3[47]", (15,)),  # American Express
        (r"3(?:0[0-5]|[689])", (14,)),  # Diners Club
        (r"35", (16,)),  # JCB
        (r"6(?:011|4[4-9]|5)", (16, 19)),  # Discover
        (r"62", (16, 17, 18, 19)),  # UnionPay
    )
    if not any(len(number) in lengths and re.match(prefix, number) for prefix, lengths in issuers):
        return False
    return bool(luhn.is_valid(number)) and len(set(number)) > 1


def _is_phone(match: re.Match[str]) -> bool:
    number = _digits(match)
    return 9 <= len(number) <= 15 and not number.endswith("000000")


def _is_ip(match: re.Match[str]) -> bool:
    """A public address (the rule of datatrove's PIIFormatter) that is neither a version nor a numbered section."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 6 or not address.is_global:
        return address.is_global
    before = match.string[max(0, match.start() - 16) : match.start()].casefold().rstrip(" :v")
    versions = ("version", "ver", "release", "build", "firmware", "driver", "update", "section", "版本", "版")
    # 1.2.3.4 and 4.18.0.3 are versions far more often than addresses.
    return not before.endswith(versions) and sum(len(part) > 1 for part in match[0].split(".")) >= 2


# Order matters: what may contain another kind comes first.
KINDS = (
    Kind(  # forms as their issuers publish them; compare detect-secrets and gitleaks
        "SECRET",
        "key or password",
        re.compile(
            r"""-----BEGIN\ (?:[A-Z]{1,20}\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?-----
            (?: (?:[^-]|-(?!----)){0,20000}-----END\ (?:[A-Z]{1,20}\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?-----
              | (?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{16,}+)* )
            | (?<![A-Za-z0-9_-])(?:
            (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])
            | LTAI[A-Za-z0-9]{16,20}(?![A-Za-z0-9]) | AKID[A-Za-z0-9]{32}(?![A-Za-z0-9])
            | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_[A-Za-z0-9_]{50,} | glpat-[A-Za-z0-9_-]{20,}
            | xox[abeoprs]-[A-Za-z0-9-]{20,} | AIza[A-Za-z0-9_-]{35} | hf_[A-Za-z0-9]{34,} | npm_[A-Za-z0-9]{36}
            | pypi-AgE[A-Za-z0-9_-]{50,} | [rs]k_(?:live|test)_[A-Za-z0-9]{20,}
            | SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}
            | eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}
            | (?P<value>sk-(?=[A-Za-z0-9_-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]{20,}))""",
            re.VERBOSE,
        ),
        _is_secret,
    ),
    Kind(  # a long value of mixed characters that is said to be a key
        "SECRET",
        "key or password",
        re.compile(
            r"""(?:[Kk]ey|KEY|[Ss]ecret|SECRET|[Tt]oken|TOKEN|[Pp]ass(?:word|wd)|PASS(?:WORD|WD)|密钥|密码)
            ["']?\s{0,3}(?::=|=>|[:=：]|是|为)\s{0,3}["'“]?
            (?P<value>[A-Za-z0-9+/_-]{16,200}={0,2})(?![A-Za-z0-9+/_.(\[-])""",
            re.VERBOSE,
        ),
        _is_secret,
    ),
    Kind(
        "EMAIL",
        "e-mail address",
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_(-])"
        ),
        _is_email,
    ),
    Kind(
        "IBAN",
        "bank account number (IBAN)",
        re.compile(
            r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)"
            r"(?![A-Za-z0-9])"
        ),
        lambda match: iban.is_valid(match[0]),
    ),
    Kind(
        "CN_ID",
        "Chinese identity number",
        re.compile(rf"[1-8]{_ALONE}[0-9]{{16}}[0-9Xx]{_ENDS}"),
        lambda match: ric.is_valid(match[0]),
    ),
    Kind(
        "CREDIT_CARD",
        "card number",
        re.compile(
            rf"[2-6]{_ALONE}(?:[0-9]{{12,18}}|[0-9]{{3}}([ -])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{1,4}}(?:\1[0-9]{{1,3}})?"
            rf"|[0-9]{{3}}([ -])[0-9]{{6}}\2[0-9]{{4,5}}){_ENDS}"
        ),
        _is_card,
    ),
    Kind(
        "PHONE",
        "telephone number",
        re.compile(
            r"(?:\+(?<![A-Za-z0-9_)\]].)(?<![0-9)] .)(?:[1-9][0-9]{9,14}"  # +8613800138000
            r"|[1-9][0-9]{0,2}[ .-]?(?:\(0?[0-9]{1,4}\)[ .-]?)?[0-9]{1,11}(?:[ .-][0-9]{2,8}){0,5})"  # +44 20 7946 0958
            rf"|1{_ALONE}[3-9][0-9]([ -]?)[0-9]{{4}}\1[0-9]{{4}}(?![元个人年次万亿])"  # mobile, mainland China
            rf"|86{_ALONE}[ -]?1[3-9][0-9]([ -]?)[0-9]{{4}}\2[0-9]{{4}}"
            rf"|[(0]{_ALONE}0?(?:10|2[0-9]|[3-9][0-9]{{2}})(?:-|\) ?)[2-8][0-9]{{6,7}}"  # fixed line, mainland China
            rf"|\({_ALONE}[2-9][0-9]{{2}}\) ?[2-9][0-9]{{2}}[ .-][0-9]{{4}}"  # North America
            rf"|[2-9]{_ALONE}[0-9]{{2}}([.-])[2-9][0-9]{{2}}\3[0-9]{{4}}"
            rf"|1{_ALONE}([.-])[2-9][0-9]{{2}}\4[2-9][0-9]{{2}}\4[0-9]{{4}}){_ENDS}"
        ),
        _is_phone,
    ),
    Kind(
        "IP_ADDRESS",
        "IP address",
        re.compile(r"[0-9](?<![A-Za-z0-9_.-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9_-])(?!\.[0-9])"),
        _is_ip,
    ),
    Kind(
        "IP_ADDRESS",
        "IP address",
        re.compile(
            r"[23](?<![A-Za-z0-9_:.].)[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![A-Za-z0-9_:])"
        ),
        _is_ip,
    ),
)
