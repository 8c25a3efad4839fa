"""Prefect automations: mark a run without heartbeats as Crashed; send alerts about failed, refused and late runs.

Alerts go to a notification block (Slack, e-mail, webhook) that was made in the dashboard. RETUNE_ALERT_BLOCK names it,
for example `slack-webhook/team`, where `python -m flows.setup` runs.
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
    """The automations for the server; `alert_block` is the id of a notification block."""
    crash = EventTrigger(
        match=FLOW_RUNS,
        posture=Posture.Proactive,  # fires when the expected event does not come
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},  # an end counts, too; its event is named after the state, e.g. Promoted
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=MISSED * HEARTBEAT_SECONDS),
    )
    rules = [
        AutomationCore(
            name="retune: crash runs whose worker died",
            description="Without heartbeats, free the slot of the pool, so that the parent can retry.",
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
    """Create or replace Retune's automations on the server; returns their names. Others are left alone."""
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
