"""The promotion log: who is champion, as a sequence of decisions in the artifact store.

A decision is the creation of the log's next record, which exactly one of several racing processes achieves; whoever
loses reads the log again and decides anew. Everything else that names a champion (MLflow's aliases) follows this log.
A log with a gap, or with a record that cannot be read, is an error.
"""

import getpass
import json
import socket
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.registry.artifact_store import ArtifactStore

# promoted, refused, rollback: by the gate or by a person; undecided: too few test items to tell; proposed: passed the
# gate and waits for approval; deleted: for good, its files may be collected; canary, canary-ended: only in old logs.
DECISIONS = ("promoted", "refused", "undecided", "rollback", "proposed", "canary", "canary-ended", "deleted")


class DecisionError(RuntimeError):
    """The promotion log cannot be read, or does not allow what was asked for; nothing changed."""


@dataclass(frozen=True)
class Record:
    """One decision of the log. `champion` is the version that serves after it."""

    number: int  # from 1, without gaps
    decision: str  # one of DECISIONS
    version: str  # what was decided on
    champion: str | None
    previous: str | None  # champion before
    reason: str
    comparison: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)  # the `promote` parameters that it was decided by
    actor: str = ""
    time: str = ""  # UTC; for people: order is `number` alone
    manifest_sha256: str = ""  # of the version decided on
    overruled: list[str] = field(default_factory=list)  # what spoke against a forced promotion
    notes: list[str] = field(default_factory=list)  # what a reader of the numbers must know
    proposal: int | None = None  # record that this approval or rejection answers
    test_sha256: str = ""  # of the test items that were compared on

    @property
    def word(self) -> str:
        """What people call the decision: `forced` where a person overruled the gate."""
        return "forced" if self.decision == "promoted" and self.overruled else self.decision


def name_of(version: str | None, number: str | None) -> str:
    """What people call a version: `v4 (295a1c…)`, or its id while the registry has no number for it."""
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
    line: list[str] = []
    for record in log:
        if record.decision == "promoted":
            line.append(record.version)
        elif record.decision == "rollback":
            while record.version in line and line[-1] != record.version:
                line.pop()
            line += [] if record.version in line else [record.version]
    return [version for version in line if version not in deleted(log)]


def rolled_back(log: list[Record]) -> set[str]:
    """Versions that a rollback took back and no later decision made champion again."""
    back: set[str] = set()
    for number, record in enumerate(log):
        if record.decision == "rollback":
            back |= set(champions(log[:number])) - set(champions(log[: number + 1]))
        if record.champion is not None:
            back.discard(record.champion)
    return back


def proposed(log: list[Record]) -> Record | None:
    """The newest version that waits for approval, if the champion that it was compared with still serves."""
    newest = next((record for record in reversed(log) if record.decision == "proposed"), None)
    if newest is None or newest.number in {record.proposal for record in log} or newest.version in deleted(log):
        return None
    return newest if newest.previous == champion(log) else None


def deleted(log: list[Record]) -> dict[str, Record]:
    """The versions that were deleted, each with the record that says so."""
    return {record.version: record for record in log if record.decision == "deleted"}


def refuse_deleted(log: list[Record], version: str) -> None:
    """Raise DecisionError if `version` was deleted, which is for good."""
    record = deleted(log).get(version)
    if record is not None:
        raise DecisionError(
            f"version {version} was deleted by {record.actor} on {record.time} ({record.reason}); a deleted id cannot "
            "be reused. Another value of train.seed trains the same model under a new one"
        )


def _key(name: str, number: int) -> str:
    return f"promotions/{name}/{number:08}.json"
