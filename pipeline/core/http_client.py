"""HTTP requests to servers of the team: JSON out, the answer's bytes in. No redirect is followed: what is sent, keys
included, goes to no address that nobody named.
"""

from typing import Any

MAX_ANSWER = 2**22  # bytes; what is longer is cut off
MAX_REASON = 300  # characters of an error's answer


class HttpError(RuntimeError):
    """No usable answer. `status` is the server's, None where it could not be reached; the cause says why."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def send(url: str, body: Any = None, timeout_s: float = 10.0, **options: Any) -> bytes:
    """What the server answers to a POST of `body` as JSON, or to a GET where there is none.

    Args:
        timeout_s: seconds to connect, and between two parts of the answer.
        options: `headers` and `auth`, as httpx has them.

    Raises:
        HttpError: the server cannot be reached, or its status is not 2xx; the message has no URL.
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
