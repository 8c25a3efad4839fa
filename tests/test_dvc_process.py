"""DVC loaded once answers as DVC loaded anew does, and what the dead were at work on is free."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import environment

from pipeline import dvc_process, graph
from pipeline.dvc_process import DvcError, DvcProcess, forget_the_dead
from pipeline.graph import GraphError

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
"""


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


@pytest.fixture
def loaded(project: Path) -> Iterator[DvcProcess]:
    with DvcProcess(project) as dvc:
        yield dvc


def holders(root: Path, pid: int, mode: str = "write") -> Path:
    """DVC's list, with the process `pid` at work on the data."""
    path = root / ".dvc" / "tmp" / "rwlock"
    one = {"pid": pid, "cmd": "dvc repro"}
    path.write_text(json.dumps({mode: {str(root / "one"): one if mode == "write" else [one]}}))
    return path


def test_a_loaded_dvc_answers_as_a_new_one_whatever_changed_in_between(project: Path, loaded: DvcProcess) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    changes = [
        lambda: (project / "data" / "rows").write_text(str(draw.random())),
        lambda: (project / "params.yaml").write_text(f"n: {draw.randrange(9)}\n"),
        lambda: (project / "one").write_text("by hand"),
        lambda: (project / "two").unlink(missing_ok=True),
        lambda: loaded.run(["repro", "--single-item", "first"], print),
        lambda: loaded.run(["repro", "--single-item", "second"], print),
    ]
    for _ in range(6):
        draw.choice(changes)()
        with DvcProcess(project) as new:
            assert json.loads(loaded.ask("status", "--json")) == json.loads(new.ask("status", "--json"))


def test_a_stage_runs_without_the_commands_as_its_input_and_its_last_line_arrives(loaded: DvcProcess) -> None:
    lines: list[str] = []
    assert loaded.run(["repro"], lines.append) == 0
    assert "in: " in lines
    assert any(line.startswith("no end of line") for line in lines)
    assert json.loads(loaded.ask("status", "--json")) == {}


def test_what_dvc_says_of_a_failure_is_the_error(loaded: DvcProcess) -> None:
    with pytest.raises(DvcError, match="`dvc repro nosuch` failed: ERROR: Stage 'nosuch' not found"):
        loaded.ask("repro", "nosuch")
    with pytest.raises(DvcError, match="`dvc nosuch` failed: .*invalid choice"):
        loaded.ask("nosuch")
    assert json.loads(loaded.ask("status", "--json"))  # and it goes on


def test_a_graph_asks_the_loaded_process_of_its_own_folder_only(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    started: list[Path] = []
    start = DvcProcess.start

    def counted(self: DvcProcess) -> None:
        if self._child is None:
            started.append(self.root)
        start(self)

    monkeypatch.setattr(DvcProcess, "start", counted)
    with graph.dvc_loaded():
        assert set(graph.stale()) == {"first", "second"}
        assert graph.repro("first", print) == 0
        assert set(graph.stale()) == {"second"}
        assert started == [project]
        with pytest.raises(GraphError, match="you are not inside of a DVC repository"):
            graph.stale(tmp_path)
    assert started == [project, tmp_path]
    graph.stale()
    assert started[2:] == [project]


def test_an_error_in_a_line_ends_the_stage_and_the_next_command_is_answered(project: Path, loaded: DvcProcess) -> None:
    (project / "dvc.yaml").write_text(
        f"stages:\n  long:\n    cmd: echo $$ && {sys.executable} -c 'import time; time.sleep(600)'\n"
    )
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if line.isdigit():
            raise ValueError(line)

    with pytest.raises(ValueError, match=r"\d+"):
        loaded.run(["repro"], stop)
    assert not psutil.pid_exists(int(seen[-1]))
    assert "long" in json.loads(loaded.ask("status", "--json"))


def test_a_process_killed_in_a_command_is_told_by_its_status(project: Path, loaded: DvcProcess) -> None:
    (project / "dvc.yaml").write_text("stages:\n  killer:\n    cmd: kill -9 $PPID\n")
    assert loaded.run(["repro"], print) == -signal.SIGKILL
    assert loaded.run(["version"], print) == 0


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_zombie_holds_no_path(project: Path, loaded: DvcProcess, mode: str) -> None:
    dead = subprocess.Popen(["true"])  # its status is asked for at the end of this test
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    holders(project, dead.pid, mode)
    assert loaded.run(["repro", "first"], print) == 0
    assert dead.wait() == 0


def test_a_process_that_has_the_number_of_a_dead_one_holds_no_path(project: Path) -> None:
    other = subprocess.Popen(["sleep", "600"])
    dvc = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "dvc"])
    try:
        for process, older, stays in ((other, False, True), (other, True, False), (dvc, True, True)):
            path = holders(project, process.pid)
            if older:  # than the process
                os.utime(path, (1, psutil.Process(process.pid).create_time() - 60))
            forget_the_dead(project)
            assert (str(process.pid) in path.read_text()) == stays
    finally:
        for process in (other, dvc):
            process.kill()
            process.wait()


def test_the_list_is_left_alone_while_another_has_it_and_with_locks_by_links(project: Path) -> None:
    lock = project / ".dvc" / "tmp" / "rwlock.lock"
    path = holders(project, 2**22 + 1)  # nobody's number
    with lock.open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        forget_the_dead(project)
        assert "pid" in path.read_text()
    lock.unlink()
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.hardlink_lock", "true"], cwd=project, check=True)
    forget_the_dead(project)
    assert json.loads(path.read_text()) == {}
    assert not lock.exists()


def test_what_a_stage_leaves_running_ends_with_it(project: Path, loaded: DvcProcess) -> None:
    (project / "dvc.yaml").write_text("stages:\n  leaver:\n    cmd: sleep 600 & echo pid $!\n")
    lines: list[str] = []
    assert loaded.run(["repro"], lines.append) == 0
    [left] = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_a_pipe_that_breaks_within_dvc_ends_its_command_only(project: Path) -> None:
    code = (
        "import sys, dvc.cli, pipeline.dvc_process as own; parse = dvc.cli.parse_args\n"
        "sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__\n"  # importing DVC wraps them
        "def broken(argv):\n"
        "    if 'repro' in argv: raise BrokenPipeError\n"
        "    return parse(argv)\n"
        "dvc.cli.parse_args = broken; own.main()"
    )
    commands = [{"arguments": ["repro"], "captured": False}, {"arguments": ["status", "--json"], "captured": True}]
    done = subprocess.run(
        [sys.executable, "-c", code, "END"],
        cwd=project,
        env=environment(),
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("END") == 2, done.stderr
    first, second = (
        json.loads(line.removeprefix("END")) for line in done.stdout.splitlines() if line.startswith("END")
    )
    assert (first["status"], second["status"]) == (141, 0)
    assert set(json.loads(second["output"])) == {"first", "second"}


def test_a_list_cut_short_by_a_kill_is_begun_anew(project: Path, loaded: DvcProcess) -> None:
    holders(project, 1).write_text('{"write": {"/so')
    assert loaded.run(["repro", "first"], print) == 0


def test_a_path_that_is_soon_free_is_waited_for(project: Path, loaded: DvcProcess) -> None:
    loaded.start()
    busy = subprocess.Popen(["sleep", "600"])
    holders(project, busy.pid)
    threading.Timer(1.0, busy.kill).start()
    loaded.ask("repro", "first")
    assert (project / "one").exists()
    busy.wait()


def test_a_path_that_stays_busy_is_an_error_that_says_with_whom(
    project: Path, loaded: DvcProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_process, "PATIENCE", 0.5)
    holders(project, os.getpid())
    with pytest.raises(DvcError, match=rf"is busy, it is being blocked by:\n  \(PID {os.getpid()}\): dvc repro"):
        loaded.ask("repro", "first")
