"""One project, run as its user runs it: the flow on a real Prefect server, DVC, MLflow and the store.

The tests follow each other: each leaves the project up to date for the next.
"""

import getpass
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import change_params, environment, make_project, retune, with_
from test_stack import free_port

from pipeline.core.files import read_json
from pipeline.params import Params

WORSE = {"max_steps": 2, "learning_rate": 1e-4, "warmup_ratio": 0.0}
BETTER = {"max_steps": -1, "learning_rate": 0.005, "warmup_ratio": 0.05, "num_train_epochs": 7.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Iterator[Path]:
    # Four passes make a champion that can be beaten.
    unfinished = with_(params, train={"num_train_epochs": 4.0})
    folder = make_project(tmp_path_factory.mktemp("flow") / "project", base, unfinished)
    yield folder
    retune(folder, "down")


def run(root: Path) -> dict[str, Any]:
    done = retune(root, "run", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in result["stages"]}


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True, text=True).stdout


def served(root: Path) -> str | None:
    """The version that MLflow's own client finds behind the champion alias."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{root}/mlflow.db"
    return str(MlflowClient(uri, uri).get_model_version_by_alias("retune-sample", "champion").tags["version_id"])


def test_a_first_run_trains_publishes_and_promotes_over_the_base(root: Path) -> None:
    result = run(root)
    ran = dict.fromkeys(("prepare", "train", "evaluate", "merge", "publish"), "ran")
    assert outcomes(result) == {"ingest": "cached"} | ran | {"promote": "promoted"}
    assert result["decision"]["decision"] == "promoted"
    assert served(root) == result["version"]["version"]
    assert {"base", "adapter", "merged"} == set(result["metrics"])


def test_a_second_run_is_a_quick_no_op_that_rewrites_nothing(root: Path) -> None:
    def state() -> list[Any]:
        git = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout
        files = sorted((str(p), p.stat().st_mtime_ns) for p in (root / "store").rglob("*") if p.is_file())
        return [git, dvc(root, "status"), files, sorted(p.stat().st_mtime_ns for p in (root / "artifacts").rglob("*"))]

    before, started = state(), time.monotonic()
    done = retune(root, "run")
    assert done.returncode == 0
    assert done.stdout.startswith("Nothing to do")
    assert f"Version v1 ({str(served(root))[:6]}…)" in done.stdout
    assert time.monotonic() - started < 15
    assert state() == before


def test_a_run_with_nothing_to_do_writes_a_report_that_is_missing(root: Path) -> None:
    page = root / "artifacts" / "report.html"
    page.unlink()
    assert "Nothing to do" in retune(root, "run").stdout
    assert f"Promoted: v1 ({str(served(root))[:6]}…)" in page.read_text()


def test_runs_on_a_server_that_is_up_are_seen_there(root: Path) -> None:
    port = free_port()
    assert retune(root, "up", "--port", str(port)).returncode == 0
    assert "Nothing to do" in retune(root, "run").stdout
    runs = api(port, "flow_runs/filter")
    assert sorted(flow_run["state_name"] for flow_run in runs) == ["Promoted", "Unchanged"]
    tasks = {task["name"].split("-")[0]: task["state_name"] for task in api(port, "task_runs/filter")}
    assert tasks["train"] == "Ran"
    keys = {artifact["key"] for artifact in api(port, "artifacts/filter")}
    assert {"metrics", "evaluation-report", "training-progress", "verdict", "version", "data-report"} <= keys


def api(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/{path}",
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.fixture
def defended(root: Path) -> None:
    """There is a champion: made now, if no test before did that."""
    if not (root / "mlflow.db").exists():
        run(root)


@pytest.fixture
def dashboard(root: Path, defended: None) -> int:
    """The port of the project's server, which is started if no test before did that."""
    url = json.loads(retune(root, "status", "--json").stdout)["dashboard"]
    url = url or json.loads(retune(root, "up", "--port", str(free_port()), "--json").stdout)["url"]
    return int(url.rpartition(":")[2])


@pytest.mark.faults
@pytest.mark.parametrize("agrees", [False, True])
def test_a_run_that_waits_for_approval_holds_no_lock_and_does_what_the_person_says(
    root: Path, dashboard: int, agrees: bool
) -> None:
    champion, port = served(root), dashboard
    before = (root / "params.yaml").read_text()
    change_params(root, promote={"approval": "manual"}, train=BETTER | {"seed": 7 + agrees})
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "--json"],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        paused: list[dict[str, Any]] = []
        while not paused and child.poll() is None:
            time.sleep(0.5)
            paused = api(port, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})
        assert paused, child.communicate()
        status = json.loads(retune(root, "status", "--json").stdout)
        assert status["stale"] == []  # the lock is free: another run could start
        assert status["waiting"]
        assert served(root) == champion
        keyset = paused[0]["state"]["state_details"]["run_input_keyset"]
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/flow_runs/{paused[0]['id']}/input/{keyset['description']}"
        ) as answer:
            shown = answer.read().decode()
        assert "| rougeL |" in shown.replace("\\n", "\n")
        answer_of_a_person = {"your_name": "Ada", "approve": agrees, "reason": "read fifty answers"}
        api(port, f"flow_runs/{paused[0]['id']}/resume", {"run_input": answer_of_a_person})
        output, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, errors
    decision = json.loads(output.splitlines()[-1])["decision"]
    assert decision["decision"] == ("promoted" if agrees else "refused")
    assert served(root) == (decision["version"] if agrees else champion)
    last = json.loads(retune(root, "history", "--json").stdout)[-1]
    assert (last["actor"], last["reason"]) == ("Ada (dashboard)", "read fifty answers")
    if agrees:
        assert retune(root, "rollback").returncode == 0
    (root / "params.yaml").write_text(before)


@pytest.mark.faults
def test_nobody_answers_and_the_proposal_stays_open(root: Path, dashboard: int) -> None:
    before = (root / "params.yaml").read_text()
    change_params(
        root, promote={"approval": "manual", "approval_hours": 0.001}, train=BETTER | {"num_train_epochs": 8.0}
    )
    result = run(root)
    assert result["decision"]["decision"] == "proposed"
    newest = api(dashboard, "flow_runs/filter", {"sort": "START_TIME_DESC"})[0]
    assert (newest["state_type"], newest["state_name"]) == ("COMPLETED", "Proposed")
    assert json.loads(retune(root, "status", "--json").stdout)["waiting"] == result["version"]["version"]
    again = retune(root, "run")
    assert "it waits for approval" in again.stdout
    rejected = retune(root, "promote", "--reject", "--reason", "too late")
    assert rejected.returncode == 3
    assert "refused: too late" in rejected.stdout
    (root / "params.yaml").write_text(before)


def test_the_champion_is_downloaded_verified_and_looked_up(root: Path, tmp_path: Path) -> None:
    verified = retune(root, "verify", "champion")
    assert verified.returncode == 0, verified.stdout
    for check in ("manifest", "id", "recorded digest", "signature", "digests", "lineage", "git commit"):
        assert f" {check} " in verified.stdout
    done = retune(root, "download", "champion", str(tmp_path / "all"), "--part", "all")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["time"]["train"] > 0
    assert retune(root, "download", "v1", str(tmp_path / "model")).returncode == 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    table = retune(root, "history")
    assert "None" not in table.stdout
    assert "none → v1" in table.stdout
    assert "verdict" in retune(root, "history", "1").stdout
    name = f"v1 ({str(served(root))[:6]}…)"
    for command in (["status"], ["doctor"], ["delete", "v1", "--reason", "any"]):
        said = retune(root, *command)
        assert name in said.stdout + said.stderr


def test_dvc_and_the_flow_see_each_others_work_as_done(root: Path) -> None:
    assert "Running stage" not in dvc(root, "repro")
    change_params(root, evaluate={"seed": 1})
    ran = dvc(root, "repro")
    assert "Running stage 'evaluate'" in ran
    assert "Running stage 'train'" not in ran
    result = run(root)
    stages = outcomes(result)
    assert {stages[stage] for stage in ("prepare", "train", "evaluate", "merge")} == {"cached"}


def test_dvcs_own_commands_show_a_dozen_scores(root: Path) -> None:
    [(path, shown)] = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"].items()
    scores = read_json(root / "artifacts" / "parity" / "scores.json")["merged"]
    assert path == "artifacts/parity/metrics.json"
    assert {name: shown["data"].pop(name) for name in ["rougeL", "bleu"]} == {
        name: scores[name]["score"] for name in ["rougeL", "bleu"]
    }
    assert len(shown["data"]) + len(shown["data"]["base"]) <= 12
    assert len(dvc(root, "metrics", "diff").splitlines()) <= 13
    columns = ["--only-changed", "--drop", "^(pipeline|artifacts|data)"]
    [header, *_] = dvc(root, "exp", "show", *columns, "--csv").splitlines()
    assert "rougeL" in header and len(header.split(",")) < 40


def test_a_worse_candidate_is_refused_with_both_numbers(root: Path) -> None:
    champion = served(root)
    change_params(root, train=WORSE)
    result = run(root)
    assert outcomes(result)["prepare"] == "cached"
    assert outcomes(result)["train"] == "ran"
    decision = result["decision"]
    assert decision["decision"] == "refused"
    row = decision["comparison"]["rougeL"]
    assert f"{row['candidate']:.3f} against {row['champion']:.3f}" in decision["reason"]
    assert served(root) == champion


def test_a_refused_version_is_not_decided_again(root: Path) -> None:
    before = json.loads(retune(root, "history", "--json").stdout)
    again = json.loads(retune(root, "promote", "--json").stdout)
    assert again["decision"] == "unchanged"
    assert json.loads(retune(root, "history", "--json").stdout) == before


def test_a_better_candidate_is_promoted_and_a_rollback_restores_the_one_before(root: Path) -> None:
    first = served(root)
    change_params(root, train=BETTER)
    result = run(root)
    assert result["decision"]["decision"] == "promoted", result["decision"]["reason"]
    assert served(root) == result["version"]["version"] != first
    back = retune(root, "rollback", "--reason", "wrong colours")
    assert back.returncode == 0, back.stderr
    assert served(root) == first
    history = json.loads(retune(root, "history", "--json").stdout)
    assert [record["decision"] for record in history][-2:] == ["promoted", "rollback"]
    assert history[-1]["reason"] == "wrong colours"
    again = retune(root, "rollback")
    assert again.returncode == 1
    assert "error: " in again.stderr
    assert "Traceback" not in again.stderr


def test_a_rolled_back_version_stays_back(root: Path) -> None:
    champion = served(root)
    assert "it was rolled back" in run(root)["reason"]
    assert served(root) == champion


def test_an_alias_that_a_crash_left_behind_is_put_right_by_the_next_command(root: Path) -> None:
    from mlflow import MlflowClient

    champion = served(root)
    uri = f"sqlite:///{root}/mlflow.db"
    MlflowClient(uri, uri).set_registered_model_alias("retune-sample", "champion", "2")
    assert served(root) != champion
    assert retune(root, "history").returncode == 0
    assert served(root) == champion
    run(root)  # it has seen the registry as it is now
    MlflowClient(uri, uri).set_registered_model_alias("retune-sample", "champion", "2")
    run(root)
    assert served(root) == champion


@pytest.mark.faults
def test_a_champion_scored_on_another_test_split_is_scored_again(root: Path, defended: None) -> None:
    change_params(root, prepare={"test_fraction": 0.2})
    result = run(root)
    row = result["decision"]["comparison"]["rougeL"]
    scored = root / ".retune" / "versions" / result["decision"]["against"] / "scored" / "items.parquet"
    assert scored.is_file()
    assert 0 <= row["champion"] <= 1


def test_an_altered_artifact_is_not_published(root: Path) -> None:
    model = root / "artifacts" / "merged" / "config.json"
    model.chmod(0o644)
    text = model.read_text()
    model.unlink()
    model.write_text(text + " ")
    done = retune(root, "publish")
    assert done.returncode == 1
    assert "merge changed since" in done.stderr
    dvc(root, "checkout", "--force")


def test_a_failing_stage_ends_the_run_with_one_sentence_and_changes_no_champion(root: Path) -> None:
    champion = served(root)
    change_params(root, prepare={"max_length": 5})
    done = retune(root, "run")
    assert done.returncode == 1
    assert "the train split is empty" in done.stdout
    assert "error: prepare failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert served(root) == champion
    change_params(root, prepare={"max_length": 128})


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("stage", signal.SIGTERM),
        *(
            pytest.param(victim, number, marks=pytest.mark.faults)
            for victim in ("retune", "flow", "dvc", "stage")
            for number in (signal.SIGTERM, signal.SIGKILL)
            if (victim, number) != ("stage", signal.SIGTERM)
        ),
    ],
)
def test_a_kill_during_training_leaves_no_process_and_no_half_adapter(
    root: Path, tmp_path: Path, victim: str, number: signal.Signals
) -> None:
    copy = tmp_path / "project"
    shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns("supervisor.sock"))
    (copy / ".retune" / "server.json").unlink(missing_ok=True)  # this run starts its own server
    change_params(copy, train={"num_train_epochs": 5000.0, "save_steps": 20})
    command = [sys.executable, "-m", "pipeline", "run"]
    child = subprocess.Popen(command, cwd=copy, env=environment(), stdout=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("train ") and "steps" in line:
                break
        started = psutil.Process(child.pid).children(recursive=True)
        told = json.loads(retune(copy, "status", "--json").stdout)["run"]
        assert (told["stage"], told["trigger"], told["by"]) == ("train", "by-hand", getpass.getuser())
        assert 0 <= told["percent"] < 100 and re.fullmatch(r"[\d:]+", told["eta"])
        assert int(told["process"].partition(":")[0]) in {process.pid for process in started}
        os.kill(victims(child.pid, started)[victim], number)
        child.wait(timeout=60)
        assert child.returncode != 0
        _, left = psutil.wait_procs(started, timeout=45)
        assert not left, [process.cmdline() for process in left]
        assert json.loads(retune(copy, "status", "--json").stdout)["run"] is None
        assert not (copy / "artifacts" / "adapter" / "adapter_model.safetensors").exists()
    finally:
        for process in [child, *started]:
            if process.pid and psutil.pid_exists(process.pid):
                process.kill()
    if (victim, number) in {("stage", signal.SIGKILL), ("retune", signal.SIGKILL)}:
        change_params(copy, train={"num_train_epochs": 6.0})
        assert run(copy)["decision"]["version"]
        with sqlite3.connect(copy / ".retune" / "prefect" / "prefect.db") as database:
            states = {state for (state,) in database.execute("select state_type from flow_run")}
        assert "RUNNING" not in states and "CRASHED" in states  # the killed run does not stay for ever


def victims(retune_pid: int, family: list[psutil.Process]) -> dict[str, int]:
    """The process ids of the run's own process, its flow, DVC and the training stage."""
    found = {"retune": retune_pid}
    for process in family:
        words = " ".join(process.cmdline())
        if " flows" in words:
            found["flow"] = process.pid
        elif "retune stage train" in words and "sh -c" not in words:
            found["stage"] = process.pid
        elif " dvc repro" in words:
            found["dvc"] = process.pid
    return found
