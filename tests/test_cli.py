"""The command line: help, one sentence for each mistake, exit statuses, and documents that match the commands."""

import errno
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
from pipeline.core.run_lock import only_run
from pipeline.params import Params
from pipeline.settings import load_params

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Path:
    return make_project(tmp_path_factory.mktemp("cli") / "project", base, params)


def error_of(root: Path, *arguments: str) -> str:
    command = retune(root, *arguments)
    assert command.returncode == 1, command.stdout
    assert command.stderr.splitlines()[-1].startswith("error: "), command.stderr
    assert "Traceback" not in command.stderr
    return command.stderr


def test_the_overview_shows_whole_summaries_at_80_columns(tmp_path: Path) -> None:
    command, wide = [sys.executable, "-m", "pipeline", "--help"], environment() | {"COLUMNS": "80"}
    overview = subprocess.run(command, cwd=tmp_path, env=wide, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert max(map(len, overview.splitlines())) <= 80
    for command in COMMANDS.values():
        assert command.hidden or " ".join(command.help.split("\n\n")[0].split()) in " ".join(overview.split())


def test_a_command_works_from_a_folder_below_with_paths_as_typed(root: Path) -> None:
    below = root / "notes"
    below.mkdir()
    (below / "rows.jsonl").write_text('{"prompt": "What is one plus one?", "completion": "two"}\n')
    commands = [retune(below, "inspect", name, "--json") for name in ("rows.jsonl", str(below / "rows.jsonl"))]
    assert [command.returncode for command in commands] == [0, 0], commands[0].stderr
    [row] = json.loads(commands[0].stdout)["rows"]
    assert "one plus one" in "".join(token["text"] for token in row["tokens"])
    above = retune(root, "inspect", "notes/rows.jsonl", "--json")
    assert json.loads(above.stdout) == json.loads(commands[0].stdout)
    shutil.rmtree(below)


def code_lines(pattern: str) -> set[str]:
    """Code in README and docs that matches: lines of blocks, and text between backticks."""
    matching: set[str] = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        lines = [line for block in blocks for line in block.splitlines()] + [" ".join(code.split()) for code in inline]
        matching |= {line.split("  #")[0].strip() for line in lines if re.match(pattern, line)}
    return matching


def test_every_command_of_the_docs_exists_with_its_options() -> None:
    lines = code_lines(r"retune( |$)")
    assert len(lines) > 50
    for line in lines:
        words = line.replace("…", "").replace("|", " ").split()[1:]
        if not words or words[0].startswith(("-", "stage")):
            continue
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        for name in [word for word in words if word in COMMANDS] if "|" in line else words[:1]:
            assert name in COMMANDS, line
            known = {option for param in COMMANDS[name].params for option in (*param.opts, *param.secondary_opts)}
            assert set(options) <= known | {"--help"}, line


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+|\$\(READY\)):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in code_lines(r"make ") for word in line.split("&&")[0].split()[1:2]} - {".venv/.ready"}
    assert len(named) > 8
    assert named <= targets


def test_every_parameter_of_the_docs_exists() -> None:
    tree = load_params(ROOT / "params.yaml").model_dump()
    lines = code_lines(rf"({'|'.join(tree)})\.[a-z_]+(\.[a-z_]+)?(:.*)?$")
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


def test_outside_a_project_the_error_names_the_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(tmp_path, "run")
    assert not (tmp_path / ".retune").exists()


def test_one_run_at_a_time(root: Path) -> None:
    with only_run(root):
        assert f"a run is under way here (process {os.getpid()})" in error_of(root, "run")


def test_a_stage_does_nothing_if_the_run_that_started_it_is_dead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graph.RUN, f"{os.getpid()}:1.5")  # no process has this identity
    assert retune(root, "stage", "prepare").returncode == 143
    assert not (root / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote"], "dvc.lock is missing"),
        (["rollback"], "no earlier champion"),
        (["download", "champion", "here"], "has no champion yet"),
        (["verify", "0123456789abcdef"], "is not published"),
        (["promote", "v1", "--force"], "--force needs --reason"),
        (["promote", "v1", "--force", "--reason", " "], "--force needs --reason"),
        (["promote", "--approve", "--reject"], "exclude each other"),
        (["promote", "--approve"], "no version waits for approval"),
        (["history", "7"], "no decision 7"),
        (["delete", "v1", "--reason", "room"], "has no version v1; it has none"),
    ],
)
def test_what_is_wrong_with_a_command_about_versions_is_named(root: Path, arguments: list[str], words: str) -> None:
    assert words in error_of(root, *arguments)


def test_before_the_first_run_nothing_is_published_and_all_is_stale(root: Path) -> None:
    assert json.loads(retune(root, "history", "--json").stdout) == []
    assert "nothing to delete; publish.keep_versions is null" in retune(root, "prune").stdout
    status = json.loads(retune(root, "status", "--json").stdout)
    assert status["champion"] is None and "train" in status["stale"]


def test_a_store_that_cannot_be_written_is_named(root: Path) -> None:
    change_params(root, publish={"artifact_store": "file://params.yaml/store"})
    assert "the artifact store params.yaml/store cannot be" in error_of(root, "history")
    change_params(root, publish={"artifact_store": "file://store"})


def test_another_users_project_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's errors are simulated, because a test cannot run as two users everywhere."""

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / ".retune").mkdir()
    monkeypatch.setattr(Path, "chmod", refuse)
    for word, code in (("--help", 0), ("status", 1)):
        monkeypatch.setattr(sys, "argv", ["retune", word])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == code
        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setattr("pipeline.cli.operate.load_params", lambda: refuse(Path(".retune")))
    assert Path(".retune").owner() in capsys.readouterr().err
