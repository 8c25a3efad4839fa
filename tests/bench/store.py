"""`make bench-store`: what publishing a file costs next to boto3's `upload_file`, and publishing it to a folder.

Both send to the same server on loopback (`s3_sink`, a process of its own that only receives), in turn, five times; the
median counts.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_EC2_METADATA_DISABLED="true")
os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)

import boto3

from pipeline.registry.artifact_store import FileStore
from pipeline.registry.s3 import S3Store
from pipeline.registry.transfer import ship, upload
from pipeline.settings import load_params

MIB = 2**20
SIZE = 1024 * MIB
ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        with path.open("wb") as file:
            for number in range(SIZE // (16 * MIB)):
                file.write(random.Random(number).randbytes(16 * MIB))
        to_s3(path)
        store = FileStore(Path(folder) / "store")
        print("\n| 1 GiB to a folder | bytes sent | seconds |\n|---|---|---|")
        for version in ("first", "the same again"):
            took, sent = timed(lambda v=version: ship(store, v.replace(" ", "-"), {"model": path}, manifest))  # type: ignore[misc]
            print(f"| {version} | {sent:,} | {took:.1f} |")


def to_s3(path: Path) -> None:
    sink = Path(__file__).parents[1] / "s3_sink.py"
    server = subprocess.Popen([sys.executable, sink], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    endpoint = server.stdout.readline().strip()
    own = load_params(Path("params.yaml")).publish
    boto = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    times: dict[str, list[float]] = {"boto3 `upload_file`, defaults": [], "Retune, SHA-256 of the file included": []}
    for _ in range(ROUNDS):
        at = {"artifact_store": f"s3://bench/{uuid.uuid4().hex}", "endpoint_url": endpoint, "addressing_style": "path"}
        store = S3Store(own.model_copy(update=at))
        store.probe()
        ways: list[Callable[[], object]] = [
            lambda: boto.upload_file(str(path), "bench", uuid.uuid4().hex),
            lambda store=store: upload(store, {"model": path}),  # type: ignore[misc]
        ]
        for each, way in zip(times.values(), ways, strict=True):
            each.append(timed(way)[0])
    server.stdin.close()
    server.wait()
    base = statistics.median(times["boto3 `upload_file`, defaults"])
    print(f"1 GiB to an S3 server on loopback, {own.max_concurrency} at once, median of {ROUNDS}\n")
    print("| | MiB/s | times boto3 |\n|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {SIZE / MIB / statistics.median(each):,.0f} | {base / statistics.median(each):.1f} |")


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def manifest(entries: dict[str, object]) -> bytes:
    return json.dumps({"files": entries}).encode()


if __name__ == "__main__":
    main()
