"""A version's manifest: its files with digests, and its lineage; written and read only as in `manifest.schema.json`."""

import hashlib
import json
import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version as package_version
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from pipeline.core import git, graph
from pipeline.core.files import read_json, sha256_json, strict_json
from pipeline.core.sanitise import portable
from pipeline.core.timings import stage_seconds
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, StoreError
from pipeline.scoring.resampling import read_scores

SCHEMA_VERSION = 2
WRITTEN_BY_RUNS = ("dvc.lock", ".dvc/init_adapter.json")  # not changes by a person; their content is in the manifest
Manifest = dict[str, Any]


def manifest_key(version: str) -> str:
    return f"versions/{version}/manifest.json"


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes, as stored, hashed and signed. Raises StoreError: it does not match the schema."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(manifest))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path) or "the manifest"
        raise StoreError(f"{where} does not match pipeline/registry/manifest.schema.json: {error.message[:300]}")
    return json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def digest(manifest: Manifest) -> str:
    """SHA-256 of the manifest as it is stored."""
    return hashlib.sha256(encode(manifest)).hexdigest()


def read_manifest(store: ArtifactStore, version: str) -> Manifest | None:
    """The manifest of a version, None if there is none. Raises StoreError: it was altered, or has another schema."""
    data = store.read(manifest_key(version))
    if data is None:
        return None
    try:
        manifest: Manifest = strict_json(data)
        schema = manifest.get("schema_version", 1)
        if schema != SCHEMA_VERSION:
            raise ValueError(f"its schema is {schema}, this Retune reads {SCHEMA_VERSION}; publish the version again")
        if manifest["version"] != version:
            raise ValueError(f"it names version {manifest['version']}")
        if encode(manifest) != data:
            raise ValueError("its bytes are not the ones that Retune writes for this content")
    except (StoreError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{manifest_key(version)} in {store.uri} is damaged: {error}") from None
    return manifest


def require_manifest(store: ArtifactStore, version: str) -> Manifest:
    """Like `read_manifest`; also raises StoreError if the version is not published."""
    manifest = read_manifest(store, version)
    if manifest is None:
        raise StoreError(f"version {version} is not published in {store.uri}; `retune history` lists those that are")
    return manifest


def published_versions(store: ArtifactStore) -> list[str]:
    """Ids of all versions in the store, sorted."""
    keys = (key.split("/") for key in store.list("versions/"))
    return sorted(parts[1] for parts in keys if len(parts) == 3 and parts[2] == "manifest.json")


def build(params: PublishParams, version: str, files: dict[str, Any], root: Path = Path(".")) -> Manifest:
    """The manifest of the workspace's artifacts. `files`: name → {sha256, size}."""
    artifacts = root / "artifacts"
    names = ("adapter/training.json", "adapter/contract.json", "dataset/report.json", "parity/parity.json")
    training, contract, report, parity = (read_json(artifacts / name) for name in names)
    stages = graph.lock(root)["stages"]
    sections = {  # that the stages last ran with; a single parameter (`train.task`) is also in its section
        key: value
        for stage in stages.values()
        for values in stage.get("params", {}).values()
        for key, value in values.items()
        if "." not in key
    }
    seconds = stage_seconds(root)
    known = [value for value in seconds.values() if value is not None]
    price = params.price_per_hour
    cost = round(sum(known) / 3600 * price, 6) if price is not None and len(known) == len(seconds) else None
    lineage = {
        "schema_version": SCHEMA_VERSION,
        "version": version,
        "name": params.registered_model_name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git.state(root, WRITTEN_BY_RUNS),
        "dvc_lock": stages,
        "data": {
            "dvc_md5": {d["path"]: d["md5"] for d in stages["prepare"]["deps"] if d["path"].split("/")[0] == "data"},
            "rows": report["rows"],
            "test_sha256": report["test_sha256"],
        },
        "base_model": training["base_model"],
        "params": sections | {"train": training["params"], "publish": params.model_dump()},
        "packages": {
            "train": training["versions"],
            "evaluate": parity["evaluation"]["versions"],
            "publish": {"python": platform.python_version(), "retune": package_version("retune")},
        },
        "contract": contract_digests(contract),
        "metrics": read_scores(artifacts / "evaluation") | read_scores(artifacts / "parity"),
        "evaluation": parity["evaluation"],
        "parity": {key: value for key, value in parity.items() if key != "evaluation"},
        "hardware": {"train": training["device"], "publish": f"{platform.machine()} {platform.system()}"},
        "time": seconds,
        "cost": {"price_per_hour": price, "total": cost},
    }
    return portable(lineage) | {"files": files}


def contract_digests(contract: dict[str, Any]) -> dict[str, str]:
    """The digest of a template contract and the digests in it, as the manifest records them."""
    return {"sha256": sha256_json(contract)} | {k: v for k, v in contract.items() if k.endswith("_sha256")}


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    text = package_files("pipeline.registry").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))
