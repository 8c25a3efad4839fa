"""DVC runs a stage and answers; what it starts ends with it, and what it says of a failure is the error."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import PYTHON, environment

from pipeline.core import graph
from pipeline.core.graph import GraphError

STAGES = """\
stages:
  first:
    cmd: {python} -c "import sys; print('in:', sys.stdin.read()); open('one', 'w').write(open('data/rows').read() * 2)"
    deps: [data/rows]
    params: [n]
    outs: [one]
  second:
    cmd: {python} -c "open('two', 'w').write(open('one').read()[::-1]); print('no end of line', end='')"
    deps: [one]
    outs: [two]
  long:
    cmd: echo pid $$ && exec {python} -c 'import time; time.sleep(600)'
  killer:
    cmd: kill -9 $PPID
  leaver:
    cmd: sleep 600 & echo pid $!
"""


@pytest.fixture(autouse=True)
def real_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)  # a fork of `preloaded` has another parent, session and group


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("new") / "project"
    (root / "data").mkdir(parents=True)
    (root / "data" / "rows").write_text("row")
    (root / "params.yaml").write_text("n: 1\n")
    (root / "dvc.yaml").write_text(STAGES.format(python=sys.executable))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, env=environment(), check=True)
    return root


@pytest.fixture
def project(new: Path, tmp_path: Path) -> Path:
    return shutil.copytree(new, tmp_path / "project")


def busy(root: Path, pid: int) -> None:
    """DVC's list of who is at work on which path has the process `pid` writing to the first stage's output."""
    path = root / ".dvc" / "tmp" / "rwlock"
    path.write_text(json.dumps({"write": {str(root / "one"): {"pid": pid, "cmd": "dvc repro"}}}))


def test_a_stage_runs_once_reads_nothing_and_its_lines_arrive_in_order(project: Path) -> None:
    lines: list[str] = []
    assert graph.repro("first", lines.append, project) == 0
    assert lines.index("Running stage 'first':") < lines.index("in: ")
    assert graph.outcome(lines, "first") == "ran"
    assert set(graph.stale(project)) == {"second", "long", "killer", "leaver"}
    assert graph.repro("second", lines.append, project) == 0
    assert any(line.startswith("no end of line") for line in lines)
    again: list[str] = []
    graph.repro("second", again.append, project)
    assert graph.outcome(again, "second") == "cached"


def test_what_dvc_says_of_a_failure_is_the_error(project: Path) -> None:
    with pytest.raises(GraphError, match="Stage 'nosuch' not found"):
        graph.ask(project, "repro", "nosuch")
    with pytest.raises(GraphError, match="you are not inside of a DVC repository"):
        graph.stale(project.parent)
    (project / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"/so')
    with pytest.raises(GraphError, match=r"remove \.dvc/tmp/rwlock"):
        graph.ask(project, "repro", "--single-item", "first")


def test_an_error_in_a_line_ends_the_stage(project: Path) -> None:
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith("pid "):
            raise ValueError(line)

    with pytest.raises(ValueError, match=r"pid \d+"):
        graph.repro("long", stop, project)
    assert not lives(seen[-1])


def test_a_killed_dvc_is_told_by_its_status(project: Path) -> None:
    assert graph.repro("killer", print, project) == -signal.SIGKILL


def test_what_a_stage_leaves_running_ends_with_it(project: Path) -> None:
    lines: list[str] = []
    assert graph.repro("leaver", lines.append, project) == 0
    assert not lives(next(line for line in lines if line.startswith("pid ")))


def test_dvc_ends_with_a_killed_run(project: Path) -> None:
    code = "from pipeline.core import graph; graph.repro('long', lambda l: print(l, flush=True))"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=project, env=environment(), stdout=subprocess.PIPE)
    assert run.stdout is not None
    stage = int(next(line for line in run.stdout if line.startswith(b"pid ")).split()[1])
    dvc = psutil.Process(run.pid).children()[0]
    run.kill()
    run.communicate()
    _, left = psutil.wait_procs([dvc], timeout=10)
    os.kill(stage, signal.SIGKILL)  # it does not watch its parent, as ours do
    assert not left


def test_a_path_that_is_soon_free_is_waited_for_and_one_that_stays_busy_is_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = subprocess.Popen(["sleep", "600"])
    busy(project, other.pid)
    threading.Timer(2.0, lambda: (other.kill(), other.wait())).start()
    graph.ask(project, "repro", "--single-item", "first")
    assert (project / "one").exists()
    (project / "data" / "rows").write_text("another")
    busy(project, os.getpid())
    monkeypatch.setattr(graph, "PATIENCE", 0.5)
    with pytest.raises(GraphError, match=rf"is busy, it is being blocked by:\n  \(PID {os.getpid()}\): dvc repro"):
        graph.ask(project, "repro", "--single-item", "first")


def lives(line: str) -> bool:
    """Whether the process of the line `pid 123` still runs."""
    pid = int(line.split()[1])
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
