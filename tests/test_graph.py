"""Stages run by DVC: their processes end with them, DVC's message is the error, its plots need no network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from browser import CHROMIUM, dump_dom
from conftest import PYTHON, ROOT, environment, files_up_to

from pipeline.core import graph
from pipeline.core.graph import GraphError, NotCopied
from pipeline.settings import ParamsError, load_params

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
  big:
    cmd: ulimit -S -f unlimited && mkdir big && head -c 2000000 /dev/urandom > big/file
    outs: [big]
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
def template_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "project"
    (root / "data").mkdir(parents=True)
    (root / "data" / "rows").write_text("row")
    (root / "params.yaml").write_text("n: 1\n")
    (root / "dvc.yaml").write_text(STAGES.format(python=sys.executable))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, env=environment(), check=True)
    return root


@pytest.fixture
def project(template_project: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template_project, tmp_path / "project")


def lock_output(root: Path, pid: int) -> None:
    """Enter the process `pid` in DVC's lock file as writing to the first stage's output."""
    path = root / ".dvc" / "tmp" / "rwlock"
    path.write_text(json.dumps({"write": {str(root / "one"): {"pid": pid, "cmd": "dvc repro"}}}))


def test_a_stage_runs_once_without_input_and_its_lines_arrive_in_order(project: Path) -> None:
    lines: list[str] = []
    assert graph.repro("first", lines.append, project) == 0
    assert lines.index("Running stage 'first':") < lines.index("in: ")
    assert graph.outcome(lines, "first") == "ran"
    assert set(graph.stale(project)) == {"second", "big", "long", "killer", "leaver"}
    assert graph.repro("second", lines.append, project) == 0
    assert any(line.startswith("no end of line") for line in lines)
    again: list[str] = []
    graph.repro("second", again.append, project)
    assert graph.outcome(again, "second") == "cached"


def test_the_error_is_dvcs_message(project: Path) -> None:
    with pytest.raises(GraphError, match="Stage 'nosuch' not found"):
        graph.run(project, "repro", "nosuch")
    with pytest.raises(GraphError, match="you are not inside of a DVC repository"):
        graph.stale(project.parent)
    (project / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"/so')
    with pytest.raises(GraphError, match=r"remove \.dvc/tmp/rwlock"):
        graph.run(project, "repro", "--single-item", "first")


def test_dvcs_advice_to_ask_its_makers_is_no_part_of_the_error(project: Path) -> None:
    (project / ".dvc" / "tmp").rename(project / "tmp")
    (project / ".dvc" / "tmp").write_text("")  # an error that DVC does not expect, as a full disk is
    with pytest.raises(GraphError) as error:
        graph.stale(project)
    assert len(str(error.value).splitlines()) == 1 and "https:" not in str(error.value)


def test_outputs_that_dvc_cannot_store_fail_the_stage_and_are_stored_later_without_another_run(project: Path) -> None:
    with files_up_to(10**6), pytest.raises(NotCopied, match=str(project / ".dvc" / "cache")):
        graph.repro("big", print, project)
    result = (project / "big" / "file").read_bytes()
    with files_up_to(10**6), pytest.raises(NotCopied):
        graph.store_results(project)
    assert "big" not in graph.store_results(project)
    lines: list[str] = []
    assert graph.repro("big", lines.append, project) == 0
    assert graph.outcome(lines, "big") == "cached" and (project / "big" / "file").read_bytes() == result


def test_outputs_that_are_not_those_of_the_record_are_not_stored(project: Path) -> None:
    graph.repro("big", print, project)
    lock = (project / "dvc.lock").read_text()
    shutil.rmtree(project / ".dvc" / "cache")
    (project / "big" / "file").write_text("edited by hand")
    assert "big" in graph.store_results(project)
    assert (project / "dvc.lock").read_text() == lock and not list((project / ".dvc" / "cache").rglob("*"))


def test_an_error_in_a_line_ends_the_stage(project: Path) -> None:
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("pid "):
            raise ValueError(line)

    with pytest.raises(ValueError, match=r"pid \d+"):
        graph.repro("long", stop, project)
    assert not lives(lines[-1])


def test_the_status_of_a_killed_dvc_is_its_signal(project: Path) -> None:
    assert graph.repro("killer", print, project) == -signal.SIGKILL


def test_processes_that_a_stage_leaves_running_end_with_it(project: Path) -> None:
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
    _, running = psutil.wait_procs([dvc], timeout=10)
    os.kill(stage, signal.SIGKILL)  # unlike Retune's stages, it does not watch its parent
    assert not running


def test_a_briefly_locked_path_is_waited_for_and_one_that_stays_locked_is_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = subprocess.Popen(["sleep", "600"])
    lock_output(project, other.pid)
    threading.Timer(2.0, lambda: (other.kill(), other.wait())).start()
    graph.run(project, "repro", "--single-item", "first")
    assert (project / "one").exists()
    (project / "data" / "rows").write_text("another")
    lock_output(project, os.getpid())
    monkeypatch.setattr(graph, "PATIENCE", 0.5)
    with pytest.raises(GraphError, match=rf"is busy, it is being blocked by:\n  \(PID {os.getpid()}\): dvc repro"):
        graph.run(project, "repro", "--single-item", "first")


def lives(line: str) -> bool:
    pid = int(line.split()[1])
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def plots(project: Path) -> Path:
    """The page of `dvc plots show` on a curve, by this project's own DVC settings."""
    shutil.copytree(ROOT / ".dvc" / "plots", project / ".dvc" / "plots", dirs_exist_ok=True)
    shutil.copy(ROOT / ".dvc" / "config", project / ".dvc" / "config")
    (project / "loss.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    (project / "dvc.yaml").write_text("plots:\n  - loss: {y: {loss.csv: loss}, x: step}\n")
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show"], cwd=project, env=environment(), check=True)
    return project / "dvc_plots" / "index.html"


def test_the_plots_load_nothing_from_elsewhere(plots: Path) -> None:
    page = plots.read_text(encoding="utf-8")
    assert "vegaEmbed" in page
    assert re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page) == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_without_network_draws_the_plots(plots: Path, tmp_path: Path) -> None:
    shown = dump_dom("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'browser'}", plots.as_uri())
    assert re.search(r"<canvas|<svg[^>]*marks", shown.stdout), shown.stderr


@pytest.mark.parametrize("name", ["dvc.lock", "data.dvc", "dvc.yaml", "params.yaml"])
def test_a_file_with_gits_conflict_markers_is_one_sentence_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("schema: '2.0'\n<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n")
    with pytest.raises((GraphError, ParamsError)) as error:
        load_params(tmp_path / name) if name == "params.yaml" else graph.stale(tmp_path)
    assert f"{name}, line 2" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert name == "params.yaml" or f"git checkout --ours {name}" in str(error.value)
