"""Versions as MLflow shows them: numbers, tags, a run with curves and reports, and the aliases that follow the log.

Nothing is decided here and no file of a version is uploaded: an entry's source is the store, the aliases `champion`
and `challenger` are projections of the promotion log, put right by whoever looks next.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.decisions import PromoteError, champion, name_of, read_log


class RegistryError(RuntimeError):
    """A version that is not there, or a registry that cannot be reached."""


@dataclass(frozen=True)
class Registration:
    """What MLflow is told of a version."""

    version: str  # content id
    source: str  # where `retune`'s plugin for MLflow finds the files
    tags: dict[str, str]
    params: dict[str, Any]
    metrics: dict[str, float]
    curve: list[tuple[str, float, int]]  # name, value, step
    reports: dict[str, str]  # file name → text


def open_registry(params: PublishParams, root: Path = Path(".")) -> "ModelRegistry":
    """The registry of publish.tracking_uri, for the model publish.registered_model_name."""
    return ModelRegistry(params.tracking_uri, params.registered_model_name, root)


class ModelRegistry:
    """The MLflow side: registered versions with their tags, and the aliases."""

    def __init__(self, tracking_uri: str, name: str, root: Path = Path(".")) -> None:
        self.uri, self.name, self.root = tracking_uri, name, root

    @cached_property
    def client(self) -> Any:
        """MLflow's own client, made at its first use: a registry that is down must not stop a rollback."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces each table that it makes
        uri = self.uri
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{(self.root / uri.removeprefix('sqlite:///')).resolve()}"
        with self._reached():
            return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def version_of(self, version_id: str) -> str | None:
        """MLflow's number of a published version, or None."""
        with self._reached():
            found = self.client.search_model_versions(f"name = '{self.name}' and tags.version_id = '{version_id}'")
        return min((str(v.version) for v in found), key=int, default=None)

    def numbers(self) -> dict[str, str]:
        """MLflow's number of every version, by version id."""
        numbers: dict[str, str] = {}
        for version in self._versions():
            known = numbers.setdefault(version.tags["version_id"], str(version.version))
            numbers[version.tags["version_id"]] = min(known, str(version.version), key=int)
        write_json(self._remembered, {"registry": self.uri, "name": self.name, "numbers": numbers})
        return numbers

    def remembered(self, version_id: str) -> str:
        """As `label`, by the numbers that `numbers` found last; asks nobody, since loading MLflow takes seconds."""
        kept = read_json(self._remembered) if self._remembered.is_file() else {}
        same = (kept.get("registry"), kept.get("name")) == (self.uri, self.name)
        return name_of(version_id, kept["numbers"].get(version_id) if same else None)

    @property
    def _remembered(self) -> Path:
        return self.root / WORK_DIR / "numbers.json"

    def label(self, version_id: str | None) -> str:
        """How people call a version; by its id alone while the registry has no number for it or cannot be reached."""
        try:
            return name_of(version_id, self.version_of(version_id) if version_id else None)
        except RegistryError:
            return str(version_id)

    def id_of(self, number: str) -> str:
        """The published version behind MLflow's `number`.

        Raises:
            RegistryError: there is none.
        """
        found = self._versions()
        for version in found:
            if str(version.version) == number.removeprefix("v"):
                return str(version.tags["version_id"])
        known = ", ".join(f"v{number}" for number in sorted(int(v.version) for v in found)) or "none"
        raise RegistryError(f"{self.name} has no version {number}; it has {known}")

    def tags(self, version_id: str) -> dict[str, str] | None:
        """What the registry says of a version, or None where it does not know it."""
        number = self.version_of(version_id)
        if number is None:
            return None
        with self._reached():
            return dict(self.client.get_model_version(self.name, number).tags)

    def register(self, version: Registration) -> str:
        """Make the entry of a version with its run (parameters, metrics, curves, reports); returns its number.

        Two publishers of one version may both make an entry; the lower number counts.
        """
        from mlflow.exceptions import MlflowException

        with self._reached():
            try:
                self.client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            run_id = self._log_run(version)
            made = self.client.create_model_version(
                self.name, source=version.source, run_id=run_id, tags=version.tags | {"version_id": version.version}
            )
            self.client.set_registered_model_alias(self.name, "challenger", made.version)
        return self.version_of(version.version) or str(made.version)

    def project(self, champion_id: str | None) -> None:
        """Make the aliases say what the promotion log says."""
        from mlflow.exceptions import MlflowException

        with self._reached():
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
            elif str(aliases.get("champion")) != number:
                self.client.set_registered_model_alias(self.name, "champion", number)
            if "challenger" in aliases and str(aliases["challenger"]) == number:
                self.client.delete_registered_model_alias(self.name, "challenger")

    def mark(self, version_id: str, tags: dict[str, str]) -> None:
        """Set tags on every entry of a version."""
        with self._reached():
            for version in self._versions():
                if version.tags["version_id"] == version_id:
                    for key, value in tags.items():
                        self.client.set_model_version_tag(self.name, version.version, key, value)

    def forget(self, version_id: str) -> None:
        """Delete the entries of a version; its run stays, as the record of a training."""
        with self._reached():
            for version in self._versions():
                if version.tags["version_id"] == version_id:
                    self.client.delete_model_version(self.name, version.version)

    def _versions(self) -> list[Any]:
        found: list[Any] = []
        token: str | None = None
        with self._reached():
            while token is None or token:
                page = self.client.search_model_versions(f"name = '{self.name}'", page_token=token)
                found += [version for version in page if "version_id" in version.tags]
                token = page.token or ""
        return found

    def _log_run(self, version: Registration) -> str:
        from mlflow.entities import Metric, Param

        experiment = self.client.get_experiment_by_name(self.name)
        if experiment is None:
            experiment_id = self.client.create_experiment(self.name, artifact_location=self._artifacts())
        else:
            experiment_id = experiment.experiment_id
        made = self.client.create_run(experiment_id, run_name=version.version, tags={"version_id": version.version})
        now = int(datetime.now(UTC).timestamp() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in version.metrics.items()]
        metrics += [Metric(key, value, now, step) for key, value, step in version.curve]
        params = [Param(key, str(value)[:500]) for key, value in version.params.items()]
        self.client.log_batch(made.info.run_id, params=params)
        for start in range(0, len(metrics), 1000):  # more at once are refused
            self.client.log_batch(made.info.run_id, metrics=metrics[start : start + 1000])
        for file, text in version.reports.items():
            self.client.log_text(made.info.run_id, text, file)
        self.client.set_terminated(made.info.run_id)
        return str(made.info.run_id)

    def _artifacts(self) -> str | None:
        """Where runs keep their reports: beside a SQLite file, else where the server says."""
        if not self.uri.startswith("sqlite:///"):
            return None
        database = self.root / unquote(self.uri.removeprefix("sqlite:///"))
        return (database.resolve().parent / "mlartifacts").as_uri()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            parsed = urlparse(self.uri)
            where = f"{parsed.scheme}://{parsed.hostname}" if parsed.hostname else self.uri
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise RegistryError(f"the registry {where} (publish.tracking_uri) could not be used: {reason}") from error


def resolve(version: str | None, store: ArtifactStore, registry: ModelRegistry, name: str, root: Path) -> str:
    """The content id of a version named by number (3 or v3), id, or `champion`; None: the workspace's.

    Raises:
        RegistryError: the registry has no such number.
        PromoteError: there is no champion.
    """
    if version is None:
        return graph.version_id(root)
    if version == "champion":
        serving = champion(read_log(store, name))
        if serving is None:
            raise PromoteError(f"{name} has no champion yet")
        return serving
    return registry.id_of(version) if version.removeprefix("v").isdigit() and len(version) < 10 else version
