"""Lets MLflow download a version, as `models:/NAME@champion`, from the artifact store, with digests checked.

MLflow finds this class by its entry points for `retune-file://…` and `retune-s3://…`, the sources of registered
versions. It is read-only, because a version never changes.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.manifest import encode, require_manifest
from pipeline.registry.signature import read_signature
from pipeline.registry.stores import fetch, open_store
from pipeline.settings import ParamsError, load_params


class RetuneArtifactRepository(ArtifactRepository):
    """One published version as a folder: its files, `manifest.json` and, if it is signed, `manifest.sig`."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        address, _, query = artifact_uri.removeprefix("retune-").partition("?")
        store_uri, _, self.version = address.rpartition("/versions/")
        self.artifact_store = open_store(_settings(store_uri, dict(parse_qsl(query))))
        self.manifest = manifest = require_manifest(self.artifact_store, self.version)
        self.extra_files = {"manifest.json": encode(manifest)}
        if signature := read_signature(self.artifact_store, manifest):
            self.extra_files["manifest.sig"] = signature

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        folder = f"{path.strip('/')}/" if path else ""
        sizes = {name: entry["size"] for name, entry in self.manifest["files"].items()}
        sizes |= {name: len(data) for name, data in self.extra_files.items()}
        entries: dict[str, FileInfo] = {}
        for name in sorted(name for name in sizes if name.startswith(folder)):
            first, slash, _ = name.removeprefix(folder).partition("/")
            entries[first] = FileInfo(folder + first, bool(slash), None if slash else sizes[name])
        return list(entries.values())

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        if remote_file_path in self.extra_files:
            Path(local_path).write_bytes(self.extra_files[remote_file_path])
            return
        if remote_file_path not in self.manifest["files"]:
            raise StoreError(f"version {self.version} has no file {remote_file_path}")
        folder, prefix = Path(local_path).parent, remote_file_path.removesuffix(Path(local_path).name)
        fetch(self.artifact_store, self.manifest, [remote_file_path], folder, prefix)

    def log_artifact(self, *_: Any, **__: Any) -> None:
        raise StoreError("a published version never changes; `retune publish` makes a new one")

    log_artifacts = log_artifact


def _settings(uri: str, options: dict[str, str]) -> PublishParams:
    """How to reach the store: by params.yaml in a project with that store, else by the options in the source's URI."""
    with suppress(ParamsError):
        params = load_params().publish
        if params.artifact_store.rstrip("/") == uri:
            return params
    server = {key: options[key] for key in ("endpoint_url", "region_name", "addressing_style") if key in options}
    values: dict[str, Any] = dict.fromkeys(PublishParams.model_fields)
    values |= {"artifact_store": uri, "addressing_style": "auto", "max_concurrency": 4} | server
    return PublishParams.model_construct(**values)
