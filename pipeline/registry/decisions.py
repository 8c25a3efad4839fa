"""The promotion log: who is champion, as a sequence of decisions in the artifact store.

To decide is to create the log's next record. Of several racing processes one succeeds; the others read the log again
and decide again. MLflow's aliases follow this log. A gap or an unreadable record in it is an error.
"""

import getpass
import json
import socket
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.registry.artifact_store import ArtifactStore

# promoted, refused: by the gate or a person; rollback: by a person; undecided: too few test items to tell; proposed:
# passed the gate, waits for approval; deleted: `gc` may collect its files; canary, canary-ended: only in old logs.
DECISIONS = ("promoted", "refused", "undecided", "rollback", "proposed", "canary", "canary-ended", "deleted")


class DecisionError(RuntimeError):
    """The promotion log cannot be read, or does not allow this decision; nothing changed."""


@dataclass(frozen=True)
class Record:
    """One decision of the log. `champion` is the version that serves after it."""

    number: int  # from 1, without gaps
    decision: str  # one of DECISIONS
    version: str  # the version that the decision is about
    champion: str | None
    previous: str | None  # champion before the decision
    reason: str
    comparison: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)  # the `promote` parameters of the gate
    actor: str = ""
    time: str = ""  # UTC; for people only, because clocks differ: `number` gives the order
    manifest_sha256: str = ""  # of `version`
    overruled: list[str] = field(default_factory=list)  # reasons against a promotion that was forced
    notes: list[str] = field(default_factory=list)  # what readers of the numbers must know
    proposal: int | None = None  # number of the proposal that this approval or rejection answers
    test_sha256: str = ""  # of the test items of the comparison

    @property
    def word(self) -> str:
        """The decision as people see it: `forced` if a person overruled the gate or a rejection."""
        return "forced" if self.decision == "promoted" and self.overruled else self.decision


def name_of(version: str | None, number: str | None) -> str:
    """A version's display name: `v4 (295a1c…)`, or its id if the registry has no number for it."""
    return str(version) if number is None else f"v{number} ({str(version)[:6]}…)"


def read_log(store: ArtifactStore, name: str) -> list[Record]:
    """Every decision about the model `name`, oldest first."""
    records = []
    for number, key in enumerate(store.list(f"promotions/{name}/"), start=1):
        try:
            record = Record(**json.loads(store.read(key) or b""))
            if record.decision not in DECISIONS:
                raise ValueError(f"its decision is {record.decision!r}")
        except (TypeError, ValueError) as error:
            raise DecisionError(f"{key} in {store.uri} is not a promotion record: {error}") from None
        if record.number != number or key != _key(name, number):
            raise DecisionError(f"the promotion log of {name} in {store.uri} has {key} where record {number} should be")
        records.append(record)
    return records


def append(store: ArtifactStore, name: str, record: Record) -> Record | None:
    """Add `record` to the log if its number is still free; None when another process took it first."""
    stamped = replace(
        record,
        actor=record.actor or f"{getpass.getuser()}@{socket.gethostname()}",
        time=record.time or datetime.now(UTC).isoformat(timespec="seconds"),
    )
    data = json.dumps(asdict(stamped), indent=2, ensure_ascii=False, allow_nan=False).encode()
    return stamped if store.create(_key(name, record.number), data) else None


def champion(log: list[Record]) -> str | None:
    return log[-1].champion if log else None


def champions(log: list[Record]) -> list[str]:
    """The versions that a rollback can go back to, oldest first; the last one is the champion."""
    stack: list[str] = []
    for record in log:
        if record.decision == "promoted":
            stack.append(record.version)
        elif record.decision == "rollback":
            while record.version in stack and stack[-1] != record.version:
                stack.pop()
            stack += [] if record.version in stack else [record.version]
    return [version for version in stack if version not in deleted(log)]


def rolled_back(log: list[Record]) -> set[str]:
    """Versions that a rollback removed from the champions and that have not become champion again."""
    versions: set[str] = set()
    for index, record in enumerate(log):
        if record.decision == "rollback":
            versions |= set(champions(log[:index])) - set(champions(log[: index + 1]))
        if record.champion is not None:
            versions.discard(record.champion)
    return versions


def proposed(log: list[Record]) -> Record | None:
    """The proposal that waits for approval; None if it was answered, or the champion has changed since."""
    newest = next((record for record in reversed(log) if record.decision == "proposed"), None)
    if newest is None or newest.number in {record.proposal for record in log} or newest.version in deleted(log):
        return None
    return newest if newest.previous == champion(log) else None


def deleted(log: list[Record]) -> dict[str, Record]:
    """The record of each version's deletion."""
    return {record.version: record for record in log if record.decision == "deleted"}


def refuse_deleted(log: list[Record], version: str) -> None:
    """Raise DecisionError if `version` was deleted."""
    record = deleted(log).get(version)
    if record is not None:
        raise DecisionError(
            f"version {version} was deleted by {record.actor} on {record.time} ({record.reason}); a deleted id cannot "
            "be reused. To get a new id, train again with another train.seed"
        )


def _key(name: str, number: int) -> str:
    return f"promotions/{name}/{number:08}.json"
