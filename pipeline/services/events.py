"""Events for the running Prefect server: new data, a worse champion (both trigger deployments), an unchanged run.

Without a server nothing is sent. A server that is unreachable, or that refuses the credentials of
PREFECT_API_AUTH_STRING, does not fail the caller.
"""

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from pipeline.services import server

DATASET_UPDATED = "dataset.updated"
CHAMPION_REGRESSED = "champion.regressed"


def emit(event: str, resource: str, payload: dict[str, Any], root: Path = Path(".")) -> bool:
    """Post `event` about `resource` to the project's server, or PREFECT_API_URL; returns whether it was accepted."""
    body: dict[str, Any] = {"id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": event}
    body |= {"resource": {"prefect.resource.id": resource}, "related": [], "payload": payload}
    if (local := server.running(root)) is not None:
        return server.post(local, "events", [body]) is not None
    url = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    return bool(url) and server.post(url, "events", [body], os.environ.get("PREFECT_API_AUTH_STRING")) is not None


def record_unchanged(reason: str, root: Path = Path(".")) -> bool:
    """Add an unchanged run of `retrain` to the history of `retune up`'s server; starting a flow would take longer."""
    url = server.running(root)
    flow = server.post(url, "flows/", {"name": "retrain"}) if url else None
    if url is None or flow is None:
        return False
    state = {"type": "COMPLETED", "name": "Unchanged", "message": f"nothing to do: {reason}"}
    run = {"name": "retrain-by-hand-unchanged", "state": state, "tags": ["retune", "trigger:by-hand", "unchanged"]}
    return server.post(url, "flow_runs/", run | {"flow_id": flow["id"]}) is not None


def tell_updated(new_rows: int, min_new_rows: int, root: Path = Path(".")) -> bool:
    """Emit `dataset.updated` if enough rows are new; fewer wait for the next scheduled run."""
    return new_rows >= min_new_rows and emit(DATASET_UPDATED, "retune.dataset", {"new_rows": new_rows}, root)


def contents(root: Path = Path(".")) -> set[int]:
    """Digests of the snapshot's rows: of messages and tools, because a row's source and line may change."""
    digests: set[int] = set()
    for shard in (root / "data" / "instructions").glob("*.parquet"):  # raw files that were not ingested do not count
        names = [name for name in ("messages", "tools") if name in pq.read_schema(shard).names]
        rows = zip(*(pq.read_table(shard, columns=[name]).column(name) for name in names), strict=True)
        digests |= {xxhash.xxh3_64_intdigest("\0".join(map(str, row)).encode()) for row in rows}
    return digests
