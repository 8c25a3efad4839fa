"""The deployments of prefect.yaml with their triggers, and the automations, onto the server of PREFECT_API_URL.

`python -m flows.deploy` does what `prefect deploy --all` does; of Prefect 3.8 that command stops after its first
deployment to a work pool, because its client asks for the pool's workers in a way that its server refuses.
"""

from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from ruamel.yaml import YAML

from flows import automations


async def deploy(path: Path = Path("prefect.yaml")) -> list[str]:
    """Create or bring up to date every deployment of `path`; returns their names."""
    spec = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    async with get_client() as client:
        for each in spec["deployments"]:
            flow: Any = load_flow_from_entrypoint(each["entrypoint"])
            limits = each.get("concurrency_limit")
            limit = ConcurrencyLimitConfig.model_validate(limits) if limits else None
            deployment = await client.create_deployment(
                flow_id=await client.create_flow(flow),
                name=each["name"],
                entrypoint=each["entrypoint"],
                description=each["description"],
                tags=each["tags"],
                parameters=each.get("parameters", {}),
                work_pool_name=each["work_pool"]["name"],
                concurrency_limit=limit.limit if limit else None,
                concurrency_options=ConcurrencyOptions(collision_strategy=limit.collision_strategy) if limit else None,
                schedules=[_schedule(schedule) for schedule in each.get("schedules", [])],
                pull_steps=spec["pull"],
                parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
            )
            await client.delete_resource_owned_automations(f"prefect.deployment.{deployment}")
            for number, wanted in enumerate(each.get("triggers", []), start=1):
                trigger = DeploymentEventTrigger.model_validate({"name": f"{each['name']}-{number}"} | wanted)
                trigger.set_deployment_id(deployment)
                await client.create_automation(trigger.as_automation())
        await automations.apply(client)
    return [each["name"] for each in spec["deployments"]]


def _schedule(wanted: dict[str, Any]) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(
        schedule=CronSchedule(cron=wanted["cron"], timezone=wanted["timezone"]),
        active=wanted.get("active", True),
        parameters=wanted.get("parameters", {}),
    )


if __name__ == "__main__":
    import asyncio

    print(f"deployed: {', '.join(asyncio.run(deploy()))}")
