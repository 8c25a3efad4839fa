"""The flows that workers run: on a schedule, on an event, or from the dashboard's form. See prefect.yaml.

Each takes the project's run lock while it writes, and ends in a state named after its outcome.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.retrain import run_stages
from flows.summary import describe_run, record_verdict, state_of
from flows.tasks import StageFailed
from pipeline import promote as promotion
from pipeline.core import graph
from pipeline.core.environment import set_environment
from pipeline.core.files import write_text
from pipeline.core.processes import end_with_worker, environment
from pipeline.core.progress import counted
from pipeline.core.redaction import redact_process, redacted_errors
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.data.snapshot import recover
from pipeline.ingest import ingest
from pipeline.registry.compare import score_on_current_split
from pipeline.registry.model import RegisteredModel
from pipeline.registry.retention import collect, delete, outdated
from pipeline.scoring.resampling import LOWER_IS_BETTER
from pipeline.services.events import CHAMPION_REGRESSED, contents, emit, tell_updated
from pipeline.settings import change_params, load_params

P = ParamSpec("P")


def deployed(run: Callable[P, State[Any]]) -> Callable[P, State[Any]]:
    """`run` as a worker starts it: in the project's folder, redacted, *Skipped* (no alert) under another's lock."""

    @wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> State[Any]:
        _enter()
        try:
            return run(*args, **kwargs)
        except RunUnderWay as error:
            return Completed(name="Skipped", message=str(error))

    return redacted_errors(call)


@flow(name="retrain", flow_run_name="retrain-{trigger}")
@deployed
def retrain(
    trigger: str = "by-hand", sources: list[str] | None = None, changes: dict[str, Any] | None = None
) -> State[Any]:
    """Bring everything up to date: train if something changed, publish, and promote if it is better.

    Args:
        trigger: what started the run; part of its name and tags.
        sources: data to ingest first, as for `retune ingest`.
        changes: parameters to write to params.yaml first, such as {"train.lora_r": 32}; they stay if the resulting
            version is promoted or waits for approval, else params.yaml is restored.
    """
    with only_run() as lock, _tried(changes) as trial:
        params = load_params()
        if sources:
            graph.pull_data()
            ingest(params.ingest, sources)
        promotion.require_ready(params)
        version = None if graph.stale() else graph.version_id()
        reason = version and promotion.settled(params, version)
        if version and reason:
            describe_run(trigger, "unchanged")
            model = RegisteredModel(params.publish)
            trial.stays = version == model.champion()
            message = f"nothing to do: version {model.label(version)}: {reason}"
            return Completed(name="Unchanged", message=message)
        # A run that waits for a person releases the lock.
        os.environ |= {"RETUNE_RUN_LOCK": str(lock), "RETUNE_DASHBOARD": os.environ.get("PREFECT_API_URL", "")}
        result = run_stages(trigger)
        trial.stays = result["decision"]["decision"] in ("promoted", "proposed", "unchanged")
    return state_of(result["decision"]["decision"], result["decision"]["reason"])


@flow(name="watch")
@deployed
def watch() -> State[Any]:
    """Read `ingest.sources` again; a new snapshot with enough new rows starts a retraining."""
    with only_run():
        params = load_params()
        if params.ingest.sources is None:
            return Completed(name="Skipped", message="ingest.sources is null; there is nothing to watch")
        graph.pull_data()
        before = contents()
        changed = ingest(params.ingest).changed
        new_rows = len(contents() - before) if changed else 0
    if not changed:
        return Completed(name="Unchanged", message="the sources hold the same rows as the snapshot")
    emitted = tell_updated(new_rows, params.operations.min_new_rows)
    reaction = "retraining requested" if emitted else f"fewer than {params.operations.min_new_rows}, so no retraining"
    return Completed(name="Updated", message=f"{counted(new_rows, 'new row')}; {reaction}")


@flow(name="promote", flow_run_name="promote-{version}")
@deployed
def promote(version: str, force: bool = False, reason: str = "") -> State[Any]:
    """Decide on a published version: v3, 3 or an id. Force overrules the gate and records the reason."""
    with only_run():
        params = load_params()
        if force and not reason.strip():
            raise ValueError("force needs a reason, which the history keeps")
        decision = promotion.promote(params, version, force=reason if force else None)
    record_verdict(decision)
    return state_of(decision.word, decision.reason)


@flow(name="rollback")
@deployed
def rollback(reason: str, to: str | None = None) -> State[Any]:
    """Restore the previous champion, or the version named by `to`; runs even while another run holds the lock."""
    params = load_params()
    record, warnings = promotion.rollback(params, to, reason)
    label = RegisteredModel(params.publish).label
    message = "; ".join([f"{label(record.champion)} is champion again; it was {label(record.previous)}", *warnings])
    return Completed(name="Rolled back", message=message, data=asdict(record))


@flow(name="evaluate-champion")
@deployed
def evaluate_champion() -> State[Any]:
    """Score the champion on today's test split; emit `champion.regressed` if it is worse than when published."""
    with only_run():
        params = load_params()
        model, metric = RegisteredModel(params.publish), params.promote.primary_metric
        version = model.champion()
        if version is None:
            return Completed(name="Skipped", message="there is no champion yet")
        manifest, name = model.manifest(version), model.label(version)
        then = manifest["metrics"]["merged"].get(metric)
        if then is None:
            message = f"{metric} (promote.primary_metric) was not measured when champion {name} was published"
            return Completed(name="Skipped", message=message)
        recover()
        graph.pull_data()
        if graph.repro("prepare", print) != 0:
            raise StageFailed("stage prepare failed; `dvc repro prepare` shows it alone")
        now = score_on_current_split(model, manifest, metric)
    message = f"{metric} {now:.3f} today; {then['score']:.3f} ({then['low']:.3f} to {then['high']:.3f}) when published"
    create_markdown_artifact(
        f"**{name}**: {message}", key="champion", description="The champion scored on today's test split"
    )
    if now <= then["high"] if metric in LOWER_IS_BETTER else now >= then["low"]:
        return Completed(name="Holds", message=message)
    emit(CHAMPION_REGRESSED, "retune.champion", {"version": version, "metric": metric, "score": now})
    return state_of("regressed", message)


@flow(name="cleanup")
@deployed
def cleanup(delete_files: bool = True) -> State[Any]:
    """Delete versions beyond publish.keep_versions, then objects that no version needs any more."""
    params = load_params().publish
    versions = outdated(params) if params.keep_versions is not None else []
    for version in versions:
        delete(params, version, f"older than the newest {params.keep_versions}")
    garbage = collect(RegisteredModel(params).store, delete_files)
    message = f"{len(versions)} versions and {garbage.objects:,} objects, {garbage.bytes / 1e6:,.1f} MB"
    return Completed(name="Cleaned", message=message, data=asdict(garbage))


@contextmanager
def _tried(changes: dict[str, Any] | None) -> Iterator[Any]:
    """Apply `changes` to params.yaml; restored at the end unless `stays` is set by then, or the file was edited."""
    path, trial = Path("params.yaml"), SimpleNamespace(stays=False)
    before = path.read_text(encoding="utf-8")
    change_params(changes or {})
    changed = path.read_text(encoding="utf-8")
    try:
        yield trial
    finally:
        if not trial.stays and changed != before and path.read_text(encoding="utf-8") == changed:
            write_text(path, before)


def _enter() -> None:
    if not Path("params.yaml").is_file():
        raise RuntimeError(f"{Path.cwd()} is not a Retune project; set RETUNE_ROOT in the worker's environment")
    end_with_worker()
    redact_process()
    set_environment()
    os.environ["PATH"] = environment()["PATH"]
