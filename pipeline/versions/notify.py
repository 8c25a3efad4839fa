"""Decisions told to others: a JSON POST to each webhook. A failure is a warning; it never undoes a decision.

Parameters name environment variables that hold the URLs, never a URL, which is often a secret by itself; no message of
this module contains one.
"""

import json
import os
import urllib.request
from dataclasses import asdict
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

from pipeline.versions.decisions import Record

TIMEOUT = 10.0  # seconds for each webhook


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook answers itself; what is posted goes to no address that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def tell(webhooks: list[str], name: str, record: Record) -> list[str]:
    """POST `record`, with the model's name, to the URL in each variable; returns a warning for each failure."""
    body = json.dumps({"model": name} | asdict(record), ensure_ascii=False).encode()
    warnings = []
    for variable in webhooks:
        problem = _post(os.environ.get(variable, ""), body)
        if problem is not None:
            warnings.append(f"the webhook in {variable} was not told of the decision: {problem}")
    return warnings


def _post(url: str, body: bytes) -> str | None:
    if not url:
        return "the variable is not set"
    if urlparse(url).scheme not in ("http", "https"):
        return "it holds no http or https address"
    try:
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT):
            return None
    except HTTPError as error:
        return f"it answered with status {error.code}"
    except URLError as error:
        return f"it cannot be reached ({type(error.reason).__name__})"
    except (OSError, ValueError) as error:
        return f"it cannot be reached ({type(error).__name__})"
