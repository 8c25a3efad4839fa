"""A chat completion of an OpenAI-compatible server, by plain HTTP.

Comes in: messages. Goes out: the reply's text. Refused: servers that answer with an error or with something that is no
chat completion, after a few tries where another try may help; and a key sent in clear text to another machine.
"""

import ipaddress
import json
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

TRIES = 4
PAUSE_S = 1.0  # before the second try; doubled before each further one
MAX_REPLY = 2**22  # bytes


class JudgeError(RuntimeError):
    """The judge cannot be asked; the message says why and what can be done."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to no address that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    url: str  # up to the version: https://host/v1
    model: str
    key: str = field(repr=False)  # "" for servers without one
    timeout_s: float
    max_tokens: int

    def __post_init__(self) -> None:
        parts = urlparse(self.url)
        if self.key and parts.scheme == "http" and not _on_this_machine(parts.hostname or ""):
            raise JudgeError(
                f"evaluate.judge.endpoint is {self.url}: a key would cross the network in clear text; use https, or "
                "a server on this machine"
            )

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The reply to `messages`, as deterministic as the server allows (temperature 0, a fixed seed).

        Raises:
            JudgeError: no usable reply.
        """
        asked = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = f"{self.url.rstrip('/')}/chat/completions"
        body = json.dumps(asked, ensure_ascii=False).encode()
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            request = urllib.request.Request(address, data=body, headers=headers, method="POST")
            try:
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_s) as response:
                    return _content(response.read(MAX_REPLY + 1), address)
            except HTTPError as error:
                said = error.read(300).decode("utf-8", "replace").strip()
                problem = f"status {error.code}" + (f": {said}" if said else "")
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (URLError, OSError) as error:
                problem = str(getattr(error, "reason", error))
        if self.key:
            problem = problem.replace(self.key, "***")  # some servers repeat it
        raise JudgeError(
            f"the judge at {address} gave no answer ({problem}); check evaluate.judge.endpoint, model and "
            "api_key_variable, or set evaluate.judge to null"
        )


def _content(data: bytes, address: str) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise JudgeError(f"what {address} answered is no chat completion: {data[:200]!r}")
    return content


def _on_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
