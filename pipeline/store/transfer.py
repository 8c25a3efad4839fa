"""Files to a store's objects and back: parallel, in pieces of 16 MiB, only what the store lacks, every digest checked.

A file of up to 16 MiB is one object under its SHA-256. A bigger one is a list of extents of objects; its changed blocks
alone are sent when an earlier version has the rest. Refused: a file that changes while it is read, a damaged object.
"""

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.files import sha256_file
from pipeline.progress import Progress
from pipeline.store.artifact_store import ArtifactStore, StoreError
from pipeline.store.garbage import uploading

OBJECT_SIZE = 16 * 2**20  # bytes an object has at most; with max_concurrency the memory of a transfer
MAX_EXTENTS = 1000  # of a file; one that is more scattered is sent whole
BLOCK_DIGEST = 16  # bytes of XXH3-128, which finds unchanged blocks; what they are is proven by the file's SHA-256

# {"sha256", "size"}; a file over 16 MiB has "block_size" and "chunks" as well, the extents that it consists of:
# {"sha256": object, "offset", "size", "blocks": object with the digests of that object's blocks}
Entry = dict[str, Any]
Region = tuple[int, int]  # start and size in a file, bytes


@dataclass(frozen=True)
class Place:
    """Where a block is in the store."""

    object: str
    offset: int
    blocks: str


def block_size(size: int) -> int:
    """Bytes of a block in a file of `size`: the power of two that gives 8,192 to 16,384 blocks.

    A changed range touches at most two blocks more than it fills, 0.024 % of the file.
    """
    return int(2 ** (size.bit_length() - 14))


def ship(
    store: ArtifactStore, version: str, files: dict[str, Path], manifest: Callable[[dict[str, Entry]], bytes]
) -> int:
    """Make `files` (manifest name → file) the version `version`; returns the bytes of objects that were sent.

    `manifest` makes the manifest from the entries; it is written when every object is seen to be there, and read back.
    When another publisher of the same version was first, its manifest stands.

    Raises:
        StoreError: the store cannot be written, or does not hold what was written.
    """
    key = f"versions/{version}/manifest.json"
    with uploading(store) as in_time:
        entries, sent = upload(store, files)
        text = manifest(entries)
        check_objects(store, entries)
        in_time()
        created = store.create(key, text)
        found = store.read(key)
        if found is None or (created and found != text):
            raise StoreError(f"{key} was written to {store.uri}, but reads otherwise")
        check_objects(store, json.loads(found)["files"])
    return sent


def upload(store: ArtifactStore, files: dict[str, Path]) -> tuple[dict[str, Entry], int]:
    """Bring `files` (manifest name → file) into the store; returns the manifest's entries and the bytes that were sent.

    What the store has is not sent again, so an interrupted upload goes on where it stopped. Asks one listing for each
    1,000 objects.

    Raises:
        StoreError: the store cannot be written, or an object in it has another size than its content.
    """
    return _Upload(store, sum(path.stat().st_size for path in files.values())).run(files)


def check_objects(store: ArtifactStore, entries: dict[str, Entry]) -> None:
    """Every object that `entries` need is in the store, with its size.

    Raises:
        StoreError: one is missing or too short.
    """
    sizes = {stored.key: stored.size for stored in store.scan("objects/")}
    for name, entry in entries.items():
        for chunk in _extents(entry):
            key = f"objects/{chunk['sha256']}"
            if key not in sizes:
                raise StoreError(f"{store.uri} has lost {key}, a part of {name}")
            end = chunk["offset"] + chunk["size"]
            if sizes[key] < end or ("chunks" not in entry and sizes[key] != end):
                raise StoreError(f"{key} in {store.uri}, a part of {name}, has {sizes[key]:,} bytes; expected {end:,}")


def fetch(store: ArtifactStore, entries: dict[str, Entry], folder: Path) -> None:
    """Download files to `folder/name`; each appears when its digest is right. Those there already are not fetched.

    Raises:
        StoreError: an object is missing or altered, or a name leads out of the folder.
    """
    for name in entries:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"a file of the version is named {name}, which would lie outside of {folder}")
    wanted = {
        name: entry
        for name, entry in entries.items()
        if not ((folder / name).is_file() and sha256_file(folder / name) == entry["sha256"])
    }
    progress = Progress("fetch", _megabytes(sum(entry["size"] for entry in wanted.values())), "MB")
    done = 0
    with ThreadPoolExecutor(store.max_concurrency) as pool:
        # All ranges are queued at once; a file is hashed while those of the next ones arrive.
        coming: list[tuple[str, Path, list[Future[None]]]] = []
        try:
            for name, entry in wanted.items():
                coming.append((name, _partial(folder / name, entry["size"]), []))
                coming[-1][2].extend(_start_fetch(store, pool, coming[-1][1], entry))
            for name, partial, parts in coming:
                for part in parts:
                    part.result()
                actual = sha256_file(partial)
                if actual != wanted[name]["sha256"]:
                    raise StoreError(
                        f"{name} in {store.uri} was altered: its content has digest {actual}, "
                        f"its manifest says {wanted[name]['sha256']}"
                    )
                partial.replace(folder / name)
                done += wanted[name]["size"]
                progress.update(_megabytes(done))
        finally:
            pool.shutdown(cancel_futures=True)
            for _, partial, _ in coming:
                partial.unlink(missing_ok=True)


def _partial(target: Path, size: int) -> Path:
    """An empty file of `size` beside `target`, under a name of its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as file:
        file.truncate(size)
    return partial


def _start_fetch(
    store: ArtifactStore, pool: ThreadPoolExecutor, partial: Path, entry: Entry
) -> Iterator["Future[None]"]:
    at = 0
    for chunk in _extents(entry):
        for start in range(0, chunk["size"], OBJECT_SIZE):
            size = min(OBJECT_SIZE, chunk["size"] - start)
            yield pool.submit(_fetch_part, store, chunk["sha256"], chunk["offset"] + start, size, partial, at)
            at += size


def _fetch_part(store: ArtifactStore, digest: str, start: int, size: int, partial: Path, at: int) -> None:
    data = store.read(f"objects/{digest}", start, size)
    if data is None:
        raise StoreError(f"{store.uri} has no objects/{digest}")
    if len(data) != size:
        raise StoreError(f"objects/{digest} in {store.uri} was altered: it ends at byte {start + len(data):,}")
    with partial.open("rb+") as file:
        file.seek(at)
        file.write(data)


class _Upload:
    """One upload: what the store has, what was sent, how far it is."""

    def __init__(self, store: ArtifactStore, total: int) -> None:
        self.store = store
        store.probe()
        self.known = {stored.key: stored.size for stored in store.scan("objects/")}
        self.earlier = _latest_entries(store)
        self.lock = threading.Lock()
        self.sent = self.done = 0  # bytes that went to the store, bytes that are dealt with
        self.progress = Progress("publish", _megabytes(total), "MB")
        self.began = time.monotonic()

    def run(self, files: dict[str, Path]) -> tuple[dict[str, Entry], int]:
        before = {path: _stamp(path) for path in files.values()}
        with ThreadPoolExecutor(self.store.max_concurrency) as pool:
            try:
                pending = [(name, self._start(pool, name, path)) for name, path in files.items()]
                entries = {name: each.entry() for name, each in pending}
            finally:
                pool.shutdown(cancel_futures=True)
        for path, stamp in before.items():
            if _stamp(path) != stamp:
                raise StoreError(f"{path} changed while it was uploaded; publish again when nothing writes to it")
        return entries, self.sent

    def _start(self, pool: ThreadPoolExecutor, name: str, path: Path) -> "_Pending":
        size = path.stat().st_size
        if size <= OBJECT_SIZE:
            return _Pending(size, 0, pool.submit(self._send, path, [(0, size)], 0), [])
        block = block_size(size)
        digest = pool.submit(lambda: (sha256_file(path), ""))
        packs: list[list[Region]] = []  # what each new object consists of
        parts: list[tuple[Place | int, int, int]] = []  # in the order of the file: where, offset there, size
        free = 0  # bytes that the last pack still takes
        for place, start, length in self._runs(pool, name, path, size, block):
            if place is not None:
                parts.append((place, place.offset, length))
                self._progressed(length)
                continue
            end = start + length
            while start < end:
                if not free:
                    packs.append([])
                    free = OBJECT_SIZE
                taken = min(free, end - start)
                packs[-1].append((start, taken))
                parts.append((len(packs) - 1, OBJECT_SIZE - free, taken))
                start, free = start + taken, free - taken
        sent = [pool.submit(self._send, path, pack, block) for pack in packs]
        return _Pending(
            size, block, digest, [(sent[to] if isinstance(to, int) else to, at, length) for to, at, length in parts]
        )

    def _runs(
        self, pool: ThreadPoolExecutor, name: str, path: Path, size: int, block: int
    ) -> list[tuple[Place | None, int, int]]:
        """The file as runs (place, start, size) that the store has at `place`, or lacks: None."""
        whole: list[tuple[Place | None, int, int]] = [(None, 0, size)]
        earlier = _blocks(self.store, self.earlier.get(name, {}), block)
        if not earlier:
            return whole
        starts = range(0, size, OBJECT_SIZE)
        windows = pool.map(lambda start: _block_digests(_read(path, [(start, OBJECT_SIZE)]), block), starts)
        runs: list[tuple[Place | None, int, int]] = []
        for number, digest in enumerate(digest for window in windows for digest in window):
            start = number * block
            length = min(block, size - start)
            place = earlier[number][1] if number < len(earlier) and earlier[number][0] == digest else None
            if runs and _continues(runs[-1], place):
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + length)
            else:
                runs.append((place, start, length))
        lacking = sum(length for place, _, length in runs if place is None)
        # A file that is mostly new, or scattered over many objects, is sent whole: it is read faster, and what the old
        # objects hold beside it need not be kept for ever.
        return runs if lacking <= size / 2 and len(runs) <= MAX_EXTENTS else whole

    def _send(self, path: Path, regions: list[Region], block: int) -> tuple[str, str]:
        """Regions of a file as one object; its digest, and that of the object with its blocks' digests."""
        data = _read(path, regions)
        digest = self._create(data)
        blocks = self._create(b"".join(_block_digests(data, block))) if block else ""
        self._progressed(len(data))
        return digest, blocks

    def _create(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        key = f"objects/{digest}"
        size = self.known.get(key)
        if size is None:
            if self.store.create(key, data):
                with self.lock:
                    self.sent += len(data)
        elif size != len(data):
            raise StoreError(f"{key} in {self.store.uri} is damaged: it has {size:,} bytes, expected {len(data):,}")
        return digest

    def _progressed(self, size: int) -> None:
        with self.lock:
            self.done += size
            rate = self.sent / 1e6 / max(time.monotonic() - self.began, 1e-3)
            self.progress.update(_megabytes(self.done), f"{rate:.1f} MB/s")


@dataclass(frozen=True)
class _Pending:
    """A file whose objects are under way."""

    size: int
    block: int  # 0: it is one object
    digest: "Future[tuple[str, str]]"
    extents: "list[tuple[Place | Future[tuple[str, str]], int, int]]"  # object, offset in it, size

    def entry(self) -> Entry:
        chunks: list[dict[str, Any]] = []
        for where, offset, size in self.extents:
            digest, blocks = (where.object, where.blocks) if isinstance(where, Place) else where.result()
            chunks.append({"sha256": digest, "offset": offset, "size": size, "blocks": blocks})
        entry: Entry = {"sha256": self.digest.result()[0], "size": self.size}
        return entry | ({"block_size": self.block, "chunks": chunks} if self.block else {})


def _continues(run: tuple[Place | None, int, int], place: Place | None) -> bool:
    before, _, size = run
    if before is None or place is None:
        return before is place
    return before.object == place.object and before.offset + size == place.offset


def _latest_entries(store: ArtifactStore) -> dict[str, Entry]:
    """The files of the newest version, which most likely has the blocks that did not change; else empty."""
    manifests = [stored for stored in store.scan("versions/") if stored.key.endswith("/manifest.json")]
    if not manifests:
        return {}
    try:
        entries: dict[str, Entry] = json.loads(store.read(max(manifests, key=lambda each: each.modified).key) or b"")
        return dict(entries["files"])
    except (ValueError, KeyError, TypeError):
        return {}  # damaged: nothing to build on, and none of this upload's business


def _blocks(store: ArtifactStore, entry: Entry, block: int) -> list[tuple[bytes, Place]]:
    """Digest and place of every block of a file that is in the store; empty when it has no blocks of that size."""
    try:
        return _blocks_of(store, entry["chunks"], block) if entry["block_size"] == block else []
    except (KeyError, TypeError, ValueError):
        return []  # an older or damaged manifest: the file is sent whole


def _blocks_of(store: ArtifactStore, chunks: list[dict[str, Any]], block: int) -> list[tuple[bytes, Place]]:
    found: list[tuple[bytes, Place]] = []
    indexes: dict[str, bytes] = {}
    for chunk in chunks:
        name = chunk["blocks"]
        if name not in indexes:
            if not re.fullmatch("[0-9a-f]{64}", name):
                raise ValueError(f"{name} is no digest")
            indexes[name] = store.read(f"objects/{name}") or b""
            if hashlib.sha256(indexes[name]).hexdigest() != name:
                return []
        for offset in range(chunk["offset"], chunk["offset"] + chunk["size"], block):
            at = offset // block * BLOCK_DIGEST
            found.append((indexes[name][at : at + BLOCK_DIGEST], Place(chunk["sha256"], offset, name)))
    return found


def _extents(entry: Entry) -> list[dict[str, Any]]:
    """The extents of objects that a file consists of; none for an empty file."""
    whole = [{"sha256": entry["sha256"], "offset": 0, "size": entry["size"]}]
    return entry.get("chunks", whole if entry["size"] else [])


def _block_digests(data: bytes, block: int) -> list[bytes]:
    view = memoryview(data)
    return [xxhash.xxh3_128_digest(view[start : start + block]) for start in range(0, len(data), block)]


def _read(path: Path, regions: list[Region]) -> bytes:
    with path.open("rb") as file:
        parts = []
        for start, size in regions:
            file.seek(start)
            parts.append(file.read(size))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _megabytes(size: int) -> int:
    return max(1, -(-size // 10**6))
