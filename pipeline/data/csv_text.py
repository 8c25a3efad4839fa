"""CSV text: what stands between its fields, and its records one by one.

A record with another number of fields than the header is `Unreadable`; a file whose end is missing, or that is not
UTF-8 or not CSV, is refused as a whole.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.json_text import MAX_RECORD_BYTES, FormatError, Unreadable, not_utf8

DELIMITERS = ",;\t|"


def delimiter_of(head: bytes, usual: str) -> str:
    """What stands between the fields of a file that begins with `head`: the usual, unless its header has none of it.

    Of several that could be, the one that splits the first records alike.
    """
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    text = text[: text.rfind("\n") + 1] or text
    best, fits = usual, (False, False, 0)
    for delimiter in DELIMITERS:
        try:
            first = list(islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 20))
        except csv.Error:
            continue
        widths = [len(row) for row in first if row]
        if widths and widths[0] > 1:
            fit = (len(set(widths)) == 1, delimiter == usual, widths[0])
            best, fits = (delimiter, fit) if fit > fits else (best, fits)
    return best


def csv_records(path: Path, pieces: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, int, Any]]:
    """(line, characters, record) of each record below the header, of text in pieces of whole lines.

    Raises:
        FormatError: see the module's first lines.
    """
    ended = True  # whether the last line has its end

    def lines() -> Iterator[str]:
        nonlocal ended
        number = 0
        for piece in pieces:
            for line in io.BytesIO(piece):
                number += 1
                ended = line.endswith((b"\n", b"\r"))
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(path, line, number, error.start) from None

    csv.field_size_limit(MAX_RECORD_BYTES)  # the library's own limit of 128 KiB is one long answer
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise FormatError(f"{path} has the column {twice[0]!r} twice; rename one")
        line = rows.line_num + 1
        for row in rows:
            if not ended and len(row) < len(header):
                raise csv.Error("the last record lacks fields and the end of its line: the file is cut off")
            if row:
                yield line, sum(map(len, row)), _record(header, row)
            line = rows.line_num + 1
    except csv.Error as error:
        what = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        between = {"\t": "a tab"}.get(delimiter, delimiter)
        raise FormatError(f"{path}, line {rows.line_num}: not CSV with {between} between fields: {what}") from None


def _record(header: list[str], row: list[str]) -> Any:
    if len(row) != len(header):
        return Unreadable(f"has {len(row)} fields where the header has {len(header)}", json.dumps(row))
    return dict(zip(header, row, strict=True))
