"""promote: makes a published version the champion if it is measurably better; refuses it, or leaves it open, if not.

Every decision, by the gate or by a person (approval, force, rollback), is one record of the promotion log; MLflow's
aliases and the webhooks follow. A version that is not published or was deleted cannot be promoted, nor one without a
trusted signature if `publish.require_signature` is on.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.http_client import HttpError, send
from pipeline.params import Params, PromoteParams
from pipeline.registry import decisions, gate, manifest, wording
from pipeline.registry.compare import UnfairError, compare, scoring_settings
from pipeline.registry.decisions import DecisionError, Record
from pipeline.registry.manifest import read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.verify import require_servable


@dataclass(frozen=True)
class Decision:
    decision: str  # promoted | refused | undecided | proposed | unchanged
    version: str
    number: str | None  # MLflow's version number; None if the registry cannot be reached
    champion: str | None  # the champion after the decision
    against: str  # what the candidate was compared with: a version, or "the base model"
    reason: str
    word: str  # the decision as people see it: also forced
    title: str  # the decision in a sentence
    next: str  # what to do now; empty if nothing
    comparison: dict[str, Any]  # see `gate.Comparison`
    notes: list[str] = field(default_factory=list)  # what readers of the numbers must know
    warnings: list[str] = field(default_factory=list)  # what failed after the decision, which stands


def require_ready(params: Params, root: Path = Path(".")) -> None:
    """Check before a training that the store can be written and that the champion is a model for the same task."""
    model = RegisteredModel(params.publish, root)
    model.store.probe()
    serving = model.champion()
    task = model.manifest(serving)["params"]["train"]["task"] if serving else params.train.task
    if task != params.train.task:
        raise gate.CompareError(
            f"train.task is {params.train.task}, but version {model.label(serving)}, the champion of {model.name}, is "
            f"a {task} model, and their scores cannot be compared; set publish.registered_model_name to another name"
        )


def promote(params: Params, version: str | None = None, root: Path = Path("."), force: str | None = None) -> Decision:
    """Decide on `version` (id or MLflow number), by default the version of the workspace's artifacts.

    `force`: the reason of a person who overrules the gate and earlier decisions; it is recorded with the numbers.
    What is deleted, not published, or unsigned although `publish.require_signature` is on, cannot be forced.
    """
    model = RegisteredModel(params.publish, root)
    version = model.find(version)

    def make_record(log: list[Record]) -> Record:
        decisions.refuse_deleted(log, version)
        candidate, serving = require_servable(model, version), decisions.champion(log)
        test_sha256 = scoring_settings(candidate, serving, root)["test_sha256"]
        why_settled = settled_reason(log, version, params.promote, test_sha256)
        if version == serving or (why_settled is not None and force is None):
            return Record(0, "unchanged", version, serving, serving, why_settled or "")
        comparison: gate.Comparison = {}
        notes = ["no numbers: candidate and champion were not compared"]
        overruled = [why_settled] if why_settled else []
        try:
            comparison, notes = compare(model, candidate, serving, params.promote)
            against = f"champion {model.label(serving)}" if serving else gate.BASE
            decision, reason = gate.decide(comparison), wording.why(comparison, against)
        except gate.CompareError as error:
            if force is None and not isinstance(error, UnfairError):
                raise
            decision, reason = "refused", str(error)
            overruled.insert(0, reason)
        if force is not None:
            refusals = [metric for metric, row in comparison.items() if row["passed"] is False]
            decision, reason, overruled = "promoted", force, [*refusals, *overruled]
        elif decision == "promoted" and params.promote.approval == "manual":
            decision = "proposed"
        winner = version if decision == "promoted" else serving
        record = Record(
            len(log) + 1, decision, version, winner, serving, reason, comparison, params.promote.gate(), notes=notes
        )
        overruled = overruled if force is not None else []
        return replace(record, manifest_sha256=manifest.digest(candidate), overruled=overruled, test_sha256=test_sha256)

    return _follow_up(model, params.promote.webhooks, model.append_decision(make_record))


def approve(
    params: Params, version: str | None = None, agreed: bool = True, reason: str = "", actor: str = "",
    root: Path = Path("."),
) -> Decision:  # fmt: skip
    """Record a person's answer to the proposal. Raises DecisionError: there is none, another, or another champion."""
    model = RegisteredModel(params.publish, root)
    version = model.find(version) if version is not None else None

    def make_record(log: list[Record]) -> Record:
        proposal, serving = decisions.proposed(log), decisions.champion(log)
        if proposal is None or version not in (None, proposal.version):
            waiting = f"version {model.label(proposal.version)}" if proposal else "no version"
            other = "" if version is None else f", not {model.label(version)}"
            advice = "if the champion has changed since, run `retune promote` again"
            raise DecisionError(f"{waiting} waits for approval{other}; {advice}")
        # A rejection needs no check: a version that may no longer be used can still be refused.
        if agreed and manifest.digest(require_servable(model, proposal.version)) != proposal.manifest_sha256:
            raise DecisionError(f"the manifest of {model.label(proposal.version)} was altered after it passed the gate")
        decision, winner = ("promoted", proposal.version) if agreed else ("refused", serving)
        because = reason or (f"approved: {proposal.reason}" if agreed else "not approved")
        record = replace(proposal, number=len(log) + 1, decision=decision, champion=winner, previous=serving)
        return replace(record, reason=because, actor=actor, time="", proposal=proposal.number)

    return _follow_up(model, params.promote.webhooks, model.append_decision(make_record))


def rollback(
    params: Params, to: str | None = None, reason: str = "rolled back by hand", root: Path = Path(".")
) -> tuple[Record, list[str]]:
    """Make the previous champion, or `to`, champion again. Raises DecisionError: it never was, or there is none."""
    model = RegisteredModel(params.publish, root)

    def make_record(log: list[Record]) -> Record:
        earlier, serving = decisions.champions(log)[:-1], decisions.champion(log)
        if to is None and not earlier:
            raise DecisionError(f"{model.name} has no earlier champion; see `retune history`")
        target = earlier[-1] if to is None else model.find(to)
        if target == serving:
            raise DecisionError(f"version {model.label(target)} is already the champion")
        if target not in {record.champion for record in log}:
            raise DecisionError(f"{model.label(target)} was never champion of {model.name}; use `retune promote`")
        decisions.refuse_deleted(log, target)
        digest = manifest.digest(require_servable(model, target))
        return Record(len(log) + 1, "rollback", target, target, serving, reason, manifest_sha256=digest)

    record = model.append_decision(make_record)
    return record, model.sync_registry(record.version)[1] + _send_to_webhooks(
        params.promote.webhooks, model.name, record
    )


def settled_reason(log: list[Record], version: str, params: PromoteParams, test_sha256: str) -> str | None:
    """Why there is nothing to decide about `version` on the test items with this digest; None if there is.

    The same gate does not refuse a version twice against the same champion, or leave it undecided twice on the same
    test items, and it does not promote a version that was rolled back.
    """
    serving = decisions.champion(log)
    if version == serving:
        return "it is the champion"
    if version in decisions.deleted(log):
        return f"it was deleted: {decisions.deleted(log)[version].reason}"
    if version in decisions.rolled_back(log):
        return f"it was rolled back; `retune rollback --to {version}` makes it champion again"
    same_gate = [r for r in log if r.version == version and r.previous == serving and r.gate == params.gate()]
    for earlier in reversed(same_gate):
        if earlier.decision == "refused":
            return f"refused before, and champion and gate are the same: {earlier.reason}"
        if earlier.decision == "undecided" and earlier.test_sha256 == test_sha256:
            return f"not decided before, and champion, gate and test items are the same: {earlier.reason}"
        if earlier.decision == "proposed" and earlier == decisions.proposed(log) and params.approval == "manual":
            return f"it waits for approval (`retune promote --approve`): {earlier.reason}"
    return None


def settled(params: Params, version: str, root: Path = Path(".")) -> str | None:
    """`settled_reason` of a published version. MLflow, which is slow, is used only if its aliases lag behind."""
    model = RegisteredModel(params.publish, root)
    log, candidate = model.log(), read_manifest(model.store, version)
    if version not in {record.version for record in log} and candidate is None:
        return None
    test_sha256 = scoring_settings(candidate, decisions.champion(log), root)["test_sha256"] if candidate else ""
    reason = settled_reason(log, version, params.promote, test_sha256)
    if reason is not None and not model.is_synced(log):
        model.sync_registry(version)
    return reason


def _follow_up(model: RegisteredModel, webhooks: list[str], record: Record) -> Decision:
    """Set the aliases, send the record to the webhooks, and describe the decision."""
    number, warnings = model.sync_registry(record.version)
    decisive: Record | None = record  # the decision that says what to do next
    if record.decision == "unchanged":
        earlier = [entry for entry in model.log() if entry.version == record.version]
        was_champion = record.version == record.champion or not earlier or earlier[-1].decision == "promoted"
        decisive = None if was_champion else earlier[-1]
    else:
        warnings += _send_to_webhooks(webhooks, model.name, record)
    name = f"v{number}" if number else record.version
    next_step = wording.next_step(decisive, name, model.manifest(record.version)) if decisive else ""
    serving = model.label(record.champion) if record.champion else None
    return Decision(
        decision=record.decision,
        version=record.version,
        number=number,
        champion=record.champion,
        against=record.previous or gate.BASE,
        reason=record.reason,
        word=record.word,
        title=wording.title(record.word, decisions.name_of(record.version, number), serving),
        next=next_step,
        comparison=record.comparison,
        notes=record.notes,
        warnings=warnings,
    )


def _send_to_webhooks(webhooks: list[str], name: str, record: Record) -> list[str]:
    """POST `record` to the URL in each environment variable; returns a warning, without the URL, for each failure."""
    warnings = []
    for variable in webhooks:
        url, problem = os.environ.get(variable, ""), ""
        if not url.startswith(("http://", "https://")):
            problem = "its value is not an http or https URL" if url else "it is not set"
        else:
            try:
                send(url, {"model": name} | asdict(record))
            except HttpError as error:
                unreachable = f"it cannot be reached ({type(error.__cause__).__name__})"
                problem = f"it answered with status {error.status}" if error.status else unreachable
        if problem:
            warnings.append(f"the decision was not sent to the webhook in {variable}: {problem}")
    return warnings
