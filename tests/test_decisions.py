"""The promotion log: one record for each number, and the champions that follow from the records."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.registry.artifact_store import FileStore
from pipeline.registry.decisions import DecisionError, Record, append, champion, champions, read_log, rolled_back

NAME = "model"
RECORD = Record(1, "promoted", "a", "a", None, "better")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


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
