"""The whole story: a data snapshot in, a new champion or a reasoned refusal out. One line a stage.

Each DVC stage runs as `dvc repro` of that stage in a child process, so `dvc repro` and this flow see each other's
work as done. Training is never retried: a second attempt is a person's decision, and goes on from the last checkpoint.
"""

import fcntl
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Running

from flows.gpu import train_on_pool
from flows.lines import say, shown, why_failed
from flows.summary import describe_run, show_run, state_of, verdict
from pipeline import git, graph
from pipeline import promote as gate
from pipeline import publish as shipping
from pipeline.data.snapshot import recover
from pipeline.params import Params
from pipeline.progress import clock
from pipeline.report.tables import score_rows
from pipeline.report.whole import report_decision
from pipeline.security.redact import redacted_errors
from pipeline.settings import load_params
from pipeline.statistics import METRICS, read_scores
from pipeline.store.artifact_store import open_store
from pipeline.training.pin import pin_champion
from pipeline.under_way import tell, told
from pipeline.versions.decisions import name_of

ARTIFACTS = Path("artifacts")


class StageFailed(RuntimeError):
    """A stage's process ended with an error; its own last lines say which."""


@dataclass(frozen=True)
class StageResult:
    stage: str
    outcome: str  # ran | restored (from DVC's run cache) | cached (nothing had changed); promote: its decision
    seconds: float
    detail: Any = None  # what publish and promote answered


@flow(name="retrain", flow_run_name="retrain-{trigger}", validate_parameters=False)
def retrain(trigger: str = "by-hand") -> State[Any]:
    return ended(run_stages(trigger))


def run_stages(trigger: str) -> dict[str, Any]:
    with told(trigger):
        describe_run(trigger)
        params = load_params()
        result = summary(
            [
                ingest(),
                prepare(),
                train(params),
                evaluate(),
                merge(),
                publish(params),
                promote(params),
            ]
        )
        show_run(params, trigger, result)
        return wait_for_approval(params, trigger, result)


def ended(result: dict[str, Any]) -> State[Any]:
    """The run's last state, named after the decision: automations wait for *Refused*."""
    return state_of(result["decision"]["decision"], result["decision"]["reason"], result)


class Approval(RunInput):
    """What a person fills in when they resume a run that waits."""

    your_name: str
    approve: bool = False
    reason: str = ""


@task
@redacted_errors
def ingest() -> State[Any]:
    """The snapshot that data.dvc names, fetched if it is not here. New data comes in by `retune ingest`."""
    started = time.monotonic()
    recover()  # an ingest that was killed half-way
    fetched = graph.pull_data()
    return _state("ingest", "ran" if fetched else "cached", started)


@task
def prepare() -> State[Any]:
    result = _repro("prepare")
    report = (ARTIFACTS / "dataset" / "report.md").read_text()
    create_markdown_artifact(report, key="data-report", description="What became of every row of the data")
    return result


@task(retries=0)
def train(params: Params) -> State[Any]:
    pin_champion(params)
    artifact = create_progress_artifact(0.0, key="training-progress", description="Training")
    assert isinstance(artifact, UUID)  # not a coroutine: this is synchronous code
    operations = load_params().operations
    if operations.train_pool == "local" or "train" not in graph.stale():
        return _repro("train", artifact)
    started = time.monotonic()
    train_on_pool(operations, shown("train", artifact))
    update_progress_artifact(artifact_id=artifact, progress=100.0)
    return _state("train", "ran", started)


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
    tell("publish")
    published = shipping.publish(params.publish)
    store = open_store(params.publish)
    link = f"{store.uri}/versions/{published.version}/manifest.json"
    create_link_artifact(link, "manifest", key="version", description="The published version: its files and lineage")
    folder = ARTIFACTS.resolve().as_uri()
    create_link_artifact(folder, "artifacts of this run", key="files", description="The workspace's files")
    return _state("publish", "ran" if published.created else "cached", started, asdict(published))


@task
@redacted_errors
def promote(params: Params) -> State[Any]:
    started = time.monotonic()
    tell("promote")
    decision = gate.promote(params.publish, params.promote)
    if decision.decision == "promoted" and params.operations.git_branch is not None:
        _record_in_git(params.operations.git_branch, params.publish.registered_model_name, decision)
    create_markdown_artifact(verdict(asdict(decision)), key="verdict", description=decision.title)
    _report(params, decision)
    return _state("promote", decision.decision, started, asdict(decision))


def _record_in_git(branch: str, model: str, decision: gate.Decision) -> None:
    """The promotion stands, whatever git says; what it says is a line of the run."""
    try:
        commit = git.record_version(branch, model, decision.version, decision.number)
        say(f"promote: {branch} has commit {commit[:12]}")
    except git.GitError as error:
        get_run_logger().warning(f"promote: {error}")
        say(f"promote: not recorded in git: {error}")


@task
def approve(params: Params, version: str, answer: Approval) -> State[Any]:
    started = time.monotonic()
    actor = f"{answer.your_name} (dashboard)"
    decision = gate.approve(params.publish, params.promote, version, answer.approve, answer.reason, actor)
    create_markdown_artifact(verdict(asdict(decision)), key="verdict", description=decision.title)
    _report(params, decision)
    return _state("approve", decision.decision, started, asdict(decision))


def _report(params: Params, decision: gate.Decision) -> None:
    """The page of this decision; that it could not be written is one more warning."""
    decision.warnings.extend(report_decision(params.publish, decision.version, ARTIFACTS))
    page = ARTIFACTS / "report.md"
    if page.is_file():
        create_markdown_artifact(
            page.read_text(), key="report", description="The whole evaluation report of the version"
        )


def wait_for_approval(params: Params, trigger: str, result: dict[str, Any]) -> dict[str, Any]:
    """Where `promote.approval` is manual: pause until a person, who sees the numbers, resumes the run.

    Nothing is held meanwhile: the stages' processes have ended, and the project's run lock is let go of. A run on a
    server of its own, which nobody sees, does not wait; nor does one for longer than `promote.approval_hours`. The
    proposal stays in the promotion log, and `retune promote --approve` answers it.
    """
    decision = result["decision"]
    if decision["decision"] != "proposed" or os.environ.get("RETUNE_DASHBOARD") == "":
        return result
    name = name_of(decision["version"], decision["number"])
    say(f"promote: version {name} passes and waits for approval in the dashboard: resume this run there")
    tell("approval")
    if "RETUNE_RUN_LOCK" in os.environ:  # inherited from `retune run`, and unlocked for both
        fcntl.flock(int(os.environ["RETUNE_RUN_LOCK"]), fcntl.LOCK_UN)
    form = Approval.with_initial_data(description=verdict(decision), approve=False)
    try:
        answer = pause_flow_run(form, timeout=int(params.promote.approval_hours * 3600), poll_interval=2)
    except FlowPauseTimeout:
        say(
            f"promote: nobody answered in {params.promote.approval_hours:g} hours; `retune promote --approve` still can"
        )
        context: Any = get_run_context()
        with get_client(sync_client=True) as client:  # from Paused the server would let it end as Failed only
            client.set_flow_run_state(context.flow_run.id, Running(), force=True)
        return result
    answered: StageResult = approve(params, decision["version"], answer).result()
    result |= {"decision": answered.detail}
    show_run(params, trigger, result)
    return result


def summary(states: list[State[Any]]) -> dict[str, Any]:
    stages: list[StageResult] = [state.result() for state in states]
    metrics = read_scores(ARTIFACTS / "evaluation") | read_scores(ARTIFACTS / "parity")
    return {
        "changed": any(stage.outcome not in ("cached", "unchanged") for stage in stages),
        "stages": [{"stage": s.stage, "outcome": s.outcome, "seconds": s.seconds} for s in stages],
        "metrics": {
            system: {metric: metrics[system][metric] for metric in METRICS} for system in ("base", "adapter", "merged")
        },
        "version": stages[-2].detail,
        "decision": stages[-1].detail,
    }


def _repro(stage: str, artifact: UUID | None = None) -> State[Any]:
    """Run one DVC stage, its lines streamed to the terminal and to Prefect, its progress to `artifact`."""
    started = time.monotonic()
    lines: list[str] = []
    show = shown(stage, artifact)

    def on_line(line: str) -> None:
        lines.append(line)
        show(line)

    status = graph.repro(stage, on_line)
    if status != 0:
        raise StageFailed(f"{stage} failed: {why_failed(lines) or f'it ended with status {status}'}")
    if artifact is not None:
        update_progress_artifact(artifact_id=artifact, progress=100.0)
    return _state(stage, graph.outcome(lines, stage), started)


def _state(stage: str, outcome: str, started: float, detail: Any = None) -> State[Any]:
    result = StageResult(stage, outcome, time.monotonic() - started, detail)
    return Completed(name=outcome.capitalize(), message=f"{stage} {outcome} in {clock(result.seconds)}", data=result)
