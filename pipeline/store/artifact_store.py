"""The artifact store: immutable objects by name, each created once or not at all. The interface, and the folder kind.

Layout: `objects/<sha256>`, `versions/<version>/manifest.json` (written last: a version without one does not exist),
`promotions/<model>/<number>.json`, the promotion log, `running/`, who uploads or sweeps (`garbage`), `probe/`.
Refused: names that could leave the store, and a store that does not create exclusively.
"""

import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from pipeline.params import PublishParams

FOLDERS = ("objects/", "versions/", "promotions/", "running/", "probe/")


class StoreError(RuntimeError):
    """The store cannot be used, or holds something else than it should."""


@dataclass(frozen=True)
class Stored:
    key: str
    size: int  # bytes
    modified: float  # seconds since 1970 by the store's own clock


class ArtifactStore(Protocol):
    """What Retune needs of a store. Keys are `/`-separated names; all writes are conditional creations.

    Every method raises StoreError, in a sentence, when the store cannot do it; after a failed `create` the key is
    either absent or whole.
    """

    uri: str
    max_concurrency: int  # transfers that it is worth running at once

    def probe(self) -> None:
        """Check that the store can be written and honours the condition that creations rest on."""

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` whole, unless the key exists: then nothing changes and the answer is False."""

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes | None:
        """The object's bytes, or `size` (at least 1) of them from `start`, fewer at its end; None: there is none."""

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`, sorted."""

    def scan(self, prefix: str) -> Sequence[Stored]:
        """As `list`, with sizes and times: one request for each 1,000 keys."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""

    def now(self) -> float:
        """The time by the clock that `Stored.modified` is told by."""

    def unfinished(self, before: float, delete: bool = False) -> Sequence[Stored]:
        """What writers that never finished left before the time `before`; invisible to every other method."""


def check_key(key: str) -> str:
    """`key`, if it is a name that stays inside a store.

    Raises:
        StoreError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", key):
        raise StoreError(f"{key!r} is no name for an object: letters, digits, '.', '_' and '-' between slashes")
    return key


class FileStore:
    """A store in a folder, for one machine or a shared disk; creation is atomic and exclusive through a hard link."""

    def __init__(self, folder: Path, max_concurrency: int = 4) -> None:
        self.folder = folder
        self.uri = folder.resolve().as_uri()
        self.max_concurrency = max_concurrency

    def probe(self) -> None:
        self.create("probe/done", b"")
        if self.create("probe/done", b""):
            raise StoreError(f"{self.uri} lies on a file system that replaces files when they are hard-linked again")

    def create(self, key: str, data: bytes) -> bool:
        target = self.folder / check_key(key)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        with self._explained(key, "written"):
            if target.exists():
                return False
            _make_folder(target.parent)
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(partial, target)
                # A name outlives a power cut only when its folder is on disk: a manifest must not precede its objects.
                _sync_folder(target.parent)
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
        return True

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes | None:
        path = self.folder / check_key(key)
        with self._explained(key, "read"):
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    return file.read(size)
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> list[str]:
        return [stored.key for stored in self.scan(prefix)]

    def scan(self, prefix: str) -> Sequence[Stored]:
        return sorted(
            (
                stored
                for stored in self._files(prefix)
                if not stored.key.endswith(".partial") and stored.key.startswith(prefix)
            ),
            key=lambda stored: stored.key,
        )

    def delete(self, key: str) -> None:
        with self._explained(key, "deleted"):
            (self.folder / check_key(key)).unlink(missing_ok=True)

    def now(self) -> float:
        with (
            self._explained("the time", "asked"),
            tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial") as file,
        ):
            return os.fstat(file.fileno()).st_mtime  # of the server, when the folder is a mounted one

    def unfinished(self, before: float, delete: bool = False) -> Sequence[Stored]:
        found = [stored for stored in self._files("") if stored.key.endswith(".partial") and stored.modified < before]
        if delete:
            for stored in found:
                with self._explained(stored.key, "deleted"):
                    (self.folder / stored.key).unlink(missing_ok=True)
        return found

    def _files(self, prefix: str) -> Iterator[Stored]:
        for folder, _, names in os.walk(self.folder / prefix.rpartition("/")[0]):
            for name in names:
                path = Path(folder) / name
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue  # a partial file that became whole, or was swept
                yield Stored(path.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime)

    @contextmanager
    def _explained(self, key: str, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{key} cannot be {done} in {self.uri}: {error.strerror or error}") from error


def open_store(params: PublishParams, root: Path = Path(".")) -> ArtifactStore:
    """The store at `artifact_store`: `s3://bucket/prefix`, `file://store` (a folder of the project) or an absolute one.

    Nothing is asked of an S3 server yet; `probe` does that, and every first write.

    Raises:
        StoreError: the folder cannot be made or written, or the URI names no bucket.
    """
    parsed = urlparse(params.artifact_store)
    if parsed.scheme == "s3":
        from pipeline.store.s3 import S3Store  # a store in a folder needs no boto3, which takes a third of a second

        return S3Store(params)
    folder = Path(unquote(parsed.path)) if not parsed.netloc else root / unquote(parsed.netloc + parsed.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the artifact store {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise StoreError(f"the artifact store {folder} is not writable")
    return FileStore(folder, params.max_concurrency)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
