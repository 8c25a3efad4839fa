"""Versions as MLflow shows them: numbers, tags, a run with curves and reports, and the aliases that follow the log.

Nothing is decided here, and no file of a version is uploaded: an entry's source is the store. The promotion log
determines the aliases `champion` and `challenger`; the next command corrects them if they differ.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.registry.decisions import name_of

CACHE = WORK_DIR / "numbers.json"  # MLflow's numbers, as they were last read


class RegistryError(RuntimeError):
    """The registry does not know a version, or cannot be used."""


class ModelRegistry:
    """The entries of one model in the MLflow at `tracking_uri`."""

    def __init__(self, tracking_uri: str, name: str, root: Path = Path(".")) -> None:
        self.uri, self.name, self.root = tracking_uri, name, root

    @cached_property
    def client(self) -> Any:
        """MLflow's client, made at its first use: a registry that is down must not stop a rollback."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces each table that it makes
        uri = f"sqlite:///{self.database}" if self.database else self.uri
        with self._registry_errors():
            return MlflowClient(tracking_uri=uri, registry_uri=uri)

    @property
    def database(self) -> Path | None:
        """The registry's SQLite file; None if the registry is on a server."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (self.root / self.uri.removeprefix("sqlite:///")).resolve()

    def numbers(self) -> dict[str, str]:
        """MLflow's number of each version, by version id; of two entries of one version the lower number counts."""
        numbers = {entry.tags["version_id"]: str(entry.version) for entry in reversed(self._entries())}
        write_json(self.root / CACHE, {"registry": self.uri, "name": self.name, "numbers": numbers})
        return numbers

    def cached_name(self, version_id: str | None) -> str:
        """A version's display name, with its number as `numbers` last read it: loading MLflow takes seconds."""
        if version_id is None:
            return "none"
        cache = read_json(self.root / CACHE) if (self.root / CACHE).is_file() else {}
        same = (cache.get("registry"), cache.get("name")) == (self.uri, self.name)
        return name_of(version_id, cache["numbers"].get(version_id) if same else None)

    def id_of(self, number: str) -> str:
        """The id of the version with MLflow's `number`."""
        ids = {str(entry.version): str(entry.tags["version_id"]) for entry in self._entries()}
        if (plain := number.removeprefix("v")) in ids:
            return ids[plain]
        numbers = ", ".join(f"v{registered}" for registered in ids) or "none"
        raise RegistryError(f"{self.name} has no version {number}; it has {numbers}")

    def tags(self, version_id: str) -> dict[str, str]:
        """The version's tags in the registry; empty if it is not registered."""
        return next((dict(entry.tags) for entry in self._entries(version_id)), {})

    def register(
        self,
        version_id: str,
        source: str,  # a URI for `mlflow_plugin`
        tags: dict[str, str],
        params: dict[str, Any],
        metrics: list[tuple[str, float, int]],  # name, value and step
        reports: dict[str, str],  # file name → text
    ) -> str:
        """Create a version's entry and run; returns its number."""
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        now = int(datetime.now(UTC).timestamp() * 1000)
        points = [Metric(key, value, now, step) for key, value, step in metrics]
        with self._registry_errors():
            if self._aliases() is None:
                try:
                    self.client.create_registered_model(self.name)
                except MlflowException:
                    if self._aliases() is None:  # else another process was quicker
                        raise
            # Reports are stored next to a SQLite file; a server has its own place.
            location = (self.database.parent / "mlartifacts").as_uri() if self.database else None
            known = self.client.get_experiment_by_name(self.name)
            experiment_id = known.experiment_id if known else self.client.create_experiment(self.name, location)
            run = self.client.create_run(experiment_id, run_name=version_id, tags={"version_id": version_id})
            run_id = str(run.info.run_id)
            self.client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])
            for start in range(0, len(points), 1000):  # MLflow refuses more at once
                self.client.log_batch(run_id, metrics=points[start : start + 1000])
            for file, text in reports.items():
                self.client.log_text(run_id, text, file)
            self.client.set_terminated(run_id)
            tags = tags | {"version_id": version_id}
            entry = self.client.create_model_version(self.name, source=source, run_id=run_id, tags=tags)
            self.client.set_registered_model_alias(self.name, "challenger", entry.version)
        return self.numbers().get(version_id) or str(entry.version)

    def set_aliases(self, champion_id: str | None) -> None:
        """Make `champion` name this version; remove aliases that no longer apply."""
        with self._registry_errors():
            aliases = self._aliases()
            if aliases is None:
                return  # an empty registry; publishing fills it
            number = self.numbers().get(champion_id) if champion_id else None
            if number is not None and aliases.get("champion") != number:
                self.client.set_registered_model_alias(self.name, "champion", number)
            outdated = {"champion": number is None, "challenger": aliases.get("challenger") == number}
            for alias in [alias for alias in aliases if outdated.get(alias)]:
                self.client.delete_registered_model_alias(self.name, alias)

    def set_tag(self, version_id: str, key: str, value: str) -> None:
        """Set a tag on every entry of a version."""
        with self._registry_errors():
            for entry in self._entries(version_id):
                self.client.set_model_version_tag(self.name, entry.version, key, value)

    def delete(self, version_id: str) -> None:
        """Delete the entries of a version; its run stays, as the record of a training."""
        with self._registry_errors():
            for entry in self._entries(version_id):
                self.client.delete_model_version(self.name, entry.version)

    def _aliases(self) -> dict[str, str] | None:
        """Alias → number; None if MLflow does not know the model."""
        models = self.client.search_registered_models(f"name = '{self.name}'")
        return {alias: str(number) for alias, number in models[0].aliases.items()} if models else None

    def _entries(self, version_id: str | None = None) -> list[Any]:
        """MLflow's entries for one version or for all, sorted by number."""
        with self._registry_errors():
            entries = self.client.search_model_versions(f"name = '{self.name}'", max_results=200_000)  # the maximum
        entries = [e for e in entries if "version_id" in e.tags and version_id in (None, e.tags["version_id"])]
        return sorted(entries, key=lambda entry: int(entry.version))

    @contextmanager
    def _registry_errors(self) -> Iterator[None]:
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
