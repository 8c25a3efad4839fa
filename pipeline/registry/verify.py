"""Whether a published version is what was published and signed, check by check.

Signature, digest of every object, and lineage: the schema, the id, the git commit, and that contract, base model and
metrics in the manifest are those in the version's own files. Nothing of the version is loaded, only hashed and parsed.
"""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.core import git
from pipeline.core.allowlist import UnsafeFileError
from pipeline.core.checks import Check
from pipeline.core.files import read_json
from pipeline.core.graph import GraphError
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import ArtifactStore, StoreError
from pipeline.registry.manifest import Manifest
from pipeline.registry.mlflow import RegistryError
from pipeline.registry.model import RegisteredModel
from pipeline.registry.signature import check_signature, refuse_failed, require_signed
from pipeline.registry.stores import fetch


def verify(model: RegisteredModel, version: str) -> list[Check]:
    """Every check of a version; raises StoreError if there is none of this id."""
    try:
        manifest = model.manifest(version)
    except StoreError as error:
        if model.store.read(manifests.key_of(version)) is None:
            raise
        return [Check("manifest", False, str(error))]
    try:
        id = manifests.version_of(manifest)
    except (GraphError, KeyError, TypeError) as error:
        id = f"no version: {error}"
    return [
        Check("manifest", True, "matches manifest.schema.json"),
        Check("id", id == version, f"dvc.lock in the manifest gives {id}"),
        _check_recorded(model, manifest),
        check_signature(model.store, model.params, manifest),
        *_check_files(model.store, manifest),
        _check_commit(manifest, model.root),
    ]


def servable(model: RegisteredModel, version: str) -> Manifest:
    """The manifest of a version that may become champion: where `publish.require_signature` is on, it is signed, and
    no object was altered since (SignatureError says what is wrong with it).
    """
    manifest = model.manifest(version)
    require_signed(model.store, manifest, model.params)
    if model.params.require_signature:
        refuse_failed(manifest, _check_files(model.store, manifest))
    return manifest


def _check_recorded(model: RegisteredModel, manifest: Manifest) -> Check:
    """The manifest's digest against what registry and promotion log noted of it: catches changes of unsigned ones."""
    noted = {
        f"record {record.number}": record.manifest_sha256
        for record in model.log()
        if record.version == manifest["version"] and record.manifest_sha256
    }
    unasked = ""
    try:
        if sha256 := model.registry.tags(manifest["version"]).get("manifest_sha256"):
            noted["the registry"] = sha256
    except RegistryError as error:
        unasked = f"; {error}"
    if not noted:
        return Check("recorded digest", None, f"neither registry nor promotion log knows this version{unasked}")
    wrong = [where for where, sha256 in noted.items() if sha256 != manifests.digest(manifest)]
    said = f"{', '.join(wrong)} noted another manifest" if wrong else f"the one that {', '.join(noted)} noted"
    return Check("recorded digest", not wrong, said + unasked)


def _check_files(store: ArtifactStore, manifest: Manifest) -> list[Check]:
    """The digest of every file, and what the files say again that the manifest says."""
    wrong, texts = [], {}
    for name in manifest["files"]:
        # One file at a time: a version may be larger than the disk's room.
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch(store, manifest, [name], Path(folder))
                if name.endswith(".json"):
                    texts[name] = read_json(Path(folder) / name)
            except (StoreError, UnsafeFileError) as error:
                wrong.append(str(error))
    sizes = {entry["sha256"]: entry["size"] for entry in manifest["files"].values()}
    said = "; ".join(dict.fromkeys(wrong)) or f"{len(manifest['files'])} files, {sum(sizes.values()) / 1e6:.1f} MB"
    return [Check("digests", not wrong, said), _check_lineage(manifest, texts)]


def _check_lineage(manifest: Manifest, files: dict[str, Any]) -> Check:
    parity = dict(files.get("parity/parity.json", {}))
    repeated: list[tuple[str, Any]] = [  # a key of the manifest, and what the files say of it
        ("evaluation", parity.pop("evaluation", None)),
        ("parity", parity),
        ("base_model", files.get("adapter/training.json", {}).get("base_model")),
        ("metrics", files.get("evaluation/scores.json", {}) | files.get("parity/scores.json", {})),
        ("contract", manifests.contract_digests(files.get("adapter/contract.json", {}))),
        ("contract", manifests.contract_digests(files.get("merged/contract.json", {}))),
    ]
    wrong = [key for key, expected in repeated if manifest[key] != expected]
    said = f"{', '.join(wrong)} of the manifest differs from the version's files" if wrong else "as in the files"
    return Check("lineage", not wrong, said)


def _check_commit(manifest: Manifest, root: Path) -> Check:
    commit = manifest["git"]["commit"]
    if not commit or git.ask(root, "rev-parse", "--git-dir") is None:
        return Check("git commit", None, commit[:12] or "it was published outside a git repository")
    known = git.ask(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None
    missing = "" if known else " is not in this repository (`git fetch` may bring it)"
    changed = ", with changes that no commit has" if manifest["git"]["dirty"] else ""
    return Check("git commit", known, f"{commit[:12]}{missing}{changed}")
