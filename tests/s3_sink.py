"""A minimal, fast S3 server for benchmarks and long listings: it stores names and sizes, but only small bodies.

It supports what an upload needs, checks no signature, and honours conditional writes by default. As a program it prints
its endpoint and serves on loopback until its input ends.
"""

import base64
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

RECEIVE = 2**20  # bytes to receive at once; bodies up to this size are stored


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve in threads of this process; yields the address."""
    silent = type("Silent", (handler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), silent) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Sink:
    def __init__(self, honours_conditions: bool = True) -> None:
        self.honours_conditions = honours_conditions
        self.sizes: dict[str, int] = {}
        self.bodies: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, key or query, bytes of the body
        self.lock = threading.Lock()

    def answer(self, method: str, target: str, condition: str | None, length: int, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(target)
        key, query = unquote(parts.path).lstrip("/").partition("/")[2], parse_qs(parts.query, keep_blank_values=True)
        with self.lock:
            self.requests.append((method, key or parts.query, length))
            if method == "PUT":
                if condition == "*" and key in self.sizes and self.honours_conditions:
                    return 412, b"<Error><Code>PreconditionFailed</Code></Error>"
                if "partNumber" not in query:
                    self.sizes[key], self.bodies[key] = length, body
                return 200, b""
            if method == "POST":
                if "uploads" in query:
                    return 200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
                return 200, b"<CompleteMultipartUploadResult><ETag>0</ETag></CompleteMultipartUploadResult>"
            if method == "DELETE":
                self.sizes.pop(key, None)
                return 204, b""
            if "uploads" in query:
                return 200, b"<ListMultipartUploadsResult/>"
            if "list-type" in query:
                return 200, self.listing(query["prefix"][0], query.get("continuation-token", [""])[0])
            if key in self.sizes:
                return 200, self.bodies[key]
            return 404, b"<Error><Code>NoSuchKey</Code></Error>"

    def listing(self, prefix: str, token: str) -> bytes:
        start = base64.b64decode(token).decode()
        keys = sorted(key for key in self.sizes if key.startswith(prefix) and key > start)
        text = "".join(
            f"<Contents><Key>{key}</Key><Size>{self.sizes[key]}</Size>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for key in keys[:1000]
        )
        if len(keys) > 1000:
            text += "<IsTruncated>true</IsTruncated>"
            text += f"<NextContinuationToken>{base64.b64encode(keys[999].encode()).decode()}</NextContinuationToken>"
        return f"<ListBucketResult>{text}</ListBucketResult>".encode()

    def running(self) -> AbstractContextManager[str]:
        return serving(type("Bound", (Handler,), {"sink": self}))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    sink: Sink

    def respond(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body, buffer = b"", memoryview(bytearray(RECEIVE))
        if length <= RECEIVE:
            body = self.rfile.read(length)
        else:
            remaining = length
            while remaining:
                remaining -= self.rfile.readinto(buffer[: min(remaining, RECEIVE)])
        status, data = self.sink.answer(self.command, self.path, self.headers.get("if-none-match"), length, body)
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond


def main() -> None:
    with Sink().running() as endpoint:
        print(endpoint, flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
