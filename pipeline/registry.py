"""Versions and who is champion: MLflow holds the versions, the promotion log decides.

MLflow's aliases have no compare-and-swap: two promoters can both set `champion`. So a promotion is the creation of the
next record of an append-only log in the artifact store, which exactly one of several racing promoters achieves; the
alias is a projection of the log, put right by whoever looks next.
"""

import getpass
import json
import logging
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.store import ArtifactStore

DECISIONS = ("promoted", "refused", "rollback")


class RegistryError(RuntimeError):
    """A version or champion that is not there, or a log that cannot be read."""


@dataclass(frozen=True)
class Record:
    """One decision of the log. `champion` is the version that serves after it."""

    number: int  # from 1, without gaps
    decision: str  # promoted | refused | rollback
    version: str  # what was decided on
    champion: str | None
    previous: str | None  # champion before
    reason: str
    comparison: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)  # the `promote` parameters that it was decided by
    actor: str = ""
    time: str = ""  # UTC; for people: order is `number` alone


def read_log(store: ArtifactStore, name: str) -> list[Record]:
    """Every decision about the model `name`, oldest first.

    Raises:
        RegistryError: a record is missing from the sequence or cannot be read.
    """
    records = []
    for number, key in enumerate(store.list(f"promotions/{name}/"), start=1):
        try:
            record = Record(**json.loads(store.read(key) or b""))
            if record.decision not in DECISIONS:
                raise ValueError(f"its decision is {record.decision!r}")
        except (TypeError, ValueError) as error:
            raise RegistryError(f"{key} in {store.uri} is no promotion record: {error}") from None
        if record.number != number or key != _key(name, number):
            raise RegistryError(f"the promotion log of {name} in {store.uri} has {key} where record {number} should be")
        records.append(record)
    return records


def append(store: ArtifactStore, name: str, record: Record) -> bool:
    """Add `record` to the log if its number is still free; False when another process took it first."""
    stamped = asdict(record) | {
        "actor": record.actor or f"{getpass.getuser()}@{socket.gethostname()}",
        "time": record.time or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return store.create(_key(name, record.number), json.dumps(stamped, indent=2, ensure_ascii=False).encode())


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
    return line


def rolled_back(log: list[Record]) -> set[str]:
    """Versions that a rollback took back and no later decision made champion again."""
    back: set[str] = set()
    for number, record in enumerate(log):
        if record.decision == "rollback":
            back |= set(champions(log[:number])) - set(champions(log[: number + 1]))
        if record.champion is not None:
            back.discard(record.champion)
    return back


def _key(name: str, number: int) -> str:
    return f"promotions/{name}/{number:08}.json"


class ModelRegistry:
    """The MLflow side: registered versions with their tags, and the `champion` and `challenger` aliases."""

    def __init__(self, tracking_uri: str, name: str) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces each table that it makes
        self.client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        self.name = name

    def version_of(self, version_id: str) -> str | None:
        """MLflow's number of a published version, or None."""
        found = self.client.search_model_versions(f"name = '{self.name}' and tags.version_id = '{version_id}'")
        return min((str(v.version) for v in found), key=int, default=None)

    def id_of(self, number: str) -> str:
        """The published version behind MLflow's `number`.

        Raises:
            RegistryError: there is none.
        """
        found = self.client.search_model_versions(f"name = '{self.name}'")
        for version in found:
            if str(version.version) == number.removeprefix("v"):
                return str(version.tags["version_id"])
        known = ", ".join(sorted((str(v.version) for v in found), key=int)) or "none"
        raise RegistryError(f"{self.name} has no version {number}; it has {known}")

    def register(self, version_id: str, source: str, tags: dict[str, str], run: dict[str, Any]) -> str:
        """Make a version with its run (parameters, metrics, loss curve), or find it: one for each `version_id`."""
        from mlflow.exceptions import MlflowException

        existing = self.version_of(version_id)
        if existing is not None:
            return existing
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        run_id = self._log_run(version_id, run)
        made = self.client.create_model_version(
            self.name, source=source, run_id=run_id, tags=tags | {"version_id": version_id}
        )
        self.client.set_registered_model_alias(self.name, "challenger", made.version)
        return str(made.version)

    def project(self, champion_id: str | None) -> None:
        """Make the aliases say what the promotion log says."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return  # a new registry beside an old log: publish fills it, the log decides all the same
        number = self.version_of(champion_id) if champion_id else None
        if number is None:
            if "champion" in aliases:
                self.client.delete_registered_model_alias(self.name, "champion")
            return
        if str(aliases.get("champion")) != number:
            self.client.set_registered_model_alias(self.name, "champion", number)
        if str(aliases.get("challenger")) == number:
            self.client.delete_registered_model_alias(self.name, "challenger")

    def _log_run(self, version_id: str, run: dict[str, Any]) -> str:
        from mlflow.entities import Metric, Param

        experiment = self.client.get_experiment_by_name(self.name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(self.name)
        made = self.client.create_run(experiment_id, run_name=version_id, tags={"version_id": version_id})
        now = int(datetime.now(UTC).timestamp() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in run["metrics"].items()]
        metrics += [Metric(key, value, now, step) for key, value, step in run["curve"]]
        self.client.log_batch(
            made.info.run_id, metrics=metrics, params=[Param(key, str(value)) for key, value in run["params"].items()]
        )
        self.client.set_terminated(made.info.run_id)
        return str(made.info.run_id)
