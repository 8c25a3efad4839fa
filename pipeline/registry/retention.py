"""Which versions stay: deleting one by hand, and the policy for old ones.

A deletion is a record of the promotion log first and the loss of the manifest afterwards, so it races fairly with every
promotion; objects that no manifest names any more are `retune gc`'s. The champion and a version that waits for
approval are refused.
"""

from pathlib import Path

from pipeline.params import PublishParams
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import Record, append, champion, champions, deleted, proposed, read_log
from pipeline.registry.manifest import published_versions
from pipeline.registry.mlflow import ModelRegistry, resolve


class RetentionError(RuntimeError):
    """The version is in use or not there; nothing was deleted."""


def delete(publishing: PublishParams, version: str, reason: str, root: Path = Path(".")) -> Record:
    """Delete a version for good: recorded, then its manifest and registry entry go.

    Repeating it after a crash, or after an error of the registry, finishes what was begun.

    Raises:
        RetentionError: the version serves, waits for approval, or does not exist.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name, root)
    while True:
        log = read_log(store, name)
        target = resolve(version, store, registry, name, root)
        made = deleted(log).get(target)
        if made is None:
            _refuse_used(log, target, registry)
            if store.read(manifests.key_of(target)) is None:
                raise RetentionError(f"version {target} is not published in {store.uri}")
            serving = champion(log)
            made = append(store, name, Record(len(log) + 1, "deleted", target, serving, serving, reason))
        if made is not None:
            store.delete(manifests.key_of(target))
            registry.forget(target)
            return made


def outdated(publishing: PublishParams, root: Path = Path(".")) -> list[str]:
    """The versions that `publish.keep_versions` and `keep_champions` do not keep, oldest first.

    Newest means the registry's numbers, not clocks; a version that the registry does not know is kept. Versions whose
    deletion was begun and not finished come first.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    log = read_log(store, name)
    here = published_versions(store)
    unfinished = [version for version in here if version in deleted(log)]
    if publishing.keep_versions is None:
        return unfinished
    numbers = ModelRegistry(publishing.tracking_uri, name, root).numbers()
    known = sorted((v for v in here if v in numbers and v not in unfinished), key=lambda v: int(numbers[v]))
    kept = set(known[-publishing.keep_versions :]) | set(champions(log)[-publishing.keep_champions :]) | _used(log)
    return unfinished + [version for version in known if version not in kept]


def _used(log: list[Record]) -> set[str]:
    waiting = proposed(log)
    return {v for v in (champion(log), waiting.version if waiting else None) if v is not None}


def _refuse_used(log: list[Record], version: str, registry: ModelRegistry) -> None:
    waiting = proposed(log)
    for used, what in (
        (champion(log), "the champion; `retune rollback` or a promotion puts another one in its place first"),
        (waiting.version if waiting else None, "waiting for approval; `retune promote --reject` answers that first"),
    ):
        if version == used:
            raise RetentionError(f"version {registry.label(version)} is {what}")
