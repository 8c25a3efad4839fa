"""`python -m flows.setup`: create work pools, automations and the deployments of prefect.yaml on PREFECT_API_URL.

Existing automations and deployments are updated. Existing work pools stay: a person may have set their limits.
"""

import asyncio
import runpy
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists

from flows import automations
from pipeline.services.stack import POOLS


async def pools_and_automations() -> None:
    async with get_client() as client:
        for name, limit in POOLS.items():
            try:
                await client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
            except ObjectAlreadyExists:
                print(f"the work pool {name} exists and is left unchanged")
        await automations.apply(client)


if __name__ == "__main__":
    asyncio.run(pools_and_automations())
    if Path("prefect.yaml").is_file():
        sys.argv = ["prefect", "--no-prompt", "deploy", "--all"]
        runpy.run_module("prefect", run_name="__main__")
