"""The tasks of the flow, one per stage and a person's approval, with their artifacts. DVC stages run by `dvc repro`."""

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import get_client, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Running

from flows.gpu import train_on_pool
from flows.lines import say, shown, training_progress, why_failed
from flows.summary import record_verdict, show_run, verdict
from pipeline import promote as promotion
from pipeline import publish as shipping
from pipeline.core import git, graph
from pipeline.core.current_run import record_stage
from pipeline.core.progress import clock
from pipeline.core.redaction import redacted_errors
from pipeline.data.snapshot import recover
from pipeline.params import Params
from pipeline.registry.decisions import name_of
from pipeline.registry.init_adapter import pin_champion
from pipeline.registry.stores import open_store
from pipeline.report.tables import score_rows
from pipeline.report.whole import report_decision
from pipeline.scoring.resampling import read_scores

ARTIFACTS = Path("artifacts")


class StageFailed(RuntimeError):
    """A stage's process failed; its last lines say why."""


@dataclass(frozen=True)
class StageResult:
    stage: str
    outcome: str  # ran | restored (from DVC's run cache) | cached (nothing had changed); promote: its decision
    seconds: float
    detail: Any = None  # the result of publish and promote


@task
@redacted_errors
def ingest() -> State[Any]:
    """Fetch the snapshot of data.dvc if it is missing. New data is added by `retune ingest`."""
    started = time.monotonic()
    recover()  # from an ingest that was killed
    fetched = graph.pull_data()
    return ended_as("ingest", "ran" if fetched else "cached", started)


@task
def prepare() -> State[Any]:
    result = _repro("prepare")
    report = (ARTIFACTS / "dataset" / "report.md").read_text()
    create_markdown_artifact(report, key="data-report", description="What happened to every row of the data")
    return result


@task(retries=0)
def train(params: Params) -> State[Any]:
    pin_champion(params)
    with training_progress() as show:
        if params.operations.train_pool == "local" or "train" not in graph.stale():
            return _repro("train", show)
        started = time.monotonic()
        train_on_pool(params.operations, show)
        return ended_as("train", "ran", started)


@task
def evaluate() -> State[Any]:
    result = _repro("evaluate")
    metrics = read_scores(ARTIFACTS / "evaluation")
    create_table_artifact(score_rows(metrics), key="metrics", description="Test scores with 95 % intervals")
    report = (ARTIFACTS / "evaluation" / "report.md").read_text()
    create_markdown_artifact(report, key="evaluation-report", description="The candidate before merge against the base")
    return result


@task
def merge() -> State[Any]:
    return _repro("merge")


@task
@redacted_errors
def publish(params: Params) -> State[Any]:
    started = time.monotonic()
    record_stage("publish")
    published = shipping.publish(params.publish)
    store = open_store(params.publish)
    link = f"{store.uri}/versions/{published.version}/manifest.json"
    create_link_artifact(link, "manifest", key="version", description="The published version: its files and lineage")
    folder = ARTIFACTS.resolve().as_uri()
    create_link_artifact(folder, "artifacts of this run", key="files", description="The workspace's files")
    return ended_as("publish", "ran" if published.created else "cached", started, asdict(published))


@task
@redacted_errors
def promote(params: Params) -> State[Any]:
    started = time.monotonic()
    record_stage("promote")
    decision = promotion.promote(params)
    if decision.decision == "promoted" and params.operations.git_branch is not None:
        try:
            branch, model = params.operations.git_branch, params.publish.registered_model_name
            commit = git.record_version(branch, model, decision.version, decision.number)
            say(f"promote: {branch} has commit {commit[:12]}")
        except git.GitError as error:  # the promotion stands
            get_run_logger().warning(f"promote: {error}")
            say(f"promote: not recorded in git: {error}")
    return _decided("promote", params, decision, started)


def _decided(stage: str, params: Params, decision: promotion.Decision, started: float) -> State[Any]:
    """Show the verdict and write the report; if that fails, the decision gets a warning."""
    record_verdict(decision)
    decision.warnings.extend(report_decision(params.publish, decision.version, ARTIFACTS))
    page = ARTIFACTS / "report.md"
    if page.is_file():
        create_markdown_artifact(page.read_text(), key="report", description="The evaluation report of the version")
    return ended_as(stage, decision.decision, started, asdict(decision))


def _repro(stage: str, show: Callable[[str], None] | None = None) -> State[Any]:
    """Run one DVC stage, its lines streamed to the terminal and to Prefect."""
    started = time.monotonic()
    lines: list[str] = []
    show = show or shown(stage)

    def on_line(line: str) -> None:
        lines.append(line)
        show(line)

    status = graph.repro(stage, on_line)
    if status != 0:
        raise StageFailed(f"{stage} failed: {why_failed(lines) or f'it ended with status {status}'}")
    return ended_as(stage, graph.outcome(lines, stage), started)


def ended_as(stage: str, outcome: str, started: float, detail: Any = None) -> State[Any]:
    result = StageResult(stage, outcome, time.monotonic() - started, detail)
    return Completed(name=outcome.capitalize(), message=f"{stage} {outcome} in {clock(result.seconds)}", data=result)


class Approval(RunInput):
    """The form that a person fills in to resume a waiting run."""

    your_name: str
    approve: bool = False
    reason: str = ""


@task
def approve(params: Params, version: str, answer: Approval) -> State[Any]:
    started = time.monotonic()
    actor = f"{answer.your_name} (dashboard)"
    decision = promotion.approve(params, version, answer.approve, answer.reason, actor)
    return _decided("approve", params, decision, started)


def wait_for_approval(params: Params, trigger: str, result: dict[str, Any]) -> dict[str, Any]:
    """If the decision is `proposed`, pause until a person resumes the run; returns the result with their answer.

    While paused, the run holds no resources: stages have ended and the run lock is released. A run on its own temporary
    server, which nobody sees, does not wait, and none waits longer than `promote.approval_hours`. The proposal stays in
    the promotion log, where `retune promote --approve` can still answer it.
    """
    decision = result["decision"]
    if decision["decision"] != "proposed" or os.environ.get("RETUNE_DASHBOARD") == "":
        return result
    name = name_of(decision["version"], decision["number"])
    say(f"promote: version {name} passes and waits for approval; resume this run in the dashboard")
    record_stage("approval")
    if "RETUNE_RUN_LOCK" in os.environ:  # inherited from `retune run`; this unlocks it for both
        fcntl.flock(int(os.environ["RETUNE_RUN_LOCK"]), fcntl.LOCK_UN)
    form = Approval.with_initial_data(description=verdict(decision), approve=False)
    try:
        answer = pause_flow_run(form, timeout=int(params.promote.approval_hours * 3600), poll_interval=2)
    except FlowPauseTimeout:
        hours = f"{params.promote.approval_hours:g} hours"
        say(f"promote: no answer within {hours}; `retune promote --approve` or --reject can still give one")
        context: Any = get_run_context()
        with get_client(sync_client=True) as client:  # a Paused run could only end as Failed
            client.set_flow_run_state(context.flow_run.id, Running(), force=True)
        return result
    result |= {"decision": approve(params, decision["version"], answer).result().detail}
    show_run(params, trigger, result)
    return result
