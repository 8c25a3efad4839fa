"""Decisions told to others: a JSON POST to each webhook. A failure is a warning; it never undoes a decision.

Parameters name environment variables that hold the URLs, never a URL, which is often a secret by itself; no message of
this module contains one.
"""

import os
from dataclasses import asdict
from urllib.parse import urlparse

from pipeline.core.http_client import HttpError, send
from pipeline.registry.decisions import Record


def tell(webhooks: list[str], name: str, record: Record) -> list[str]:
    """POST `record`, with the model's name, to the URL in each variable; returns a warning for each failure."""
    warnings = []
    for variable in webhooks:
        url = os.environ.get(variable, "")
        problem = ""
        if urlparse(url).scheme not in ("http", "https"):
            problem = "it holds no http or https address" if url else "the variable is not set"
        else:
            try:
                send(url, {"model": name} | asdict(record))
            except HttpError as error:
                unreachable = f"it cannot be reached ({type(error.__cause__).__name__})"
                problem = f"it answered with status {error.status}" if error.status else unreachable
        if problem:
            warnings.append(f"the webhook in {variable} was not told of the decision: {problem}")
    return warnings
