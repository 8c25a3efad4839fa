"""HTTP requests to the team's servers: JSON out, bytes in. Redirects are not followed, so that data and keys reach only
the configured address.
"""

from typing import Any

MAX_ANSWER = 2**22  # bytes; longer answers are cut
MAX_REASON = 300  # characters kept of an error's answer


class HttpError(RuntimeError):
    """No usable answer. `status` is the server's, or None if it could not be reached; see `__cause__`."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def send(url: str, body: Any = None, timeout_s: float = 10.0, **options: Any) -> bytes:
    """POST `body` as JSON, or GET if there is none; returns the answer's content.

    `timeout_s`: to connect, and between two parts of the answer. `options`: `headers` and `auth` of httpx.

    Raises HttpError: the server cannot be reached, or its status is not 2xx; the message does not contain the URL.
    """
    import httpx

    options |= {} if body is None else {"json": body}
    try:
        with httpx.stream("GET" if body is None else "POST", url, timeout=timeout_s, **options) as response:
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER:
                    break
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise HttpError(str(error) or type(error).__name__) from error
    if not response.is_success:
        reason = data.decode("utf-8", "replace")[:MAX_REASON].strip()
        raise HttpError(f"status {response.status_code}" + (f": {reason}" if reason else ""), response.status_code)
    return data
