"""infra/compose.yaml and the images: valid by the rules of compose and hadolint, closed by default, and in the words
of the locked Prefect and MLflow.

Not shown here: that Docker builds and runs them; there is none on this machine.
"""

import contextlib
import json
import os
import re
import runpy
import stat
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT, git
from ruamel.yaml import YAML

INFRA = ROOT / "infra"
SECRET = re.compile(r"\{secret:(\w+)\}")
HIDDEN = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY")
RAW = {"prefect-db", "redis", "mlflow-db", "store-data"}  # workers may reach these only through their servers


def interpolated(value: Any) -> Any:
    """`value` as compose reads it when only RETUNE_GIT_URL is set."""
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\$\{RETUNE_GIT_URL:\?[^}]*\}", "https://git.example.org/retune.git", value)
    value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return re.sub(r"\$\{\w+:\+[^}]*\}", "", value).replace("$$", "$")


def compose() -> dict[str, Any]:
    read = YAML(typ="safe").load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
    return json.loads(json.dumps(interpolated(read)))


COMPOSE = compose()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
every_service = pytest.mark.parametrize("name", SERVICES)


def test_the_compose_file_is_one_by_the_compose_specification() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(COMPOSE)


def test_every_image_has_a_version_and_prefect_and_mlflow_those_of_the_lock() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+(\.\d+)+", service["image"]), f"{name}: {service['image']}"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {name: service["image"].rpartition(":")[2] for name, service in SERVICES.items()}
    for name in ("prefect", "prefect-services", "prefect-migrate"):
        assert images[name].startswith(f"{LOCKED['prefect']}-python3.11")
    assert images["mlflow"] == f"v{LOCKED['mlflow-skinny']}-full"
    assert {images[name] for name in ("setup", "cpu-worker", "gpu-worker")} == {version}
    assert images["store"] == images["store-data"]


@every_service
def test_a_service_has_no_rights_and_is_reached_only_where_it_asks_for_a_password(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not [at for at in service.get("volumes", []) if at.startswith((".", "/"))]  # nothing of the host
    ports = service.get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert bool(ports) == (name in ("prefect", "mlflow", "store"))
    networks = set(service["networks"])
    if name in ("setup", "cpu-worker", "gpu-worker"):
        assert networks == {"team"}
    if name in RAW:
        assert "team" not in networks and all(COMPOSE["networks"][network]["internal"] for network in networks)


@every_service
def test_a_secret_comes_from_a_file_and_only_its_users_get_it(name: str) -> None:
    service = SERVICES[name]
    environment = service.get("environment", {})
    for key, value in environment.items():
        if key.endswith("_FILE"):
            assert value.removeprefix("/run/secrets/") in service["secrets"]
        elif HIDDEN.search(key):
            assert SECRET.fullmatch(value), f"{name}: {key} is in the open"
        in_url = re.search(r"://[^:/@]*:([^/@]+)@", value)
        assert in_url is None or SECRET.fullmatch(in_url[1]), f"{name}: {key} has a password in the open"
    command = json.dumps([service.get("entrypoint", []), service.get("command", [])])
    assert "{secret:" not in command  # which `ps` and `docker inspect` show
    used = {secret for value in environment.values() for secret in SECRET.findall(value)}
    used |= set(re.findall(r"/run/secrets/(\w+)", command + json.dumps(environment)))
    for config in service.get("configs", []):
        if config["source"] != "with_secrets":
            used |= set(SECRET.findall((INFRA / COMPOSE["configs"][config["source"]]["file"]).read_text()))
    if service["image"].startswith("retune-"):
        used |= set(re.findall(r"/run/secrets\}/(\w+)", (INFRA / "docker" / "git-askpass.sh").read_text()))
    assert used == set(service.get("secrets", []))
    if any(SECRET.search(value) for value in environment.values()):  # something must fill them in
        assert "with_secrets.py" in command or service["image"].startswith("retune-")


def test_every_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    script = runpy.run_path(str(INFRA / "make_secrets.py"))
    assert set(script["MADE"]) | set(script["ASKED"]) == set(COMPOSE["secrets"])
    folder = tmp_path / "secrets"
    with pytest.raises(SystemExit, match="git_token"):
        script["main"](folder)
    (folder / "git_token").write_text("t")
    first = {path.name: path.read_text() for path in folder.iterdir()}
    script["main"](folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    values = [value.strip() for name, value in first.items() if name in script["MADE"]]
    assert len(set(values)) == len(values) and min(map(len, values)) >= 20
    for ignored in ("infra/secrets/git_token", "infra/.env"):
        assert subprocess.run(["git", "check-ignore", "-q", ignored], cwd=ROOT).returncode == 0


def test_secrets_are_filled_in_quoted_in_addresses_and_refused_when_missing(tmp_path: Path) -> None:
    script = INFRA / "docker" / "with_secrets.py"
    (tmp_path / "pw").write_text("a/b@c\n")
    (tmp_path / "none").write_text("\n")
    (tmp_path / "t.ini").write_text("# http://x\nplain = {secret:pw}\nuri = pg://u:{secret:pw}@h/d\n")
    show = "import os; print(os.environ['A'], os.environ['B'])"

    def run(*arguments: str, **values: str) -> "subprocess.CompletedProcess[str]":
        environment = {"RETUNE_SECRETS": str(tmp_path), "A": "", "B": "", **values}
        command = [sys.executable, "-S", script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    template = f"{tmp_path / 't.ini'}:{tmp_path / 'out.ini'}"
    done = run(template, "--", sys.executable, "-c", show, A="{secret:pw}", B="redis://:{secret:pw}@r/1")
    assert done.stdout == "a/b@c redis://:a%2Fb%40c@r/1\n", done.stderr
    assert (tmp_path / "out.ini").read_text() == "# http://x\nplain = a/b@c\nuri = pg://u:a%2Fb%40c@h/d\n"
    assert stat.S_IMODE((tmp_path / "out.ini").stat().st_mode) == 0o600
    for value, message in (("{secret:gone}", "the secret gone cannot be read"), ("{secret:none}", "is empty")):
        done = run("--", sys.executable, "-c", show, A=value)
        assert done.returncode == 1 and message in done.stderr and done.stdout == ""


def commands() -> list[list[str]]:
    """Prefect's commands in compose, in the worker's start script and on Kubernetes."""
    commands = [service["command"] for service in SERVICES.values() if service.get("command", [""])[0] == "prefect"]
    line = re.search(r"exec (prefect worker start .*)", (INFRA / "docker" / "worker.sh").read_text())
    assert line is not None
    commands.append(re.sub(r'"\$pool[^"]*"', "gpu", line[1]).replace(' "$@"', "").split())
    kubernetes = YAML(typ="safe").load((INFRA / "kubernetes" / "worker.yaml").read_text())
    return [*commands, kubernetes["spec"]["template"]["spec"]["containers"][0]["args"]]


def test_the_locked_prefect_takes_every_command() -> None:
    from prefect.cli._app import _app

    for words in commands():
        command, _, _ = _app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert command.__name__ in {"start", "upgrade", "services_start", "start_services"}, command


def test_the_locked_mlflow_takes_its_command() -> None:
    from mlflow.cli import server

    words = SERVICES["mlflow"]["command"]
    assert words[:2] == ["mlflow", "server"]
    uri = SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    chosen = server.make_context("server", [*words[2:], "--backend-store-uri", uri]).params
    assert chosen["app_name"] == "basic-auth" and "mlflow:5000" in chosen["allowed_hosts"].split(",")


def test_every_prefect_variable_is_a_setting_of_the_locked_prefect() -> None:
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings
    from prefect_redis.client import RedisMessagingSettings

    used = {key for service in SERVICES.values() for key in service.get("environment", {}) if key[:8] == "PREFECT_"}
    for dockerfile in (INFRA / "docker").glob("*.Dockerfile"):
        used |= set(re.findall(r"\b(PREFECT_[A-Z_]+)=", dockerfile.read_text()))
    redis = {f"PREFECT_REDIS_MESSAGING_{name}".upper() for name in RedisMessagingSettings.model_fields}
    assert used - redis - set(_get_settings_fields(Settings)) == set()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_image_is_clean_by_hadolint_from_the_lock_and_starts_its_pool(kind: str) -> None:
    path = INFRA / "docker" / f"{kind}.Dockerfile"
    command = [Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert "pip install --no-cache-dir -r requirements.lock" in text
    for line in ("USER 10001:10001$", rf'CMD \["{kind}"\]$', "HEALTHCHECK "):
        assert re.search(f"^{line}", text, re.MULTILINE), line
    assert SERVICES[f"{kind}-worker"]["build"]["dockerfile"] == f"infra/docker/{kind}.Dockerfile"
    assert SERVICES[f"{kind}-worker"]["user"] == "10001:10001" and SERVICES[f"{kind}-worker"]["command"][0] == kind
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and any(f"{source}/".startswith(f"{folder}/") for folder in allowed), source


def test_a_worker_starts_in_a_clone_of_its_own_and_goes_on_with_it(tmp_path: Path) -> None:
    origin, root, stubs = tmp_path / "origin", tmp_path / "volume" / "retune", tmp_path / "bin"
    (origin / ".dvc").mkdir(parents=True)
    (origin / ".dvc" / ".gitignore").write_text("/config.local\n")
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", "-A")
    git(origin, "commit", "-qm", "one")
    stubs.mkdir()
    (stubs / "prefect").write_text('#!/bin/sh\necho "$@" in "$PWD"\n')
    (stubs / "prefect").chmod(0o755)
    environment = {
        "PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(tmp_path / "volume" / "home"), "RETUNE_ROOT": str(root),
        "RETUNE_GIT_URL": str(origin), "RETUNE_DVC_REMOTE": "s3://b/dvc", "AWS_ENDPOINT_URL_S3": "http://store:8333",
    }  # fmt: skip

    def start(*arguments: str, **more: str) -> str:
        script = INFRA / "docker" / "worker.sh"
        done = subprocess.run([script, *arguments], env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = start("gpu", "--limit", "1", RETUNE_POOL="gpu")
    assert output.startswith("worker start --pool gpu --type process --name gpu-") and output.endswith(f"in {root}\n")
    assert "--with-healthcheck --limit 1" in output
    assert git(root, "config", "retune.worker") == "true"
    assert git(root, "rev-parse", "HEAD") == git(origin, "rev-parse", "HEAD")
    assert git(root, "status", "--porcelain") == ""  # config.local is ignored

    from dvc.config import Config

    config = Config(str(root / ".dvc"))
    assert config["core"]["remote"] == "team"
    assert [config["remote"]["team"][key] for key in ("url", "endpointurl")] == ["s3://b/dvc", "http://store:8333"]

    (root / "checkpoint").write_text("kept")  # the second start finds a clone and leaves it alone
    git(origin, "commit", "-q", "--allow-empty", "-m", "two")
    assert start("echo", "a run") == "a run\n"
    assert (root / "checkpoint").exists() and git(root, "log", "--format=%s") == "one"

    other = str(tmp_path / "other")
    start("true", RETUNE_ROOT=other)  # a cpu worker's clone is the project: nothing overwrites it
    with contextlib.suppress(subprocess.CalledProcessError):
        assert git(Path(other), "config", "retune.worker") != "true"
