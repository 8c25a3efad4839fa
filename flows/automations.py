"""Automations as code: a run whose heartbeats stop is marked Crashed; failures, refusals and late runs are told.

Whoever is to be told is a notification block of Prefect (Slack, e-mail, webhook), made once in the dashboard and named
by RETUNE_ALERT_BLOCK, for example `slack-webhook/team`, where `python -m flows.setup` runs.
"""

import os
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState, SendNotification

HEARTBEAT_SECONDS = 30  # PREFECT_FLOWS_HEARTBEAT_FREQUENCY of the stack
MISSED = 3
FLOW_RUNS: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
BODY = "{{ flow.name }}/{{ flow_run.name }}: {{ flow_run.state.name }}: {{ flow_run.state.message }}"


def automations(alert_block: UUID | None) -> list[AutomationCore]:
    """What is to be on the server; `alert_block` is the id of a notification block."""
    crash = EventTrigger(
        match=FLOW_RUNS,
        posture=Posture.Proactive,  # fires when what is expected does not come
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},  # an end, too: its event is named after the state, Promoted or Trained say
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=MISSED * HEARTBEAT_SECONDS),
    )
    rules = [
        AutomationCore(
            name="retune: crash runs whose worker died",
            description="No heartbeat for a while: the slot of the pool is freed, and the parent tries again.",
            trigger=crash,
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, name="Crashed", message="no heartbeat: its worker died", force=True
                )
            ],
        )
    ]
    if alert_block is None:
        return rules
    for name, states in (("failed", ["Failed", "Crashed"]), ("was refused", ["Refused"]), ("is late", ["Late"])):
        trigger = EventTrigger(
            match=FLOW_RUNS,
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.retune"},
            posture=Posture.Reactive,
            expect={f"prefect.flow-run.{state}" for state in states},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(0),
        )
        notify = SendNotification(block_document_id=alert_block, subject=f"Retune: a run {name}", body=BODY)
        rules.append(AutomationCore(name=f"retune: tell that a run {name}", trigger=trigger, actions=[notify]))
    return rules


async def apply(client: PrefectClient) -> list[str]:
    """Bring the server's automations up to date; returns their names. Those of other names are left alone."""
    block: UUID | None = None
    if named := os.environ.get("RETUNE_ALERT_BLOCK"):
        kind, _, name = named.partition("/")
        block = (await client.read_block_document_by_name(name, kind)).id
    rules = automations(block)
    for each in rules:
        for old in await client.read_automations_by_name(each.name):
            await client.delete_automation(old.id)
        await client.create_automation(each)
    return [each.name for each in rules]
