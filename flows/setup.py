"""`python -m flows.setup`: work pools, automations, the deployments of prefect.yaml, on the server of PREFECT_API_URL.

What is there is brought up to date; a work pool that is there stays as it is, its limit may have been set by a person.
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
                print(f"the work pool {name} exists and stays as it is")
        await automations.apply(client)


if __name__ == "__main__":
    asyncio.run(pools_and_automations())
    if Path("prefect.yaml").is_file():
        sys.argv = ["prefect", "--no-prompt", "deploy", "--all"]
        runpy.run_module("prefect", run_name="__main__")
