"""publish: finished artifacts in, one immutable version out: objects by digest, the manifest last, a registry entry.

Idempotent by content: publishing what is already published moves nothing and makes no new version.
"""

import csv
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pipeline import graph
from pipeline.params import PublishParams
from pipeline.security.allowlist import UnsafeFileError, check_file, check_names
from pipeline.statistics import METRICS
from pipeline.store.artifact_store import ArtifactStore, StoreError, open_store
from pipeline.store.transfer import check_objects, fetch, ship, upload
from pipeline.versions import card, signature
from pipeline.versions import manifest as manifests
from pipeline.versions.decisions import read_log, refuse_deleted
from pipeline.versions.manifest import Manifest, read_manifest
from pipeline.versions.registry import ModelRegistry, Registration

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


def register(store: ArtifactStore, registry: ModelRegistry, manifest: Manifest) -> str:
    """The version's MLflow number; makes the entry, from the store alone, if the registry has none (any more).

    Versions that were decided on before it come first, so that the registries of two clones number them alike.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    number = registry.version_of(manifest["version"])
    if number is not None:
        return number
    known, decided = registry.numbers(), dict.fromkeys(each.version for each in read_log(store, manifest["name"]))
    for version in takewhile(lambda each: each != manifest["version"], decided):
        with suppress(StoreError):  # one that is damaged has no number here
            earlier = read_manifest(store, version) if version not in known else None
            if earlier is not None:
                registry.register(_registration(store, earlier))
    return registry.register(_registration(store, manifest))


def fetch_version(store: ArtifactStore, manifest: Manifest, part: str, folder: Path) -> Path:
    """Download one part of a version (adapter, merged, evaluation or parity) to `folder/part`, every file checked.

    Raises:
        StoreError: an object is missing or altered.
        UnsafeFileError: the manifest names a file that versions do not hold, or one is not what its name says.
    """
    wanted = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{part}/")}
    fetch_files(store, manifest, wanted, folder)
    return folder / part


def fetch_files(store: ArtifactStore, manifest: Manifest, wanted: dict[str, Any], folder: Path) -> None:
    """Download files of a version to `folder/name`; those that lie there already are checked all the same.

    Raises:
        StoreError, UnsafeFileError: as `fetch_version`.
    """
    check_names(manifest["files"])
    fetch(store, wanted, folder)
    for name in wanted:
        try:
            check_file(folder / name)
        except UnsafeFileError:
            (folder / name).unlink()
            raise


def fetch_file(store: ArtifactStore, entry: dict[str, Any], target: Path) -> None:
    """Bring the bytes of one file of a manifest to `target`, for hashing and parsing; nothing loads them.

    Raises:
        StoreError: an object is missing or altered.
    """
    fetch(store, {target.name: entry}, target.parent)


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


def _registration(store: ArtifactStore, manifest: Manifest) -> Registration:
    """What MLflow shows of a version, read from the store: tags, parameters, final scores, curves and reports."""
    merged, git = manifest["metrics"]["merged"], manifest["git"]
    scores = {metric: merged[metric]["score"] for metric in METRICS if merged.get(metric)}
    data = manifests.encode(manifest)
    tags = {
        "base_model": manifest["base_model"]["name_or_path"],
        "base_digest": manifest["base_model"]["digest"][:16],
        "git_commit": git["commit"][:12] + ("-dirty" if git["dirty"] else ""),
        "data": " ".join(manifest["data"]["dvc_md5"].values()),
        "test_sha256": manifest["data"]["test_sha256"][:16],
        "train_rows": str(manifest["data"]["rows"]["train"]),
        "manifest_sha256": manifests.digest(manifest),
        "signed": str(signature.read_signature(store, manifest["version"], data) is not None).lower(),
    } | {metric: f"{score:.4f}" for metric, score in scores.items()}
    with tempfile.TemporaryDirectory() as folder:
        texts = {}
        for name in ("adapter/loss.csv", "evaluation/report.md", "README.md"):
            if name in manifest["files"]:
                fetch_file(store, manifest["files"][name], Path(folder) / name)
                texts[Path(name).name] = (Path(folder) / name).read_text(encoding="utf-8")
    return Registration(
        version=manifest["version"],
        source=_source(store, manifest),
        tags=tags,
        params=manifest["params"]["train"],
        metrics=scores,
        curve=_curve(texts.pop("loss.csv", "")),
        reports=texts,
    )


def _source(store: ArtifactStore, manifest: Manifest) -> str:
    """Where MLflow's clients find the version; for S3 with what they need to know of the server, never a credential."""
    known = manifest["params"]["publish"]
    options = {key: known[key] for key in ("endpoint_url", "region_name", "addressing_style") if known[key]}
    query = f"?{urlencode(options)}" if store.uri.startswith("s3:") else ""
    return f"retune-{store.uri}/versions/{manifest['version']}{query}"


def _curve(table: str) -> list[tuple[str, float, int]]:
    return [
        (key, float(row[key]), int(row["step"]))
        for row in csv.DictReader(table.splitlines())
        for key in ("loss", "validation_loss", "learning_rate", "grad_norm", "weight_change")
        if row.get(key)
    ]
