"""The local stack behind `retune up`: Prefect server, work pools with their workers, MLflow; supervised, on loopback.

A supervisor process starts the services, writes what it knows to `.retune/server.json`, and starts again what dies.
Every process carries the project's folder in its environment, so that `retune down`, and a reaper that notices the
supervisor's death, find all of them, also those that a worker started. A port that is taken is an error.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from pipeline.core import git
from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.core.handover import make_clone
from pipeline.core.http_client import HttpError, send
from pipeline.core.processes import end_group, python_ending_with_parent, start_logged
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.params import Params
from pipeline.services import server
from pipeline.services.flow_runs import cancel_stack_runs, close_lost_runs, close_stack_runs
from pipeline.services.server import HOST, STATE, ServerError

MARK = "RETUNE_STACK"  # in the environment of every process of a stack: the project's folder
LOGS = WORK_DIR / "logs"
CLONE = WORK_DIR / "gpu-worker"  # where this machine's gpu worker trains: it overwrites its working tree
POOLS = {"cpu": None, "gpu": 1}  # concurrency limits
READY_SECONDS = 180
RESTARTS, WITHIN_SECONDS = 5, 300  # a service that dies more often is not started again until the next `retune up`


@dataclass(frozen=True)
class Service:
    name: str
    arguments: tuple[str, ...]  # of `python -m`
    url: str | None = None  # where a person opens it
    health: str | None = None  # what answers 200 when it works; without one, a living process is enough


@dataclass
class Child:
    service: Service
    process: subprocess.Popen[str]
    deaths: list[float]
    given_up: bool = False


def services(params: Params) -> list[Service]:
    """What `operations.services` asks for, in the order of starting; the server always comes first."""
    chosen, ports = params.operations.services, params.operations
    url = f"http://{HOST}:{ports.prefect_port}"
    start: tuple[str, ...] = ("prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect_port))
    wanted = [Service("prefect-server", start, url, f"{url}/api/health")]
    if "mlflow" in chosen and why_no_mlflow(params) is None:
        url = f"http://{HOST}:{ports.mlflow_port}"
        places = ("--backend-store-uri", params.publish.tracking_uri, "--artifacts-destination", "mlartifacts")
        start = ("mlflow", "server", "--host", HOST, "--port", str(ports.mlflow_port), "--workers", "1", *places)
        wanted.append(Service("mlflow", start, url, f"{url}/health"))
    for pool in POOLS:
        if pool in chosen:
            name = f"{pool}-{socket.gethostname()}"
            start = ("prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name)
            wanted.append(Service(f"{pool}-worker", start))
    return wanted


def why_no_mlflow(params: Params) -> str | None:
    """Why this stack has no MLflow server, or None when it can have one."""
    if not params.publish.tracking_uri.startswith("sqlite:"):
        return f"publish.tracking_uri names a server of its own, {params.publish.tracking_uri}"
    missing = [name for name in ("flask", "flask_cors", "graphene") if find_spec(name) is None]
    return f"the packages {', '.join(missing)} are not installed" if missing else None


def mlflow_has_pages() -> bool:
    """mlflow-skinny serves the API only; the pages come with the full package."""
    spec = find_spec("mlflow")
    return spec is not None and (Path(spec.origin or "").parent / "server" / "js" / "build" / "index.html").exists()


def up(params: Params, root: Path = Path("."), on_wait: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Start the stack in the background and wait until it works, or answer with the one that runs.

    Raises:
        ServerError: a port is taken, or a service did not start; nothing is left running then.
    """
    if server.supervisor(root) is not None:
        return state(root)
    end_marked(root, grace=5)  # of a supervisor and a reaper that were both killed
    wanted = services(params)
    for service in wanted:
        if service.url is not None:
            _require_free(service)
    log = root / LOGS / "supervisor.log"
    (root / STATE).unlink(missing_ok=True)
    supervise = [sys.executable, "-m", "pipeline.services.stack", "supervise"]
    child = start_logged(supervise, log, root, environment(root, params))
    deadline, said = time.monotonic() + READY_SECONDS, ""
    try:
        while True:
            now = state(root)
            if now.get("error"):
                raise ServerError(now["error"])
            if now.get("ready"):
                return now
            if child.poll() is not None:
                raise ServerError(f"the supervisor ended with status {child.returncode}; its log is {log}")
            if time.monotonic() > deadline:
                raise ServerError(f"the stack was not ready after {READY_SECONDS} s; the logs are in {LOGS}")
            if now.get("doing", said) != said:
                said = now["doing"]
                on_wait(said)
            time.sleep(0.2)
    except BaseException:
        down(root)
        raise


def _require_free(service: Service) -> None:
    assert service.url is not None
    port = int(service.url.rpartition(":")[2])
    option = "--port" if service.name == "prefect-server" else "--mlflow-port"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ServerError(
                f"port {port} of {service.name} is taken by another program; choose another with `retune up {option}` "
                "or in params.yaml, section operations"
            ) from None


def environment(root: Path, params: Params) -> dict[str, str]:
    """What every process of the stack sees: the server's address, no telemetry, the mark."""
    project = str(root.resolve())
    python_path = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    return server.environment(root, f"http://{HOST}:{params.operations.prefect_port}") | {
        MARK: project,
        "RETUNE_ROOT": project,  # where flows run; see prefect.yaml
        "PYTHONPATH": python_path,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that a registry does not need
        "RETUNE_STACK_PARAMS": params.model_dump_json(),  # the ports of the flags, which the file does not have
    }


def state(root: Path = Path(".")) -> dict[str, Any]:
    """What the supervisor last wrote, with each service's process looked at now; empty when none runs."""
    try:
        known: dict[str, Any] = read_json(root / STATE)
    except (OSError, ValueError):
        return {}
    for each in known.get("services", []):
        if not psutil.pid_exists(each["pid"]):
            each["state"] = "given up" if each["state"] == "given up" else "dead"
        elif each["health"] is not None and each["state"] == "running":
            each["state"] = "healthy" if _answers(each["health"]) else "does not answer"
    return known


def down(root: Path = Path(".")) -> bool:
    """Stop the stack and everything it started, runs that its workers have under way included; False if none ran."""
    process = server.supervisor(root)
    found = process is not None or bool(marked(root))
    if (up := server.running(root)) is not None:
        cancel_stack_runs(up.url, "`retune down` stopped it")
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=60)
    end_marked(root, grace=5)
    (root / STATE).unlink(missing_ok=True)
    return found


def marked(root: Path) -> list[psutil.Process]:
    """Living processes of this project's stack, other than this one."""
    project, found = str(root.resolve()), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(MARK) == project
            ):
                found.append(process)
    return found


def end_marked(root: Path, grace: float, keep: Callable[[], set[int]] = set) -> None:
    """SIGTERM to all processes of the stack but `keep`, SIGKILL after `grace` seconds, until there are none.

    Args:
        keep: asked before each signal, since the others go on starting processes meanwhile.
    """
    for number, patience in ((signal.SIGTERM, grace), *[(signal.SIGKILL, 5.0)] * 3):
        found = marked(root)  # before `keep`: what starts in between belongs to it
        kept = keep()
        left = [process for process in found if process.pid not in kept]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(left, timeout=patience)
        if not left:
            return


def _answers(url: str) -> bool:
    try:
        send(url, timeout_s=5)
    except HttpError:
        return False
    return True


def supervise(root: Path) -> None:
    """Start every service, then keep it: the body of the supervisor, until SIGTERM."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    params = Params.model_validate_json(os.environ["RETUNE_STACK_PARAMS"])
    me = psutil.Process()
    known: dict[str, Any] = {
        "pid": me.pid,
        "create_time": me.create_time(),
        "url": f"http://{HOST}:{params.operations.prefect_port}",
        "ready": False,
    }
    children: list[Child] = []
    reaper = _reaper(root)

    def note(**values: Any) -> None:
        known.update(values)
        known["services"] = [_row(child, known["ready"]) for child in children]
        write_json(root / STATE, known)

    try:
        for service in services(params):
            note(doing=f"starting {service.name}")
            if service.name == "gpu-worker" and params.operations.train_pool == "gpu":
                make_clone(root / CLONE, params.operations.git_remote, root)
            children.append(Child(service, _start(root, service), []))
            _wait_healthy(children[-1], stopping)
            if service.name == "prefect-server" and not stopping:
                note(doing="making the work pools and deployments")
                close_stack_runs(known["url"])
                with contextlib.suppress(RunUnderWay), only_run():  # whoever holds the lock does it
                    close_lost_runs(known["url"])
                set_up(root)
        note(ready=True, doing="")
        while not stopping:
            time.sleep(0.5)
            if reaper.poll() is not None:
                reaper = _reaper(root)
            if _restart_dead(root, children):
                note()
    except (ServerError, git.GitError, OSError) as error:
        note(error=str(error))
    finally:
        for child in reversed(children):  # workers before the server, which is told how their runs ended
            end_group(child.process, grace=15)
        end_marked(root, grace=10, keep=lambda: {reaper.pid})
        reaper.kill()


def _row(child: Child, ready: bool) -> dict[str, Any]:
    service = child.service
    return {
        "name": service.name,
        "pid": child.process.pid,
        "url": service.url,
        "health": service.health,
        "state": _state_of(child, ready),
        "restarts": len(child.deaths),
        "log": str(LOGS / f"{service.name}.log"),
    }


def _state_of(child: Child, ready: bool) -> str:
    if child.given_up:
        return "given up"
    if child.process.poll() is not None:
        return "failed"
    return "running" if ready else "starting"


def _restart_dead(root: Path, children: list[Child]) -> bool:
    """Start again what died, unless it dies again and again; returns whether anything changed."""
    changed = False
    for child in children:
        if child.process.poll() is None or child.given_up:
            continue
        recent = [death for death in child.deaths if time.monotonic() - death < WITHIN_SECONDS]
        child.given_up = len(recent) >= RESTARTS
        changed = True
        # Whatever it had started (a run on a killed worker, say) must not go on beside its successor.
        end_group(child.process, grace=5)
        _end_orphans(root)
        next_step = "it is not started again until the next `retune up`" if child.given_up else "it is started again"
        print(f"{child.service.name} ended with status {child.process.returncode}; {next_step}", flush=True)
        if not child.given_up:
            child.deaths.append(time.monotonic())
            child.process = _start(root, child.service)
    return changed


def _end_orphans(root: Path) -> None:
    """Processes of the stack that no living service has started any more."""
    me = psutil.Process()
    end_marked(root, grace=10, keep=lambda: {process.pid for process in me.children(recursive=True)} | {me.pid})


def _start(root: Path, service: Service) -> subprocess.Popen[str]:
    clone = {}
    if service.name == "gpu-worker":  # the code that it runs is its clone's, too
        path = str((root / CLONE).resolve())
        clone = {"RETUNE_ROOT": path, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    log = root / LOGS / f"{service.name}.log"
    return start_logged(python_ending_with_parent(*service.arguments), log, root, os.environ | clone)


def _wait_healthy(child: Child, stopping: list[int]) -> None:
    log = LOGS / f"{child.service.name}.log"
    deadline = time.monotonic() + server.STARTUP_SECONDS
    while child.service.health is not None and not _answers(child.service.health) and not stopping:
        if child.process.poll() is not None:
            raise ServerError(f"{child.service.name} ended with status {child.process.returncode}; its log is {log}")
        if time.monotonic() > deadline:
            raise ServerError(
                f"{child.service.name} was not healthy after {server.STARTUP_SECONDS} s; its log is {log}"
            )
        time.sleep(0.2)


def _reaper(root: Path) -> subprocess.Popen[bytes]:
    """A process that waits for this one's death, by a pipe that the kernel then closes, and ends the stack."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.services.stack", "reap"],
        cwd=root,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def set_up(root: Path) -> None:
    """Work pools, automations and deployments, in a process of its own: this one does not know Prefect.

    All pools, with or without a worker here: deployments name them.

    Raises:
        ServerError: it failed.
    """
    command = python_ending_with_parent("flows.setup")
    with (root / LOGS / "setup.log").open("a") as log:
        done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise ServerError(f"`python -m flows.setup` failed; its log is {LOGS / 'setup.log'}")


def with_ports(params: Params, prefect_port: int | None, mlflow_port: int | None) -> Params:
    """`params` with the ports that were given on the command line."""
    chosen = {"prefect_port": prefect_port, "mlflow_port": mlflow_port}
    update = {key: port for key, port in chosen.items() if port is not None}
    return params.model_copy(update={"operations": params.operations.model_copy(update=update)})


def main() -> None:
    root = Path(".")
    if sys.argv[1] == "supervise":
        supervise(root)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a group's signal must not take it before its work
        sys.stdin.read()
        end_marked(root, grace=10)


if __name__ == "__main__":
    main()
