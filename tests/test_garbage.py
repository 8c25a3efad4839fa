"""Garbage collection: what is needed or young stays."""

import json
import os
import time
import uuid
from pathlib import Path

import pytest
from conftest import publish_params
from s3_sink import Sink

from pipeline.registry.artifact_store import FileStore, open_store
from pipeline.registry.decisions import Record, append
from pipeline.registry.garbage import GRACE_S, Garbage, GarbageError, collect

DIGESTS = [f"{number:064x}" for number in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def age(store: FileStore, seconds: float = GRACE_S + 60) -> None:
    """Make what is there now look this old, by the store's own clock."""
    then = store.now() - seconds
    for key in store.list(""):
        os.utime(store.folder / key, (then, then))


def put(store: FileStore, *digests: str) -> None:
    for digest in digests:
        store.create(f"objects/{digest}", b"1234")


def test_only_old_objects_that_nothing_names_go_and_what_others_have_in_such_folders_stays(store: FileStore) -> None:
    put(store, *DIGESTS[:6])
    theirs = ["objects/report.pdf", f"objects/{DIGESTS[9]}/part", "probe/report", "backup/a"]
    for key in theirs:
        store.create(key, b"theirs")
    files = {"f": {"sha256": DIGESTS[0]}, "chunked": {"sha256": DIGESTS[8], "chunks": [{"sha256": DIGESTS[3]}]}}
    store.create("versions/v1/manifest.json", json.dumps({"files": files}).encode())
    store.create("versions/v1/signature.json", json.dumps({"predicate": [DIGESTS[1]]}).encode())
    append(store, "model", Record(1, "refused", "v9", None, None, f"see report {DIGESTS[2]}"))
    age(store)
    put(store, *DIGESTS[6:8])
    before = store.list("")
    assert collect(store, delete=False) == Garbage(2, 8, 0, 6, False)
    assert store.list("") == before
    assert collect(store, delete=True) == Garbage(2, 8, 0, 6, True)
    assert set(before) - set(store.list("")) == {f"objects/{digest}" for digest in DIGESTS[4:6]}
    assert collect(store, delete=True) == Garbage(0, 0, 0, 6, True)


@pytest.mark.parametrize(("seconds", "swept"), [(0, 0), (GRACE_S - 60, 0), (GRACE_S + 60, 1)])
def test_an_object_has_seven_days_by_the_stores_clock_and_not_by_this_machines(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, seconds: float, swept: int
) -> None:
    put(store, DIGESTS[0])
    age(store, seconds)
    monkeypatch.setattr(time, "time", lambda: 4e9 if not swept else 0.0)  # the year 2096, or 1970
    assert collect(store, delete=True).objects == swept
    assert len(store.list("objects/")) == 1 - swept


def test_what_killed_writers_left_goes_after_seven_days(store: FileStore) -> None:
    store.create("versions/v1/manifest.json", b"{}")
    half = store.folder / "versions" / "v1" / ".manifest.json.1.partial"
    half.write_bytes(b"half")
    assert collect(store, delete=True).unfinished == 0
    os.utime(half, (0, 0))
    assert collect(store, delete=False).unfinished == 1
    assert half.exists()
    assert collect(store, delete=True).unfinished == 1
    assert not half.exists()
    assert store.list("versions/") == ["versions/v1/manifest.json"]


def test_of_a_bucket_only_old_objects_below_the_prefix_go(s3: str) -> None:
    """On a real server whatever a test writes is young; one that dates all of 2026-01-01 has old ones."""
    prefix = uuid.uuid4().hex
    params = publish_params(f"s3://retune/{prefix}", endpoint_url=s3, addressing_style="path")
    store = open_store(params)
    store.create(f"objects/{DIGESTS[0]}", b"young")
    assert collect(store, delete=True) == Garbage(0, 0, 0, 1, True)
    sink = Sink()
    sink.sizes = {f"{place}objects/{DIGESTS[0]}": 4 for place in ("", "x/", "xy/")} | {"x/objects/report": 4}
    with sink.running() as endpoint:
        store = open_store(publish_params("s3://retune/x", endpoint_url=endpoint, addressing_style="path"))
        assert collect(store, delete=True) == Garbage(1, 4, 0, 0, True)
    assert set(sink.sizes) == {f"objects/{DIGESTS[0]}", f"xy/objects/{DIGESTS[0]}", "x/objects/report"}


def test_a_store_whose_champion_is_missing_is_not_swept(store: FileStore) -> None:
    put(store, DIGESTS[0])
    append(store, "model", Record(1, "promoted", "v1", "v1", None, ""))
    age(store)
    with pytest.raises(GarbageError, match="v1"):
        collect(store, delete=True)
    assert store.list("objects/") == [f"objects/{DIGESTS[0]}"]
