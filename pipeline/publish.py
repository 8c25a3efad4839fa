"""publish: finished artifacts in, one immutable version out: objects by digest, the manifest last, a registry entry.

Idempotent by content: publishing what is already published moves nothing and makes no new version.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import graph
from pipeline.core.allowlist import check_file, check_names
from pipeline.params import PublishParams
from pipeline.registry import card, signature
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import ArtifactStore, StoreError, open_store
from pipeline.registry.decisions import read_log, refuse_deleted
from pipeline.registry.fetching import fetch_file
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.registration import register
from pipeline.registry.transfer import check_objects, ship, upload

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


class PublishError(RuntimeError):
    """The artifacts cannot become a version; nothing of them is visible in the store."""


@dataclass(frozen=True)
class Published:
    version: str  # content id
    number: str  # MLflow's version number
    created: bool  # False: it was published before
    uploaded_bytes: int
    signed: bool


def publish(params: PublishParams, root: Path = Path(".")) -> Published:
    """Ship the workspace's artifacts as a version of `registered_model_name`.

    Raises:
        PublishError: artifacts are stale, or hold a type of file that versions do not ship (pickles among them).
        StoreError: the store cannot be written.
        SignatureError: the signing key cannot be used; nothing of the version is visible then.
        RegistryError: MLflow cannot be reached; the version is in the store and registered by the next publish.
    """
    stale = [stage for stage in graph.stale(root) if stage in graph.STAGES]
    if stale:
        raise PublishError(
            f"{', '.join(stale)} changed since they ran; `retune run` or `dvc repro` brings them up to date"
        )
    version = graph.version_id(root)
    store = open_store(params, root)
    refuse_deleted(read_log(store, params.registered_model_name), version)
    manifest = read_manifest(store, version)
    uploaded, created = 0, manifest is None
    if manifest is None:
        manifest, uploaded = _upload(params, store, version, root)
    else:
        try:
            check_objects(store, manifest["files"])
        except StoreError:  # the store lost one; the workspace has it
            _, uploaded = upload(store, _shipped_files(root))
            check_objects(store, manifest["files"])
    registry = ModelRegistry(params.tracking_uri, params.registered_model_name, root)
    number = register(store, registry, manifest)
    signed = signature.read_signature(store, version, manifests.encode(manifest)) is not None
    return Published(version, number, created, uploaded, signed)


def sign(params: PublishParams, version: str, root: Path = Path(".")) -> bool:
    """Sign a version that was published unsigned, after checking every file; False when it has a signature already.

    Raises:
        PublishError: there is no such version, or no key to sign with.
        StoreError: an object is missing or altered.
        RegistryError: MLflow cannot be reached; the version is signed all the same.
    """
    store = open_store(params, root)
    manifest = read_manifest(store, version)
    if manifest is None:
        raise PublishError(f"version {version} is not published in {store.uri}")
    with tempfile.TemporaryDirectory() as folder:
        for entry in manifest["files"].values():
            fetch_file(store, entry, Path(folder) / "file")
    data = manifests.encode(manifest)
    signed = signature.sign(params, data)
    if signed is None:
        raise PublishError("publish.signing_key is null; it names the private key to sign with")
    made = store.create(signature.signature_key(version, data), signed)
    ModelRegistry(params.tracking_uri, params.registered_model_name, root).mark(version, {"signed": "true"})
    return made


def _upload(params: PublishParams, store: ArtifactStore, version: str, root: Path) -> tuple[Manifest, int]:
    moved = 0

    def describe(entries: dict[str, Any]) -> bytes:
        nonlocal moved
        manifest = manifests.build(params, version, entries, root)
        with tempfile.TemporaryDirectory() as folder:
            described = {}
            for name, text in {"README.md": card.model_card(manifest), "MLmodel": card.mlmodel(manifest)}.items():
                described[name] = Path(folder) / name
                described[name].write_text(text, encoding="utf-8")
            more, moved = upload(store, described)
        manifest["files"] = manifest["files"] | more | _for_mlflow(manifest)
        data = manifests.encode(manifest)
        # The signature first: a version that can be seen is signed already.
        signed = signature.sign(params, data)
        if signed is not None:
            store.create(signature.signature_key(version, data), signed)
        return data

    uploaded = ship(store, version, _shipped_files(root), describe)
    published = read_manifest(store, version)
    if published is None:
        raise StoreError(f"versions/{version}/manifest.json was written to {store.uri} but is not there")
    return published, uploaded + moved


def _shipped_files(root: Path) -> dict[str, Path]:
    files = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path
        for folder in (root / out for out in graph.SHIPPED)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".html"  # a page for the workspace: a version holds nothing to open in a browser
    }
    check_names(files)
    for path in files.values():
        check_file(path)
    return files


def _for_mlflow(manifest: Manifest) -> dict[str, Any]:
    """The tokenizer once more where MLflow's transformers flavour looks for it: other names of the same objects."""
    merged = {name: entry for name, entry in manifest["files"].items() if name.startswith("merged/")}
    names = {name: name.removeprefix("merged/") for name in merged}
    return {
        f"components/tokenizer/{short}": merged[name]
        for name, short in names.items()
        if short in TOKENIZER_FILES or short.endswith(".model")
    }
