"""Checks that a published version is what was published and signed.

Checked are the signature, the digest of every file and the lineage: schema, id, git commit, and that the manifest's
contract, base model and metrics are those in the version's files. Files are hashed and parsed, never loaded as models.
"""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.core import git, graph
from pipeline.core.allowlist import UnsafeFileError
from pipeline.core.checks import Check
from pipeline.core.files import read_json
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import ArtifactStore, StoreError
from pipeline.registry.manifest import Manifest
from pipeline.registry.mlflow import RegistryError
from pipeline.registry.model import RegisteredModel
from pipeline.registry.signature import check_signature, require_passed, require_signed
from pipeline.registry.stores import fetch


def verify(model: RegisteredModel, version: str) -> list[Check]:
    """All checks of a version. Raises StoreError: it is not published."""
    try:
        manifest = model.manifest(version)
    except StoreError as error:
        if model.store.read(manifests.manifest_key(version)) is None:
            raise
        return [Check("manifest", False, str(error))]
    try:
        id = graph.version_id(stages=manifest["dvc_lock"])
    except (graph.GraphError, KeyError, TypeError) as error:
        id = f"no id: {error}"
    return [
        Check("manifest", True, "matches manifest.schema.json"),
        Check("id", id == version, f"dvc.lock in the manifest gives {id}"),
        _check_recorded(model, manifest),
        check_signature(model.store, model.params, manifest),
        *_check_files(model.store, manifest),
        _check_commit(manifest, model.root),
    ]


def require_servable(model: RegisteredModel, version: str) -> Manifest:
    """The manifest of a version that may become champion. Raises SignatureError: it has to be signed and is not."""
    manifest = model.manifest(version)
    require_signed(model.store, manifest, model.params)
    if model.params.require_signature:
        require_passed(manifest, _check_files(model.store, manifest))
    return manifest


def _check_recorded(model: RegisteredModel, manifest: Manifest) -> Check:
    """Compare the manifest with its digests in registry and promotion log: detects changes of unsigned manifests."""
    recorded = {
        f"record {record.number}": record.manifest_sha256
        for record in model.log()
        if record.version == manifest["version"] and record.manifest_sha256
    }
    problem = ""
    try:
        if sha256 := model.registry.tags(manifest["version"]).get("manifest_sha256"):
            recorded["the registry"] = sha256
    except RegistryError as error:
        problem = f"; {error}"
    if not recorded:
        return Check("recorded digest", None, f"neither registry nor promotion log knows this version{problem}")
    wrong = [where for where, sha256 in recorded.items() if sha256 != manifests.digest(manifest)]
    detail = f"another digest in {', '.join(wrong)}" if wrong else f"the same in {', '.join(recorded)}"
    return Check("recorded digest", not wrong, detail + problem)


def _check_files(store: ArtifactStore, manifest: Manifest) -> list[Check]:
    """Check the digest of every file, and the lineage in the manifest against the files."""
    problems, documents = [], {}
    for name in manifest["files"]:
        # One file at a time, because a version may be larger than the free space on the disk.
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch(store, manifest, [name], Path(folder))
                if name.endswith(".json"):
                    documents[name] = read_json(Path(folder) / name)
            except (StoreError, UnsafeFileError) as error:
                problems.append(str(error))
    sizes = {entry["sha256"]: entry["size"] for entry in manifest["files"].values()}
    detail = "; ".join(dict.fromkeys(problems)) or f"{len(manifest['files'])} files, {sum(sizes.values()) / 1e6:.1f} MB"
    return [Check("digests", not problems, detail), _check_lineage(manifest, documents)]


def _check_lineage(manifest: Manifest, files: dict[str, Any]) -> Check:
    parity = dict(files.get("parity/parity.json", {}))
    expected: list[tuple[str, Any]] = [  # key of the manifest, and its value according to the files
        ("evaluation", parity.pop("evaluation", None)),
        ("parity", parity),
        ("base_model", files.get("adapter/training.json", {}).get("base_model")),
        ("metrics", files.get("evaluation/scores.json", {}) | files.get("parity/scores.json", {})),
        ("contract", manifests.contract_digests(files.get("adapter/contract.json", {}))),
        ("contract", manifests.contract_digests(files.get("merged/contract.json", {}))),
    ]
    wrong = [key for key, value in expected if manifest[key] != value]
    detail = f"{', '.join(wrong)} in the manifest differs from the version's files" if wrong else "as in the files"
    return Check("lineage", not wrong, detail)


def _check_commit(manifest: Manifest, root: Path) -> Check:
    commit = manifest["git"]["commit"]
    if not commit or git.run_or_none(root, "rev-parse", "--git-dir") is None:
        return Check("git commit", None, commit[:12] or "the version was published outside a git repository")
    known = git.run_or_none(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None
    missing = "" if known else " is not in this repository (try `git fetch`)"
    changed = ", with uncommitted changes" * manifest["git"]["dirty"]
    return Check("git commit", known, f"{commit[:12]}{missing}{changed}")
