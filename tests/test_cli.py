"""What a person meets on the command line: help, one sentence for each mistake, statuses that scripts can rely on."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT, change_params, environment, make_project, retune

from pipeline.cli.main import app, main
from pipeline.core import graph
from pipeline.params import Params
from pipeline.settings import load_params

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Path:
    return make_project(tmp_path_factory.mktemp("cli") / "project", base, params)


def sentence(root: Path, *arguments: str) -> str:
    done = retune(root, *arguments)
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_overview_shows_whole_summaries_at_80_columns(tmp_path: Path) -> None:
    overview = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], cwd=tmp_path, env=environment() | {"COLUMNS": "80"},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert max(map(len, overview.splitlines())) <= 80
    for command in COMMANDS.values():
        assert command.hidden or " ".join(command.help.split("\n\n")[0].split()) in " ".join(overview.split())


def test_a_command_works_from_a_folder_below_with_paths_as_typed(root: Path) -> None:
    below = root / "notes"
    below.mkdir()
    (below / "rows.jsonl").write_text('{"prompt": "What is one plus one?", "completion": "two"}\n')
    shown = [retune(below, "inspect", name, "--json") for name in ("rows.jsonl", str(below / "rows.jsonl"))]
    assert [done.returncode for done in shown] == [0, 0], shown[0].stderr
    [row] = json.loads(shown[0].stdout)["rows"]
    assert "one plus one" in "".join(token["text"] for token in row["tokens"])
    above = retune(root, "inspect", "notes/rows.jsonl", "--json")
    assert json.loads(above.stdout) == json.loads(shown[0].stdout)
    shutil.rmtree(below)


def written(pattern: str) -> set[str]:
    """What stands in README and docs as code: lines of blocks, and between backticks."""
    found: set[str] = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        lines = [line for block in blocks for line in block.splitlines()] + [" ".join(code.split()) for code in inline]
        found |= {line.split("  #")[0].strip() for line in lines if re.match(pattern, line)}
    return found


def test_every_command_of_the_docs_exists_with_its_options() -> None:
    lines = written(r"retune( |$)")
    assert len(lines) > 50
    for line in lines:
        words = line.replace("…", "").replace("|", " ").split()[1:]
        if not words or words[0].startswith(("-", "stage")):
            continue
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        for name in [word for word in words if word in COMMANDS] if "|" in line else words[:1]:
            assert name in COMMANDS, line
            known = {option for each in COMMANDS[name].params for option in (*each.opts, *each.secondary_opts)} | {
                "--help"
            }
            assert set(options) <= known, line


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+|\$\(READY\)):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in written(r"make ") for word in line.split("&&")[0].split()[1:2]} - {".venv/.ready"}
    assert len(named) > 8
    assert named <= targets


def test_every_parameter_of_the_docs_exists() -> None:
    tree = load_params(ROOT / "params.yaml").model_dump()
    lines = written(rf"({'|'.join(tree)})\.[a-z_]+(\.[a-z_]+)?(:.*)?$")
    assert len(lines) > 50
    for line in lines:
        value: Any = tree
        for part in line.split(":")[0].split("."):
            assert isinstance(value, dict), line
            assert part in value, line
            value = value[part]


def test_documents_stay_short() -> None:
    limits = {"README.md": 180, "CONTRIBUTING.md": 80, "docs/decisions.md": 250, "docs/operations.md": 400}
    for name, most in limits.items():
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most, name
        assert [line for line in lines if len(line) > 120] == [], name


def test_outside_a_project_the_way_in_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in sentence(tmp_path, "run")
    assert not (tmp_path / ".retune").exists()


def test_one_run_at_a_time(root: Path) -> None:
    (root / ".retune").mkdir(exist_ok=True)
    with (root / ".retune" / "run.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4321")
        lock.flush()
        assert "a run is under way here (process 4321)" in sentence(root, "run")


def test_a_stage_does_nothing_once_the_run_that_started_it_is_dead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graph.RUN, f"{os.getpid()}:1.5")  # it died before the stage could ask to die with DVC
    assert retune(root, "stage", "prepare").returncode == 143
    assert not (root / "artifacts").exists()


def test_before_the_first_run_nothing_is_there_to_promote(root: Path) -> None:
    assert "dvc.lock is missing" in sentence(root, "promote")
    assert "no earlier champion" in sentence(root, "rollback")
    assert json.loads(retune(root, "history", "--json").stdout) == []
    assert "has no champion yet" in sentence(root, "download", "champion", "here")
    assert "is not published" in sentence(root, "verify", "0123456789abcdef")
    assert "nothing to delete; publish.keep_versions is null" in retune(root, "prune").stdout
    status = json.loads(retune(root, "status", "--json").stdout)
    assert status["champion"] is None
    assert "train" in status["stale"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "v1", "--force"], "--force needs --reason"),
        (["promote", "v1", "--force", "--reason", " "], "--force needs --reason"),
        (["promote", "--approve", "--reject"], "exclude each other"),
        (["promote", "--approve"], "no version waits for approval"),
        (["history", "7"], "no decision 7"),
        (["delete", "v1", "--reason", "room"], "has no version v1; it has none"),
    ],
)
def test_a_command_about_versions_says_what_it_lacks(root: Path, arguments: list[str], words: str) -> None:
    assert words in sentence(root, *arguments)


def test_a_store_that_cannot_be_written_is_named(root: Path) -> None:
    change_params(root, publish={"artifact_store": "file://params.yaml/store"})
    assert "the artifact store params.yaml/store cannot be" in sentence(root, "history")
    change_params(root, publish={"artifact_store": "file://store"})


def test_a_folder_of_another_user_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's answers to somebody whose folder it is not: no test can be sure to run as two users."""

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / ".retune").mkdir()
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(sys, "argv", ["retune", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["retune", "status"])
    monkeypatch.setattr("pipeline.settings.load_params", lambda: refuse(Path(".retune")))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert Path(".retune").owner() in capsys.readouterr().err
