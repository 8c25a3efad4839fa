"""Jinja environments for the reports, with a common style and common filters.

Text from the data cannot act as markup: Jinja escapes it in HTML, `cell` and `code` in Markdown.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment(folder: Path, html: bool) -> Environment:
    """The environment for the templates in `folder`, which may include `style.css`."""
    jinja = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"cell": cell, "code": fenced, "number": "{:,}".format}
    return jinja


def fenced(text: str) -> str:
    """`text` as a Markdown code block that nothing in it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def cell(text: str) -> str:
    """`text` on one line of Markdown, with markup and HTML escaped."""
    return "".join(f"\\{c}" if c in "\\`*_[]|<>&#" else c for c in " ".join(str(text).split()))
