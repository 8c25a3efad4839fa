"""What no version needs any more, out of the store: finds it, says how much it is, deletes it when told to.

Never an object younger than a day by the store's clock, nor one that a file of any version or a record of the promotion
log names. Refused: to delete while somebody uploads, or when the champion's manifest is missing.

Uploads and sweeps exclude each other. An upload relies on objects that are there already and that no manifest names
yet; a sweep that read the manifests before it ended would take them away. So each first creates an object in
`running/` that says so, and only then looks for the other kind: whatever the order of events, one of them sees the
other. The upload waits, the sweep gives up. Neither needs the right to delete: `….done` ends what it names.
"""

import getpass
import json
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.store.artifact_store import ArtifactStore, Stored, StoreError
from pipeline.versions.decisions import champion, read_log

DAY_S = 24 * 3600
# How long a `running/` object counts when its process was killed. Both ends stop well before: no clock is that wrong.
LIFETIME_S = {"upload": DAY_S, "sweep": 3600}
POLL_S = 5.0
# In a bucket without a prefix other programs may have folders of these names: only our own keys are ours to delete.
OBJECT = re.compile(r"objects/[0-9a-f]{64}")
ENDED = re.compile(r"running/(upload|sweep)-[0-9a-f]{32}(\.done)?|probe/[0-9a-f]{32}.*")


class GarbageError(RuntimeError):
    """Nothing may be deleted now; nothing was."""


class UploadUnderWay(GarbageError):
    """A sweep must wait until an upload has ended."""


@dataclass(frozen=True)
class Garbage:
    objects: int
    bytes: int
    unfinished: int  # uploads that were never completed
    kept: int  # objects that stay
    deleted: bool


def collect(store: ArtifactStore, delete: bool) -> Garbage:
    """Find the objects that nothing needs, and delete them if `delete`.

    Raises:
        GarbageError: an upload is under way, or the log names a champion that has no manifest.
        StoreError: the store does not allow it.
    """
    if not delete:
        return _collect(store, None)
    with _running(store, "sweep") as deadline:
        for other in _alive(store, "upload"):
            raise UploadUnderWay(
                f"somebody uploads to {store.uri} ({_who(store, other)}); run this again when that is done. "
                "An upload that was killed counts for a day"
            )
        return _collect(store, deadline)


@contextmanager
def uploading(store: ArtifactStore) -> Iterator[Callable[[], None]]:
    """Around an upload, up to and including its manifest: no sweep takes away what it relies on.

    Yields what is to be called before the manifest is written; it raises StoreError when that took too long.
    """
    with _running(store, "upload") as deadline:
        told = False
        while _alive(store, "sweep"):
            if not told:
                print("publish: waiting for `retune gc --delete` to end", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL_S)

        def in_time() -> None:
            if time.monotonic() > deadline:
                raise StoreError("the upload took more than 12 hours; publish again, it goes on from there")

        yield in_time


def _collect(store: ArtifactStore, deadline: float | None) -> Garbage:
    yesterday = store.now() - DAY_S
    objects = [stored for stored in store.scan("objects/") if OBJECT.fullmatch(stored.key)]
    needed = _needed(store)
    old = [stored for stored in objects if stored.modified < yesterday and stored.key[8:] not in needed]
    ended = [*store.scan("running/"), *store.scan("probe/")]
    ended = [stored for stored in ended if stored.modified < yesterday and ENDED.fullmatch(stored.key)]
    unfinished = store.unfinished(yesterday, delete=deadline is not None)
    if deadline is not None:
        with ThreadPoolExecutor(store.max_concurrency) as pool:
            list(pool.map(lambda stored: _delete(store, stored, deadline), [*old, *ended]))
    return Garbage(len(old), sum(each.size for each in old), len(unfinished), len(objects) - len(old), bool(deadline))


def _delete(store: ArtifactStore, stored: Stored, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise GarbageError("the sweep took too long and stopped halfway; run it again for the rest")
    store.delete(stored.key)


def _needed(store: ArtifactStore) -> set[str]:
    """Every digest that a file of a version or a record of the promotion log names, in whatever field."""
    records = store.scan("promotions/")
    for name in {stored.key.split("/")[1] for stored in records}:
        serving = champion(read_log(store, name))
        if serving and store.read(f"versions/{serving}/manifest.json") is None:
            raise GarbageError(
                f"the champion of {name} is {serving}, but {store.uri} has no manifest of it; "
                "restore it, or put another version in its place by `retune rollback --to`"
            )
    with ThreadPoolExecutor(store.max_concurrency) as pool:
        texts = pool.map(lambda stored: store.read(stored.key), [*store.scan("versions/"), *records])
        return {digest.decode() for text in texts for digest in re.findall(rb"\b[0-9a-f]{64}\b", text or b"")}


@contextmanager
def _running(store: ArtifactStore, kind: str) -> Iterator[float]:
    """Say that this process uploads or sweeps; yields the monotonic time until which others surely heed it."""
    deadline = time.monotonic() + LIFETIME_S[kind] / 2
    key = f"running/{kind}-{uuid.uuid4().hex}"
    store.create(key, json.dumps({"by": f"{getpass.getuser()}@{socket.gethostname()}"}).encode())
    try:
        yield deadline
    finally:
        with suppress(StoreError):  # then it counts until it is too old, and what went wrong before is what matters
            store.create(f"{key}.done", b"")


def _alive(store: ArtifactStore, kind: str) -> list[Stored]:
    found = {stored.key: stored for stored in store.scan(f"running/{kind}-")}
    begun = [stored for key, stored in found.items() if not key.endswith(".done") and f"{key}.done" not in found]
    if not begun:
        return []
    since = store.now() - LIFETIME_S[kind]
    return [stored for stored in begun if stored.modified > since]


def _who(store: ArtifactStore, running: Stored) -> str:
    minutes = (store.now() - running.modified) / 60
    by = json.loads(store.read(running.key) or b"{}").get("by", "?")
    return f"{by}, since {minutes:.0f} minutes"
