"""The local stack behind `retune up`: Prefect server, work pools with their workers, MLflow; on loopback.

supervisord starts them, keeps their logs, restarts what dies, and takes all of them with it when it ends. Every process
has the project's folder in its environment, by which `retune down` also finds what workers started.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil

from pipeline.core.files import WORK_DIR, write_json, write_text
from pipeline.core.handover import make_clone
from pipeline.core.pages import templates
from pipeline.core.processes import ending_with_parent, identity, python_ending_with_parent, start_logged
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.params import Params
from pipeline.services import server
from pipeline.services.flow_runs import cancel_stack_runs, close_lost_runs, close_stack_runs
from pipeline.services.server import HOST, LOGS, STATE, ServerError, answers, wait_for

MARK = "RETUNE_STACK"  # in the environment of every process of a stack: the project's folder
CLONE = WORK_DIR / "gpu-worker"  # where this machine's gpu worker trains, because it overwrites its working tree
CONFIG = WORK_DIR / "supervisor.ini"
SOCKET = WORK_DIR / "supervisor.sock"
# supervisord makes paths absolute, and a socket's path has at most 107 characters, fewer than a project's may have.
SHORT_FOLDER = "/proc/self/cwd/" if sys.platform == "linux" else ""
POOLS = {"cpu": None, "gpu": 1}  # concurrency limits
STATES = {"FATAL": "failed", "BACKOFF": "restarting", "EXITED": "restarting"}  # supervisord's, in plain words


@dataclass(frozen=True)
class Service:
    name: str
    arguments: tuple[str, ...]  # of `python -m`
    url: str | None = None  # its page for people
    health: str | None = None  # answers 200 when the service works; without one, a living process is enough

    def answers(self) -> bool:
        return self.health is None or answers(self.health)


def services(params: Params) -> list[Service]:
    """The server and what `operations.services` lists, in the order in which they are started."""
    ports, chosen = params.operations, params.operations.services
    url = f"http://{HOST}:{ports.prefect_port}"
    start: tuple[str, ...] = ("prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect_port))
    stack = [Service("prefect-server", start, url, f"{url}/api/health")]
    if "mlflow" in chosen and params.publish.tracking_uri.startswith("sqlite:"):  # else it is a server already
        url = f"http://{HOST}:{ports.mlflow_port}"
        folders = ("--backend-store-uri", params.publish.tracking_uri, "--artifacts-destination", "mlartifacts")
        start = ("mlflow", "server", "--host", HOST, "--port", str(ports.mlflow_port), "--workers", "1", *folders)
        stack.append(Service("mlflow", start, url, f"{url}/health"))
    for pool in POOLS:
        if pool in chosen:
            name = f"{pool}-{socket.gethostname()}"
            start = ("prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name)
            stack.append(Service(f"{pool}-worker", start))
    return stack


def with_ports(params: Params, prefect_port: int | None, mlflow_port: int | None, root: Path = Path(".")) -> Params:
    """`params` with the ports of the command line. Raises ServerError: a stack runs here on other ports."""
    given = {"prefect_port": prefect_port, "mlflow_port": mlflow_port}
    update = {key: port for key, port in given.items() if port is not None}
    urls = {each["name"]: each["url"] for each in server.known_stack(root).get("services", []) if each["url"]}
    for name, port in (("prefect-server", prefect_port), ("mlflow", mlflow_port)):
        if urls and port is not None and urls.get(name) != f"http://{HOST}:{port}":
            at = ", ".join(f"{each} at {url}" for each, url in urls.items())
            raise ServerError(f"the stack is running ({at}); run `retune down` before moving {name} to port {port}")
    return params.model_copy(update={"operations": params.operations.model_copy(update=update)})


def up(params: Params, root: Path = Path("."), on_wait: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Start the stack, unless it runs; returns its state when it works. Raises ServerError: nothing runs then."""
    if server.known_stack(root).get("ready"):
        return state(root)
    down(root)  # leftovers of an interrupted `up` or a killed supervisor
    stack = services(params)
    for service in stack:
        _require_free(service)
    _write_config(root, stack)
    supervise = [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--configuration", str(CONFIG)]
    child = start_logged(supervise, root / LOGS / "supervisor.log", root, environment(root, params))
    rows = [vars(each) | {"log": str(LOGS / f"{each.name}.log")} for each in stack]
    record = {"process": identity(child.pid), "url": stack[0].url, "services": rows, "ready": False}
    write_json(root / STATE, record)

    def has_ended(service: Service) -> bool:
        return _ask(root, "getProcessInfo", service.name)["statename"] not in ("STARTING", "RUNNING")

    try:
        wait_for("supervisor", (root / SOCKET).exists, lambda: child.poll() is not None)
        for service in stack:
            on_wait(f"starting {service.name}")
            if service.name == "gpu-worker" and params.operations.train_pool == "gpu":
                make_clone(root / CLONE, params.operations.git_remote, root)
            _ask(root, "startProcess", service.name, False)
            wait_for(service.name, service.answers, partial(has_ended, service))
            if service.name == "prefect-server":
                on_wait("making the work pools and deployments")
                _prepare_server(root, params, f"http://{HOST}:{params.operations.prefect_port}")
        write_json(root / STATE, record | {"ready": True})
    except BaseException:
        down(root)
        raise
    return state(root)


def down(root: Path = Path(".")) -> bool:
    """Stop the stack and everything it started, its workers' runs included; returns whether anything ran."""
    record = server.known_stack(root)
    ran = bool(record or marked(root))
    if (url := server.running(root)) is not None:
        cancel_stack_runs(url, "`retune down` stopped it")
    with suppress(KeyError, psutil.NoSuchProcess):
        supervisor = psutil.Process(int(record["process"].partition(":")[0]))
        supervisor.terminate()  # it stops workers before the server, so that their runs' ends are recorded
        psutil.wait_procs([supervisor], timeout=60)
    end_marked(root, grace=10)
    (root / STATE).unlink(missing_ok=True)
    return ran


def state(root: Path = Path(".")) -> dict[str, Any]:
    """The stack's address and services, each with its process and present state; empty if none runs."""
    record, processes = server.known_stack(root), {}
    with suppress(OSError):  # supervisord does not answer in its first second
        processes = {each["name"]: each for each in _ask(root, "getAllProcessInfo")} if record else {}
    for service in record.get("services", []):
        process = processes.get(service["name"], {"pid": 0, "statename": "STARTING"})
        service |= {"pid": process["pid"], "state": STATES.get(process["statename"], process["statename"].lower())}
        if service["state"] in ("starting", "running") and service["health"] is not None:
            service["state"] = "healthy" if answers(service["health"]) else "does not answer"
    return record


def environment(root: Path, params: Params) -> dict[str, str]:
    """The environment of every process of the stack: the server's address, no telemetry, the mark."""
    project = str(root.resolve())
    python_path = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    return server.environment(root, f"http://{HOST}:{params.operations.prefect_port}") | {
        MARK: project,
        "RETUNE_ROOT": project,  # where flows run; see prefect.yaml
        "PYTHONPATH": python_path,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that a registry does not need
    }


def marked(root: Path) -> list[psutil.Process]:
    """Running processes of this project's stack, except this one."""
    project, processes = str(root.resolve()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            others = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if others and process.environ().get(MARK) == project:
                processes.append(process)
    return processes


def end_marked(root: Path, grace: float) -> None:
    """Send SIGTERM to all processes of the stack, and SIGKILL after `grace` seconds, until there are none."""
    for number, patience in ((signal.SIGTERM, grace), *[(signal.SIGKILL, 5.0)] * 3):
        if not (processes := marked(root)):
            return
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=patience)


def _write_config(root: Path, stack: list[Service]) -> None:
    clone, programs = str((root / CLONE).resolve()), []
    for service in stack:
        variables = {}
        if service.name == "gpu-worker":  # it runs its clone's code
            variables = {"RETUNE_ROOT": clone, "PYTHONPATH": os.pathsep.join([clone, os.environ.get("PYTHONPATH", "")])}
        command = shlex.join(ending_with_parent([sys.executable, "-m", *service.arguments], parent=0))
        programs.append((service.name, command, ",".join(f'{key}="{value}"' for key, value in variables.items())))
    template = templates.environment(Path(__file__).parent, html=False).get_template("supervisor.ini.jinja")
    text = template.render(logs=LOGS, work=WORK_DIR, socket=f"{SHORT_FOLDER}{SOCKET}", programs=programs)
    (root / SOCKET).unlink(missing_ok=True)
    write_text(root / CONFIG, text)


def _ask(root: Path, method: str, *arguments: Any) -> Any:
    """Call a method of supervisord."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{SOCKET}")
    try:
        with chdir(root):
            return getattr(ServerProxy("http://127.0.0.1", transport).supervisor, method)(*arguments)
    except Fault as error:
        raise ServerError(f"supervisord's {method} failed: {error.faultString}; its log is in {LOGS}") from None


def _prepare_server(root: Path, params: Params, url: str) -> None:
    """Close the runs of an earlier stack; then create work pools, automations and deployments."""
    close_stack_runs(url)
    with suppress(RunUnderWay), only_run(root):  # else the lock's holder has closed them
        close_lost_runs(url)
    with (root / LOGS / "setup.log").open("a") as log:
        done = subprocess.run(
            python_ending_with_parent("flows.setup"), cwd=root, env=environment(root, params), stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"`python -m flows.setup` failed; its log is {LOGS / 'setup.log'}")


def _require_free(service: Service) -> None:
    if service.url is None:
        return
    port = int(service.url.rpartition(":")[2])
    option = "--port" if service.name == "prefect-server" else "--mlflow-port"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ServerError(
                f"port {port} for {service.name} is used by another program; choose another with `retune up {option}`"
            ) from None
