"""Training on the `gpu` pool: the run sends a request, a worker trains in its own clone, the run fetches the outputs.

`pipeline.core.handover` carries the data. If a worker dies, its run has no more heartbeats, an automation of
`flows.setup` marks it Crashed and frees the pool's slot, and the parent tries again; in the same clone, the
training then continues from its last checkpoint.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect import flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, WorkerFilter, WorkerFilterStatus
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Cancelling, Completed

from flows.lines import training_progress
from pipeline.core import handover
from pipeline.core.environment import set_environment
from pipeline.core.processes import end_with_worker
from pipeline.core.redaction import redact_process, redacted_errors
from pipeline.params import OperationsParams

POOL = "gpu"
POLL_SECONDS = 2.0
ONLINE = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))


class TrainingFailed(RuntimeError):
    """The training failed on the worker, or too many workers died; no outputs were fetched."""


def train_on_pool(params: OperationsParams, on_line: Callable[[str], None]) -> None:
    """Have a worker of the gpu pool run the stage `train`, and fetch its outputs; `on_line` gets its progress."""
    if os.environ.get("RETUNE_DASHBOARD") == "":
        raise TrainingFailed(
            "operations.train_pool is gpu, but no server with a gpu worker runs; start it: `retune up`"
        )
    commit = handover.request("train", params.git_remote)
    try:
        for attempt in range(1, params.train_attempts + 1):
            on_line(f"train: requested {commit[:12]} from the gpu pool, attempt {attempt}")
            started: Any = run_deployment(
                "train/train",
                parameters={"commit": commit, "remote": params.git_remote},
                flow_run_name=f"train-{commit[:12]}-{attempt}",
                timeout=0,  # `_wait` also reports that no worker polls the pool
            )
            run = _wait(started.id, params.worker_wait_minutes, on_line)
            if run.state.is_completed():
                handover.accept("train", commit, params.git_remote)
                return
            if not run.state.is_crashed():
                raise TrainingFailed(f"the gpu worker's run {run.name} ended as {run.state.name}: {run.state.message}")
            on_line(f"train: the worker of {run.name} died")
        raise TrainingFailed(
            f"the workers of {params.train_attempts} attempts died; run `retune doctor` on their machine"
        )
    finally:
        handover.forget(commit, params.git_remote)


def _wait(run_id: UUID, minutes: float, on_line: Callable[[str], None]) -> Any:
    """Wait for the flow run to end, and return it; it is cancelled if this process stops waiting."""
    artifacts = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    last_line, deserted_since = "", None
    with get_client(sync_client=True) as client:
        try:
            while not (run := client.read_flow_run(run_id)).state.is_final():  # type: ignore[union-attr]
                line = ""
                if run.state.is_running():  # type: ignore[union-attr]
                    shown = client.read_artifacts(artifact_filter=artifacts)
                    line = (shown[0].description or "") if shown else ""
                elif client.read_workers_for_work_pool(POOL, ONLINE):
                    deserted_since = None
                else:
                    deserted_since = deserted_since or time.monotonic()
                    line = f"train: no worker polls the work pool {POOL}; waiting {minutes:g} minutes for one"
                    if time.monotonic() - deserted_since > 60 * minutes:
                        raise TrainingFailed(
                            f"no worker polled the work pool {POOL} for operations.worker_wait_minutes, {minutes:g}; "
                            "start one (`retune up`, or see docs/operations.md, Training on another machine), or set "
                            "operations.train_pool to local"
                        )
                if line and line != last_line:
                    on_line(line)
                last_line = line
                time.sleep(POLL_SECONDS)
            return run
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                now: Any = client.read_flow_run(run_id).state
                state = Cancelling if now.is_running() else Cancelled  # Cancelling has the worker end its process
                client.set_flow_run_state(run_id, state(message="the run that requested it has ended"), force=True)
            raise


@flow(name="train", retries=0)
@redacted_errors
def train(commit: str, remote: str = "origin") -> State[Any]:
    """Run the stage `train` of `commit` in this worker's clone."""
    end_with_worker()
    redact_process()
    set_environment()
    with training_progress() as show:
        handover.answer("train", commit, remote, show)
    return Completed(name="Trained", message=f"commit {commit[:12]}")
