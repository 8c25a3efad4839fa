"""Between an S3 client and its server: hands every request on, except those for which `plan` names a fault.

Conditional writes pass one at a time, whole. AWS promises that one of several racing ones wins; Swift asks whether the
object exists when a write begins, so that two can win. With this in between, it keeps what AWS promises.

reset    the connection is reset, the server sees nothing
lost     the server does it, but the connection is reset instead of its answer
stall    the server does it, its answer never comes
500, 503 the server sees nothing, the client an error of that status
cut      half of the request's body reaches the server (half of the answer the client, when there is no body)
twice    the request is delivered twice, the client sees the second answer
kill     `on_kill` is called before the server sees anything
killed   `on_kill` is called after the server did it
412:Code any other number, with S3's error code: an answer in the server's place
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
    """Serves on `port` from entering to leaving the context."""

    server_port: int
    plan: Callable[[int, str], str | None] = lambda number, line: None  # fault of the n-th request, counted from 0
    on_kill: Callable[[], None] = lambda: None
    seen: list[str] = field(default_factory=list)  # request lines, in order
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
        self._one_write = asyncio.Lock()
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
                number = len(self.seen)
                self.seen.append(request.line)
                self.heads.append(request.head)
                fault = self.plan(number, request.line)
                answer = await self._answer(request, fault)
                if answer is None:
                    # RST, as a crashed peer or a firewall sends it, and not an orderly end.
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
            async with self._one_write:
                return await self._pass(request, part)
        return await self._pass(request, part)

    async def _pass(self, request: Request, part: int | None) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server_port, limit=2**20)
        try:
            writer.write(request.head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + request.body[:part])
            await writer.drain()
            if part is not None:
                return b""
            answer = await reader.read()
            # The connection to the client stays open, whatever the server said about its own.
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
