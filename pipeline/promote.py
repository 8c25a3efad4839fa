"""promote: a published version in; it becomes champion if it is measurably better, or is refused with both numbers;
where the test items are too few to tell, nothing is decided.

Every change of the champion, by the gate, by a person's approval or force, or by a rollback, is one record of the
promotion log; the registry's aliases and the webhooks follow. Versions that are not published or were
deleted cannot be promoted, nor, where `publish.require_signature` is on, those without a trusted signature.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.files import WORK_DIR, read_json, write_json
from pipeline.params import PromoteParams, PublishParams
from pipeline.registry import compare as comparing
from pipeline.registry import gate, manifest, notify, verdict, verify
from pipeline.registry.artifact_store import ArtifactStore, open_store
from pipeline.registry.compare import BASE, CompareError, UnfairError
from pipeline.registry.decisions import (
    DecisionError,
    PromoteError,
    Record,
    append,
    champion,
    champions,
    name_of,
    proposed,
    read_log,
    refuse_deleted,
    rolled_back,
    word_of,
)
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.mlflow import ModelRegistry, RegistryError, resolve
from pipeline.registry.registration import register


@dataclass(frozen=True)
class Decision:
    decision: str  # promoted | refused | undecided | proposed | unchanged
    version: str
    number: str | None  # MLflow's version number; None while the registry cannot be reached
    champion: str | None  # version that serves after the decision
    against: str  # what the candidate was compared with: a version, or "the base model"
    reason: str
    word: str  # the decision as people call it: also forced
    title: str  # what was decided, in a sentence
    next: str  # what to do now; empty where there is nothing
    comparison: dict[str, Any]  # metric → candidate, champion, difference, low, high, p, verdict, …: `gate.Comparison`
    notes: list[str] = field(default_factory=list)  # what a reader of the numbers must know
    warnings: list[str] = field(default_factory=list)  # what did not work after the decision; nothing undoes it


def promote(
    publishing: PublishParams,
    params: PromoteParams,
    version: str | None = None,
    root: Path = Path("."),
    force: str | None = None,
) -> Decision:
    """Decide on `version` (content id, or MLflow number), by default the one that the workspace's artifacts are.

    `force`: the reason of a person who overrules gate and earlier decisions; the numbers are recorded beside it. It
    overrules neither a deletion nor `publish.require_signature`.

    Raises:
        PromoteError: no such version, or one that may not be promoted.
        CompareError: no fair comparison can be made.
        SignatureError: the version is unsigned or altered, and publish.require_signature is on.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name, root)
    candidate = resolve(version, store, registry, name, root)
    refuse_deleted(read_log(store, name), candidate)
    published = _published(store, candidate, publishing)
    while True:
        log = read_log(store, name)
        refuse_deleted(log, candidate)
        serving = champion(log)
        settled = settled_reason(log, candidate, params)
        if candidate == serving or (settled is not None and force is None):
            return _unchanged(store, registry, published, log, settled or "")
        against = f"champion {registry.label(serving)}" if serving else BASE
        comparison, notes, unfair = _compare(publishing, published, serving, params, root, force)
        failed = gate.refusals(comparison)
        reason = verdict.why(comparison, against) if comparison else unfair
        judged = gate.decision_on(comparison) if comparison and not unfair else "refused"
        passed = force is not None or judged == "promoted"
        waits = passed and force is None and params.approval == "manual"
        kind = "proposed" if waits else "promoted" if passed else judged
        record = Record(
            number=len(log) + 1,
            decision=kind,
            version=candidate,
            champion=candidate if kind == "promoted" else serving,
            previous=serving,
            reason=reason if force is None else force,
            comparison=comparison,
            gate=params.gate(),
            manifest_sha256=manifest.digest(published),
            overruled=[] if force is None else [*failed, *filter(None, [unfair, settled])],
            notes=notes,
        )
        made = append(store, name, record)
        if made is not None:
            return _decided(store, registry, publishing, params, published, made)
        # Another promoter wrote this record first; the champion may be another one now.


def approve(
    publishing: PublishParams,
    params: PromoteParams,
    version: str | None = None,
    agreed: bool = True,
    reason: str = "",
    actor: str = "",
    root: Path = Path("."),
) -> Decision:
    """A person's answer to the version that passed the gate and waits: it is promoted, or recorded as refused.

    Raises:
        PromoteError: no version waits, or another one than `version`, or the champion is not the one compared with.
        SignatureError: as for `promote`.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name, root)
    while True:
        log = read_log(store, name)
        waiting = proposed(log)
        wanted = resolve(version, store, registry, name, root) if version is not None else None
        if waiting is None or wanted not in (None, waiting.version):
            who = f"version {registry.label(waiting.version)}" if waiting else "no version"
            other = "" if wanted is None else f", not {registry.label(wanted)}"
            raise PromoteError(
                f"{who} waits for approval{other}; `retune promote` decides anew where the champion has changed since"
            )
        published = _published(store, waiting.version, publishing)
        if manifest.digest(published) != waiting.manifest_sha256:
            raise PromoteError(
                f"version {registry.label(waiting.version)} is not the one that passed: its manifest was altered"
            )
        serving = champion(log)
        record = replace(
            waiting,
            number=len(log) + 1,
            decision="promoted" if agreed else "refused",
            champion=waiting.version if agreed else serving,
            previous=serving,
            reason=reason or (f"approved: {waiting.reason}" if agreed else "not approved"),
            actor=actor,
            time="",
            proposal=waiting.number,
        )
        made = append(store, name, record)
        if made is not None:
            return _decided(store, registry, publishing, params, published, made)


def rollback(
    publishing: PublishParams,
    params: PromoteParams,
    to: str | None = None,
    reason: str = "rolled back by hand",
    root: Path = Path("."),
) -> tuple[Record, list[str]]:
    """Make the champion before this one (or version `to`) champion again; returns the record, and warnings.

    Raises:
        PromoteError: there is no earlier champion, or `to` never was one.
        SignatureError: as for `promote`.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name, root)
    while True:
        log = read_log(store, name)
        line = champions(log)
        if to is None and len(line) < 2:
            raise PromoteError(f"{name} has no champion before the present one; `retune history` lists the decisions")
        target = line[-2] if to is None else resolve(to, store, registry, name, root)
        if target == champion(log):
            raise PromoteError(f"version {registry.label(target)} is the champion already")
        if target not in {record.champion for record in log}:
            raise PromoteError(
                f"version {registry.label(target)} never was champion of {name}; `retune promote` decides on it first"
            )
        refuse_deleted(log, target)
        published = _published(store, target, publishing)
        record = Record(
            len(log) + 1, "rollback", target, target, champion(log), reason, manifest_sha256=manifest.digest(published)
        )
        made = append(store, name, record)
        if made is not None:
            _, warnings = _project(store, registry, [*log, made], target)
            return made, warnings + notify.tell(params.webhooks, name, made)


def history(publishing: PublishParams, root: Path = Path(".")) -> tuple[list[Record], list[str]]:
    """Every decision, oldest first, and warnings; puts the registry's aliases right on the way.

    A registry that is a file as the last call left it is not asked: loading MLflow takes two seconds.
    """
    store, name = open_store(publishing, root), publishing.registered_model_name
    log = read_log(store, name)
    if not log:
        return [], []
    marker, before = root / WORK_DIR / "aliases.json", _state_of_aliases(log, publishing, root)
    if marker.is_file() and read_json(marker) == before:
        return log, []
    try:
        registry = ModelRegistry(publishing.tracking_uri, name, root)
    except RegistryError as error:
        return log, [str(error)]
    warnings = _project(store, registry, log, log[-1].version)[1]
    # What was put right just now, or by another process meanwhile, is looked at once more next time.
    if before is not None and not warnings and before == _state_of_aliases(log, publishing, root):
        write_json(marker, before)
    return log, warnings


def _state_of_aliases(log: list[Record], publishing: PublishParams, root: Path) -> list[Any] | None:
    """What the aliases follow from and where they are kept; None for a registry that is no file."""
    database = root / publishing.tracking_uri.removeprefix("sqlite:///")
    if not publishing.tracking_uri.startswith("sqlite:///") or not database.is_file():
        return None
    files = [database, *database.parent.glob(f"{database.name}-*")]  # SQLite's journals
    return [len(log), log[-1].version, *sorted([file.name, file.stat().st_mtime_ns] for file in files)]


def settled_reason(log: list[Record], version: str, params: PromoteParams) -> str | None:
    """Why there is nothing to decide about `version`, or None when there is.

    Nothing is decided twice by the same gate against the same champion, and a version that was rolled back stays back.
    """
    serving = champion(log)
    if version == serving:
        return "it is the champion"
    try:
        refuse_deleted(log, version)
    except DecisionError as error:
        return str(error)
    if version in rolled_back(log):
        return f"it was rolled back; `retune rollback --to {version}` makes it champion again"
    same = [r for r in log if r.version == version and r.previous == serving and r.gate == params.gate()]
    for earlier in reversed(same):
        if earlier.decision == "refused":
            return f"refused before, and champion and gate are the same: {earlier.reason}"
        if earlier.decision == "undecided":
            return f"not decided before, and champion, gate and test items are the same: {earlier.reason}"
        if earlier.decision == "proposed" and earlier == proposed(log) and params.approval == "manual":
            return f"it waits for approval (`retune promote --approve`): {earlier.reason}"
    return None


def settled(publishing: PublishParams, params: PromoteParams, version: str, root: Path = Path(".")) -> str | None:
    """As `settled_reason`, for a published version; None when it is not published. Quick: asks no registry."""
    store = open_store(publishing, root)
    log = read_log(store, publishing.registered_model_name)
    if read_manifest(store, version) is None and version not in {record.version for record in log}:
        return None
    return settled_reason(log, version, params)


def _compare(
    publishing: PublishParams,
    published: Manifest,
    serving: str | None,
    params: PromoteParams,
    root: Path,
    force: str | None,
) -> tuple[dict[str, Any], list[str], str]:
    """The comparison, its notes, and why none is fair; who forces a promotion needs none."""
    try:
        return *comparing.compare(publishing, published, serving, params, root), ""
    except CompareError as error:
        if force is None and not isinstance(error, UnfairError):
            raise
        return {}, ["no numbers: candidate and champion were not compared"], str(error)


def _published(store: ArtifactStore, version: str, publishing: PublishParams) -> Manifest:
    found = read_manifest(store, version)
    if found is None:
        raise PromoteError(f"version {version} is not published in {store.uri}; `retune publish` does that")
    verify.require_intact(store, found, publishing)
    return found


def _decided(
    store: ArtifactStore,
    registry: ModelRegistry,
    publishing: PublishParams,
    params: PromoteParams,
    published: Manifest,
    made: Record,
) -> Decision:
    number, warnings = _project(store, registry, read_log(store, publishing.registered_model_name), made.version)
    warnings += notify.tell(params.webhooks, publishing.registered_model_name, made)
    word, name = word_of(made), name_of(made.version, number)
    return Decision(
        made.decision,
        made.version,
        number,
        made.champion,
        made.previous or BASE,
        made.reason,
        word,
        verdict.title(word, name, registry.label(made.champion) if made.champion else None),
        next_step(made, published, number),
        made.comparison,
        made.notes,
        warnings,
    )


def _unchanged(
    store: ArtifactStore, registry: ModelRegistry, published: Manifest, log: list[Record], reason: str
) -> Decision:
    version, serving = published["version"], champion(log)
    number, warnings = _project(store, registry, log, version)
    earlier = [record for record in log if record.version == version and version != serving]
    todo = next_step(earlier[-1], published, number) if earlier else ""
    said = verdict.title("unchanged", name_of(version, number), None)
    against = serving or BASE
    return Decision("unchanged", version, number, serving, against, reason, "unchanged", said, todo, {}, [], warnings)


def next_step(record: Record, published: Manifest, number: str | None) -> str:
    """What a person can do after the decision of `record` on the version `published`."""
    name = f"v{number}" if number else record.version
    return verdict.next_step(word_of(record), name, record.comparison, published, record.previous is None)


def _project(
    store: ArtifactStore, registry: ModelRegistry, log: list[Record], version: str
) -> tuple[str | None, list[str]]:
    """Make the registry say what the log says; returns `version`'s number there, and a warning if it cannot be reached.

    A version that the registry has lost is registered again from the store.
    """
    serving = champion(log)
    try:
        for wanted in {serving, version} - {None}:
            found = read_manifest(store, str(wanted))
            if found is not None:
                register(store, registry, found)
        registry.project(serving)
        return registry.numbers().get(version), []
    except RegistryError as error:
        return None, [f"{error}. The decision stands; the next command sets the aliases"]
