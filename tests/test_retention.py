"""The promotion log: one record a number, champions that follow from the records; and deletion of versions."""

import json
import os
import re
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import publish_params, with_
from hypothesis import example, given, settings
from hypothesis import strategies as st
from s3_sink import Sink
from versions import parameters, promote_version, published, records

from pipeline import promote
from pipeline.params import Params
from pipeline.registry.artifact_store import FileStore, StoreError
from pipeline.registry.decisions import DecisionError, Record, append, champion, champions, read_log, rolled_back
from pipeline.registry.manifest import manifest_key, published_versions
from pipeline.registry.model import RegisteredModel
from pipeline.registry.retention import GRACE_S, Garbage, collect, delete, outdated
from pipeline.registry.stores import open_store

DIGESTS = [f"{number:064x}" for number in range(10)]


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return parameters(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def age(store: FileStore, seconds: float = GRACE_S + 60) -> None:
    """Make every file look this old, by the store's clock."""
    then = store.now() - seconds
    for key in store.list(""):
        os.utime(store.folder / key, (then, then))


def put(store: FileStore, *digests: str) -> None:
    for digest in digests:
        store.create(f"objects/{digest}", b"1234")


def test_the_champion_and_a_proposal_cannot_be_deleted(tmp_path: Path, params: Params) -> None:
    manual = with_(params, promote={"approval": "manual"})
    first, second = (published(tmp_path, manual, quality) for quality in (0.5, 0.7))
    promote_version(tmp_path, manual, first, force="the first")
    assert promote_version(tmp_path, manual, second).decision == "proposed"
    for version, error in ((first, DecisionError), (second, DecisionError), ("0" * 16, StoreError)):
        with pytest.raises(error, match=version[:6]):
            delete(manual.publish, version, "room", tmp_path)
    assert len(published_versions(open_store(manual.publish))) == 2


def test_a_deletion_cannot_be_undone_and_an_interrupted_one_is_finished(tmp_path: Path, params: Params) -> None:
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    promote_version(tmp_path, params, first)
    promote_version(tmp_path, params, second)
    manifest = tmp_path / "store" / manifest_key(first)
    data = manifest.read_bytes()
    assert delete(params.publish, "v1", "room", tmp_path).version == first
    assert RegisteredModel(params.publish, tmp_path).registry.numbers() == {second: "2"}
    with pytest.raises(DecisionError):
        promote.rollback(params, root=tmp_path)
    manifest.write_bytes(data)  # as if the deletion had been killed after its record
    assert outdated(params.publish, tmp_path) == [first]
    assert delete(params.publish, first, "again", tmp_path).reason == "room"
    assert not manifest.exists()
    assert [record["decision"] for record in records(tmp_path)] == ["promoted", "promoted", "deleted"]


def test_the_policy_keeps_the_newest_and_the_last_champions(tmp_path: Path, params: Params) -> None:
    params = with_(params, publish={"keep_versions": 1, "keep_champions": 2})
    versions = [published(tmp_path, params, 0.30 + 0.05 * i) for i in range(6)]
    for index in (0, 2, 3):
        promote_version(tmp_path, params, versions[index])
    unregistered = published(tmp_path, params, 0.9, registered=False)
    assert outdated(params.publish, tmp_path) == [versions[0], versions[1], versions[4]]
    assert outdated(with_(params, publish={"keep_versions": None}).publish, tmp_path) == []
    for version in outdated(params.publish, tmp_path):
        delete(params.publish, version, "old", tmp_path)
    assert outdated(params.publish, tmp_path) == []
    kept = {versions[2], versions[3], versions[5], unregistered}
    assert set(published_versions(open_store(params.publish))) == kept


def test_gc_deletes_only_old_objects_that_nothing_names_and_no_foreign_files(store: FileStore) -> None:
    put(store, *DIGESTS[:6])
    for key in ("objects/report.pdf", f"objects/{DIGESTS[9]}/part", "probe/report", "backup/a"):
        store.create(key, b"theirs")
    files = {"f": {"sha256": DIGESTS[0]}, "g": {"sha256": DIGESTS[3]}}
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


def test_the_seven_days_are_by_the_stores_clock_not_by_this_machines(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("versions/v1/manifest.json", b"{}")
    put(store, DIGESTS[0])
    half = store.folder / "versions" / "v1" / ".manifest.json.1.partial"
    half.write_bytes(b"half")  # left by a killed writer
    for seconds, now, deleted in ((GRACE_S - 60, 4e9, 0), (GRACE_S + 60, 0.0, 1)):
        age(store, seconds)
        os.utime(half, (store.now() - seconds,) * 2)
        monkeypatch.setattr(time, "time", lambda now=now: now)  # the year 2096, or 1970
        counts = [(g.objects, g.unfinished) for g in (collect(store, delete) for delete in (False, True, True))]
        assert counts == [(deleted, deleted), (deleted, deleted), (0, 0)]
        assert (len(store.list("objects/")), half.exists()) == (1 - deleted, not deleted)
    assert store.list("versions/") == ["versions/v1/manifest.json"]


def test_gc_in_a_bucket_deletes_only_old_objects_below_the_prefix(s3: str) -> None:
    """On a real server everything that a test writes is new; `Sink` gives every object the date 2026-01-01."""
    store = open_store(publish_params(f"s3://retune/{uuid.uuid4().hex}", endpoint_url=s3, addressing_style="path"))
    store.create(f"objects/{DIGESTS[0]}", b"young")
    assert collect(store, delete=True) == Garbage(0, 0, 0, 1, True)
    sink = Sink()
    sink.sizes = {f"{prefix}objects/{DIGESTS[0]}": 4 for prefix in ("", "x/", "xy/")} | {"x/objects/report": 4}
    with sink.running() as endpoint:
        store = open_store(publish_params("s3://retune/x", endpoint_url=endpoint, addressing_style="path"))
        assert collect(store, delete=True) == Garbage(1, 4, 0, 0, True)
    assert set(sink.sizes) == {f"objects/{DIGESTS[0]}", f"xy/objects/{DIGESTS[0]}", "x/objects/report"}


def test_gc_refuses_a_store_without_the_champions_manifest(store: FileStore) -> None:
    put(store, DIGESTS[0])
    append(store, "model", Record(1, "promoted", "v1", "v1", None, ""))
    age(store)
    with pytest.raises(StoreError, match="v1"):
        collect(store, delete=True)
    assert store.list("objects/") == [f"objects/{DIGESTS[0]}"]


NAME = "model"
RECORD = Record(1, "promoted", "a", "a", None, "better")


def test_records_are_read_as_appended_each_number_is_used_once_and_logs_are_separate(store: FileStore) -> None:
    assert (read_log(store, NAME), champion([]), champions([])) == ([], None, [])
    record = replace(RECORD, reason="比较好", comparison={"bleu": {"passed": True}}, actor="me", time="now")
    assert append(store, NAME, record) == record
    assert not append(store, NAME, replace(RECORD, version="b", champion="b"))
    append(store, NAME, replace(RECORD, number=2))
    append(store, "model2", replace(RECORD, version="b", champion="b"))
    first, second = read_log(store, NAME)
    assert first == record
    assert "@" in second.actor and second.time.endswith("+00:00")
    assert [[record.version for record in read_log(store, name)] for name in ("model2", "mode")] == [["b"], []]


def test_decisions_of_removed_commands_are_read(store: FileStore) -> None:
    for number, decision in enumerate(("canary", "canary-ended"), start=1):
        append(store, NAME, replace(RECORD, number=number, decision=decision))
    assert [record.decision for record in read_log(store, NAME)] == ["canary", "canary-ended"]


@pytest.mark.parametrize(
    "change",
    [
        *(b"", b"{", b"\xff", b"[]", b'{"number": 2}'),
        *(json.dumps(vars(RECORD) | more).encode() for more in (
            {"number": 3}, {"number": 2, "decision": "blessed"}, {"number": 2, "mood": "good"},
        )),
        None,
    ],
)  # fmt: skip
def test_an_invalid_or_missing_record_is_refused_by_name(store: FileStore, change: bytes | None) -> None:
    for number in (1, 2, 3):
        append(store, NAME, replace(RECORD, number=number))
    path = store.folder / "promotions" / NAME / "00000002.json"
    path.write_bytes(change) if change is not None else path.unlink()
    named = "00000003.json where record 2 should" if change is None else "promotions/model/00000002.json"
    with pytest.raises(DecisionError, match=re.escape(named)):
        read_log(store, NAME)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["promoted", "refused", "back", "to"]), st.integers(0, 2)), max_size=12))
@example([("promoted", 0), ("promoted", 1), ("promoted", 0), ("promoted", 2), ("back", 0)])
def test_champions_are_a_stack_of_promotions(steps: list[tuple[str, int]]) -> None:
    stack: list[str] = []
    log: list[Record] = []
    for decision, which in steps:
        version = "abc"[which]
        if decision == "promoted" and stack[-1:] != [version]:
            stack.append(version)
        elif decision == "back" and len(stack) > 1:
            stack.pop()
            decision, version = "rollback", stack[-1]
        elif decision == "to" and version in {r.champion for r in log} and stack[-1] != version:
            while version in stack and stack[-1] != version:
                stack.pop()
            stack += [] if version in stack else [version]
            decision = "rollback"
        elif decision != "refused":
            continue
        serving = champion(log)
        log.append(Record(len(log) + 1, decision, version, stack[-1] if stack else None, serving, ""))
        assert champions(log) == stack
        assert champion(log) == (stack[-1] if stack else None)


def test_a_version_counts_as_rolled_back_until_it_is_champion_again() -> None:
    steps = [("promoted", "a"), ("promoted", "b"), ("promoted", "c"), ("rollback", "a"), ("rollback", "c")]
    serving = [None, *(version for _, version in steps)]
    log = [Record(i + 1, decision, version, version, serving[i], "") for i, (decision, version) in enumerate(steps)]
    assert [rolled_back(log[:number]) for number in (3, 4, 5)] == [set(), {"b", "c"}, {"b"}]
