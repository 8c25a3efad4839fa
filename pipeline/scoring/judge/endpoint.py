"""A chat completion of an OpenAI-compatible server: messages in, the reply's text out.

A server that answers with an error is asked again where that may help; a key is never sent in clear text to another
machine.
"""

import ipaddress
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlparse

from pipeline.core.http_client import HttpError, send

TRIES = 4
PAUSE_S = 1.0  # before the second try; doubled before each further one


class JudgeError(RuntimeError):
    """The judge cannot be asked; the message says why and what can be done."""


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
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": self.max_tokens}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                return _content(send(address, body, self.timeout_s, headers=headers), address)
            except HttpError as error:
                problem = str(error)
                if error.status is not None and error.status not in (408, 409, 429) and error.status < 500:
                    break
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
