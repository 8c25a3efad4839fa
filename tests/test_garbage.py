"""Garbage collection: what is needed or young stays, whatever happens beside it."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.store import garbage
from pipeline.store.artifact_store import FileStore, StoreError
from pipeline.store.garbage import DAY_S, Garbage, GarbageError, collect, uploading
from pipeline.store.transfer import check_objects, fetch, ship
from pipeline.versions.decisions import Record, append

DIGESTS = [f"{number:064x}" for number in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def age(store: FileStore, prefix: str = "", days: float = 1.01) -> None:
    """Make what is there now look `days` old, to the store's own clock."""
    then = store.now() - days * DAY_S
    for key in store.list(prefix):
        os.utime(store.folder / key, (then, then))


def put(store: FileStore, *digests: str) -> None:
    for digest in digests:
        store.create(f"objects/{digest}", b"1234")


def test_only_old_objects_that_nothing_names_go(store: FileStore) -> None:
    put(store, *DIGESTS[:5])
    store.create("versions/v1/manifest.json", json.dumps({"files": {"f": {"sha256": DIGESTS[0]}}}).encode())
    store.create("versions/v1/signature.json", json.dumps({"predicate": [DIGESTS[1]]}).encode())
    append(store, "model", Record(1, "refused", "v9", None, None, f"see report {DIGESTS[2]}"))
    age(store)
    put(store, *DIGESTS[5:])
    before = store.list("")
    assert collect(store, delete=False) == Garbage(2, 8, 0, 8, False)
    assert store.list("") == before
    assert collect(store, delete=True) == Garbage(2, 8, 0, 8, True)
    assert store.list("objects/") == [f"objects/{digest}" for digest in DIGESTS[:3] + DIGESTS[5:]]
    assert collect(store, delete=True) == Garbage(0, 0, 0, 8, True)
    assert len(store.list("versions/")) == 2 and len(store.list("promotions/")) == 1


def test_files_of_other_programs_in_folders_of_the_same_names_stay(store: FileStore) -> None:
    theirs = ["objects/report.pdf", f"objects/{DIGESTS[0]}/part", "running/job-1", "probe/report", "backup/a"]
    for key in theirs:
        store.create(key, b"theirs")
    put(store, DIGESTS[1])
    age(store)
    found = collect(store, delete=True)
    assert (found.objects, found.kept) == (1, 0)
    assert set(theirs) <= set(store.list(""))


def test_every_extent_and_index_of_a_big_file_stays(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.transfer.OBJECT_SIZE", 2**18)
    path = tmp_path / "m"
    data = bytearray(os.urandom(2**19 + 1))
    for number in range(3):
        path.write_bytes(data)
        ship(store, f"v{number}", {"m": path}, lambda entries: json.dumps({"files": entries}).encode())
        data[0] ^= 1 + number  # the same block each time: the object that had it before is needed no more
    age(store)
    assert collect(store, delete=True).objects == 0
    store.delete("versions/v0/manifest.json")
    store.delete("versions/v1/manifest.json")
    assert collect(store, delete=True).objects > 0
    entries = json.loads(store.read("versions/v2/manifest.json") or b"")["files"]
    check_objects(store, entries)
    fetch(store, entries, tmp_path / "out")
    assert (tmp_path / "out" / "m").read_bytes() == path.read_bytes()


def test_the_stores_clock_decides_and_not_this_machines(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, DIGESTS[0])
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the year 2096
    assert collect(store, delete=True).objects == 0
    age(store)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert collect(store, delete=True).objects == 1


def test_what_killed_writers_left_goes_after_a_day(store: FileStore) -> None:
    store.create("versions/v1/manifest.json", b"{}")
    half = store.folder / "versions" / "v1" / ".manifest.json.1.partial"
    half.write_bytes(b"half")
    assert collect(store, delete=True).unfinished == 0
    os.utime(half, (0, 0))
    assert collect(store, delete=False).unfinished == 1
    assert half.exists()
    assert collect(store, delete=True).unfinished == 1
    assert not half.exists()
    age(store)
    collect(store, delete=True)
    assert len(store.list("running/")) == 2  # the last sweep's own
    assert store.list("versions/") == ["versions/v1/manifest.json"]


def test_nothing_is_swept_while_somebody_uploads(store: FileStore) -> None:
    put(store, DIGESTS[0])
    age(store)
    with uploading(store):
        assert collect(store, delete=False).objects == 1
        with pytest.raises(GarbageError, match=r"somebody uploads to file://.* \(.+@.+, since 0 minutes\)"):
            collect(store, delete=True)
        assert store.list("objects/") == [f"objects/{DIGESTS[0]}"]
    assert collect(store, delete=True).objects == 1


def test_an_upload_that_was_killed_holds_a_sweep_up_for_a_day(store: FileStore) -> None:
    put(store, DIGESTS[0])
    store.create("running/upload-1", b"{}")
    age(store, days=0.9)
    with pytest.raises(GarbageError, match=r"since 1,?\d+ minutes"):
        collect(store, delete=True)
    age(store)
    assert collect(store, delete=True).objects == 1


def test_an_upload_waits_for_a_sweep_and_not_for_a_dead_one(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(garbage, "POLL_S", 0.01)
    store.create("running/sweep-dead", b"{}")
    age(store, days=0.1)
    store.create("running/sweep-1", b"{}")
    order: list[str] = []

    def upload() -> None:
        with uploading(store):
            order.append("uploads")

    thread = threading.Thread(target=upload)
    thread.start()
    time.sleep(0.1)
    order.append("swept")
    store.create("running/sweep-1.done", b"")
    thread.join()
    assert order == ["swept", "uploads"]
    assert capsys.readouterr().err == "publish: waiting for `retune gc --delete` to end\n"


def test_a_sweep_and_an_upload_that_begin_together_never_both_go_on(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each publish relies on an old object that no manifest names, each sweep wants it; no version may lose it."""
    monkeypatch.setattr(garbage, "POLL_S", 0.001)
    path = store.folder.parent / "f"
    path.write_bytes(b"shared")
    swept = refused = 0
    for number in range(400):
        if number >= 20 and swept and refused:
            break
        ship(store, "old", {"f": path}, lambda entries: json.dumps({"files": entries}).encode())
        store.delete("versions/old/manifest.json")
        age(store, "objects/")
        outcome: list[str] = []

        def sweep(outcome: list[str] = outcome) -> None:
            try:
                outcome.append(str(collect(store, delete=True).objects))
            except GarbageError:
                outcome.append("refused")

        thread = threading.Thread(target=sweep)
        # The sweep begins ever earlier, or ever later, than the upload.
        if number % 2:
            thread.start()
            time.sleep(0.0002 * number)
        else:
            threading.Timer(0.001 * number, thread.start).start()
        ship(store, f"v{number}", {"f": path}, lambda entries: json.dumps({"files": entries}).encode())
        while not outcome:
            time.sleep(0.001)
        swept, refused = swept + (outcome[0] == "1"), refused + (outcome[0] == "refused")
        check_objects(store, json.loads(store.read(f"versions/v{number}/manifest.json") or b"")["files"])
        store.delete(f"versions/v{number}/manifest.json")
    print("swept", swept, "refused", refused)
    assert swept and refused  # both orders came about


def test_a_sweep_or_an_upload_that_takes_too_long_stops(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, DIGESTS[0])
    age(store)
    monkeypatch.setitem(garbage.LIFETIME_S, "sweep", 0)
    with pytest.raises(GarbageError, match="took too long and stopped halfway"):
        collect(store, delete=True)
    monkeypatch.setitem(garbage.LIFETIME_S, "upload", 0)
    (store.folder.parent / "f").write_bytes(b"x")
    with pytest.raises(StoreError, match="more than 12 hours; publish again"):
        ship(store, "v1", {"f": store.folder.parent / "f"}, lambda entries: b"{}")
    assert store.list("versions/") == []


def test_a_store_whose_champion_is_missing_is_not_swept(store: FileStore) -> None:
    put(store, DIGESTS[0])
    append(store, "model", Record(1, "promoted", "v1", "v1", None, ""))
    age(store)
    with pytest.raises(GarbageError, match=r"the champion of model is v1, but file://.* has no manifest of it"):
        collect(store, delete=True)
    assert store.list("objects/") == [f"objects/{DIGESTS[0]}"]
