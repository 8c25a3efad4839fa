"""publish: turns finished artifacts into one immutable version: files by digest, the manifest last, a registry entry.

Publishing the same content again uploads nothing and makes no new version.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

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
    """The artifacts cannot become a version; nothing was published."""


@dataclass(frozen=True)
class Published:
    version: str  # content id
    number: str  # MLflow's version number
    created: bool  # False: it was published before
    uploaded_bytes: int
    signed: bool


def publish(params: PublishParams, root: Path = Path(".")) -> Published:
    """Ship the workspace's artifacts as a version of `registered_model_name`.

    Raises PublishError (they are stale), UnsafeFileError (a file that versions do not ship), StoreError, SignatureError
    (the signing key cannot be used), and RegistryError: the version is stored, and the next publish registers it.
    """
    if stale := [stage for stage in graph.stale(root) if stage in graph.STAGES]:
        raise PublishError(f"{', '.join(stale)} changed since the last run; `retune run` brings them up to date")
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
        except StoreError:  # the store lost an object; the workspace still has it
            _, uploaded = upload(model.store, _shipped_files(root))
            check_objects(model.store, manifest["files"])
    number = model.register(manifest)
    signed = signature.read_signature(model.store, manifest) is not None
    return Published(version, number, created, uploaded, signed)


def ship_version(model: RegisteredModel, version: str) -> tuple[Manifest, int]:
    """Upload the workspace's artifacts, sign the manifest and store it; returns it and the number of bytes sent."""
    entries, sent = upload(model.store, _shipped_files(model.root))
    manifest = manifests.build(model.params, version, entries, model.root)
    with tempfile.TemporaryDirectory() as folder:
        descriptions = {name: Path(folder) / name for name in ("README.md", "MLmodel")}
        descriptions["README.md"].write_text(card.model_card(manifest), encoding="utf-8")
        descriptions["MLmodel"].write_text(card.mlmodel(manifest), encoding="utf-8")
        description_entries, sent_descriptions = upload(model.store, descriptions)
    tokenizer = {  # a second time, under the names where MLflow's transformers flavour looks for it
        f"components/tokenizer/{name.removeprefix('merged/')}": entry
        for name, entry in entries.items()
        if name.startswith("merged/") and (name.removeprefix("merged/") in TOKENIZER_FILES or name.endswith(".model"))
    }
    manifest["files"] = entries | description_entries | tokenizer
    _sign(model, manifest)  # before the manifest, so that a visible version is signed
    publish_manifest(model.store, version, manifests.encode(manifest))
    return model.manifest(version), sent + sent_descriptions


def sign(params: PublishParams, version: str, root: Path = Path(".")) -> bool:
    """Sign a version that was published unsigned, after checking every file; False if it already has a signature.

    Raises StoreError, SignatureError (no signing key, or one that cannot be used), RegistryError (it is signed then).
    """
    model = RegisteredModel(params, root)
    manifest = model.manifest(version)
    for name in manifest["files"]:
        with tempfile.TemporaryDirectory() as folder:  # one file at a time: all may not fit on the disk
            fetch(model.store, manifest, [name], Path(folder))
    if params.signing_key is None:
        raise signature.SignatureError("publish.signing_key is null; set it to the path of the private key")
    signed = _sign(model, manifest)
    model.registry.set_tag(version, "signed", "true")
    return signed


def _sign(model: RegisteredModel, manifest: Manifest) -> bool:
    """Sign and store the manifest's signature if there is a key; returns whether the signature is new."""
    data = manifests.encode(manifest)
    signed = signature.sign(model.params, data)
    return signed is not None and model.store.create(signature.signature_key(manifest["version"], data), signed)


def _shipped_files(root: Path) -> dict[str, Path]:
    files = {
        path.relative_to(root / "artifacts").as_posix(): path
        for out in graph.SHIPPED
        for path in sorted((root / out).rglob("*"))
        if path.is_file() and path.suffix != ".html"  # versions contain nothing that a browser would run
    }
    check_names(files)
    for path in files.values():
        check_file(path)
    return files
