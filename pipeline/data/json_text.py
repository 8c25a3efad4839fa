"""JSON texts of instruction data: the elements of a list that is read as a stream, and what one record says.

What is no JSON or cut off, other encodings than UTF-8 and oversized records are errors with file and line. A key
given twice makes a record unreadable: either meaning could be the wrong one.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charset_normalizer
import orjson

from pipeline.core.files import KeyTwiceError, unique_keys

WINDOW_BYTES = 1 << 20
MAX_RECORD_BYTES = 32 << 20  # a longer record is no conversation, and would have to fit in memory
KEY = re.compile(rb'"\s*:')  # at least as often in a record as it has keys: also inside strings, as \":
SPACE = re.compile(r"[ \t\n\r]*")


class FormatError(ValueError):
    """A file that cannot be read as instruction data; the message names file, line and way out."""


@dataclass(frozen=True)
class Unreadable:
    """A record whose text is whole but whose meaning is not plain, such as a key given twice."""

    reason: str
    text: str


def not_utf8(path: str | Path, data: bytes, line: int, byte: int) -> FormatError:
    legacy = ["cp1252", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "latin_1"]
    best = charset_normalizer.from_bytes(data[:65536], cp_isolation=legacy).best()
    guess = f", perhaps {best.encoding}" if best is not None else ""
    name = best.encoding if best is not None else "ITS_ENCODING"
    return FormatError(
        f"{path} is not UTF-8 (line {line}, byte {byte}){guess}; convert it, e.g. with `iconv -f {name} -t UTF-8`"
    )


def too_long(path: Path, where: str) -> FormatError:
    return FormatError(
        f"{path}, {where} is longer than {MAX_RECORD_BYTES >> 20} MiB, which no conversation is; split or remove it"
    )


def list_elements(path: Path, read: Callable[[int], bytes]) -> Iterator[str]:
    """The text of each element of the one JSON list that `read` gives, in order.

    The standard library's decoder finds where an element ends, in a window that moves over the file.

    Raises:
        FormatError: it is no list, not JSON, not UTF-8, or an element is longer than MAX_RECORD_BYTES.
    """
    to_text = codecs.getincrementaldecoder("utf-8")()
    find_end = json.JSONDecoder().raw_decode
    text, at, line, column, ended = "", 0, 1, 1, False

    def more() -> None:
        nonlocal text, at, line, column, ended
        data = read(max(WINDOW_BYTES, len(text) - at))
        newlines = text.count("\n", 0, at)
        column = at - text.rindex("\n", 0, at) if newlines else column + at
        line += newlines
        try:
            text, at, ended = text[at:] + to_text.decode(data, final=not data), 0, not data
        except UnicodeDecodeError as error:
            raise not_utf8(path, data, line + text.count("\n", at), error.start) from None

    def skip_space() -> str:
        """Move to the next character that is no space and return it; "" at the end."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text too
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    def fault(message: str, position: int) -> FormatError:
        newlines = text.count("\n", 0, position)
        where = position - text.rindex("\n", 0, position) if newlines else column + position
        cut_off = ended and (message.startswith("Unterminated") or not text[position:].strip())
        hint = "the file seems cut off" if cut_off else "correct the file there"
        return FormatError(f"{path}, line {line + newlines}, column {where}: not JSON: {message}; {hint}")

    def element_end() -> int:
        while True:
            try:
                _, end = find_end(text, at)
            except json.JSONDecodeError as error:
                if ended:
                    raise fault(error.msg, error.pos) from None
            except ValueError as error:  # a number with thousands of digits
                raise FormatError(f"{path}, line {line + text.count(chr(10), 0, at)}: {error}") from None
            except RecursionError:
                where = line + text.count("\n", 0, at)
                raise FormatError(f"{path}, line {where}: nested too deeply to be instruction data") from None
            else:
                if end + 2 < len(text) or ended:  # else a number may go on, as after 1e+
                    return end
            if len(text) - at > MAX_RECORD_BYTES:
                raise too_long(path, f"the record that begins in line {line + text.count(chr(10), 0, at)}")
            more()

    more()
    text = text.removeprefix("\ufeff")
    first = skip_space()
    if not first:
        return
    if first != "[":
        end = element_end()
        what = {"{": "object", '"': "text"}.get(first, "value")
        text, at = text[end:], 0
        if skip_space():
            raise FormatError(
                f"{path} holds several {what}s in a row; expected a list of records, or one a line (.jsonl)"
            )
        raise FormatError(f"{path} holds one {what}; expected a list of records")
    at += 1
    closed = skip_space() == "]"
    while not closed:
        end = element_end()
        yield text[at:end]
        at = end
        following = skip_space()
        closed = following == "]"
        if not closed:
            if following != ",":
                raise fault("Expecting ',' delimiter", at)
            at += 1
            skip_space()
    at += 1
    if skip_space():
        raise fault("Extra data", at)


def parse(raw: bytes, path: str, line: int, cut_off: bool) -> Any:
    """One JSON text. What orjson cannot tell apart or refuses (keys given twice, NaN) goes the slow way."""
    try:
        record = orjson.loads(raw)
        keys = len(KEY.findall(raw))
        if (type(record) is dict and keys == len(record)) or keys == _number_of_keys(record):
            return record
    except orjson.JSONDecodeError:
        pass
    except RecursionError:
        raise FormatError(f"{path}, line {line}: nested too deeply to be instruction data") from None
    try:
        text = raw.decode()
        json.loads(text)
        return json.loads(text, object_pairs_hook=unique_keys)
    except KeyTwiceError as error:
        return Unreadable(f"gives the key {error.key!r} twice", text)
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw, line, error.start) from None
    except json.JSONDecodeError as error:
        hint = "the file seems cut off" if cut_off else "correct or remove that line"
        raise FormatError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}; {hint}") from None
    except ValueError as error:  # a number with thousands of digits
        raise FormatError(f"{path}, line {line}: {error}") from None
    except RecursionError:
        raise FormatError(f"{path}, line {line}: nested too deeply to be instruction data") from None


def _number_of_keys(value: Any) -> int:
    number = len(value) if type(value) is dict else 0
    for each in value.values() if type(value) is dict else value if type(value) is list else ():
        if type(each) is dict or type(each) is list:
            number += _number_of_keys(each)
    return number
