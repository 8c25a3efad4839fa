"""Files of a version out of the store: a part of it, one file, or those that were asked for."""

from pathlib import Path
from typing import Any

from pipeline.core.allowlist import UnsafeFileError, check_file, check_names
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.manifest import Manifest
from pipeline.registry.transfer import fetch


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
