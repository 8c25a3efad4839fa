"""Opens the artifact store, uploads files as objects named by their SHA-256, and downloads and checks them."""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pipeline.core.allowlist import UnsafeFileError, check_file, check_names
from pipeline.core.files import sha256_file
from pipeline.core.progress import Progress
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, FileStore, StoreError

Entry = dict[str, Any]  # {"sha256", "size"}


def open_store(params: PublishParams, root: Path = Path(".")) -> ArtifactStore:
    """The store at `s3://bucket/prefix` (not asked yet), `file://store` in the project, or an absolute `file:///`."""
    parsed = urlparse(params.artifact_store)
    if parsed.scheme == "s3":
        from pipeline.registry.s3 import S3Store  # importing boto3 takes a third of a second

        return S3Store(params)
    folder = Path(unquote(parsed.path)) if not parsed.netloc else root / unquote(parsed.netloc + parsed.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the artifact store {folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise StoreError(f"the artifact store {folder} is not writable")
    return FileStore(folder)


def upload(store: ArtifactStore, files: dict[str, Path]) -> tuple[dict[str, Entry], int]:
    """Upload `files` (manifest name → file) that the store lacks; returns the manifest entries and the bytes sent."""
    store.probe()
    stamps = {path: _stamp(path) for path in files.values()}
    with ThreadPoolExecutor(2) as pool:
        digests = dict(zip(files, pool.map(sha256_file, files.values()), strict=True))
    entries = {name: {"sha256": digests[name], "size": stamps[path][0]} for name, path in files.items()}
    present = set(store.list("objects/"))
    absent = {key: path for name, path in files.items() if (key := f"objects/{digests[name]}") not in present}
    size = sum(stamps[path][0] for path in absent.values())
    store.upload(list(absent.items()), _meter("publish", size))
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise StoreError(f"{path} changed while it was uploaded; publish again when nothing writes to it")
    return entries, size


def publish_manifest(store: ArtifactStore, version: str, text: bytes) -> None:
    """Make a version visible, after a check of its objects; an earlier publisher's manifest of this version stays."""
    key = f"versions/{version}/manifest.json"
    check_objects(store, json.loads(text)["files"])
    created = store.create(key, text)
    stored = store.read(key)
    if stored is None or (created and stored != text):
        raise StoreError(f"read back from {store.uri}, {key} has different content")
    check_objects(store, json.loads(stored)["files"])


def check_objects(store: ArtifactStore, entries: dict[str, Entry]) -> None:
    """Raises StoreError: an object that `entries` name is missing from the store, or has another size."""
    sizes = {stored.key: stored.size for stored in store.scan("objects/")}
    for name, entry in entries.items():
        key = f"objects/{entry['sha256']}"
        if key not in sizes:
            raise StoreError(f"{store.uri} has lost {key} ({name}); `retune publish` sends it again")
        if sizes[key] != entry["size"]:
            raise StoreError(f"{key} in {store.uri} ({name}) has {sizes[key]:,} bytes; expected {entry['size']:,}")


def fetch(store: ArtifactStore, manifest: dict[str, Any], names: Iterable[str], folder: Path, prefix: str = "") -> None:
    """Download files of a version to `folder/name`, without the `prefix` of their names.

    A file appears only if its digest is right. Files that are already there are checked, not downloaded again.

    Raises UnsafeFileError (versions do not ship such a file, or it may not be loaded) and StoreError (an object is
    missing or altered, a link would lead a file out of `folder`, or it cannot be written).
    """
    check_names(manifest["files"])
    targets = {folder / name.removeprefix(prefix): (name, manifest["files"][name]) for name in names}
    for path, (name, _) in targets.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"{name} would be written outside of {folder}; remove the link there that leads out of it")
    absent = {
        path: entry
        for path, (_, entry) in targets.items()
        if not (path.is_file() and sha256_file(path) == entry["sha256"])
    }
    progress = _meter("fetch", sum(entry["size"] for entry in absent.values()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary, ThreadPoolExecutor(2) as pool:
            partial = {path: Path(temporary) / str(number) for number, path in enumerate(absent)}
            store.download([(f"objects/{absent[path]['sha256']}", partial[path]) for path in absent], progress)
            for path, digest in zip(absent, pool.map(sha256_file, partial.values()), strict=True):
                if digest != absent[path]["sha256"]:
                    expected = f"its SHA-256 is {digest}; the manifest has {absent[path]['sha256']}"
                    raise StoreError(f"{targets[path][0]} in {store.uri} was altered: {expected}")
                path.parent.mkdir(parents=True, exist_ok=True)
                partial[path].replace(path)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; free space or allow writing there") from error
    for path in targets:
        try:
            check_file(path)
        except UnsafeFileError:
            path.unlink()
            raise


def _meter(stage: str, total: int) -> Callable[[int], None]:
    """A callback that adds up transferred bytes, from any thread, and prints the stage's progress."""
    progress, lock, start, done = Progress(stage, max(1, total // 10**6), "MB"), threading.Lock(), time.monotonic(), 0

    def add(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            rate = done / 1e6 / max(time.monotonic() - start, 1e-3)
            progress.update(done // 10**6, f"{rate:.1f} MB/s")

    return add


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
