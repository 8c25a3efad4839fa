"""The tasks of the flow, one per stage, with their artifacts for the dashboard. DVC stages run by `dvc repro`."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.gpu import train_on_pool
from flows.lines import say, shown, training_progress, why_failed
from flows.summary import record_verdict
from pipeline import promote as promotion
from pipeline import publish as shipping
from pipeline.core import git, graph
from pipeline.core.current_run import record_stage
from pipeline.core.progress import clock
from pipeline.core.redaction import redacted_errors
from pipeline.data.snapshot import recover
from pipeline.params import Params
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
    decision = promotion.promote(params.publish, params.promote)
    if decision.decision == "promoted" and params.operations.git_branch is not None:
        try:
            branch, model = params.operations.git_branch, params.publish.registered_model_name
            commit = git.record_version(branch, model, decision.version, decision.number)
            say(f"promote: {branch} has commit {commit[:12]}")
        except git.GitError as error:  # the promotion stands
            get_run_logger().warning(f"promote: {error}")
            say(f"promote: not recorded in git: {error}")
    record_verdict(decision)
    show_report(params, decision)
    return ended_as("promote", decision.decision, started, asdict(decision))


def show_report(params: Params, decision: promotion.Decision) -> None:
    """Write and show the report of this decision; failing to do so adds a warning."""
    decision.warnings.extend(report_decision(params.publish, decision.version, ARTIFACTS))
    page = ARTIFACTS / "report.md"
    if page.is_file():
        create_markdown_artifact(page.read_text(), key="report", description="The evaluation report of the version")


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
