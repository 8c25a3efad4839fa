"""promote: a published version in; it becomes champion if it is measurably better, or is refused with both numbers;
where the test items are too few to tell, nothing is decided.

Every change of the champion, by the gate, by a person's approval or force, or by a rollback, is one record of the
promotion log; the registry's aliases and the webhooks follow. Versions that are not published or were
deleted cannot be promoted, nor, where `publish.require_signature` is on, those without a trusted signature.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.core.http_client import HttpError, send
from pipeline.params import Params, PromoteParams, PublishParams
from pipeline.registry import gate, manifest, wording
from pipeline.registry.compare import BASE, UnfairError, compare, settings_of
from pipeline.registry.decisions import (
    DecisionError,
    Record,
    champion,
    champions,
    deleted,
    name_of,
    proposed,
    refuse_deleted,
    rolled_back,
)
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.verify import servable


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


def require_ready(params: Params, root: Path = Path(".")) -> None:
    """Check before a training what would fail after it.

    Raises StoreError if the store cannot be written, CompareError if the champion under this name is another kind of
    model.
    """
    model = RegisteredModel(params.publish, root)
    model.store.probe()
    serving = model.champion()
    task = model.manifest(serving)["params"]["train"]["task"] if serving else params.train.task
    if task != params.train.task:
        raise gate.CompareError(
            f"train.task is {params.train.task}, but version {model.label(serving)}, the champion of {model.name}, is "
            f"a {task} model, and their scores cannot be compared; set publish.registered_model_name to another name"
        )


def promote(
    publishing: PublishParams,
    params: PromoteParams,
    version: str | None = None,
    root: Path = Path("."),
    force: str | None = None,
) -> Decision:
    """Decide on `version` (content id, or MLflow number), by default the one that the workspace's artifacts are.

    `force`: the reason of a person who overrules gate and earlier decisions; the numbers are recorded with it. It
    overrules neither a deletion nor `publish.require_signature`.

    Raises:
        DecisionError: the version was deleted, or the log cannot be read.
        StoreError: it is not published.
        CompareError: no fair comparison can be made.
        SignatureError: the version is unsigned or altered, and publish.require_signature is on.
    """
    model = RegisteredModel(publishing, root)
    version = model.find(version)

    def decide(log: list[Record]) -> Record:
        refuse_deleted(log, version)
        candidate, serving = servable(model, version), champion(log)
        test_sha256 = settings_of(candidate, serving, root)["test_sha256"]
        why_settled = settled_reason(log, version, params, test_sha256)
        if version == serving or (why_settled is not None and force is None):
            return Record(0, "unchanged", version, serving, serving, why_settled or "")
        return replace(_judge(model, candidate, log, params, force, why_settled), test_sha256=test_sha256)

    return _decided(model, params, model.decide(decide))


def _judge(
    model: RegisteredModel,
    candidate: Manifest,
    log: list[Record],
    params: PromoteParams,
    force: str | None,
    why_settled: str | None,
) -> Record:
    """The gate's decision on `candidate` against the champion, or that of the person who forces it."""
    version, serving = candidate["version"], champion(log)
    comparison: gate.Comparison = {}
    notes, overruled = ["no numbers: candidate and champion were not compared"], [why_settled] if why_settled else []
    try:
        comparison, notes = compare(model, candidate, serving, params)
        against = f"champion {model.label(serving)}" if serving else BASE
        decision, reason = gate.decide(comparison), wording.why(comparison, against)
    except gate.CompareError as error:
        if force is None and not isinstance(error, UnfairError):
            raise
        decision, reason = "refused", str(error)
        overruled.insert(0, reason)
    if force is not None:
        refusals = [metric for metric, row in comparison.items() if row["passed"] is False]
        decision, reason, overruled = "promoted", force, [*refusals, *overruled]
    elif decision == "promoted" and params.approval == "manual":
        decision = "proposed"
    return Record(
        number=len(log) + 1,
        decision=decision,
        version=version,
        champion=version if decision == "promoted" else serving,
        previous=serving,
        reason=reason,
        comparison=comparison,
        gate=params.gate(),
        manifest_sha256=manifest.digest(candidate),
        overruled=overruled if force is not None else [],
        notes=notes,
    )


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

    Raises DecisionError: no version waits, or another one, or it was compared with an earlier champion.
    """
    model = RegisteredModel(publishing, root)
    version = model.find(version) if version is not None else None

    def decide(log: list[Record]) -> Record:
        proposal, serving = proposed(log), champion(log)
        if proposal is None or version not in (None, proposal.version):
            who = f"version {model.label(proposal.version)}" if proposal else "no version"
            other = "" if version is None else f", not {model.label(version)}"
            anew = "`retune promote` decides anew where the champion has changed since"
            raise DecisionError(f"{who} waits for approval{other}; {anew}")
        # What became unservable while it waited can still be refused.
        if agreed and manifest.digest(servable(model, proposal.version)) != proposal.manifest_sha256:
            raise DecisionError(
                f"version {model.label(proposal.version)} is not the one that passed: its manifest was altered"
            )
        return replace(
            proposal,
            number=len(log) + 1,
            decision="promoted" if agreed else "refused",
            champion=proposal.version if agreed else serving,
            previous=serving,
            reason=reason or (f"approved: {proposal.reason}" if agreed else "not approved"),
            actor=actor,
            time="",
            proposal=proposal.number,
        )

    return _decided(model, params, model.decide(decide))


def rollback(
    publishing: PublishParams,
    params: PromoteParams,
    to: str | None = None,
    reason: str = "rolled back by hand",
    root: Path = Path("."),
) -> tuple[Record, list[str]]:
    """Make the champion before this one (or version `to`) champion again; returns the record, and warnings.

    Raises DecisionError: there is no earlier champion, or `to` never was one.
    """
    model = RegisteredModel(publishing, root)

    def decide(log: list[Record]) -> Record:
        line, serving = champions(log), champion(log)
        if to is None and len(line) < 2:
            raise DecisionError(f"{model.name} has no champion before the present one; see `retune history`")
        target = line[-2] if to is None else model.find(to)
        if target == serving:
            raise DecisionError(f"version {model.label(target)} is the champion already")
        if target not in {record.champion for record in log}:
            raise DecisionError(
                f"version {model.label(target)} never was champion of {model.name}; `retune promote` decides on it"
            )
        refuse_deleted(log, target)
        digest = manifest.digest(servable(model, target))
        return Record(len(log) + 1, "rollback", target, target, serving, reason, manifest_sha256=digest)

    record = model.decide(decide)
    return record, model.project(record.version)[1] + _tell(params.webhooks, model.name, record)


def history(publishing: PublishParams, root: Path = Path(".")) -> tuple[list[Record], list[str]]:
    """Every decision, oldest first, and warnings; puts the registry's aliases right on the way."""
    model = RegisteredModel(publishing, root)
    log = model.log()
    return log, model.project(log[-1].version)[1] if log else []


def settled_reason(log: list[Record], version: str, params: PromoteParams, test_sha256: str) -> str | None:
    """Why there is nothing to decide about `version` on the test items of this digest, or None when there is.

    Nothing is refused twice by the same gate against the same champion, nor left undecided twice on the same test
    items, and a version that was rolled back stays back.
    """
    serving = champion(log)
    if version == serving:
        return "it is the champion"
    if version in deleted(log):
        return f"it was deleted: {deleted(log)[version].reason}"
    if version in rolled_back(log):
        return f"it was rolled back; `retune rollback --to {version}` makes it champion again"
    same = [r for r in log if r.version == version and r.previous == serving and r.gate == params.gate()]
    for earlier in reversed(same):
        if earlier.decision == "refused":
            return f"refused before, and champion and gate are the same: {earlier.reason}"
        if earlier.decision == "undecided" and earlier.test_sha256 == test_sha256:
            return f"not decided before, and champion, gate and test items are the same: {earlier.reason}"
        if earlier.decision == "proposed" and earlier == proposed(log) and params.approval == "manual":
            return f"it waits for approval (`retune promote --approve`): {earlier.reason}"
    return None


def settled(publishing: PublishParams, params: PromoteParams, version: str, root: Path = Path(".")) -> str | None:
    """As `settled_reason`, for a version; None when it is not published.

    Quick: asks the registry only where a crash kept the last decision from its aliases; loading MLflow takes seconds.
    """
    model = RegisteredModel(publishing, root)
    log, candidate = model.log(), read_manifest(model.store, version)
    if version not in {record.version for record in log} and candidate is None:
        return None
    test_sha256 = settings_of(candidate, champion(log), root)["test_sha256"] if candidate else ""
    reason = settled_reason(log, version, params, test_sha256)
    if reason is not None and not model.projected(log):
        model.project(version)
    return reason


def _decided(model: RegisteredModel, params: PromoteParams, record: Record) -> Decision:
    """The record in words, after aliases and webhooks followed it."""
    number, warnings = model.project(record.version)
    asking: Record | None = record  # the decision that asks for something to be done now
    if record.decision == "unchanged":
        earlier = [each for each in model.log() if each.version == record.version]
        serves_or_served = record.version == record.champion or not earlier or earlier[-1].decision == "promoted"
        asking = None if serves_or_served else earlier[-1]
    else:
        warnings += _tell(params.webhooks, model.name, record)
    todo = ""
    if asking is not None:
        name, candidate = f"v{number}" if number else record.version, model.manifest(record.version)
        todo = wording.next_step(asking.word, name, asking.comparison, candidate, asking.previous is None)
    serving = model.label(record.champion) if record.champion else None
    return Decision(
        decision=record.decision,
        version=record.version,
        number=number,
        champion=record.champion,
        against=record.previous or BASE,
        reason=record.reason,
        word=record.word,
        title=wording.title(record.word, name_of(record.version, number), serving),
        next=todo,
        comparison=record.comparison,
        notes=record.notes,
        warnings=warnings,
    )


def _tell(webhooks: list[str], name: str, record: Record) -> list[str]:
    """POST `record` to the URL in each environment variable; returns a warning, without the URL, for each failure."""
    warnings = []
    for variable in webhooks:
        url, problem = os.environ.get(variable, ""), ""
        if urlparse(url).scheme not in ("http", "https"):
            problem = "it holds no http or https address" if url else "the variable is not set"
        else:
            try:
                send(url, {"model": name} | asdict(record))
            except HttpError as error:
                unreachable = f"it cannot be reached ({type(error.__cause__).__name__})"
                problem = f"it answered with status {error.status}" if error.status else unreachable
        if problem:
            warnings.append(f"the webhook in {variable} was not told of the decision: {problem}")
    return warnings
