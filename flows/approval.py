"""With `promote.approval: manual`, a run waits for a person's answer in the dashboard."""

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
from pipeline.core.current_run import record_stage
from pipeline.params import Params
from pipeline.registry.decisions import name_of


class Approval(RunInput):
    """The form that a person fills in to resume a waiting run."""

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
        say(
            f"promote: no answer within {params.promote.approval_hours:g} hours; answer with `retune promote --approve`"
        )
        context: Any = get_run_context()
        with get_client(sync_client=True) as client:  # a Paused run could only end as Failed
            client.set_flow_run_state(context.flow_run.id, Running(), force=True)
        return result
    answered: StageResult = approve(params, decision["version"], answer).result()
    result |= {"decision": answered.detail}
    show_run(params, trigger, result)
    return result
