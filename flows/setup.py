"""`python -m flows.setup`: create work pools, automations and the deployments of prefect.yaml on PREFECT_API_URL.

The automations mark a run without heartbeats as Crashed, and send alerts about failed, refused and late runs to the
notification block (Slack, e-mail, webhook) named by RETUNE_ALERT_BLOCK, for example `slack-webhook/team`. Existing
automations and deployments are updated. Existing work pools stay: a person may have set their limits.
"""

import asyncio
import os
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.exceptions import ObjectAlreadyExists

from pipeline.services.stack import POOLS

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


async def pools_and_automations() -> None:
    async with get_client() as client:
        for name, limit in POOLS.items():
            try:
                await client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
            except ObjectAlreadyExists:
                print(f"the work pool {name} exists and is left unchanged")
        block: UUID | None = None
        if named := os.environ.get("RETUNE_ALERT_BLOCK"):
            kind, _, name = named.partition("/")
            block = (await client.read_block_document_by_name(name, kind)).id
        for rule in automations(block):
            for old in await client.read_automations_by_name(rule.name):
                await client.delete_automation(old.id)
            await client.create_automation(rule)


if __name__ == "__main__":
    asyncio.run(pools_and_automations())
    if Path("prefect.yaml").is_file():
        sys.argv = ["prefect", "--no-prompt", "deploy", "--all"]
        runpy.run_module("prefect", run_name="__main__")
