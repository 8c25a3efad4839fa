"""Closes runs in the local Prefect server's history whose processes were, or are about to be, killed.

Prefect does not notice when a process is killed, or a worker stops together with its server: such a run would stay
Running for ever and keep its deployment's slot.
"""

import time
from typing import Any

from pipeline.core.processes import lives
from pipeline.services import server

OPEN = ["RUNNING", "PENDING", "CANCELLING"]
KILL_SECONDS = 45  # a worker gives a run 30 s to save a checkpoint and end
LOST = "its process no longer exists: it was killed, or the machine restarted"


def close_lost_runs(url: str) -> None:
    """Set each manual run whose process no longer exists to Crashed; call it with the project's run lock held."""
    runs = _open(url, OPEN, of_deployments=False)  # not those that wait for a person: they hold no lock
    _end(url, [run for run in runs if not lives(run["infrastructure_pid"])], "CRASHED", LOST)


def close_stack_runs(url: str) -> None:
    """Set each open run of a deployment to Crashed; call it before the stack's workers start."""
    _end(url, _open(url, [*OPEN, "PAUSED"], of_deployments=True), "CRASHED", LOST)


def refuse_runs_by_hand(url: str) -> None:
    """Raise ServerError if a manual run reports to this server: it would hang without it."""
    processes = [run["infrastructure_pid"] for run in _open(url, OPEN, of_deployments=False)]
    if living := [process.partition(":")[0] for process in processes if lives(process)]:
        raise server.ServerError(
            f"a manual run (process {', '.join(living)}) needs this server; wait for it, or stop it with Ctrl-C"
        )


def cancel_stack_runs(url: str, reason: str) -> None:
    """Have the workers stop each open run of a deployment, and set it to Cancelled with `reason`."""
    runs = _open(url, [*OPEN, "PAUSED"], of_deployments=True)
    _end(url, runs, "CANCELLING", reason)
    deadline = time.monotonic() + KILL_SECONDS
    while runs and _open(url, OPEN, of_deployments=True) and time.monotonic() < deadline:
        time.sleep(0.5)
    _end(url, runs, "CANCELLED", reason)


def _open(url: str, types: list[str], of_deployments: bool) -> list[dict[str, Any]]:
    conditions = {"state": {"type": {"any_": types}}, "deployment_id": {"is_null_": not of_deployments}}
    return server.post(url, "flow_runs/filter", {"flow_runs": conditions}) or []


def _end(url: str, runs: list[dict[str, Any]], state_type: str, message: str) -> None:
    state = {"type": state_type, "name": state_type.capitalize(), "message": message}
    for run in runs:  # force, because Prefect's rules assume the run's own process
        server.post(url, f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})
