"""One registered model: its versions in the artifact store, its promotion log, and its entries in MLflow."""

import csv
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.params import PublishParams
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import ArtifactStore, StoreError
from pipeline.registry.decisions import DecisionError, Record, append, champion, name_of, read_log
from pipeline.registry.manifest import Manifest, read_manifest, require_manifest
from pipeline.registry.mlflow import ModelRegistry, RegistryError
from pipeline.registry.signature import read_signature, require_signed
from pipeline.registry.stores import fetch, open_store
from pipeline.scoring.resampling import METRICS

SYNCED = WORK_DIR / "aliases.json"  # the state of log and registry when the aliases were last set
CURVES = ("loss", "validation_loss", "learning_rate", "grad_norm", "weight_change")


class RegisteredModel:
    """The model `publish.registered_model_name`. Store and registry are opened at their first use."""

    def __init__(self, params: PublishParams, root: Path = Path(".")) -> None:
        self.params, self.root, self.name = params, root, params.registered_model_name
        self.registry = ModelRegistry(params.tracking_uri, self.name, root)

    @cached_property
    def store(self) -> ArtifactStore:
        return open_store(self.params, self.root)

    def log(self) -> list[Record]:
        return read_log(self.store, self.name)

    def champion(self) -> str | None:
        return champion(self.log())

    def append_decision(self, make_record: Callable[[list[Record]], Record]) -> Record:
        """Append the record that `make_record` makes from the log, again if another process was faster.

        A record whose number is 0 or already in the log is returned without being appended.
        """
        while True:
            log = self.log()
            record = make_record(log)
            if record.number <= len(log):
                return record
            if appended := append(self.store, self.name, record):
                return appended

    def find(self, version: str | None) -> str:
        """The id of the version named by a number (3 or v3), an id or `champion`; None: that of the workspace."""
        if version is None:
            return graph.version_id(self.root)
        if version == "champion":
            serving = self.champion()
            if serving is None:
                raise DecisionError(f"{self.name} has no champion yet")
            return serving
        return self.registry.id_of(version) if version.removeprefix("v").isdigit() and len(version) < 10 else version

    def manifest(self, version: str) -> Manifest:
        """Raises StoreError: the version is not published, or its manifest was altered."""
        return require_manifest(self.store, version)

    def label(self, version: str | None) -> str:
        """A version's display name; its id if the registry has no number for it or cannot be reached."""
        try:
            return name_of(version, self.registry.numbers().get(version) if version else None)
        except RegistryError:
            return str(version)

    def folder(self, version: str) -> Path:
        """The folder for files and scores of a version on this machine."""
        return self.root / WORK_DIR / "versions" / version

    def fetch(self, manifest: Manifest, part: str) -> Path:
        """The folder of one part (adapter, merged, evaluation, parity), downloaded if necessary, with files checked."""
        folder = self.folder(manifest["version"])
        fetch(self.store, manifest, [name for name in manifest["files"] if name.startswith(f"{part}/")], folder)
        return folder / part

    def fetch_signed(self, manifest: Manifest, part: str) -> Path:
        """Like `fetch`, for files to be loaded as a model. Raises SignatureError: they must be signed, and are not."""
        require_signed(self.store, manifest, self.params)
        return self.fetch(manifest, part)

    def register(self, manifest: Manifest) -> str:
        """The version's MLflow number; registers it after versions with earlier decisions, so clones number alike."""
        numbers, version = self.registry.numbers(), manifest["version"]
        if version in numbers:
            return numbers[version]
        for earlier in dict.fromkeys(record.version for record in self.log()):
            if earlier == version:
                break
            with suppress(StoreError):  # a damaged version gets no number
                if earlier not in numbers and (earlier_manifest := read_manifest(self.store, earlier)):
                    self._register(earlier_manifest)
        return self._register(manifest)

    def sync_registry(self, version: str) -> tuple[str | None, list[str]]:
        """Register champion and `version` if the registry lost them, and set its aliases as the log says.

        Returns `version`'s number, and a warning if the registry cannot be reached.
        """
        log = self.log()
        serving = champion(log)
        try:
            for id in {serving, version} - {None}:
                manifest = read_manifest(self.store, str(id))
                if manifest is not None:
                    self.register(manifest)
            self.registry.set_aliases(serving)
            number = self.registry.numbers().get(version)
        except RegistryError as error:
            return None, [f"{error}. The decision stands; the next command sets the aliases"]
        write_json(self.root / SYNCED, self._sync_state(log))
        return number, []

    def is_synced(self, log: list[Record]) -> bool:
        """Whether the registry is a file that has not changed since `sync_registry` with this log."""
        path, state = self.root / SYNCED, self._sync_state(log)
        return state is not None and path.is_file() and read_json(path) == state

    def _sync_state(self, log: list[Record]) -> list[Any] | None:
        """Changes with the log and with the registry's file; None if the registry is on a server."""
        database = self.registry.database
        if database is None or not database.is_file():
            return None
        return [self.registry.uri, self.name, len(log), database.stat().st_mtime_ns]

    def _register(self, manifest: Manifest) -> str:
        merged, git = manifest["metrics"]["merged"], manifest["git"]
        scores = {metric: merged[metric]["score"] for metric in METRICS if merged.get(metric)}
        tags = {
            "base_model": manifest["base_model"]["name_or_path"],
            "base_digest": manifest["base_model"]["digest"][:16],
            "git_commit": git["commit"][:12] + ("-dirty" if git["dirty"] else ""),
            "data": " ".join(manifest["data"]["dvc_md5"].values()),
            "test_sha256": manifest["data"]["test_sha256"][:16],
            "train_rows": str(manifest["data"]["rows"]["train"]),
            "manifest_sha256": manifests.digest(manifest),
            "signed": str(read_signature(self.store, manifest) is not None).lower(),
        } | {metric: f"{score:.4f}" for metric, score in scores.items()}
        metrics = [(metric, score, 0) for metric, score in scores.items()]
        with tempfile.TemporaryDirectory() as folder:
            names = {"adapter/loss.csv", "evaluation/report.md", "README.md"} & manifest["files"].keys()
            fetch(self.store, manifest, names, Path(folder))
            reports = {Path(name).name: (Path(folder) / name).read_text(encoding="utf-8") for name in names}
        for row in csv.DictReader(reports.pop("loss.csv", "").splitlines()):
            metrics += [(key, float(row[key]), int(row["step"])) for key in CURVES if row.get(key)]
        # The URI that `mlflow_plugin` reads: the version's place in the store, for S3 with the server's parameters.
        publish = manifest["params"]["publish"]
        options = {key: publish[key] for key in ("endpoint_url", "region_name", "addressing_style") if publish[key]}
        query = f"?{urlencode(options)}" if self.store.uri.startswith("s3:") else ""
        source = f"retune-{self.store.uri}/versions/{manifest['version']}{query}"
        params = manifest["params"]["train"]
        return self.registry.register(manifest["version"], source, tags, params, metrics, reports)
