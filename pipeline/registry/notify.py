"""Decisions told to others: a JSON POST to each webhook. A failure is a warning; it never undoes a decision.

Parameters name environment variables that hold the URLs, never a URL, which is often a secret by itself; no message of
this module contains one.
"""

import os
from dataclasses import asdict
from typing import Any
from urllib.parse import urlparse

from pipeline.core.http_client import HttpError, send
from pipeline.registry.decisions import Record


def tell(webhooks: list[str], name: str, record: Record) -> list[str]:
    """POST `record`, with the model's name, to the URL in each variable; returns a warning for each failure."""
    body = {"model": name} | asdict(record)
    warnings = []
    for variable in webhooks:
        problem = _post(os.environ.get(variable, ""), body)
        if problem is not None:
            warnings.append(f"the webhook in {variable} was not told of the decision: {problem}")
    return warnings


def _post(url: str, body: dict[str, Any]) -> str | None:
    if not url:
        return "the variable is not set"
    if urlparse(url).scheme not in ("http", "https"):
        return "it holds no http or https address"
    try:
        send(url, body)
        return None
    except HttpError as error:
        if error.status is None:
            return f"it cannot be reached ({type(error.__cause__).__name__})"
        return f"it answered with status {error.status}"
