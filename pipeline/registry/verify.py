"""verify: a published version in; out, check by check, whether it is what was published and signed.

Signature, digest of every object, and lineage: the schema, the id, the git commit, and that contract, base model and
metrics in the manifest are those in the version's own files. Nothing of the version is loaded, only hashed and parsed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.core import git
from pipeline.core.checks import Check
from pipeline.core.graph import GraphError
from pipeline.params import PublishParams
from pipeline.registry import manifest as manifests
from pipeline.registry import signature
from pipeline.registry.artifact_store import ArtifactStore, StoreError, open_store
from pipeline.registry.decisions import read_log
from pipeline.registry.fetching import fetch_version
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.signature import SignatureError
from pipeline.registry.transfer import fetch

# Manifest keys and the file of the version that must say the same.
REPEATED = {
    "base_model": ("adapter/training.json", "base_model"),
    "parity": ("parity/parity.json", None),
    "evaluation": ("parity/parity.json", "evaluation"),
}


def verify(
    params: PublishParams,
    store: ArtifactStore,
    version: str,
    registered: dict[str, str] | None = None,
    root: Path = Path("."),
) -> list[Check]:
    """Every check of a version, in the order of the module's first lines. `registered`: the registry's tags for it.

    Raises:
        StoreError: there is no such version.
    """
    try:
        manifest = read_manifest(store, version)
    except StoreError as error:
        return [Check("manifest", False, str(error))]
    if manifest is None:
        raise StoreError(f"version {version} is not published in {store.uri}")
    checks = [Check("manifest", True, "as manifest.schema.json asks for"), _check_id(manifest)]
    checks += [_check_recorded(store, params, manifest, registered), _check_signature(store, params, manifest)]
    checks += _check_files(store, manifest)
    checks.append(_check_commit(manifest, root))
    return checks


def require_intact(store: ArtifactStore, manifest: Manifest, params: PublishParams) -> None:
    """Where `require_signature` is on: refuse a version that is not signed, or has an object that was altered since.

    Raises:
        SignatureError: which is wrong, and why.
    """
    require_signed(store, manifest, params)
    for check in _check_files(store, manifest) if params.require_signature else ():
        if not check.passed:
            raise SignatureError(_may_not_serve(manifest, check))


def require_signed(store: ArtifactStore, manifest: Manifest, params: PublishParams) -> None:
    """As `require_intact`, without reading the files: enough before a download, which checks each against the manifest.

    Raises:
        SignatureError: there is no signature of a trusted key for this manifest.
    """
    if params.require_signature:
        check = _check_signature(store, params, manifest)
        if not check.passed:
            raise SignatureError(_may_not_serve(manifest, check))


def fetch_signed(params: PublishParams, manifest: Manifest, part: str, folder: Path, root: Path = Path(".")) -> Path:
    """Download the part of a version that is going to be loaded; every loader of a published model takes it from here.

    Raises:
        SignatureError: `require_signature` is on, and the version is not signed.
        StoreError, UnsafeFileError: as `fetch_version`.
    """
    store = open_store(params, root)
    require_signed(store, manifest, params)
    return fetch_version(store, manifest, part, folder)


def _may_not_serve(manifest: Manifest, check: Check) -> str:
    return f"version {manifest['version']} may not serve (publish.require_signature): {check.name}: {check.detail}"


def _check_id(manifest: Manifest) -> Check:
    try:
        found = manifests.version_of(manifest)
    except (GraphError, KeyError, TypeError) as error:
        return Check("id", False, f"dvc.lock in the manifest names no version: {error}")
    return Check("id", found == manifest["version"], f"dvc.lock in the manifest gives {found}")


def _check_recorded(
    store: ArtifactStore, params: PublishParams, manifest: Manifest, registered: dict[str, str] | None
) -> Check:
    """The manifest's digest against what registry and promotion log noted of it: catches changes of unsigned ones."""
    found = manifests.digest(manifest)
    noted = {
        f"record {record.number}": record.manifest_sha256
        for record in read_log(store, params.registered_model_name)
        if record.version == manifest["version"] and record.manifest_sha256
    }
    if registered and "manifest_sha256" in registered:
        noted["the registry"] = registered["manifest_sha256"]
    if not noted:
        return Check("recorded digest", None, "neither registry nor promotion log knows this version")
    wrong = [where for where, sha256 in noted.items() if sha256 != found]
    said = f"{', '.join(wrong)} noted another manifest" if wrong else f"the one that {', '.join(noted)} noted"
    return Check("recorded digest", not wrong, said)


def _check_signature(store: ArtifactStore, params: PublishParams, manifest: Manifest) -> Check:
    data = manifests.encode(manifest)
    signed = signature.read_signature(store, manifest["version"], data)
    if signed is None:
        passed = False if params.require_signature else None
        return Check("signature", passed, "the version is not signed, or its manifest was altered afterwards")
    if params.verify_key is None:
        return Check("signature", None, "there is one, but publish.verify_key names no key to check it with")
    try:
        return Check("signature", True, f"by {signature.verify(params, data, signed)}")
    except SignatureError as error:
        return Check("signature", False, str(error))


def _check_files(store: ArtifactStore, manifest: Manifest) -> list[Check]:
    """The digest of every file, and what the files say again that the manifest says."""
    wrong, texts = [], {}
    for name, entry in manifest["files"].items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch(store, {name: entry}, Path(folder))
                if name.endswith(".json"):
                    texts[name] = (Path(folder) / name).read_bytes()
            except StoreError as error:
                wrong.append(str(error))
    sizes = {entry["sha256"]: entry["size"] for entry in manifest["files"].values()}
    said = "; ".join(wrong) or f"{len(manifest['files'])} files, {sum(sizes.values()) / 1e6:.1f} MB"
    return [Check("digests", not wrong, said), _check_lineage(manifest, texts)]


def _check_lineage(manifest: Manifest, texts: dict[str, bytes]) -> Check:
    wrong, files = [], {}
    for name, text in texts.items():
        try:
            files[name] = json.loads(text)
        except ValueError as error:
            wrong.append(f"{name} is no JSON: {error}")
    for part in ("adapter", "merged"):
        contract = files.get(f"{part}/contract.json")
        if contract is None or manifests.contract_digests(contract) != manifest["contract"]:
            wrong.append(f"contract is not that of {part}/contract.json")
    for key, (name, inner) in REPEATED.items():
        found = files.get(name, {})
        expected = found.get(inner) if inner else {k: v for k, v in found.items() if k != "evaluation"}
        if manifest[key] != expected:
            wrong.append(f"{key} is not that of {name}")
    scores = _scores(files, "evaluation") | _scores(files, "parity")
    if manifest["metrics"] != scores:
        wrong.append("metrics are not those of evaluation/scores.json and parity/scores.json")
    return Check("lineage", not wrong, "; ".join(wrong) or "contract, base model, metrics and parity as in the files")


def _scores(files: dict[str, Any], folder: str) -> dict[str, Any]:
    """As `statistics.read_scores`, of a version's parsed files."""
    scores: dict[str, Any] = files.get(f"{folder}/scores.json", files.get(f"{folder}/metrics.json", {}))
    return scores


def _check_commit(manifest: Manifest, root: Path) -> Check:
    commit = manifest["git"]["commit"]
    if not commit:
        return Check("git commit", None, "it was published outside a git repository")
    if git.ask(root, "rev-parse", "--git-dir") is None:
        return Check("git commit", None, f"{commit[:12]}: this folder is not a git repository")
    known = git.ask(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None
    missing = "" if known else " is not in this repository (`git fetch` may bring it)"
    changed = ", with changes that no commit has" if manifest["git"]["dirty"] else ""
    return Check("git commit", known, f"{commit[:12]}{missing}{changed}")
