"""The commands about published versions: publish, verify, promote, roll back, look at, download and delete them."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from pipeline.core.checks import as_json
from pipeline.registry.decisions import name_of
from pipeline.report.tables import WIDTH, verdict_lines, verdict_table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Version = Annotated[str | None, typer.Argument(help="v3, 3, champion or a version's id; else the workspace's.")]
Reason = Annotated[str, typer.Option(help="Kept in the history.")]


class CommandError(ValueError):
    """The options do not go together, or name nothing."""


def publish(json_output: Json = False) -> None:
    """Ship the workspace's artifacts as a version: store first, registry after."""
    from pipeline.publish import publish as do
    from pipeline.settings import load_params

    result = do(load_params().publish)
    signed = "signed" if result.signed else "unsigned"
    if json_output:
        print(json.dumps(asdict(result)))
    elif result.created:
        megabytes = f"{result.uploaded_bytes / 1e6:.1f} MB"
        print(f"publish: version {name_of(result.version, result.number)}, {megabytes} uploaded, {signed}")
    else:
        print(f"publish: already published as {name_of(result.version, result.number)}, {signed}")


def sign(version: Version = None, json_output: Json = False) -> None:
    """Sign a version that was published unsigned, after checking its files."""
    from pipeline.publish import sign as do

    params, _, registry, target = find(version)
    made = do(params.publish, target)
    if json_output:
        print(json.dumps({"version": target, "signed": made}))
    else:
        print(f"sign: version {registry.label(target)} {'is signed' if made else 'had a signature already'}")


def verify(version: Version = None, json_output: Json = False) -> None:
    """Check a version's signature, the digest of every file, and its lineage; exit status 1 when one fails."""
    from pipeline.registry.mlflow import RegistryError
    from pipeline.registry.verify import verify as do

    params, store, registry, target = find(version)
    try:
        registered = registry.tags(target)
    except RegistryError as error:
        print(f"warning: {error}", file=sys.stderr)
        registered = None
    checks = do(params.publish, store, target, registered)
    failed = [check.name for check in checks if check.passed is False]
    if json_output:
        print(json.dumps({"version": target} | as_json(checks)))
    else:
        words = {True: "passed", False: "FAILED", None: "not checked"}
        table = Table(
            "check", "result", "detail", title=f"Version {registry.label(target)}, id {target}", title_justify="left"
        )
        for check in checks:
            table.add_row(check.name, words[check.passed], check.detail)
        _print(table)
        print(f"verify: {', '.join(failed)} failed" if failed else "verify: nothing failed")
    if failed:
        raise typer.Exit(1)


def promote(
    version: Version = None,
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; needs --reason.")] = False,
    approve: Annotated[bool, typer.Option("--approve", help="Agree to the version that waits for approval.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Refuse the version that waits for approval.")] = False,
    reason: Reason = "",
    json_output: Json = False,
) -> None:
    """Make a version the champion if it is measurably better; a refusal (exit status 3) shows both numbers."""
    from pipeline.promote import approve as answer
    from pipeline.promote import promote as do
    from pipeline.report.whole import report_decision
    from pipeline.settings import load_params

    if force + approve + reject > 1:
        raise CommandError("--force, --approve and --reject exclude each other")
    if force and not reason.strip():
        raise CommandError("--force needs --reason: the history keeps why the gate was overruled")
    params = load_params()
    if approve or reject:
        decision = answer(params.publish, params.promote, version, approve, reason)
    else:
        decision = do(params.publish, params.promote, version, force=reason if force else None)
    decision.warnings.extend(report_decision(params.publish, decision.version, Path("artifacts")))
    _say(decision, json_output)
    if decision.decision == "proposed" and not json_output and sys.stdin.isatty():
        agreed = typer.confirm("Make it the champion?")
        why = reason or typer.prompt("Reason, kept in the history", default="", show_default=False)
        decision = answer(params.publish, params.promote, decision.version, agreed, why)
        _say(decision, json_output)
    if decision.champion != decision.version:
        raise typer.Exit(3)


def rollback(
    to: Annotated[str | None, typer.Option(help="The version to go back to; else the champion before.")] = None,
    reason: Reason = "rolled back by hand",
    json_output: Json = False,
) -> None:
    """Put the previous champion back."""
    from pipeline.promote import rollback as do
    from pipeline.settings import load_params

    params = load_params()
    record, warnings = do(params.publish, params.promote, to, reason)
    _warn(warnings)
    if json_output:
        print(json.dumps(asdict(record)))
    else:
        label = _registry(params).label
        print(f"rollback: {label(record.champion)} is champion again; it was {label(record.previous)}")


def history(
    number: Annotated[int | None, typer.Argument(min=1, help="One decision, with all its numbers.")] = None,
    json_output: Json = False,
) -> None:
    """Every decision: who, when, from which champion to which, why, and with which numbers."""
    from pipeline.promote import history as do
    from pipeline.registry.decisions import word_of
    from pipeline.registry.mlflow import RegistryError
    from pipeline.registry.verdict import in_short
    from pipeline.settings import load_params

    params = load_params()
    log, warnings = do(params.publish)
    _warn(warnings)
    if number is not None and number > len(log):
        raise CommandError(f"there are {len(log)} decisions, no number {number}")
    shown = log if number is None else [log[number - 1]]
    if json_output:
        print(json.dumps([asdict(record) for record in shown]))
        return
    if not log:
        print("history: nothing was decided yet; `retune run` trains, publishes and decides")
        return
    try:
        registered = _registry(params).numbers()
    except RegistryError:
        registered = {}

    def name(version: str | None) -> str:
        return "none" if version is None else name_of(version, registered.get(version))

    table = Table("#", "when (UTC)", "who", "decision", "version", "champion", "why", title_justify="left")
    for record in shown:
        by_gate = word_of(record) in ("promoted", "refused", "undecided", "proposed") and record.proposal is None
        table.add_row(
            str(record.number), record.time[:16].replace("T", " "), record.actor, word_of(record),
            name(record.version), name(record.champion) if record.previous != record.champion else "as before",
            (in_short(record.comparison) if by_gate else "") or record.reason,
        )  # fmt: skip
    _print(table)
    if number is not None:
        [record] = shown
        print(f"Champion {name(record.previous)} → {name(record.champion)}")
        print(f"Why      {record.reason}")
        _numbers(record.comparison, record.notes, record.overruled, record.previous is None)
        return
    print(f"champion: {name(log[-1].champion)}; `retune history NUMBER` shows one decision's numbers")


def download(
    version: Annotated[str, typer.Argument(help="v3, 3, champion or a version's id.")],
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is not there.")],
    part: Annotated[
        Literal["merged", "adapter", "all"],
        typer.Option(help="The model, the adapter, or everything with its signature."),
    ] = "merged",
    json_output: Json = False,
) -> None:
    """Put a version's model into FOLDER, every file checked; what is there already is kept."""
    from pipeline.registry import manifest as manifests
    from pipeline.registry import signature
    from pipeline.registry.card import auto_class
    from pipeline.registry.fetching import fetch_files
    from pipeline.registry.manifest import read_manifest
    from pipeline.registry.verify import require_signed

    params, store, registry, target = find(version)
    manifest = read_manifest(store, target)
    if manifest is None:
        raise CommandError(f"version {target} is not published in {store.uri}")
    require_signed(store, manifest, params.publish)
    if part == "all":
        fetch_files(store, manifest, manifest["files"], folder)
        data = manifests.encode(manifest)
        signed = signature.read_signature(store, target, data)
        (folder / "manifest.json").write_bytes(data)
        if signed is not None:
            (folder / "manifest.sig").write_bytes(signed)
    else:
        files = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{part}/")}
        fetch_files(store, manifest, {name.removeprefix(f"{part}/"): entry for name, entry in files.items()}, folder)
    if json_output:
        print(json.dumps({"version": target, "path": str(folder)}))
    else:
        print(f"download: version {registry.label(target)} in {folder}")
        if part == "merged":
            print(f'  {auto_class(manifest["params"]["train"])}.from_pretrained("{folder}") loads it as it was scored')


def delete(
    version: Annotated[str, typer.Argument(help="v3, 3 or a version's id.")],
    reason: Annotated[str, typer.Option(help="Kept in the history.")],
    json_output: Json = False,
) -> None:
    """Delete a version for good; the champion and a version that waits for approval are refused."""
    from pipeline.registry.retention import delete as do

    params, _, registry, target = find(version)
    name = registry.label(target)  # while it has one
    record = do(params.publish, target, reason)
    if json_output:
        print(json.dumps(asdict(record)))
    else:
        print(f"delete: version {name} is gone; `retune gc` collects the files that no other version has")


def prune(
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without it they are only listed.")] = False,
    json_output: Json = False,
) -> None:
    """List, and with --yes delete, the versions that publish.keep_versions and keep_champions do not keep."""
    from pipeline.registry.retention import delete as do
    from pipeline.registry.retention import outdated
    from pipeline.settings import load_params

    params = load_params()
    keep, versions = params.publish.keep_versions, outdated(params.publish)
    names = [_registry(params).label(version) for version in versions]  # while they have them
    if yes:
        for version in versions:
            do(params.publish, version, f"older than the newest {keep}")
    if json_output:
        print(json.dumps({"versions": versions, "deleted": yes}))
    elif not versions:
        print("prune: nothing to delete" + ("; publish.keep_versions is null" if keep is None else ""))
    else:
        print("\n".join(names))
        done = "deleted; `retune gc` collects their files" if yes else "would be deleted; `retune prune --yes` does it"
        print(f"prune: {len(versions)} versions {done}")


COMMANDS: list[Callable[..., None]] = [
    publish, sign, verify, promote, rollback, history, download, delete, prune,
]  # fmt: skip


def find(version: str | None) -> tuple[Any, Any, Any, str]:
    """Parameters, store, registry, and the content id of the version that was named."""
    from pipeline.registry.artifact_store import open_store
    from pipeline.registry.mlflow import resolve
    from pipeline.settings import load_params

    params = load_params()
    name = params.publish.registered_model_name
    store = open_store(params.publish)
    registry = _registry(params)
    return params, store, registry, resolve(version, store, registry, name, Path("."))


def _registry(params: Any) -> Any:
    from pipeline.registry.mlflow import open_registry

    return open_registry(params.publish)


def _say(decision: Any, json_output: bool) -> None:
    _warn(decision.warnings)
    if json_output:
        print(json.dumps(asdict(decision)))
        return
    from pipeline.registry.compare import BASE

    print("\n".join(verdict_lines(decision.title, decision.reason, decision.next)))
    _numbers(decision.comparison, decision.notes, [], decision.against == BASE)


def _numbers(comparison: dict[str, Any], notes: list[str], overruled: list[str], first: bool) -> None:
    if comparison:
        from pipeline.registry.verdict import P_NOTE

        _print(verdict_table(comparison, first))
        print(P_NOTE)
    for note in notes:
        print(f"note: {note}")
    for one in overruled:
        print(f"overruled: {one}")


def _print(table: Table) -> None:
    Console(width=WIDTH, highlight=False).print(table)


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
