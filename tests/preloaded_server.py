"""The process behind `preloaded.py`: imports everything once, then forks a child for each request.

Started with the address of its socket and the number of the process with which it ends.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

MODULES = (
    "conftest",
    *(f"pipeline.{stage}" for stage in ("ingest", "prepare", "train", "evaluate", "merge", "publish", "promote")),
    *(f"pipeline.cli.{name}" for name in ("main", "serving")),
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
    "dvc.cli",
    "dvc.cli.parser",
    "dvc.repo",
    "flows.retrain",
    "prefect.cli.deploy",
)


def serve(address: Path, owner: int) -> None:
    """Fork children until `owner` ends."""
    for module in MODULES:
        importlib.import_module(module)
    logging.getLogger().handlers.clear()  # Prefect's, which are for flows alone
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)  # who sees it can connect
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(os.pidfd_open(owner), selectors.EVENT_READ, "owner")
    children: dict[int, socket.socket] = {}  # with whom waits for them
    while True:
        for key, _ in selector.select():
            match key.data:
                case "owner":
                    return
                case ("client", child) if child in children:  # it went away: nobody waits for the child
                    selector.unregister(children[child])
                    os.kill(child, signal.SIGKILL)
                case ("child", child):
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    with suppress(KeyError):
                        selector.unregister(children[child])
                    with suppress(OSError), children.pop(child) as connection:
                        connection.sendall(f"{status}\n".encode())
                case None:
                    connection, _ = listener.accept()
                    request, descriptors = receive(connection)
                    if not request:
                        connection.close()
                        continue
                    child = os.fork()
                    if child == 0:
                        become(request, descriptors)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    with suppress(OSError):
                        connection.sendall(f"{child}\n".encode())
                    children[child] = connection
                    selector.register(os.pidfd_open(child), selectors.EVENT_READ, ("child", child))
                    selector.register(connection, selectors.EVENT_READ, ("client", child))


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request and three descriptors; nothing of a client that went away."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 4)
    while not text.endswith(b"\n"):
        part = connection.recv(1 << 20)
        if not part:
            return {}, []
        text += part
    return json.loads(text), list(descriptors)


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """The child: runs what was asked for, and ends."""
    status = 1
    try:
        numbers = [0, 1, 2, int(request["environment"].get("RETUNE_RUN_LOCK", 3))]
        for descriptor, number in zip(descriptors, numbers, strict=False):
            os.dup2(descriptor, number)
        for number in map(int, os.listdir("/proc/self/fd")):
            if number not in numbers[: len(descriptors)]:
                with suppress(OSError):
                    os.close(number)
        os.umask(request.get("umask", 0o022))
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        status = call(request) if "function" in request else run_command(request["program"], request["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run_command(program: str, arguments: list[str]) -> int:
    sys.argv = [program.replace("pipeline", "retune"), *arguments]
    try:
        match program:
            case "dvc":
                from dvc.cli import main

                return int(main(arguments))
            case "flows":
                from flows.__main__ import main as flow

                read_prefect_settings()
                flow()
            case "flows.setup":
                read_prefect_settings()
                runpy.run_module("flows.setup", run_name="__main__")
            case "pipeline.train":  # one of several processes
                runpy.run_module("pipeline.train", run_name="__main__")
            case _:
                from pipeline.cli.main import main as retune

                retune()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    return 0


def read_prefect_settings() -> None:
    """Prefect reads them when it is imported, which was before this process had its environment."""
    from prefect.context import refresh_global_settings_context
    from prefect.logging.configuration import setup_logging

    refresh_global_settings_context()
    setup_logging(incremental=False)


def call(request: dict[str, Any]) -> int:
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    events = count_events(request["kill_at"])
    answer = function(*request["arguments"])
    seen, events[1] = events[0], 0
    Path(request["report"]).write_text(json.dumps({"answer": answer, "events": seen}))
    return 0


def count_events(kill_at: int) -> list[int]:
    """The number of events so far, and the one to die at.

    An event is a write to a file, the making, linking, renaming or removal of one, an SQL statement, a step of the
    optimiser, or a forward pass of a model.
    """
    import sqlalchemy
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    events = [0, kill_at]

    def event(*_: Any) -> None:
        events[0] += 1
        if events[0] == events[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        # What is only read cannot be left half done.
        writes = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        if writes or name in ("os.link", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
            event()

    sys.addaudithook(audit)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", event)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", event)
    register_optimizer_step_post_hook(event)
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: event() if isinstance(module, torch.nn.Embedding) else None
    )
    torch.set_num_threads(1)
    return events


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
