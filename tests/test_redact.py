"""Secrets in the environment, in addresses and in messages do not reach terminal, logs, databases or artifacts."""

import base64
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from conftest import ROOT, environment, make_project
from ruamel.yaml import YAML

from pipeline.core.redaction import HIDDEN, has_credentials, redact, redacted_errors
from pipeline.params import Params
from pipeline.settings import ParamsError, load_params

# Invented, with the shape and length of real ones.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAQ7PLANTED1KEY9ZX",
    "AWS_SECRET_ACCESS_KEY": "wJalrPLANTED+K7MDENG/bPxRfiCYpl4nt3dKEYab",
    "AWS_SESSION_TOKEN": "FwoGZXPLANTED//////////wEaDFplanted==",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-pass",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token",
    "HF_TOKEN": "hf_plantedplantedplantedplantedplant",
    "RETUNE_WEBHOOK": "https://hooks.slack.com/services/T0PLANTED/B0PLANTED/planted",
    "RETUNE_SIGNING_PASSWORD": "planted signing passphrase",
    "PREFECT_API_KEY": "pnu_plantedplantedplanted",
    "SMTP_PASSWD": "plänted&pässwd",
}
URIS = {
    "HTTPS_PROXY": "http://planteduser:plantedpass@127.0.0.1:9",
    "AWS_ENDPOINT_URL_DYNAMODB": "https://planteduser:plantedpass@example.org",
}
FORBIDDEN = [*SECRETS.values(), "plantedpass", quote(SECRETS["AWS_SECRET_ACCESS_KEY"], safe="")]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRETS | URIS).items():
        monkeypatch.setenv(name, value)


def has_no_secret(text: str) -> bool:
    return not any(secret in text for secret in FORBIDDEN)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_the_environment_is_hidden_in_every_encoding(planted: None, name: str) -> None:
    value = SECRETS[name]
    encoded = base64.b64encode(value.encode()).decode()
    for spelling in (value, quote(value, safe=""), repr(value), encoded, f"x{value}y", f"{value}\n{value}"):
        shown = redact(f"failed with {spelling}!")
        assert value not in shown and encoded not in shown and quote(value, safe="") not in shown
        assert shown.startswith("failed with ")
        assert redact(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEYID:s3cretvalue@bucket/prefix", "s3://***@bucket/prefix"),
        ("http://user:p@ss@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+asyncpg://u:pw@db/prefect", "postgresql+asyncpg://***@db/prefect"),
        ("https://b.s3.org/k?X-Amz-Signature=abc123&x=1", "https://b.s3.org/k?X-Amz-Signature=***&x=1"),
        ("GET /?token=abc&b=c", "GET /?token=***&b=c"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic ***'}"),
        ("key AKIAIOSFODNN7EXAMPLE.", "key ***."),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("see https://hooks.slack.com/services/T0/B0/xyz now", "see *** now"),
        ("-----BEGIN EC PRIVATE KEY-----\nabc\n-----END EC PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_a_secret_with_a_known_shape_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert has_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix",
        "http://127.0.0.1:4200/api",
        "https://user@host/path",
        "sqlite:////srv/mlflow.db",
        "file://store",
        "train 50% · 85/168 steps · loss 0.499 · ETA 0:05",
        "rougeL 0.634 against 0.029 (95 % CI +0.568 to +0.638)",
        "<|im_start|>user\n1 + 1 = ?<|im_end|>",
        "sha256 a4ce4462b7920e4fa4ce4462b7920e4fa4ce4462b7920e4fa4ce4462b7920e4f",
        "token 5 of 7; tokens/s 2,159; password: none",
        "Qwen/Qwen2.5-0.5B-Instruct at 0123456789abcdef0123456789abcdef01234567",
        "time 10:30 user: me @home",
        "falsely /srv/key.json 1",  # the values of settings
    ],
)
def test_ordinary_text_and_settings_are_unchanged(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    settings = {"TOKENIZERS_PARALLELISM": "falsely", "GOOGLE_CREDENTIALS_FILE": "/srv/key.json", "API_TOKEN": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert redact(text) == text
    assert not has_credentials(text)


def test_an_error_keeps_its_class_without_secrets(planted: None) -> None:
    @redacted_errors
    def fail() -> None:
        raise ConnectionError(f"cannot reach {URIS['HTTPS_PROXY']} with {SECRETS['HF_TOKEN']}", 5)

    with pytest.raises(ConnectionError) as caught:
        fail()
    assert caught.value.args == (f"cannot reach http://{HIDDEN}@127.0.0.1:9 with {HIDDEN}", 5)


PROGRAM = """
import logging, os, sys
from pipeline.core.redaction import redact_process
redact_process()
redact_process()
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
secret = os.environ["AWS_SECRET_ACCESS_KEY"]
logging.getLogger("botocore").debug("signing with %s and %r", secret, {"key": secret})
logging.info("no arguments: %s done" % secret)
logging.info("%d items", 3)
try:
    raise ValueError(secret)
except ValueError:
    logging.exception("went wrong")
    try:
        raise KeyError("outer")
    except KeyError as error:
        logging.error("chained", exc_info=error)
raise RuntimeError(f"uncaught {secret}")
"""


def test_log_records_and_tracebacks_of_any_library_are_redacted(planted: None) -> None:
    program = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True)
    assert has_no_secret(program.stdout + program.stderr)
    assert "signing with *** and {'key': '***'}" in program.stdout
    assert "INFO:root:3 items" in program.stdout
    assert "ValueError: ***" in program.stdout
    assert "RuntimeError: uncaught ***" in program.stderr


def params_with(folder: Path, section: str, key: str, value: Any) -> Path:
    tree = YAML(typ="rt").load((ROOT / "params.yaml").read_text())
    tree[section][key] = value
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="rt").dump(tree, file)
    return folder / "params.yaml"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("publish", "artifact_store", "s3://AKIDPLANTED:plantedpass@bucket/prefix"),
        ("prepare", "model_name_or_path", "hf_plantedplantedplantedplantedplant"),
        ("ingest", "sources", [{"uri": "rows.csv"}, {"uri": "https://user:plantedpass@example.org/rows.csv"}]),
    ],
)
def test_credentials_in_params_are_refused_without_being_printed(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    path = params_with(tmp_path, section, key, value)
    words = rf"{section}\.{key}\S* holds a password or key .*line \d+.*environment"
    with pytest.raises(ParamsError, match=words) as caught:
        load_params(path)
    assert has_no_secret(str(caught.value))


def test_a_command_that_fails_prints_no_secret(tmp_path: Path, planted: None) -> None:
    path = params_with(tmp_path, "prepare", "model_name_or_path", f"./{SECRETS['MLFLOW_TRACKING_PASSWORD']}")
    assert path.exists()
    command = [sys.executable, "-m", "pipeline", "stage", "prepare"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert has_no_secret(result.stdout + result.stderr)


def test_the_work_folder_is_private_and_no_file_is_world_writable(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    command = ["sh", "-c", f"umask 0; {sys.executable} -m pipeline status; true"]
    subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True)
    assert stat.S_IMODE((tmp_path / ".retune").stat().st_mode) == 0o700
    assert not [path for path in tmp_path.rglob("*") if path.stat().st_mode & stat.S_IWOTH]


@pytest.mark.faults
def test_a_whole_run_leaves_no_secret_anywhere(tmp_path: Path, base: Path, params: Params, planted: None) -> None:
    root = make_project(tmp_path / "project", base, params)
    # The stage prints a secret, as a library's debug output might.
    stages = (root / "dvc.yaml").read_text().replace("stage prepare", "stage prepare && echo leaking $HF_TOKEN")
    (root / "dvc.yaml").write_text(stages)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    settings = environment() | {"TMPDIR": str(scratch), "PREFECT_LOGGING_LEVEL": "DEBUG", "NO_PROXY": "127.0.0.1"}
    command = ["sh", "-c", f"umask 0; exec {sys.executable} -m pipeline run"]
    command_lines: set[str] = set()
    listening: set[str] = set()
    with (tmp_path / "output").open("w") as out:
        child = subprocess.Popen(command, cwd=root, env=settings, stdout=out, stderr=subprocess.STDOUT)
        while child.poll() is None:
            for process in psutil.Process(child.pid).children(recursive=True):
                with suppress(psutil.Error):
                    command_lines.add(" ".join(process.cmdline()))
                    connections = process.net_connections("tcp")
                    listening |= {socket.laddr.ip for socket in connections if socket.status == psutil.CONN_LISTEN}
            time.sleep(0.2)
    output = (tmp_path / "output").read_text()
    assert child.returncode == 0, output
    assert has_no_secret(output)
    assert f"leaking {HIDDEN}" in output
    assert any("prefect server start" in line for line in command_lines)
    assert all(has_no_secret(line) for line in command_lines)
    assert listening == {"127.0.0.1"}
    files = [path for path in (*root.rglob("*"), *scratch.rglob("*")) if path.is_file() and not path.is_symlink()]
    leaking = [(path, secret) for path in files for secret in FORBIDDEN if secret.encode() in path.read_bytes()]
    assert leaking == []
    assert {".db", ".lock", ".json", ".log", ".parquet"} <= {path.suffix for path in files}
    writable = [path for path in (*root.rglob("*"), *scratch.rglob("*")) if not path.is_symlink()]
    assert not [path for path in writable if path.stat().st_mode & 0o002 and ".git" not in path.parts]
    assert not [path for path in files if "store" in path.parts and path.stat().st_mode & 0o111]
