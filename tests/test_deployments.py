"""The deployments of prefect.yaml: what they name exists, and on a real stack they do what they say."""

import base64
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, change_params, environment, make_project, retune, with_, write_params
from local_servers import api, ended, posted_to, start, wait_until, whole_stack
from prefect.events import EventTrigger
from prefect.exceptions import Abort
from ruamel.yaml import YAML
from test_stack import supervisor
from versions import parameters, published

from flows import deployments
from flows.deployments import evaluate_champion
from flows.setup import automations
from flows.summary import state_of
from pipeline import promote as gate
from pipeline.core.run_lock import only_run
from pipeline.params import Params
from pipeline.services import stack
from pipeline.services.events import contents, emit, tell_updated
from pipeline.settings import ParamsError, load_params
from pipeline.settings import change_params as change

DEPLOYMENTS = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_a_deployment_names_a_flow_that_exists_and_parameters_it_has(deployment: dict[str, Any]) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert flow.name == deployment["name"] or name == deployment["name"].replace("-", "_")
    known = set(flow.parameters.properties)
    for asks in (*deployment.get("schedules", []), *deployment.get("triggers", []), deployment):
        assert set(asks.get("parameters", {})) <= known
    assert deployment["work_pool"]["name"] in ("cpu", "gpu")


def test_enough_new_rows_are_told_to_a_server_that_takes_the_password_and_nothing_else_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = f"Basic {base64.b64encode(b'admin:secret').decode()}"
    with posted_to(lambda request: 204 if request.headers["Authorization"] == known else 401) as (url, posts):
        monkeypatch.setenv("PREFECT_API_URL", url)
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:secret")
        assert not tell_updated(4, 5, tmp_path) and not posts
        assert tell_updated(5, 5, tmp_path)
        [(_, told)] = posts
        assert [(each["event"], each["payload"]) for each in told] == [("dataset.updated", {"new_rows": 5})]
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:other")
        assert not tell_updated(5, 5, tmp_path)
    assert not emit("dataset.updated", "retune.dataset", {}, tmp_path)  # the server is gone
    monkeypatch.delenv("PREFECT_API_URL")
    assert not emit("dataset.updated", "retune.dataset", {}, tmp_path)


def test_new_rows_are_counted_by_what_they_say(tmp_path: Path) -> None:
    def write(name: str, texts: list[str]) -> None:
        lines = [str(i) for i in range(len(texts))]
        path = tmp_path / "data" / "instructions" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"messages": texts, "tools": [None] * len(texts), "row": lines}), path)

    assert contents(tmp_path) == set()
    write("a.parquet", ["one", "two"])
    before = contents(tmp_path)
    assert len(before) == 2
    write("a.parquet", ["three", "one", "two"])  # every row has another line now
    write("b.parquet", ["two", "four"])
    assert len(contents(tmp_path) - before) == 2


@pytest.fixture
def params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path))


def test_a_wrong_parameter_changes_nothing(params_file: Path) -> None:
    text = params_file.read_text()
    for wrong, words in (
        ({"train.lora_r": 0}, "train.lora_r is 0"),
        ({"train.rank": 3}, "train.rank is not a parameter"),
        ({"lora_r": 3}, "lora_r is not a parameter"),
    ):
        with pytest.raises(ParamsError, match=words):
            change(wrong, params_file)
        assert params_file.read_text() == text
    assert [*params_file.parent.iterdir()] == [params_file]


@pytest.mark.parametrize(("run", "arguments"), [
    (deployments.retrain, {}), (deployments.watch, {}), (deployments.promote, {"version": "v1"}),
    (deployments.evaluate_champion, {}),
])  # fmt: skip
def test_a_deployment_ends_as_skipped_while_another_run_holds_the_lock(
    run: Any, arguments: dict[str, str], params_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with only_run():
        state = run.fn(**arguments)
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert "a run is under way here" in state.message


def test_parameters_of_a_trial_are_put_back_unless_they_stay_or_somebody_edits_them(params_file: Path) -> None:
    path, before = params_file, params_file.read_text()
    with deployments._tried({"train.lora_r": 64}):
        assert load_params(path).train.lora_r == 64
    assert path.read_text() == before
    with pytest.raises(RuntimeError, match="diverged"), deployments._tried({"train.lora_r": 64}):
        raise RuntimeError("diverged")
    assert path.read_text() == before
    with deployments._tried({"train.lora_r": 64}):
        path.write_text(path.read_text() + "# a person's note\n")
    assert load_params(path).train.lora_r == 64
    path.write_text(before)
    with deployments._tried({"train.lora_r": 64}) as trial:
        trial.stays = True
    assert load_params(path).train.lora_r == 64


def test_what_a_person_should_look_at_is_not_green() -> None:
    for decision in ("refused", "undecided", "regressed"):
        state = state_of(decision, "why", {"a": 1})
        assert (state.type.value, state.name) == ("CANCELLED", decision.capitalize())
        assert state.result(raise_on_failure=False) == {"a": 1}
        with pytest.raises(Abort, match="why"):  # which ends a worker's run without a traceback
            state_of(decision, "why").result()
    assert {state_of(each, "").type.value for each in ("promoted", "proposed", "unchanged")} == {"COMPLETED"}


def test_the_nightly_evaluation_is_skipped_where_the_primary_metric_was_never_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params, exact=False)
    gate.promote(params, version, tmp_path)
    write_params(tmp_path, with_(params, promote={"primary_metric": "macro_f1", "guard_metrics": {}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flows.deployments._enter", lambda: None)
    state = evaluate_champion.fn()
    assert (state.name, state.type.value) == ("Skipped", "COMPLETED")
    assert "macro_f1" in state.message and f"({version[:6]}…)" in state.message


def test_automations_crash_dead_runs_and_tell_whoever_was_named() -> None:
    assert [each.name for each in automations(None)] == ["retune: crash runs whose worker died"]
    trigger = automations(None)[0].trigger
    assert isinstance(trigger, EventTrigger)
    from prefect.server.events.schemas.automations import EventTrigger as OfServer

    there = OfServer.model_validate(trigger.model_dump(mode="json"))
    for state in ("Completed", "Failed", "Promoted", "Trained", "Rolled back"):  # an event is named after its state
        assert there.expects(f"prefect.flow-run.{state}")
    assert there.starts_after("prefect.flow-run.heartbeat") and not there.starts_after("prefect.flow-run.Promoted")
    told = automations(UUID(int=1))[1:]
    states = [state for each in told for state in each.trigger.expect]
    assert sorted(states) == [f"prefect.flow-run.{state}" for state in ("Crashed", "Failed", "Late", "Refused")]


def finished(url: str, deployment: str, **parameters: Any) -> dict[str, Any]:
    """The flow run of a deployment, when it has ended."""
    number = start(url, deployment, **parameters)
    return wait_until(lambda: ended(url, id=number), 240)[0]


@pytest.mark.faults
def test_deployments_on_a_real_stack(tmp_path: Path, base: Path, params: Params) -> None:
    root = make_project(tmp_path / "project", base, params)
    with whole_stack(root, operations={"services": ["cpu"]}) as known:
        url = known["url"]
        schedules = {each["name"]: each["schedules"] for each in api(url, "deployments/filter")}
        assert schedules["retrain"][0]["schedule"]["cron"] == "0 3 * * *"
        (tmp_path / "rows.json").write_text(rows_of("red", 300))
        ingested = json.loads(retune(root, "ingest", str(tmp_path / "rows.json"), "--json").stdout)
        assert (ingested["new_rows"], ingested["told"]) == (300, True)
        wait_until(lambda: ended(url, name="retrain-new-data"), 240)
        [first] = ended(url, name="retrain-new-data")
        assert first["state_name"] in ("Promoted", "Refused"), first["state"]
        assert {"trigger:new-data", "model:retune-sample-v1", "retune"} < set(first["tags"])
        [page] = [each["data"] for each in api(url, "artifacts/filter") if each["key"] == "run"]
        assert "| prepare | ran |" in page and "| rougeL |" in page and first["state"]["message"] in page
        began = time.monotonic()
        again = finished(url, "retrain/retrain", trigger="again")
        assert again["state_name"] == "Unchanged", again["state"]
        assert time.monotonic() - began < 60
        changed = finished(url, "retrain/retrain", trigger="changed", changes={"evaluate.seed": 5})
        assert changed["state_name"] in ("Promoted", "Refused", "Unchanged"), changed["state"]
        assert load_params(root / "params.yaml").evaluate.seed == (5 if changed["state_name"] == "Promoted" else 42)
        assert finished(url, "evaluate-champion/evaluate-champion")["state_name"] in ("Holds", "Skipped")
        assert finished(url, "cleanup/cleanup")["state_name"] == "Cleaned"
        assert finished(url, "watch/watch")["state_name"] == "Skipped"
        change_params(root, train={"num_train_epochs": 5000.0})
        start(url, "retrain/retrain", trigger="long")
        wait_until(lambda: any("stage train" in " ".join(p.cmdline()) for p in stack.marked(root)), 120)
        supervisor(stack.marked(root)).kill()
        wait_until(lambda: not stack.marked(root), 75)  # the training too, which a worker started


def rows_of(colour: str, number: int, start: int = 0) -> str:
    names = range(start, start + number)
    return json.dumps([{"instruction": f"Name the colour of jar {i}: {colour}", "output": colour} for i in names])


@pytest.mark.faults
@pytest.mark.timeout(1200)  # eight runs of a flow, two of them trainings
def test_new_rows_and_a_worse_champion_start_a_retraining_and_a_failure_is_told(
    tmp_path: Path, base: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = make_project(tmp_path / "project", base, params), tmp_path / "source"
    source.mkdir()
    (source / "a.json").write_text(rows_of("red", 300))
    operations = {"services": ["cpu"], "min_new_rows": 250}
    posting = posted_to(lambda request: 204)  # a webhook of a chat
    with (
        posting as (hook, posts),
        whole_stack(root, ingest={"sources": [{"uri": f"{source}/*.json"}]}, operations=operations) as known,
    ):
        url = known["url"]
        # A person makes a block in the dashboard, and names it where deployments are made.
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
        monkeypatch.setenv("RETUNE_ALERT_BLOCK", "custom-webhook/team")
        for code in (
            f"from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
            f"Block(name='team', url={hook!r}, json_data={{'text': '{{{{subject}}}}: {{{{body}}}}'}}).save('team')",
            "import runpy; runpy.run_module('flows.setup', run_name='__main__')",
        ):
            done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment(), capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
        run = finished(url, "watch/watch")
        assert run["state"]["message"] == "300 new rows; retraining requested"
        wait_until(lambda: ended(url, name="retrain-new-data"), 240)
        assert finished(url, "watch/watch")["state_name"] == "Unchanged"
        (source / "b.json").write_text(rows_of("red", 50, start=300))
        run = finished(url, "watch/watch")
        assert run["state"]["message"] == "50 new rows; fewer than 250, so no retraining"

        failed = finished(url, "promote/promote", version="v1", force=True)
        assert failed["state_name"] == "Failed"
        [(_, told)] = wait_until(lambda: posts, 60)
        assert "Retune: a run failed" in told["text"] and "force needs a reason" in told["text"]

        made = finished(url, "promote/promote", version="v1", force=True, reason="a test asks for it")
        assert made["state_name"] in ("Promoted", "Unchanged"), made["state"]  # the retraining may have promoted it
        (source / "a.json").write_text(rows_of("a colour that nobody has ever named before", 200))
        (source / "b.json").unlink()
        run = finished(url, "watch/watch")
        assert run["state"]["message"] == "200 new rows; fewer than 250, so no retraining"
        worse = finished(url, "evaluate-champion/evaluate-champion")
        assert worse["state_name"] == "Regressed", worse["state"]
        wait_until(lambda: ended(url, name="retrain-champion-regressed"), 240)
        assert len(ended(url, name="retrain-new-data")) == 1
