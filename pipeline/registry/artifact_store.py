"""The artifact store: immutable objects by name, each created at most once. The interface, and a store in a folder.

Layout: `objects/<sha256>`; `versions/<version>/manifest.json`, written last, so a version without one does not exist;
`promotions/<model>/<number>.json`, the promotion log; `probe/`, for testing that creation is exclusive.
"""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.core.files import FULL_DISK

OBJECT = re.compile(r"objects/[0-9a-f]{64}")  # a shared bucket may have other files under `objects/`
Files = Sequence[tuple[str, Path]]  # keys, and the local files to upload or to write
PARTIAL = ".partial"  # suffix of a file whose write is in progress or was interrupted
Progress = Callable[[int], object]  # called with numbers of transferred bytes, from any thread


class StoreError(RuntimeError):
    """The store cannot be used, or its content is not what it should be."""


@dataclass(frozen=True, order=True)
class Stored:
    key: str
    size: int  # bytes
    modified: float  # seconds since 1970 by the store's own clock


class ArtifactStore(Protocol):
    """A store. Keys are names separated by `/`; a write creates an object, never replaces one. Errors are StoreErrors.

    After a failed creation the key is absent or complete.
    """

    uri: str

    def probe(self) -> None: ...  # checks that the store can be written and that creation is exclusive
    def create(self, key: str, data: bytes) -> bool: ...  # False if the key exists; nothing changes then
    def upload(self, files: Files, progress: Progress) -> None: ...  # creates the `objects/<sha256>` that are absent
    def read(self, key: str) -> bytes | None: ...  # None if the key does not exist
    def download(self, files: Files, progress: Progress) -> None: ...  # OSError: a local file cannot be written
    def scan(self, prefix: str) -> Sequence[Stored]: ...  # sorted by key
    def delete(self, key: str) -> None: ...  # not an error if the key does not exist
    def now(self) -> float: ...  # by the same clock as `Stored.modified`
    def unfinished(self, before: float, delete: bool = False) -> int: ...  # counts, deletes writes that never finished

    def list(self, prefix: str) -> list[str]:
        return [stored.key for stored in self.scan(prefix)]


def check_key(key: str) -> str:
    """Return `key` if it is a name that stays inside the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", key):
        raise StoreError(f"{key!r} is not a name for an object: letters, digits, '.', '_' and '-' between slashes")
    return key


class FileStore(ArtifactStore):
    """A store in a folder, for one machine or a shared disk; creation is atomic and exclusive through a hard link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = folder.resolve().as_uri()

    def probe(self) -> None:
        self.create("probe/done", b"")
        if self.create("probe/done", b""):
            raise StoreError(
                f"{self.uri} is on a file system where a hard link replaces an existing file, so two promotions could "
                "both succeed; use another publish.artifact_store"
            )

    def create(self, key: str, data: bytes) -> bool:
        return self._create(key, lambda partial: partial.write_bytes(data))

    def upload(self, files: Files, progress: Progress) -> None:
        for key, path in files:
            self._create(key, lambda partial, path=path: shutil.copyfile(path, partial))  # type: ignore[misc]
            progress(path.stat().st_size)

    def read(self, key: str) -> bytes | None:
        with self._store_errors(key, "read"):
            path = self.folder / check_key(key)
            return path.read_bytes() if path.exists() else None

    def download(self, files: Files, progress: Progress) -> None:
        for key, path in files:
            with self._store_errors(key, "read"):
                progress(shutil.copyfile(self.folder / check_key(key), path).stat().st_size)

    def scan(self, prefix: str) -> Sequence[Stored]:
        return sorted(stored for stored in self._files(prefix) if not stored.key.endswith(PARTIAL))

    def delete(self, key: str) -> None:
        with self._store_errors(key, "deleted"):
            (self.folder / check_key(key)).unlink(missing_ok=True)

    def now(self) -> float:
        with self._store_errors("a file", "written"), tempfile.NamedTemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime  # the server's clock if the folder is mounted

    def unfinished(self, before: float, delete: bool = False) -> int:
        partials = [file for file in self._files("") if file.key.endswith(PARTIAL) and file.modified < before]
        with self._store_errors("a partial file", "deleted"):
            for file in partials if delete else ():
                (self.folder / file.key).unlink(missing_ok=True)
        return len(partials)

    def _files(self, prefix: str) -> Iterator[Stored]:
        for folder, _, names in os.walk(self.folder / prefix.rpartition("/")[0]):
            for name in names:
                key = (Path(folder) / name).relative_to(self.folder).as_posix()
                with suppress(FileNotFoundError):  # a partial file that was finished or deleted in the meantime
                    stat = (self.folder / key).stat()
                    if key.startswith(prefix):
                        yield Stored(key, stat.st_size, stat.st_mtime)

    def _create(self, key: str, write: Callable[[Path], object]) -> bool:
        target = self.folder / check_key(key)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        with self._store_errors(key, "written"):
            if target.exists():
                return False
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                _sync(target.parent.parent)
            try:
                write(partial)
                _sync(partial)
                os.link(partial, target)
                # Without this, a power cut could keep a manifest and lose the objects it names.
                _sync(target.parent)
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
        return True

    @contextmanager
    def _store_errors(self, key: str, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if done == "read" and error.errno in FULL_DISK:
                raise  # of the disk that is downloaded to
            raise StoreError(f"{key} cannot be {done} in {self.uri}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
