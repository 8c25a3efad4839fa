"""Which versions and objects stay: deleting a version by hand, the policy for old ones, and the sweep of the store.

A deletion is a record of the promotion log first and the loss of the manifest afterwards, so it races fairly with every
promotion. The sweep removes objects that no file of a version and no record of the log names, seven days after they
were written, by the store's clock: these cover uploads whose manifest is still to come.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.params import PublishParams
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import OBJECT, ArtifactStore
from pipeline.registry.decisions import DecisionError, Record, champion, champions, deleted, proposed, read_log
from pipeline.registry.model import RegisteredModel

GRACE_S = 7 * 24 * 3600
REQUESTS = 8  # at once


@dataclass(frozen=True)
class Garbage:
    objects: int
    bytes: int
    unfinished: int  # uploads that were never completed
    kept: int  # objects that stay
    deleted: bool


def delete(publishing: PublishParams, version: str, reason: str, root: Path = Path(".")) -> Record:
    """Delete a version for good: recorded, then its manifest and registry entry go.

    Repeating it after a crash, or after an error of the registry, finishes what was begun.

    Raises:
        DecisionError: the version serves or waits for approval.
        StoreError: it does not exist.
    """
    model = RegisteredModel(publishing, root)
    version = model.find(version)

    def decide(log: list[Record]) -> Record:
        if earlier := deleted(log).get(version):
            return earlier
        if why := _used(log).get(version):
            raise DecisionError(f"version {model.label(version)} is {why}")
        model.manifest(version)
        serving = champion(log)
        return Record(len(log) + 1, "deleted", version, serving, serving, reason)

    record = model.decide(decide)
    model.store.delete(manifests.key_of(version))
    model.registry.forget(version)
    return record


def outdated(publishing: PublishParams, root: Path = Path(".")) -> list[str]:
    """The versions that `publish.keep_versions` and `keep_champions` do not keep, oldest first.

    Newest means the registry's numbers, not clocks; a version that the registry does not know is kept. Versions whose
    deletion was begun and not finished come first.
    """
    model = RegisteredModel(publishing, root)
    log, versions = model.log(), manifests.published_versions(model.store)
    unfinished = [version for version in versions if version in deleted(log)]
    if publishing.keep_versions is None:
        return unfinished
    numbers = model.registry.numbers()
    known = sorted((v for v in versions if v in numbers and v not in unfinished), key=lambda v: int(numbers[v]))
    kept = {*known[-publishing.keep_versions :], *champions(log)[-publishing.keep_champions :], *_used(log)}
    return unfinished + [version for version in known if version not in kept]


def collect(store: ArtifactStore, delete: bool) -> Garbage:
    """Find the objects that nothing needs, and delete them if `delete`.

    Raises:
        StoreError: the log names a champion that has no manifest, or the store does not allow it.
    """
    before = store.now() - GRACE_S
    objects = [stored for stored in store.scan("objects/") if OBJECT.fullmatch(stored.key)]
    needed = _needed_digests(store)
    old = [stored for stored in objects if stored.modified < before and stored.key[8:] not in needed]
    unfinished = store.unfinished(before, delete)
    if delete:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda stored: store.delete(stored.key), old))
    return Garbage(len(old), sum(each.size for each in old), unfinished, len(objects) - len(old), delete)


def _needed_digests(store: ArtifactStore) -> set[str]:
    """Every digest that a file of a version or a record of the promotion log names, in whatever field."""
    records = store.list("promotions/")
    for name in {key.split("/")[1] for key in records}:
        serving = champion(read_log(store, name))
        if serving:
            manifests.require_manifest(store, serving)  # with its manifest lost, a sweep would delete its objects
    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = pool.map(store.read, [*store.list("versions/"), *records])
        return {digest.decode() for text in texts for digest in re.findall(rb"\b[0-9a-f]{64}\b", text or b"")}


def _used(log: list[Record]) -> dict[str | None, str]:
    """The versions that must stay, and why."""
    waiting = proposed(log)
    used = {waiting.version: "waiting for approval; answer by `retune promote --reject` first"} if waiting else {}
    return used | {champion(log): "the champion; `retune rollback` or a promotion puts another in its place first"}
