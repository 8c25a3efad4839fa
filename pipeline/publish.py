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
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.decisions import refuse_deleted
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.stores import check_objects, fetch, publish_manifest, upload

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
    model = RegisteredModel(params, root)
    version = graph.version_id(root)
    refuse_deleted(model.log(), version)
    manifest = read_manifest(model.store, version)
    uploaded, created = 0, manifest is None
    if manifest is None:
        manifest, uploaded = ship_version(model, version)
    else:
        try:
            check_objects(model.store, manifest["files"])
        except StoreError:  # the store lost one; the workspace has it
            _, uploaded = upload(model.store, _shipped_files(root))
            check_objects(model.store, manifest["files"])
    number = model.register(manifest)
    signed = signature.read_signature(model.store, manifest) is not None
    return Published(version, number, created, uploaded, signed)


def ship_version(model: RegisteredModel, version: str) -> tuple[Manifest, int]:
    """Upload the workspace's artifacts, sign the manifest and store it; returns it and the bytes that were sent."""
    entries, sent = upload(model.store, _shipped_files(model.root))
    manifest = manifests.build(model.params, version, entries, model.root)
    with tempfile.TemporaryDirectory() as folder:
        described = {name: Path(folder) / name for name in ("README.md", "MLmodel")}
        described["README.md"].write_text(card.model_card(manifest), encoding="utf-8")
        described["MLmodel"].write_text(card.mlmodel(manifest), encoding="utf-8")
        more, sent_more = upload(model.store, described)
    manifest["files"] = entries | more | _for_mlflow(entries)
    _sign(model, manifest)  # first: a version that can be seen is signed already
    publish_manifest(model.store, version, manifests.encode(manifest))
    return model.manifest(version), sent + sent_more


def sign(params: PublishParams, version: str, root: Path = Path(".")) -> bool:
    """Sign a version that was published unsigned, after checking every file; False when it has a signature already.

    Raises:
        SignatureError: there is no key to sign with, or it cannot be used.
        StoreError: there is no such version, or an object is missing or altered.
        RegistryError: MLflow cannot be reached; the version is signed all the same.
    """
    model = RegisteredModel(params, root)
    manifest = model.manifest(version)
    for name in manifest["files"]:
        with tempfile.TemporaryDirectory() as folder:  # one file at a time: a version may be larger than the disk
            fetch(model.store, manifest, [name], Path(folder))
    if params.signing_key is None:
        raise signature.SignatureError("publish.signing_key is null; it names the private key to sign with")
    signed = _sign(model, manifest)
    model.registry.mark(version, "signed", "true")
    return signed


def _sign(model: RegisteredModel, manifest: Manifest) -> bool:
    """Store the manifest's signature, where there is a key; whether it is new."""
    data = manifests.encode(manifest)
    signed = signature.sign(model.params, data)
    return signed is not None and model.store.create(signature.signature_key(manifest["version"], data), signed)


def _shipped_files(root: Path) -> dict[str, Path]:
    paths = [path for out in graph.SHIPPED for path in sorted((root / out).rglob("*"))]
    files = {
        path.relative_to(root / "artifacts").as_posix(): path
        for path in paths
        if path.is_file() and path.suffix != ".html"  # a version holds nothing to open in a browser
    }
    check_names(files)
    for path in files.values():
        check_file(path)
    return files


def _for_mlflow(entries: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer once more where MLflow's transformers flavour looks for it: other names of the same objects."""
    merged = {name.removeprefix("merged/"): entry for name, entry in entries.items() if name.startswith("merged/")}
    return {
        f"components/tokenizer/{name}": entry
        for name, entry in merged.items()
        if name in TOKENIZER_FILES or name.endswith(".model")
    }
