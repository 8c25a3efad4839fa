"""The artifact store: immutable objects by name, each created once or not at all.

Layout: `objects/<sha256>`, `versions/<version>/manifest.json` (written last: a version without one does not exist) and
`promotions/<model>/<number>.json`, the promotion log.
"""

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from pipeline.files import sha256_file


class StoreError(RuntimeError):
    """The store cannot be used, or holds something else than it should."""


class ArtifactStore(Protocol):
    """What publish and promote need of a store. Keys are `/`-separated names; all writes are conditional creations."""

    uri: str

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` whole, unless the key exists: then nothing changes and the answer is False."""

    def upload(self, path: Path, key: str) -> bool:
        """As `create`, from a file of any size."""

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None when there is none."""

    def download(self, key: str, path: Path) -> None:
        """Write the object to `path`, which appears whole; StoreError when there is no such object."""

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""


class FileStore:
    """A store in a folder, for one machine or a shared disk; creation is atomic and exclusive through a hard link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = folder.resolve().as_uri()

    def create(self, key: str, data: bytes) -> bool:
        target = self._path(key)
        partial = self._partial(target)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._link(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def upload(self, path: Path, key: str) -> bool:
        target = self._path(key)
        if target.exists():
            return False
        partial = self._partial(target)
        try:
            shutil.copyfile(path, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            return self._link(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partial(path)
        try:
            shutil.copyfile(self._path(key), partial)
            partial.replace(path)
        except FileNotFoundError:
            raise StoreError(f"{self.uri} has no {key}") from None
        finally:
            partial.unlink(missing_ok=True)

    def list(self, prefix: str) -> list[str]:
        base = self.folder / prefix.rpartition("/")[0]
        keys = (path.relative_to(self.folder).as_posix() for path in base.rglob("*") if path.is_file())
        return sorted(key for key in keys if key.startswith(prefix) and not key.endswith(".partial"))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", key):
            raise StoreError(f"{key!r} is no name for an object: letters, digits, '.', '_' and '-' between slashes")
        return self.folder / key

    @staticmethod
    def _partial(target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")

    @staticmethod
    def _link(partial: Path, target: Path) -> bool:
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        return True


def open_store(uri: str, root: Path = Path(".")) -> ArtifactStore:
    """The store at `uri`: `file://store` is a folder of the project, `file:///srv/store` an absolute one.

    Raises:
        StoreError: the folder cannot be made or written.
    """
    parsed = urlparse(uri)
    if parsed.scheme != "file":
        raise StoreError(f"publish.artifact_store is {uri}; expected file://…")
    folder = Path(unquote(parsed.path)) if not parsed.netloc else root / unquote(parsed.netloc + parsed.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the artifact store {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise StoreError(f"the artifact store {folder} is not writable")
    return FileStore(folder)


def fetch_object(store: ArtifactStore, digest: str, path: Path) -> None:
    """Download `objects/<digest>` to `path` and check it.

    Raises:
        StoreError: it is missing or its bytes are not what its name says.
    """
    store.download(f"objects/{digest}", path)
    actual = sha256_file(path)
    if actual != digest:
        path.unlink()
        raise StoreError(f"objects/{digest} in {store.uri} was altered: its content has digest {actual}")
