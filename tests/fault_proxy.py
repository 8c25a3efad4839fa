"""A proxy between an S3 client and its server, which forwards every request unless `plan` names a fault for it.

Conditional writes are forwarded one at a time. On AWS one of several racing writes wins; Swift checks whether the
object exists when a write begins, so two can win. Behind this proxy, Swift behaves like AWS.

reset    the connection is reset; the server gets nothing
lost     the server executes the request; the connection is reset instead of its answer
stall    the server executes the request; its answer never arrives
500, 503 the server gets nothing; the client gets this status
cut      half of the request's body reaches the server (without a body: half of the answer reaches the client)
twice    the request is delivered twice; the client gets the second answer
kill     `on_kill` is called before the server gets anything
killed   `on_kill` is called after the server executed the request
412:Code any other status, with S3's error code: the client gets this answer, the server nothing
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
FAULTS = ("reset", "lost", "500", "503", "stall", "cut", "twice", "409:ConditionalRequestConflict")
KILLS = ("kill", "killed")


@dataclass
class Request:
    line: str
    head: bytes
    body: bytes


@dataclass
class FaultProxy:
    """A context manager; serves on `port` while the context is open."""

    server_port: int
    plan: Callable[[int, str], str | None] = lambda number, line: None  # fault of the n-th request, counted from 0
    on_kill: Callable[[], None] = lambda: None
    request_lines: list[str] = field(default_factory=list)  # request lines, in order
    heads: list[bytes] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> "FaultProxy":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _run(self, ready: threading.Event) -> None:
        self._write_lock = asyncio.Lock()
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=2**20)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _request(reader, writer)) is not None:
                number = len(self.request_lines)
                self.request_lines.append(request.line)
                self.heads.append(request.head)
                fault = self.plan(number, request.line)
                answer = await self._answer(request, fault)
                if answer is None:
                    # Send RST, as a crashed peer or a firewall does, instead of closing properly.
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                writer.write(answer)
                await writer.drain()
                if fault == "cut":
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: Request, fault: str | None) -> bytes | None:
        if fault == "reset":
            return None
        if fault == "kill":
            self.on_kill()
            return None
        if fault and fault[0].isdigit():
            status, _, code = fault.partition(":")
            return _response(int(status), code or {"503": "SlowDown"}.get(status, "InternalError"))
        if fault == "cut" and request.body:
            await self._forward(request, len(request.body) // 2)
            return None
        answer = await self._forward(request)
        if fault == "twice":
            answer = await self._forward(request)
        elif fault == "killed":
            self.on_kill()
        elif fault == "stall":
            await self._end.wait()
        elif fault == "cut":
            head, _, body = answer.partition(b"\r\n\r\n")
            return head + b"\r\n\r\n" + body[: len(body) // 2] if body else None
        return None if fault in ("lost", "killed") else answer

    async def _forward(self, request: Request, part: int | None = None) -> bytes:
        if b"if-none-match" in request.head.lower():
            async with self._write_lock:
                return await self._send(request, part)
        return await self._send(request, part)

    async def _send(self, request: Request, part: int | None) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server_port, limit=2**20)
        try:
            writer.write(request.head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + request.body[:part])
            await writer.drain()
            if part is not None:
                return b""
            answer = await reader.read()
            # Only the connection to the server is closed.
            return answer.replace(b"\r\nConnection: close\r\n", b"\r\n", 1)
        finally:
            writer.close()


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        lines = [line for line in lines if not line.lower().startswith("expect:")]
        head = "\r\n".join(lines).encode("latin-1")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(lines[0].rpartition(" ")[0], head, body)


def _response(status: int, code: str) -> bytes:
    body = ERROR.format(code=code).encode()
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
