"""One registered model: its versions in the artifact store, the log of the decisions on them, its entries in MLflow."""

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

PROJECTED = WORK_DIR / "aliases.json"  # the log that the registry's aliases follow
CURVES = ("loss", "validation_loss", "learning_rate", "grad_norm", "weight_change")


class RegisteredModel:
    """The model `publish.registered_model_name`. Store and registry are reached at their first use."""

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

    def decide(self, decide: Callable[[list[Record]], Record]) -> Record:
        """Add to the log what `decide` makes of it, anew whenever another process wrote first; a record without a
        number stays outside, and one that is in it already is not added again."""
        while True:
            log = self.log()
            record = decide(log)
            if record.number <= len(log):
                return record
            if written := append(self.store, self.name, record):
                return written

    def find(self, version: str | None) -> str:
        """The content id of a version named by number (3 or v3), id, or `champion`; None: the workspace's.

        Raises:
            RegistryError: the registry has no such number.
            DecisionError: there is no champion.
        """
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
        """What people call a version; its id alone while the registry has no number for it or cannot be reached."""
        try:
            return name_of(version, self.registry.numbers().get(version) if version else None)
        except RegistryError:
            return str(version)

    def folder(self, version: str) -> Path:
        """Where this machine keeps what it fetched and measured of a version."""
        return self.root / WORK_DIR / "versions" / version

    def fetch(self, manifest: Manifest, part: str) -> Path:
        """One part of a version (adapter, merged, evaluation, parity), fetched if it is not here, all files checked."""
        folder = self.folder(manifest["version"])
        fetch(self.store, manifest, [name for name in manifest["files"] if name.startswith(f"{part}/")], folder)
        return folder / part

    def fetch_signed(self, manifest: Manifest, part: str) -> Path:
        """As `fetch`, of what is going to be loaded, which `publish.require_signature` may not allow (SignatureError);
        every loader of a published model takes it from here.
        """
        require_signed(self.store, manifest, self.params)
        return self.fetch(manifest, part)

    def register(self, manifest: Manifest) -> str:
        """The version's MLflow number; makes the entry, from the store alone, if the registry has none (any more).

        Versions that were decided on before it come first, so that the registries of two clones number them alike.
        """
        known, version = self.registry.numbers(), manifest["version"]
        if version in known:
            return known[version]
        for earlier in dict.fromkeys(record.version for record in self.log()):
            if earlier == version:
                break
            with suppress(StoreError):  # one that is damaged has no number here
                before = read_manifest(self.store, earlier) if earlier not in known else None
                if before is not None:
                    self._register(before)
        return self._register(manifest)

    def project(self, version: str) -> tuple[str | None, list[str]]:
        """Make the registry say what the log says, versions that it lost included; returns `version`'s number there,
        and a warning if the registry cannot be reached.
        """
        log = self.log()
        serving = champion(log)
        try:
            for each in {serving, version} - {None}:
                manifest = read_manifest(self.store, str(each))
                if manifest is not None:
                    self.register(manifest)
            self.registry.project(serving)
            number = self.registry.numbers().get(version)
        except RegistryError as error:
            return None, [f"{error}. The decision stands; the next command sets the aliases"]
        write_json(self.root / PROJECTED, self._projection(log))
        return number, []

    def projected(self, log: list[Record]) -> bool:
        """Whether the registry is a file, and as `project` left it for this log; a server has to be asked."""
        path, known = self.root / PROJECTED, self._projection(log)
        return known is not None and path.is_file() and read_json(path) == known

    def _projection(self, log: list[Record]) -> list[Any] | None:
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
        source, params = self._source(manifest), manifest["params"]["train"]
        return self.registry.register(manifest["version"], source, tags, params, metrics, reports)

    def _source(self, manifest: Manifest) -> str:
        """Where MLflow's clients find the version; for S3 with what they need to know of the server, no credential."""
        known = manifest["params"]["publish"]
        options = {key: known[key] for key in ("endpoint_url", "region_name", "addressing_style") if known[key]}
        query = f"?{urlencode(options)}" if self.store.uri.startswith("s3:") else ""
        return f"retune-{self.store.uri}/versions/{manifest['version']}{query}"
