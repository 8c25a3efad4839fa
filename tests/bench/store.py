"""`make bench-store`: what publishing a file to S3 costs next to boto3's `upload_file`, on loopback.

Both send to the same server (`s3_sink`, a process that only receives), in turn; the median of five counts.
"""

import os
import random
import subprocess
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path
from statistics import median

os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_EC2_METADATA_DISABLED="true")
os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)

import boto3

from pipeline.registry.s3 import S3Store
from pipeline.registry.stores import upload
from pipeline.settings import load_params
from tests.bench.measuring import header, row, timed

MIB = 2**20
SIZE = 1024 * MIB
ROUNDS = 5


def main() -> None:
    sink = [sys.executable, Path(__file__).parents[1] / "s3_sink.py"]
    server = subprocess.Popen(sink, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    endpoint = server.stdout.readline().strip()
    params = load_params(Path("params.yaml")).publish
    boto = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    seconds: dict[str, list[float]] = {"boto3 `upload_file`, defaults": [], "Retune, SHA-256 of the file included": []}
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        with path.open("wb") as file:
            for number in range(SIZE // (16 * MIB)):
                file.write(random.Random(number).randbytes(16 * MIB))
        for _ in range(ROUNDS):
            uri = f"s3://bench/{uuid.uuid4().hex}"
            settings = {"artifact_store": uri, "endpoint_url": endpoint, "addressing_style": "path"}
            store = S3Store(params.model_copy(update=settings))
            store.probe()
            send = partial(boto.upload_file, str(path), "bench", uuid.uuid4().hex)
            for times, way in zip(seconds.values(), (send, partial(upload, store, {"model": path})), strict=True):
                times.append(timed(way)[0])
    server.stdin.close()
    server.wait()
    header(f"1 GiB to S3 on loopback, {params.max_concurrency} requests at once", "MiB/s", "times boto3")
    fastest = median(next(iter(seconds.values())))
    for name, times in seconds.items():
        row(name, f"{SIZE / MIB / median(times):,.0f}", f"{fastest / median(times):.1f}")


if __name__ == "__main__":
    main()
