"""The promotion log decides, one record a number."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import environment, publish_params
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.registry.artifact_store import ArtifactStore, open_store
from pipeline.registry.decisions import (
    DecisionError,
    Record,
    append,
    champion,
    champions,
    read_log,
    rolled_back,
)

NAME = "model"
RECORD = Record(1, "promoted", "a", "a", None, "better")
RACE = """
import sys
from pathlib import Path
from pipeline.registry.decisions import Record, append, read_log
from pipeline.registry.artifact_store import FileStore
store, me, done = FileStore(Path(sys.argv[1])), sys.argv[2], 0
print("ready", flush=True)
sys.stdin.readline()
while done < 10:
    number = len(read_log(store, "model")) + 1
    if append(store, "model", Record(number, "promoted", me, me, None, "")):
        print(number, flush=True)
        done += 1
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(publish_params((tmp_path / "store").as_uri()))


def log_file(tmp_path: Path, number: int) -> Path:
    return tmp_path / "store" / "promotions" / NAME / f"{number:08}.json"


def fill(store: ArtifactStore, number: int) -> None:
    for i in range(1, number + 1):
        assert append(store, NAME, replace(RECORD, number=i))


def test_a_record_is_read_as_it_was_appended(store: ArtifactStore) -> None:
    record = replace(RECORD, reason="比较好", comparison={"bleu": {"passed": True}}, actor="me", time="now")
    assert append(store, NAME, record)
    assert read_log(store, NAME) == [record]


def test_a_record_says_who_and_when(store: ArtifactStore) -> None:
    append(store, NAME, RECORD)
    [record] = read_log(store, NAME)
    assert "@" in record.actor
    assert record.time.endswith("+00:00")


def test_a_number_is_taken_once(store: ArtifactStore) -> None:
    assert append(store, NAME, RECORD)
    assert not append(store, NAME, replace(RECORD, version="b", champion="b"))
    assert [record.version for record in read_log(store, NAME)] == ["a"]


def test_racing_promoters_share_one_log_without_gaps(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([*command, str(me)], env=environment(), **pipes) for me in range(4)]  # type: ignore[call-overload]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = {int(line): str(me) for me, racer in enumerate(racers) for line in racer.communicate()[0].splitlines()}
    log = read_log(open_store(publish_params((tmp_path / "store").as_uri())), NAME)
    assert [record.number for record in log] == list(range(1, 41))
    assert {record.number: record.version for record in log} == wins


def test_the_logs_of_two_models_are_apart(store: ArtifactStore) -> None:
    append(store, "model", RECORD)
    append(store, "model2", replace(RECORD, version="b", champion="b"))
    assert [record.version for record in read_log(store, "model")] == ["a"]
    assert [record.version for record in read_log(store, "model2")] == ["b"]
    assert read_log(store, "mode") == []


@pytest.mark.parametrize("lost", [1, 2])
def test_a_gap_in_the_log_is_refused(store: ArtifactStore, tmp_path: Path, lost: int) -> None:
    fill(store, 3)
    log_file(tmp_path, lost).unlink()
    with pytest.raises(DecisionError, match=rf"log of model in .* has .*{lost + 1}\.json where record {lost} should"):
        read_log(store, NAME)


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"number": 2}',
        json.dumps(vars(RECORD) | {"number": 3}).encode(),
        json.dumps(vars(RECORD) | {"number": 2, "decision": "blessed"}).encode(),
        json.dumps(vars(RECORD) | {"number": 2, "mood": "good"}).encode(),
    ],
)
def test_a_record_that_is_none_is_refused_by_name(store: ArtifactStore, tmp_path: Path, change: bytes) -> None:
    fill(store, 2)
    log_file(tmp_path, 2).write_bytes(change)
    with pytest.raises(DecisionError, match=r"promotions/model/00000002\.json"):
        read_log(store, NAME)


@settings(derandomize=True, deadline=None, max_examples=300)
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


def test_an_empty_log_has_no_champion(store: ArtifactStore) -> None:
    assert read_log(store, NAME) == []
    assert champion([]) is None
    assert champions([]) == []


def test_a_version_that_a_rollback_took_back_stays_named_until_it_serves_again() -> None:
    def record(number: int, decision: str, version: str, serving: str, previous: str | None) -> Record:
        return Record(number, decision, version, serving, previous, "")

    log = [
        record(1, "promoted", "a", "a", None),
        record(2, "promoted", "b", "b", "a"),
        record(3, "promoted", "c", "c", "b"),
        record(4, "rollback", "a", "a", "c"),
    ]
    assert rolled_back(log) == {"b", "c"}
    assert rolled_back([*log, record(5, "rollback", "c", "c", "a")]) == {"b"}
    assert rolled_back(log[:3]) == set()
