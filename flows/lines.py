"""Sends a stage's output to the terminal, to Prefect's log and progress, and to `retune status`."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from pipeline.core.current_run import record_stage
from pipeline.core.progress import LINE
from pipeline.core.redaction import redact

# DVC's hints after each stage, for people who type `dvc repro`.
DVC_HINTS = (
    "Use `dvc push`", "To track the changes", "\tgit add", "> ", "To enable auto staging", "\tdvc config",
    "Updating lock file", "Data and pipelines are up to date", "ERROR: failed to transfer", "Having any troubles?",
    "ERROR: failed to reproduce",  # the run's last line has the reason
)  # fmt: skip


@contextmanager
def training_progress() -> Iterator[Callable[[str], None]]:
    """Yield a function for each line of a training's output; it also updates the dashboard's progress."""
    artifact: Any = create_progress_artifact(0.0, key="training-progress", description="Training")
    yield shown("train", artifact)
    update_progress_artifact(artifact_id=artifact, progress=100.0)


def shown(stage: str, artifact: Any = None) -> Callable[[str], None]:
    """A function for each line of the output of `stage`; it also updates the progress artifact, if there is one."""
    logger = get_run_logger()
    record_stage(stage)

    def on_line(line: str) -> None:
        line = redact(line)
        if not line.strip() or line.startswith(DVC_HINTS):
            return
        logger.info(line)
        say(line)
        if not (progress := LINE.match(line)):
            return
        record_stage(stage, line)
        if artifact is not None:
            try:
                update_progress_artifact(artifact_id=artifact, progress=float(progress["percent"]), description=line)
            except Exception as error:  # no fault of the server may end a training
                logger.warning(f"progress could not be updated: {error}")

    return on_line


def say(line: str) -> None:
    print(line, flush=True, file=sys.stderr if "--json" in sys.argv else sys.stdout)


def why_failed(lines: list[str]) -> str | None:
    """The reason in the output of a failed stage: its own error, else Python's or DVC's."""
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    python = [line for line in lines if re.match(r"[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    dvc = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next((each[-1] for each in (ours, python, dvc) if each), None)
