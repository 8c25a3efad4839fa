"""The commands about published versions: publish, verify, promote, roll back, compare, download and delete."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pipeline import promote as promotion
from pipeline import publish as shipping
from pipeline.core.checks import as_json
from pipeline.core.files import write_text
from pipeline.core.progress import counted
from pipeline.registry import retention
from pipeline.registry.card import auto_class
from pipeline.registry.decisions import name_of
from pipeline.registry.manifest import encode
from pipeline.registry.model import RegisteredModel
from pipeline.registry.signature import read_signature, require_signed
from pipeline.registry.stores import fetch
from pipeline.registry.verify import verify as verify_version
from pipeline.report.evaluation_pages import render
from pipeline.report.tables import WIDTH, in_short, show_decision, show_table, show_verdict
from pipeline.report.versus import compare_versions, comparison_json
from pipeline.report.whole import report_decision
from pipeline.settings import load_params

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Version = Annotated[str | None, typer.Argument(help="v3, 3, champion or a version's id; default: the workspace's.")]
Reason = Annotated[str, typer.Option(help="Recorded in the history.")]


class CommandError(ValueError):
    """Options that cannot be combined, or that name something that does not exist."""


def publish(json_output: Json = False) -> None:
    """Publish the workspace's artifacts as a version, and register it in MLflow."""
    result = shipping.publish(load_params().publish)
    name, signed = name_of(result.version, result.number), "signed" if result.signed else "unsigned"
    new = f"publish: version {name}, {result.uploaded_bytes / 1e6:.1f} MB uploaded, {signed}"
    answer(json_output, asdict(result), new if result.created else f"publish: already published as {name}, {signed}")


def sign(version: Version = None, json_output: Json = False) -> None:
    """Sign a version that was published unsigned, after checking its files."""
    params, model, version = find(version)
    signed = shipping.sign(params.publish, version)
    text = f"sign: version {model.label(version)} {'is signed' if signed else 'already has a signature'}"
    answer(json_output, {"version": version, "signed": signed}, text)


def verify(version: Version = None, json_output: Json = False) -> None:
    """Check a version's signature, the digest of every file, and its lineage; exit status 1 when one fails."""
    _, model, version = find(version)
    checks = verify_version(model, version)
    failed = [check.name for check in checks if check.passed is False]
    if json_output:
        print(json.dumps({"version": version} | as_json(checks)))
    else:
        words = {True: "passed", False: "FAILED", None: "not checked"}
        rows = [{"check": c.name, "result": words[c.passed], "detail": c.detail} for c in checks]
        show_table(rows, f"Version {model.label(version)}, id {version}")
        print(f"verify: {', '.join(failed)} failed" if failed else "verify: nothing failed")
    if failed:
        raise typer.Exit(1)


def promote(
    version: Version = None,
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; needs --reason.")] = False,
    approve: Annotated[bool, typer.Option("--approve", help="Approve the waiting version.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Reject the waiting version.")] = False,
    reason: Reason = "",
    json_output: Json = False,
) -> None:
    """Make a version the champion if it is measurably better; a refusal (exit status 3) shows both numbers."""
    if force + approve + reject > 1:
        raise CommandError("--force, --approve and --reject exclude each other")
    if force and not reason.strip():
        raise CommandError("--force needs --reason: the history keeps why the gate was overruled")
    params = load_params()
    if approve or reject:
        decision = promotion.approve(params, version, approve, reason)
    else:
        decision = promotion.promote(params, version, force=reason if force else None)
    decision.warnings.extend(report_decision(params.publish, decision.version, Path("artifacts")))
    _show_decision(decision, json_output)
    if decision.decision == "proposed" and not json_output and sys.stdin.isatty():
        agreed = typer.confirm("Make it the champion?")
        why = reason or typer.prompt("Reason, kept in the history", default="", show_default=False)
        decision = promotion.approve(params, decision.version, agreed, why)
        _show_decision(decision, json_output)
    if decision.champion != decision.version:
        raise typer.Exit(3)


def rollback(
    to: Annotated[str | None, typer.Option(help="The version to restore; default: the previous champion.")] = None,
    reason: Reason = "rolled back by hand",
    json_output: Json = False,
) -> None:
    """Make the previous champion, or another earlier one, champion again."""
    params, model = _load_model()
    record, warnings = promotion.rollback(params, to, reason)
    print_warnings(warnings)
    text = f"rollback: {model.label(record.champion)} is champion again, instead of {model.label(record.previous)}"
    answer(json_output, asdict(record), text)


def history(
    number: Annotated[int | None, typer.Argument(min=1, help="One decision, with all its numbers.")] = None,
    json_output: Json = False,
) -> None:
    """List all decisions: who, when, from which champion to which, why, and with which numbers."""
    _, model = _load_model()
    log = model.log()
    print_warnings(model.sync_registry(log[-1].version)[1] if log else [])
    if number is not None and number > len(log):
        raise CommandError(f"there is no decision {number}; the number of decisions is {len(log)}")
    records = log if number is None else [log[number - 1]]
    if json_output:
        print(json.dumps([asdict(record) for record in records]))
        return
    if not log:
        print("history: no decisions yet; `retune run` trains, publishes and decides")
        return

    name = model.registry.cached_name

    def row(record: Any) -> dict[str, str]:
        by_gate = record.word in ("promoted", "refused", "undecided", "proposed") and record.proposal is None
        return {
            "#": str(record.number),
            "when (UTC)": record.time[:16].replace("T", " "),
            "who": record.actor,
            "decision": record.word,
            "version": name(record.version),
            "champion": name(record.champion) if record.previous != record.champion else "as before",
            "why": (in_short(record.comparison) if by_gate else "") or record.reason,
        }

    show_table([row(record) for record in records])
    if number is None:
        print(f"champion: {name(log[-1].champion)}; `retune history NUMBER` shows one decision's numbers")
        return
    [record] = records
    print(f"Champion {name(record.previous)} → {name(record.champion)}\nWhy      {record.reason}")
    show_verdict(record.comparison, record.previous is None)
    for note in record.notes:
        print(f"note: {note}")
    for reason in record.overruled:
        print(f"overruled: {reason}")


def download(
    version: Annotated[str, typer.Argument(help="v3, 3, champion or a version's id.")],
    folder: Annotated[Path, typer.Argument(help="The folder; created if it does not exist.")],
    part: Annotated[
        Literal["merged", "adapter", "all"],
        typer.Option(help="The model, the adapter, or everything with its signature."),
    ] = "merged",
    json_output: Json = False,
) -> None:
    """Download a version's model into FOLDER and check every file; files that are already there are kept."""
    params, model, version = find(version)
    manifest = model.manifest(version)
    require_signed(model.store, manifest, params.publish)
    prefix = "" if part == "all" else f"{part}/"
    fetch(model.store, manifest, [name for name in manifest["files"] if name.startswith(prefix)], folder, prefix)
    if part == "all":
        (folder / "manifest.json").write_bytes(encode(manifest))
        if signature := read_signature(model.store, manifest):
            (folder / "manifest.sig").write_bytes(signature)
    text = f"download: version {model.label(version)} in {folder}"
    if part == "merged":
        model_class = auto_class(manifest["params"]["train"])
        text += f'\n  {model_class}.from_pretrained("{folder}") loads it as it was scored'
    answer(json_output, {"version": version, "path": str(folder)}, text)


def delete(
    version: Annotated[str, typer.Argument(help="v3, 3 or a version's id.")],
    reason: Annotated[str, typer.Option(help="Recorded in the history.")],
    json_output: Json = False,
) -> None:
    """Delete a version for good, unless it is the champion or waits for approval."""
    params, model, version = find(version)
    name = model.label(version)  # a deleted version has none
    record = retention.delete(params.publish, version, reason)
    text = f"delete: version {name} is deleted; `retune gc` deletes the files that no other version has"
    answer(json_output, asdict(record), text)


def prune(
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without it they are only listed.")] = False,
    json_output: Json = False,
) -> None:
    """List the versions beyond publish.keep_versions and keep_champions; --yes deletes them."""
    params, model = _load_model()
    keep, versions = params.publish.keep_versions, retention.outdated(params.publish)
    lines = [model.label(version) for version in versions]  # deleted versions have none
    for version in versions if yes else ():
        retention.delete(params.publish, version, f"older than the newest {keep}")
    result = (
        "deleted; `retune gc` deletes their files" if yes else "would be deleted; `retune prune --yes` deletes them"
    )
    nothing = "prune: nothing to delete" + "; publish.keep_versions is null" * (keep is None)
    lines.append(f"prune: {counted(len(versions), 'version')} {result}" if versions else nothing)
    answer(json_output, {"versions": versions, "deleted": yes}, "\n".join(lines))


def compare(
    old: Annotated[str, typer.Argument(help="v3, 3, champion, workspace or a version's id.")] = "champion",
    new: Annotated[str, typer.Argument(help="The version to compare with it.")] = "workspace",
    html: Annotated[Path | None, typer.Option(help="Also write it as a page, with every text.")] = None,
    json_output: Json = False,
) -> None:
    """Compare two versions: scores with intervals, parameters and data that differ, and answers that changed most."""
    from rich.markdown import Markdown  # importing it takes a tenth of a second

    contents = compare_versions(load_params(), old, new)
    if html is not None:
        write_text(html, render(contents, "report.html"))
    if json_output:
        print(json.dumps(comparison_json(contents), ensure_ascii=False))
        return
    Console(width=WIDTH, highlight=False).print(Markdown(render(contents, "report.md")))
    if html is not None:
        print(f"compare: {html} is the same as a page")


COMMANDS: list[Callable[..., None]] = [
    publish, sign, verify, promote, rollback, history, compare, download, delete, prune,
]  # fmt: skip


def find(version: str | None) -> tuple[Any, Any, str]:
    """The parameters, the registered model, and the id of the version named by `version`."""
    params, model = _load_model()
    return params, model, model.find(version)


def _load_model() -> tuple[Any, Any]:
    params = load_params()
    return params, RegisteredModel(params.publish)


def _show_decision(decision: promotion.Decision, json_output: bool) -> None:
    print_warnings(decision.warnings)
    if json_output:
        print(json.dumps(asdict(decision)))
    else:
        show_decision(asdict(decision))


def answer(json_output: bool, values: Any, text: str) -> None:
    print(json.dumps(values) if json_output else text)


def print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
