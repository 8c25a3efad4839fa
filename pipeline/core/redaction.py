"""Removes secrets from text before a person, a log or a database sees it.

`***` replaces values of environment variables with secret-looking names, passwords in URIs, signatures in queries, and
tokens in known formats. Other secrets are not recognised.
"""

import base64
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote, quote_plus

HIDDEN = "***"
MIN_LENGTH = 6  # shorter values (1, true, dev) occur in ordinary text
P = ParamSpec("P")
R = TypeVar("R")

_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|WEBHOOK|(ACCESS|API|PRIVATE|SIGNING|ENCRYPTION)_?KEY",
    re.IGNORECASE,
)
# Names that match, but hold settings or paths.
_NO_SECRET = re.compile(r"PARALLELISM|_FILE$|_PATH$|_URL_ENV$|^TOKENIZERS_|_DIR$", re.IGNORECASE)
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^\s/@'\"<>]*:[^\s/'\"<>]*@", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key ids
    r"|\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|https://hooks\.slack\.com/[^\s'\"<>]+|https://[\w.-]*discord(app)?\.com/api/webhooks/[^\s'\"<>]+"
    r"|https://[\w.-]+\.webhook\.office\.com/[^\s'\"<>]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*|bearer\s+)[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
_QUERY = re.compile(
    r"([?&](?:x-amz-(?:signature|credential|security-token)|signature|sig|token|access_token|password|api_key|key)=)[^\s&'\"<>]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with everything that looks like a secret replaced; safe to call twice."""
    for spelling in _spellings(_secrets()):
        text = text.replace(spelling, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _SHAPES.sub(HIDDEN, text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _HEADER.sub(rf"\g<1>{HIDDEN}", text))


def has_credentials(text: str) -> bool:
    """Whether `text` contains a URI, a key or a webhook that gives its reader access to something."""
    return any(pattern.search(text) for pattern in (_USERINFO, _SHAPES, _HEADER, _QUERY))


def redact_process() -> None:
    """Redact every log record and uncaught exception of this process, those of libraries included."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        entry = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments; logging reports that
            entry.msg, entry.args = redact(entry.getMessage()), ()
        if entry.exc_info and entry.exc_info[1] is not None:
            entry.exc_text = redact("".join(traceback.format_exception(entry.exc_info[1])).rstrip("\n"))
        return entry

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
    sys.excepthook = uncaught


def redacted_errors(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with secrets removed from its errors: Prefect stores an exception's text as the run's state."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            error.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise

    return call


def _secrets() -> frozenset[str]:
    variables = [(name, value) for name, value in os.environ.items() if len(value) >= MIN_LENGTH]
    return frozenset(value for name, value in variables if _NAME.search(name) and not _NO_SECRET.search(name))


@lru_cache(maxsize=4)
def _spellings(secrets: frozenset[str]) -> list[str]:
    """Every spelling of each secret: plain, escaped for URLs, in JSON, in base64; the longest first."""
    spellings: set[str] = set()
    for value in secrets:
        encoded = base64.b64encode(value.encode()).decode()
        spellings |= {value, quote(value, safe=""), quote_plus(value), repr(value)[1:-1], encoded}
    return sorted(spellings, key=len, reverse=True)
