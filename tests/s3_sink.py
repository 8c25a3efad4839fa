"""The fastest S3 server there can be, for benchmarks and long listings: keeps names and sizes, but only small bodies.

It speaks what an upload needs, checks no signature, and honours conditional writes unless told not to. As a program it
prints its port and serves loopback until its input ends.
"""

import base64
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

RECEIVE = 2**20  # bytes at once; bodies up to this size are kept


class Sink:
    def __init__(self, honours_conditions: bool = True) -> None:
        self.honours_conditions = honours_conditions
        self.sizes: dict[str, int] = {}
        self.bodies: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, key or query, bytes of the body
        self.lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        with connection:
            self.converse(connection)

    def converse(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(RECEIVE))
        left = b""
        while True:
            while b"\r\n\r\n" not in left:
                more = connection.recv(65536)
                if not more:
                    return
                left += more
            head, _, left = left.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length", 0))
            if headers.get("expect") == "100-continue":
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body, left = left[:length], left[length:]
            remaining = length - len(body)
            while remaining:
                got = connection.recv_into(buffer, min(RECEIVE, remaining))
                if not got:
                    return
                remaining -= got
                if length <= RECEIVE:
                    body += bytes(buffer[:got])
            connection.sendall(self.answer(method, target, headers, length, body))
            if headers.get("connection") == "close":
                return

    def answer(self, method: str, target: str, headers: dict[str, str], length: int, body: bytes) -> bytes:
        parts = urlsplit(target)
        key, query = unquote(parts.path).lstrip("/").partition("/")[2], parse_qs(parts.query, keep_blank_values=True)
        status, data, extra = "200 OK", b"", ""
        with self.lock:
            self.requests.append((method, key or parts.query, length))
            if method == "PUT":
                if headers.get("if-none-match") == "*" and key in self.sizes and self.honours_conditions:
                    status, data = "412 Precondition Failed", b"<Error><Code>PreconditionFailed</Code></Error>"
                elif "partNumber" not in query:
                    self.sizes[key] = length
                    self.bodies[key] = body if length <= RECEIVE else b""
                extra = 'ETag: "0"\r\n'
            elif method == "POST":
                begins = "uploads" in query
                data = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
                data = (
                    data if begins else b"<CompleteMultipartUploadResult><ETag>0</ETag></CompleteMultipartUploadResult>"
                )
            elif "list-type" in query:
                data = self.listing(query["prefix"][0], query.get("continuation-token", [""])[0])
            elif key in self.sizes:
                data = self.bodies[key]
            else:
                status, data = "404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"
        head = f"HTTP/1.1 {status}\r\nDate: {formatdate(usegmt=True)}\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
        return head.encode() + (b"" if method == "HEAD" else data)

    def listing(self, prefix: str, token: str) -> bytes:
        start = base64.b64decode(token).decode()
        keys = sorted(each for each in self.sizes if each.startswith(prefix) and each > start)
        text = "".join(
            f"<Contents><Key>{each}</Key><Size>{self.sizes[each]}</Size>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for each in keys[:1000]
        )
        if len(keys) > 1000:
            text += "<IsTruncated>true</IsTruncated>"
            text += f"<NextContinuationToken>{base64.b64encode(keys[999].encode()).decode()}</NextContinuationToken>"
        return f"<ListBucketResult>{text}</ListBucketResult>".encode()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in threads of this process; yields the endpoint."""
        with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
            threading.Thread(target=self.accept, args=(server,), daemon=True).start()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
            server.shutdown(socket.SHUT_RDWR)

    def accept(self, server: socket.socket) -> None:
        try:
            while True:
                connection, _ = server.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()
        except OSError:
            pass  # closed


def main() -> None:
    with Sink().running() as endpoint:
        print(endpoint, flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
