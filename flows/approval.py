"""Where `promote.approval` is manual, a run waits for a person, who answers in the dashboard."""

import fcntl
import os
import time
from dataclasses import asdict
from typing import Any

from prefect import get_client, task
from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Running

from flows.lines import say
from flows.summary import record_verdict, show_run, verdict
from flows.tasks import StageResult, ended_as, show_report
from pipeline import promote as gate
from pipeline.core.under_way import tell
from pipeline.params import Params
from pipeline.registry.decisions import name_of


class Approval(RunInput):
    """What a person fills in when they resume a run that waits."""

    your_name: str
    approve: bool = False
    reason: str = ""


@task
def approve(params: Params, version: str, answer: Approval) -> State[Any]:
    started = time.monotonic()
    actor = f"{answer.your_name} (dashboard)"
    decision = gate.approve(params.publish, params.promote, version, answer.approve, answer.reason, actor)
    record_verdict(decision)
    show_report(params, decision)
    return ended_as("approve", decision.decision, started, asdict(decision))


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
