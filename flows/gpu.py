"""Training on the `gpu` pool: the run asks, a worker in a clone of its own trains, the run takes the answer.

See `pipeline.handover` for what is carried how. A worker that dies leaves a run without heartbeats, which an automation
of `flows.automations` marks Crashed; its slot of the pool is then free, and the parent asks again.
"""

import os
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.states import Completed

from pipeline import handover
from pipeline.environment import set_environment
from pipeline.params import OperationsParams
from pipeline.progress import LINE
from pipeline.security.redact import redact, redact_process, redacted_errors


class TrainingFailed(RuntimeError):
    """The worker's training failed or its workers died too often; nothing was taken over."""


def train_on_pool(params: OperationsParams) -> None:
    """Have a worker of the gpu pool run the stage `train`, and take over what it made.

    Raises:
        TrainingFailed: the training failed, or workers died at each of `operations.train_attempts`.
        HandoverError: inputs or outputs could not be handed over.
    """
    if os.environ.get("RETUNE_DASHBOARD") == "":
        raise TrainingFailed(
            "operations.train_pool is gpu, but no server with a gpu worker is up; `retune up` starts it"
        )
    logger = get_run_logger()
    commit = handover.ask("train", params.git_remote)
    for attempt in range(1, params.train_attempts + 1):
        logger.info(f"train: asked the gpu pool for {commit[:12]}, attempt {attempt}")
        run: Any = run_deployment(
            "train/train",
            parameters={"commit": commit, "remote": params.git_remote},
            flow_run_name=f"train-{commit[:12]}-{attempt}",
            poll_interval=2,
        )
        if run.state.is_completed():
            handover.take("train", commit, params.git_remote)
            return
        if not run.state.is_crashed():
            raise TrainingFailed(f"the gpu worker's run {run.name} ended as {run.state.name}: {run.state.message}")
        logger.warning(f"train: the worker of {run.name} died")
    raise TrainingFailed(f"the workers of {params.train_attempts} attempts died; `retune doctor` on the gpu machine")


@flow(name="train", retries=0)
@redacted_errors
def train(commit: str, remote: str = "origin") -> State[Any]:
    """Run the stage `train` as `commit` has it, in this worker's clone."""
    redact_process()
    set_environment()
    logger = get_run_logger()
    artifact = create_progress_artifact(0.0, key="training-progress", description="Training")
    assert isinstance(artifact, UUID)  # not a coroutine: this is synchronous code

    def on_line(line: str) -> None:
        line = redact(line)
        if not line.strip():
            return
        logger.info(line)
        progress = LINE.match(line)
        if progress:
            try:
                update_progress_artifact(artifact_id=artifact, progress=float(progress["percent"]), description=line)
            except Exception as error:  # whatever ails the server, it must not end a training
                logger.warning(f"progress could not be shown: {error}")

    handover.work("train", commit, remote, on_line)
    update_progress_artifact(artifact_id=artifact, progress=100.0)
    return Completed(name="Trained", message=f"commit {commit[:12]}")
