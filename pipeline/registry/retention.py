"""Deletes a version by hand, finds versions that are old by the policy, and deletes objects that nothing needs (`gc`).

A deletion is recorded in the promotion log before the manifest is deleted, so it cannot collide with a promotion. `gc`
deletes objects that no manifest and no record names, seven days after they were written (by the store's clock), so that
an upload has time to write its manifest.
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
REQUESTS = 8  # concurrent requests


@dataclass(frozen=True)
class Garbage:
    objects: int
    bytes: int
    unfinished: int  # uploads that were never completed
    kept: int  # other objects
    deleted: bool


def delete(publishing: PublishParams, version: str, reason: str, root: Path = Path(".")) -> Record:
    """Record the deletion of a version, then delete its manifest and its entry in the registry.

    Called again, it finishes a deletion that was interrupted. Raises StoreError: the version does not exist;
    DecisionError: it is the champion or waits for approval.
    """
    model = RegisteredModel(publishing, root)
    version = model.find(version)

    def make_record(log: list[Record]) -> Record:
        if earlier := deleted(log).get(version):
            return earlier
        if reason_to_keep := _in_use(log).get(version):
            raise DecisionError(f"version {model.label(version)} is {reason_to_keep}")
        model.manifest(version)
        serving = champion(log)
        return Record(len(log) + 1, "deleted", version, serving, serving, reason)

    record = model.append_decision(make_record)
    model.store.delete(manifests.manifest_key(version))
    model.registry.delete(version)
    return record


def outdated(publishing: PublishParams, root: Path = Path(".")) -> list[str]:
    """Interrupted deletions, and numbered versions that keep_versions and keep_champions do not keep, oldest first."""
    model = RegisteredModel(publishing, root)
    log, versions = model.log(), manifests.published_versions(model.store)
    interrupted = [version for version in versions if version in deleted(log)]
    if publishing.keep_versions is None:
        return interrupted
    numbers = model.registry.numbers()
    by_age = sorted((v for v in versions if v in numbers and v not in interrupted), key=lambda v: int(numbers[v]))
    keep = {*by_age[-publishing.keep_versions :], *champions(log)[-publishing.keep_champions :], *_in_use(log)}
    return interrupted + [version for version in by_age if version not in keep]


def collect(store: ArtifactStore, delete: bool) -> Garbage:
    """Find the objects that nothing needs; `delete` deletes them. Raises StoreError: a champion has no manifest."""
    before = store.now() - GRACE_S
    objects = [stored for stored in store.scan("objects/") if OBJECT.fullmatch(stored.key)]
    needed = _needed_digests(store)
    old = [stored for stored in objects if stored.modified < before and stored.key[8:] not in needed]
    unfinished = store.unfinished(before, delete)
    if delete:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda stored: store.delete(stored.key), old))
    return Garbage(len(old), sum(stored.size for stored in old), unfinished, len(objects) - len(old), delete)


def _needed_digests(store: ArtifactStore) -> set[str]:
    """Every digest in a manifest, a signature's file or a record of the promotion log, in any field."""
    records = store.list("promotions/")
    for name in {key.split("/")[1] for key in records}:
        if serving := champion(read_log(store, name)):
            manifests.require_manifest(store, serving)  # without its manifest, its objects would be deleted
    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = pool.map(store.read, [*store.list("versions/"), *records])
        return {digest.decode() for text in texts for digest in re.findall(rb"\b[0-9a-f]{64}\b", text or b"")}


def _in_use(log: list[Record]) -> dict[str | None, str]:
    """The versions that may not be deleted, and why."""
    proposal = proposed(log)
    in_use = {proposal.version: "waiting for approval; first run `retune promote --reject`"} if proposal else {}
    return in_use | {champion(log): "the champion; first promote another version or run `retune rollback`"}
