"""`make bench-store`: what the store's transfer costs beside boto3's `upload_file`, and what a small change moves.

Both send to the same server on loopback (`s3_sink`, a process of its own that only receives), in turn, five times; the
median counts. On two cores the digests of a gigabyte cost as much as sending it, so both are given: with the digests
known, and from the file alone.
"""

import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_EC2_METADATA_DISABLED="true")
os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)

import boto3

from pipeline.settings import load_params
from pipeline.store.artifact_store import FileStore
from pipeline.store.s3 import S3Store
from pipeline.store.transfer import OBJECT_SIZE, ship, upload

MIB = 2**20
SIZE = 1024 * MIB
ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        with path.open("wb") as file:
            for number in range(SIZE // (16 * MIB)):
                file.write(random.Random(number).randbytes(16 * MIB))
        throughput(path)
        small_change(path, Path(folder))


def throughput(path: Path) -> None:
    sink = Path(__file__).with_name("s3_sink.py")
    server = subprocess.Popen([sys.executable, sink], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    endpoint = server.stdout.readline().strip()
    own = load_params(Path("params.yaml")).publish
    boto = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    digests = [hashlib.sha256(piece).hexdigest() for piece in pieces(path)]

    def store() -> S3Store:
        at = {"artifact_store": f"s3://bench/{uuid.uuid4().hex}", "endpoint_url": endpoint, "addressing_style": "path"}
        return S3Store(own.model_copy(update=at))

    def send(to: S3Store, number: int) -> None:
        with path.open("rb") as file:
            file.seek(number * OBJECT_SIZE)
            to.create(f"objects/{digests[number]}", file.read(OBJECT_SIZE))

    def known(to: S3Store) -> None:
        with ThreadPoolExecutor(to.max_concurrency) as pool:
            list(pool.map(lambda number: send(to, number), range(len(digests))))

    ways: dict[str, Callable[[S3Store], object]] = {
        "boto3 `upload_file`, defaults": lambda to: boto.upload_file(str(path), "bench", uuid.uuid4().hex),
        "Retune, digests known": known,
        "Retune, from the file: two SHA-256, index and all": lambda to: upload(to, {"model": path}),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            to = store()
            to.probe()
            started = time.perf_counter()
            way(to)
            times[name].append(time.perf_counter() - started)
    server.stdin.close()
    server.wait()
    base = statistics.median(times["boto3 `upload_file`, defaults"])
    print(f"1 GiB to an S3 server on loopback, {own.max_concurrency} at once, median of {ROUNDS}\n")
    print("| | MiB/s | times boto3 |\n|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {SIZE / MIB / statistics.median(each):,.0f} | {base / statistics.median(each):.1f} |")


def pieces(path: Path) -> "list[bytes]":
    data = path.read_bytes()
    return [data[start : start + OBJECT_SIZE] for start in range(0, len(data), OBJECT_SIZE)]


def small_change(path: Path, folder: Path) -> None:
    store = FileStore(folder / "store")
    rows = []
    for what in ("first", "unchanged", "1 % changed", "one byte changed"):
        if what != "first":
            with path.open("rb+") as file:
                file.seek(random.Random(what).randrange(SIZE * 98 // 100))
                file.write(random.Random(what).randbytes({"1": SIZE // 100, "o": 1, "u": 0}[what[0]]))
        started = time.perf_counter()
        sent = ship(
            store, f"v-{what.split()[0]}", {"model": path}, lambda entries: json.dumps({"files": entries}).encode()
        )
        rows.append((what, sent, time.perf_counter() - started))
    print("\n| a file of 1 GiB in a folder store | bytes sent | of the file | seconds |\n|---|---|---|---|")
    for what, sent, seconds in rows:
        print(f"| {what} | {sent:,} | {100 * sent / SIZE:.4f} % | {seconds:.1f} |")


if __name__ == "__main__":
    main()
