"""Objects that no version needs any more: found, counted, and deleted when asked to.

An object stays for seven days after it was written, by the store's clock, and as long as a file of any version or a
record of the promotion log names its digest. The seven days cover uploads whose manifest is still to come.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.registry.artifact_store import OBJECT, ArtifactStore
from pipeline.registry.decisions import champion, read_log

GRACE_S = 7 * 24 * 3600
REQUESTS = 8  # at once


class GarbageError(RuntimeError):
    """Nothing may be deleted now; nothing was."""


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
        GarbageError: the log names a champion that has no manifest.
        StoreError: the store does not allow it.
    """
    before = store.now() - GRACE_S
    objects = [stored for stored in store.scan("objects/") if OBJECT.fullmatch(stored.key)]
    needed = _needed_digests(store)
    old = [stored for stored in objects if stored.modified < before and stored.key[8:] not in needed]
    unfinished = store.unfinished(before, delete)
    if delete:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda stored: store.delete(stored.key), old))
    return Garbage(len(old), sum(each.size for each in old), len(unfinished), len(objects) - len(old), delete)


def _needed_digests(store: ArtifactStore) -> set[str]:
    """Every digest that a file of a version or a record of the promotion log names, in whatever field."""
    records = store.scan("promotions/")
    for name in {stored.key.split("/")[1] for stored in records}:
        serving = champion(read_log(store, name))
        if serving and store.read(f"versions/{serving}/manifest.json") is None:
            raise GarbageError(
                f"the champion of {name} is {serving}, but {store.uri} has no manifest of it; "
                "restore it, or put another version in its place by `retune rollback --to`"
            )
    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = pool.map(lambda stored: store.read(stored.key), [*store.scan("versions/"), *records])
        return {digest.decode() for text in texts for digest in re.findall(rb"\b[0-9a-f]{64}\b", text or b"")}
