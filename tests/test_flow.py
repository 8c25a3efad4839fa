"""A project run as its user runs it: the flow on a real Prefect server, DVC, MLflow and the store.

Each test works in a copy of a project that was run once, or of one whose first champion was beaten.
"""

import getpass
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PYTHON, change_params, dvc, environment, git, make_project, retune, with_
from local_servers import api, give_database, prefect_server, read, use_server, wait_until

from pipeline.core.current_run import FILE, record_stage, recorded
from pipeline.core.files import read_json, write_json
from pipeline.core.processes import identity
from pipeline.params import Params

Ran = tuple[Path, dict[str, Any]]  # a project after a run, and what the run said
WORSE = {"max_steps": 2, "learning_rate": 1e-4, "warmup_ratio": 0.0}
BETTER = {"max_steps": -1, "learning_rate": 0.005, "warmup_ratio": 0.05, "num_train_epochs": 7.0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params, url: str) -> Ran:
    """After its first run, whose champion can be beaten."""
    folder = tmp_path_factory.mktemp("first") / "project"
    make_project(folder, base, with_(params, train={"num_train_epochs": 4.0}))
    use_server(folder, url)
    return folder, run(folder)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, first: Ran) -> Ran:
    """The same after a run with better parameters."""
    folder = copied(first[0], tmp_path_factory.mktemp("second"))
    change_params(folder, train=BETTER)
    return folder, run(folder)


@pytest.fixture
def root(first: Ran, tmp_path: Path) -> Path:
    return copied(first[0], tmp_path)


@pytest.fixture
def beaten(second: Ran, tmp_path: Path) -> Path:
    return copied(second[0], tmp_path)


def copied(project: Path, folder: Path) -> Path:
    return shutil.copytree(project, folder / "project", symlinks=True)


def run(root: Path) -> dict[str, Any]:
    done = retune(root, "run", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in result["stages"]}


def history(root: Path) -> list[dict[str, Any]]:
    return json.loads(retune(root, "history", "--json").stdout)


def served(root: Path) -> str | None:
    """The version that MLflow's own client finds behind the champion alias."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{root}/mlflow.db"
    return str(MlflowClient(uri, uri).get_model_version_by_alias("retune-sample", "champion").tags["version_id"])


def test_a_first_run_trains_publishes_and_promotes_over_the_base_and_is_seen_on_the_server(
    first: Ran, url: str
) -> None:
    root, result = first
    ran = dict.fromkeys(("prepare", "train", "evaluate", "merge", "publish"), "ran")
    assert outcomes(result) == {"ingest": "cached"} | ran | {"promote": "promoted"}
    assert result["decision"]["decision"] == "promoted"
    assert served(root) == result["version"]["version"]
    assert {"base", "adapter", "merged"} == set(result["metrics"])
    assert "Promoted" in [flow_run["state_name"] for flow_run in api(url, "flow_runs/filter")]
    assert "Ran" in {task["state_name"] for task in api(url, "task_runs/filter") if task["name"].startswith("train")}
    artifacts = api(url, "artifacts/filter")
    keys = {artifact["key"] for artifact in artifacts}
    version, reason = result["version"]["version"], result["decision"]["reason"]
    page = next(each["data"] for each in artifacts if each["key"] == "run" and version in each["data"])
    for words in (f"# Promoted: v1 ({version[:6]}…)", reason, "| rougeL |", "| train | ran |",
                  f"{version}/manifest.json", "cost: publish.price_per_hour is not set"):  # fmt: skip
        assert words in page
    assert {"run", "metrics", "evaluation-report", "training-progress", "verdict", "version", "data-report"} <= keys


def test_a_second_run_is_a_quick_no_op_that_rewrites_nothing_but_a_missing_report(root: Path, url: str) -> None:
    def state() -> list[Any]:
        files = sorted((str(p), p.stat().st_mtime_ns) for p in (root / "store").rglob("*") if p.is_file())
        artifacts = sorted(p.stat().st_mtime_ns for p in (root / "artifacts").rglob("*"))
        return [git(root, "status", "--porcelain"), dvc(root, "status"), files, artifacts]

    before, started = state(), time.monotonic()
    done = retune(root, "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing to do")
    assert f"Version v1 ({str(served(root))[:6]}…)" in done.stdout
    assert time.monotonic() - started < 15
    assert state() == before
    assert "Unchanged" in [flow_run["state_name"] for flow_run in api(url, "flow_runs/filter")]
    page = root / "artifacts" / "report.html"
    page.unlink()
    assert "Nothing to do" in retune(root, "run").stdout
    assert f"Promoted: v1 ({str(served(root))[:6]}…)" in page.read_text()


@pytest.mark.faults
@pytest.mark.parametrize("agrees", [False, True])
def test_a_run_that_waits_for_approval_holds_no_lock_and_does_what_the_person_says(
    root: Path, url: str, agrees: bool
) -> None:
    champion = served(root)
    change_params(root, promote={"approval": "manual"}, train=BETTER | {"seed": 7 + agrees})
    command, pipe = [sys.executable, "-m", "pipeline", "run", "--json"], subprocess.PIPE
    child = subprocess.Popen(command, cwd=root, env=environment(), stdout=pipe, stderr=pipe, text=True)

    def paused() -> list[dict[str, Any]]:
        assert child.poll() is None, child.communicate()
        return api(url, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})

    try:
        [flow_run] = wait_until(paused, 300)
        status = json.loads(retune(root, "status", "--json").stdout)
        assert status["stale"] == []  # the lock is free: another run could start
        assert status["waiting"]
        assert served(root) == champion
        keyset = flow_run["state"]["state_details"]["run_input_keyset"]
        shown = str(read(url, f"flow_runs/{flow_run['id']}/input/{keyset['description']}"))
        assert "| rougeL |" in shown
        answer_of_a_person = {"your_name": "Ada", "approve": agrees, "reason": "read fifty answers"}
        api(url, f"flow_runs/{flow_run['id']}/resume", {"run_input": answer_of_a_person})
        output, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, errors
    decision = json.loads(output.splitlines()[-1])["decision"]
    assert decision["decision"] == ("promoted" if agrees else "refused")
    assert served(root) == (decision["version"] if agrees else champion)
    assert (history(root)[-1]["actor"], history(root)[-1]["reason"]) == ("Ada (dashboard)", "read fifty answers")


@pytest.mark.faults
def test_nobody_answers_and_the_proposal_stays_open(root: Path, url: str) -> None:
    change_params(root, promote={"approval": "manual", "approval_hours": 0.001}, train=BETTER)
    result = run(root)
    assert result["decision"]["decision"] == "proposed"
    newest = api(url, "flow_runs/filter", {"sort": "START_TIME_DESC"})[0]
    assert (newest["state_type"], newest["state_name"]) == ("COMPLETED", "Proposed")
    assert json.loads(retune(root, "status", "--json").stdout)["waiting"] == result["version"]["version"]
    assert "it waits for approval" in retune(root, "run").stdout
    rejected = retune(root, "promote", "--reject", "--reason", "too late")
    assert rejected.returncode == 3
    assert "Refused: v2" in rejected.stdout and "too late" in rejected.stdout


def test_the_champion_is_downloaded_verified_and_looked_up(root: Path, tmp_path: Path) -> None:
    verified = retune(root, "verify", "champion")
    assert verified.returncode == 0, verified.stdout
    for check in ("manifest", "id", "recorded digest", "signature", "digests", "lineage", "git commit"):
        assert f" {check} " in verified.stdout
    done = retune(root, "download", "champion", str(tmp_path / "all"), "--part", "all")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "all" / "manifest.json")["time"]["train"] > 0
    assert retune(root, "download", "v1", str(tmp_path / "model")).returncode == 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    table = retune(root, "history")
    assert "None" not in table.stdout
    name = f"v1 ({str(served(root))[:6]}…)"
    assert name in table.stdout
    assert "verdict" in retune(root, "history", "1").stdout
    for command in (["status"], ["doctor"], ["delete", "v1", "--reason", "any"]):
        said = retune(root, *command)
        assert name in said.stdout + said.stderr


def test_what_dvc_made_is_done_for_the_flow_which_refuses_a_worse_candidate_with_both_numbers(root: Path) -> None:
    assert "Running stage" not in dvc(root, "repro")  # nor is what the flow made done again
    champion = served(root)
    change_params(root, train=WORSE)
    ran = dvc(root, "repro")
    assert "Running stage 'train'" in ran and "Running stage 'prepare'" not in ran
    result = run(root)
    assert {outcomes(result)[stage] for stage in ("prepare", "train", "evaluate", "merge")} == {"cached"}
    decision = result["decision"]
    assert decision["decision"] == "refused"
    row = decision["comparison"]["rougeL"]
    assert f"{row['candidate']:.3f} against {row['champion']:.3f}" in decision["reason"]
    assert served(root) == champion
    before = history(root)
    assert json.loads(retune(root, "promote", "--json").stdout)["decision"] == "unchanged"
    assert history(root) == before


def test_dvc_shows_a_dozen_scores_and_few_columns(root: Path) -> None:
    [(path, shown)] = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"].items()
    scores = read_json(root / "artifacts" / "parity" / "scores.json")["merged"]
    assert path == "artifacts/parity/metrics.json"
    assert [shown["data"].pop(name) for name in ("rougeL", "bleu")] == [scores[n]["score"] for n in ("rougeL", "bleu")]
    assert len(shown["data"]) + len(shown["data"]["base"]) <= 12
    columns = ["--only-changed", "--drop", "^(pipeline|artifacts|data)"]
    [header, *_] = dvc(root, "exp", "show", *columns, "--csv").splitlines()
    assert "rougeL" in header and len(header.split(",")) < 40


def test_a_better_candidate_is_promoted_and_a_rollback_restores_the_one_before(
    first: Ran, second: Ran, beaten: Path
) -> None:
    result = second[1]
    assert result["decision"]["decision"] == "promoted", result["decision"]["reason"]
    assert served(beaten) == result["version"]["version"] != served(first[0])
    back = retune(beaten, "rollback", "--reason", "wrong colours")
    assert back.returncode == 0, back.stderr
    assert served(beaten) == served(first[0])
    decisions = history(beaten)
    assert [record["decision"] for record in decisions][-2:] == ["promoted", "rollback"]
    assert decisions[-1]["reason"] == "wrong colours"
    again = retune(beaten, "rollback")
    assert again.returncode == 1 and "error: " in again.stderr
    assert "it was rolled back" in run(beaten)["reason"]
    assert served(beaten) == served(first[0])


def test_an_alias_that_a_crash_left_behind_is_put_right_by_the_next_command(beaten: Path) -> None:
    from mlflow import MlflowClient

    champion = served(beaten)
    uri = f"sqlite:///{beaten}/mlflow.db"
    for command in (["history"], ["run"]):
        MlflowClient(uri, uri).set_registered_model_alias("retune-sample", "champion", "1")
        assert served(beaten) != champion
        assert retune(beaten, *command).returncode == 0
        assert served(beaten) == champion


def test_an_altered_artifact_is_not_published(root: Path) -> None:
    model = root / "artifacts" / "merged" / "config.json"
    text = model.read_text()
    model.unlink()
    model.write_text(text + " ")
    done = retune(root, "publish")
    assert done.returncode == 1
    assert "merge changed since" in done.stderr


def test_a_failing_stage_ends_the_run_with_one_sentence_and_changes_no_champion(root: Path) -> None:
    champion = served(root)
    change_params(root, prepare={"max_length": 5})
    done = retune(root, "run")
    assert done.returncode == 1
    assert "the train split is empty" in done.stdout and "error: prepare failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert served(root) == champion


def test_status_says_how_far_the_run_is_while_its_process_lives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with recorded("by-hand"):
        record_stage("train", "train 35% · 70/200 steps · loss 0.5 · ETA 1:02")
        status = json.loads(retune(root, "status", "--json").stdout)["run"]
    assert (status["stage"], status["percent"], status["eta"]) == ("train", 35, "1:02")
    assert (status["trigger"], status["by"], status["process"]) == ("by-hand", getpass.getuser(), identity())
    write_json(root / FILE, status | {"process": f"{os.getpid()}:1.5"})  # killed, and its number is another's now
    assert json.loads(retune(root, "status", "--json").stdout)["run"] is None


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["retune", "flow", "dvc", "stage"])
def test_a_kill_during_training_leaves_no_process_and_no_half_adapter(
    root: Path, victim: str, number: signal.Signals
) -> None:
    (root / ".retune" / "server.json").unlink()  # this run starts its own server
    give_database(root)
    change_params(root, train={"num_train_epochs": 5000.0, "save_steps": 20})
    command = [PYTHON, "-m", "pipeline", "run"]  # forks of `preloaded` have another parent
    child = subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("train ") and "steps" in line:
                break
        started = psutil.Process(child.pid).children(recursive=True)
        status = json.loads(retune(root, "status", "--json").stdout)["run"]
        assert status["stage"] == "train"
        assert f"(process {status['process'].partition(':')[0]})" in retune(root, "run").stderr
        os.kill(victims(child.pid, started)[victim], number)
        child.wait(timeout=60)
        assert child.returncode != 0
        _, left = psutil.wait_procs(started, timeout=45)
        assert not left, [process.cmdline() for process in left]
        assert json.loads(retune(root, "status", "--json").stdout)["run"] is None
        assert not (root / "artifacts" / "adapter" / "adapter_model.safetensors").exists()
    finally:
        for process in [child, *started]:
            if process.pid and psutil.pid_exists(process.pid):
                process.kill()
    if (victim, number) in {("stage", signal.SIGKILL), ("retune", signal.SIGKILL)}:
        change_params(root, train={"num_train_epochs": 6.0})
        assert run(root)["decision"]["version"]
        with sqlite3.connect(root / ".retune" / "prefect" / "prefect.db") as database:
            states = {state for (state,) in database.execute("select state_type from flow_run")}
        assert "RUNNING" not in states  # a killed run does not stay for ever; one whose stage was killed ends by itself
        assert ("CRASHED" if victim == "retune" else "FAILED") in states


def victims(retune_pid: int, family: list[psutil.Process]) -> dict[str, int]:
    pids = {"retune": retune_pid}
    for process in family:
        words = " ".join(process.cmdline())
        marks = {"flow": " flows", "stage": "retune stage train", "dvc": " dvc repro"}
        name = next((name for name, mark in marks.items() if mark in words and "sh -c" not in words), None)
        pids |= {name: process.pid} if name else {}
    return pids
