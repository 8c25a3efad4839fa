"""The artifact store: immutable objects by name, each created once or not at all. The interface, and the folder kind.

Layout: `objects/<sha256>`, `versions/<version>/manifest.json` (written last: a version without one does not exist),
`promotions/<model>/<number>.json`, the promotion log, and `probe/`, by which a store shows that it creates exclusively.
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

OBJECT = re.compile(r"objects/[0-9a-f]{64}")  # in a shared bucket others may have a folder `objects/` too
Files = Sequence[tuple[str, Path]]  # keys and the files that hold, or are to hold, their bytes
PARTIAL = ".partial"  # how a file of a store in a folder ends whose write is under way, or was cut short
Progress = Callable[[int], object]  # is told bytes as they move, from any thread


class StoreError(RuntimeError):
    """The store cannot be used, or its content is not what it should be."""


@dataclass(frozen=True, order=True)
class Stored:
    key: str
    size: int  # bytes
    modified: float  # seconds since 1970 by the store's own clock


class ArtifactStore(Protocol):
    """What Retune needs of a store. Keys are `/`-separated names; all writes are conditional creations.

    Every method raises StoreError, in a sentence, when the store cannot do it; after a failed creation the key is
    either absent or whole.
    """

    uri: str

    def probe(self) -> None: ...  # the store can be written and honours the condition that creations rest on

    def create(self, key: str, data: bytes) -> bool: ...  # False, and nothing changed: the key exists

    def upload(self, files: Files, progress: Progress) -> None: ...  # creates those `objects/<sha256>` that are absent

    def read(self, key: str) -> bytes | None: ...  # None: there is no such object

    def download(self, files: Files, progress: Progress) -> None: ...

    def scan(self, prefix: str) -> Sequence[Stored]: ...  # sorted by key

    def delete(self, key: str) -> None: ...  # also of what is not there

    def now(self) -> float: ...  # by the clock that `Stored.modified` is told by

    def unfinished(self, before: float, delete: bool = False) -> int:
        """How many writes begun before the time `before` never finished; `delete` removes what they left."""
        ...

    def list(self, prefix: str) -> list[str]:
        return [stored.key for stored in self.scan(prefix)]


def check_key(key: str) -> str:
    """`key`, if it is a name that stays inside a store."""
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
            raise StoreError(f"{self.uri} is on a file system that replaces files when they are hard-linked again")

    def create(self, key: str, data: bytes) -> bool:
        return self._create(key, lambda partial: partial.write_bytes(data))

    def upload(self, files: Files, progress: Progress) -> None:
        for key, path in files:
            self._create(key, lambda partial, path=path: shutil.copyfile(path, partial))  # type: ignore[misc]
            progress(path.stat().st_size)

    def read(self, key: str) -> bytes | None:
        with self._explained(key, "read"):
            path = self.folder / check_key(key)
            return path.read_bytes() if path.exists() else None

    def download(self, files: Files, progress: Progress) -> None:
        for key, path in files:
            with self._explained(key, "read"):
                progress(shutil.copyfile(self.folder / check_key(key), path).stat().st_size)

    def scan(self, prefix: str) -> Sequence[Stored]:
        return sorted(stored for stored in self._files(prefix) if not stored.key.endswith(PARTIAL))

    def delete(self, key: str) -> None:
        with self._explained(key, "deleted"):
            (self.folder / check_key(key)).unlink(missing_ok=True)

    def now(self) -> float:
        with self._explained("a file", "written"), tempfile.NamedTemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime  # of the server, when the folder is a mounted one

    def unfinished(self, before: float, delete: bool = False) -> int:
        partials = [each for each in self._files("") if each.key.endswith(PARTIAL) and each.modified < before]
        with self._explained("a partial file", "deleted"):
            for stored in partials if delete else ():
                (self.folder / stored.key).unlink(missing_ok=True)
        return len(partials)

    def _files(self, prefix: str) -> Iterator[Stored]:
        for folder, _, names in os.walk(self.folder / prefix.rpartition("/")[0]):
            for name in names:
                key = (Path(folder) / name).relative_to(self.folder).as_posix()
                with suppress(FileNotFoundError):  # a partial file that became whole, or was swept
                    stat = (self.folder / key).stat()
                    if key.startswith(prefix):
                        yield Stored(key, stat.st_size, stat.st_mtime)

    def _create(self, key: str, write: Callable[[Path], object]) -> bool:
        target = self.folder / check_key(key)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        with self._explained(key, "written"):
            if target.exists():
                return False
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                _sync(target.parent.parent)
            try:
                write(partial)
                _sync(partial)
                os.link(partial, target)
                # A name outlives a power cut only when its folder is on disk: a manifest must not precede its objects.
                _sync(target.parent)
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
        return True

    @contextmanager
    def _explained(self, key: str, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{key} cannot be {done} in {self.uri}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
