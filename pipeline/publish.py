"""publish: finished artifacts in, one immutable version out: objects by digest, the manifest last, a registry entry.

Idempotent by content: publishing what is already published moves nothing and makes no new version.
"""

import csv
import json
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import graph
from pipeline.allowlist import UnsafeFileError, check_file, check_names, strict_json
from pipeline.files import read_json
from pipeline.params import PublishParams
from pipeline.registry import ModelRegistry
from pipeline.sanitise import portable
from pipeline.statistics import METRICS
from pipeline.store import ArtifactStore, StoreError, open_store
from pipeline.transfer import check_objects, fetch, ship

Manifest = dict[str, Any]


class PublishError(RuntimeError):
    """The artifacts cannot become a version; nothing of them is visible in the store."""


@dataclass(frozen=True)
class Published:
    version: str  # content id
    number: str  # MLflow's version number
    created: bool  # False: it was published before
    uploaded_bytes: int


def publish(params: PublishParams, root: Path = Path(".")) -> Published:
    """Ship the workspace's artifacts as a version of `registered_model_name`.

    Raises:
        PublishError: artifacts are stale.
        UnsafeFileError: they hold a file that versions do not ship, or one that is not what its name says.
        StoreError: the store cannot be written.
    """
    stale = [stage for stage in graph.stale(root) if stage in graph.STAGES]
    if stale:
        raise PublishError(
            f"{', '.join(stale)} changed since they ran; `retune run` or `dvc repro` brings them up to date"
        )
    version = graph.version_id(root)
    store = open_store(params, root)
    manifest = read_manifest(store, version)
    uploaded, created = 0, manifest is None
    if manifest is None:
        manifest, uploaded = _upload(store, version, root)
    else:
        check_objects(store, manifest["files"])
    registry = ModelRegistry(params.tracking_uri, params.registered_model_name)
    number = registry.register(version, f"{store.uri}/versions/{version}", _tags(manifest), _run(root))
    return Published(version, number, created, uploaded)


def read_manifest(store: ArtifactStore, version: str) -> Manifest | None:
    """The manifest of a version, or None while there is no such version."""
    data = store.read(f"versions/{version}/manifest.json")
    if data is None:
        return None
    try:
        manifest: Manifest = strict_json(data)
        if manifest["version"] != version:
            raise ValueError(f"it names version {manifest['version']}")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"versions/{version}/manifest.json in {store.uri} is damaged: {error}") from None
    return manifest


def fetch_version(store: ArtifactStore, manifest: Manifest, part: str, folder: Path) -> Path:
    """Download one part of a version (adapter, merged, evaluation or parity) to `folder/part`, every file checked.

    Raises:
        StoreError: an object is missing or altered.
        UnsafeFileError: the manifest names a file that versions do not hold, or one is not what its name says.
    """
    check_names(manifest["files"])
    wanted = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{part}/")}
    fetch(store, wanted, folder)
    for name in wanted:
        try:
            check_file(folder / name)
        except UnsafeFileError:
            (folder / name).unlink()
            raise
    return folder / part


def _upload(store: ArtifactStore, version: str, root: Path) -> tuple[Manifest, int]:
    files = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path
        for folder in (root / out for out in graph.SHIPPED)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    check_names(files)
    for path in files.values():
        check_file(path)

    def manifest(entries: dict[str, Any]) -> bytes:
        tree = {"version": version, "files": entries} | portable(_lineage(root))
        return json.dumps(tree, indent=2, ensure_ascii=False, sort_keys=True).encode()

    uploaded = ship(store, version, files, manifest)
    published = read_manifest(store, version)
    if published is None:
        raise StoreError(f"versions/{version}/manifest.json was written to {store.uri} but is not there")
    return published, uploaded


def _lineage(root: Path) -> dict[str, Any]:
    """Where the version comes from and what was measured of it."""
    artifacts = root / "artifacts"
    training = read_json(artifacts / "adapter" / "training.json")
    data_report = read_json(artifacts / "dataset" / "report.json")
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(root),
        "dvc_lock": graph.lock(root)["stages"],
        "data": {"rows": data_report["rows"], "test_sha256": data_report["test_sha256"]},
        "base_model": training["base_model"],
        "params": {"train": training["params"]},
        "versions": training["versions"] | {"python": platform.python_version()},
        "hardware": training["device"],
        "metrics": read_json(artifacts / "evaluation" / "metrics.json")
        | read_json(artifacts / "parity" / "metrics.json"),
        "parity": read_json(artifacts / "parity" / "parity.json"),
    }


def _git(root: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _tags(manifest: Manifest) -> dict[str, str]:
    merged = manifest["metrics"]["merged"]
    scores = {metric: f"{merged[metric]['score']:.4f}" for metric in METRICS if merged[metric]}
    return {
        "base_model": manifest["base_model"]["name_or_path"],
        "base_digest": manifest["base_model"]["digest"][:16],
        "git_commit": manifest["git"]["commit"][:12] + ("-dirty" if manifest["git"]["dirty"] else ""),
        "test_sha256": manifest["data"]["test_sha256"][:16],
        "train_rows": str(manifest["data"]["rows"]["train"]),
    } | scores


def _run(root: Path) -> dict[str, Any]:
    """What MLflow shows of the training: parameters, final scores, and the loss by step."""
    adapter = root / "artifacts" / "adapter"
    training = read_json(adapter / "training.json")
    merged = read_json(root / "artifacts" / "parity" / "metrics.json")["merged"]
    with (adapter / "loss.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curve = [
        (key, float(row[key]), int(row["step"])) for row in rows for key in ("loss", "validation_loss") if row[key]
    ]
    return {
        "params": training["params"],
        "metrics": {metric: merged[metric]["score"] for metric in METRICS if merged[metric]},
        "curve": curve,
    }
