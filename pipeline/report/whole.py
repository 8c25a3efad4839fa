"""The complete report of a version: base, champion, candidate, merged model, and the gate's decision.

It is made from the version's manifest, its files and the promotion log. No stage writes it, because it contains the
decision, which comes after the stages.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.core.graph import STAGES
from pipeline.core.progress import clock
from pipeline.params import PublishParams
from pipeline.registry.compare import merged_items
from pipeline.registry.decisions import Record
from pipeline.registry.gate import BASE, CompareError
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.wording import next_step, title
from pipeline.report.contents import Contents, System, gate_changes
from pipeline.report.evaluation_pages import write_report
from pipeline.report.stage import facts, file_parts, read_prompts
from pipeline.report.versus import scored_system
from pipeline.scoring.resampling import read_scores

DECISIONS = ("promoted", "refused", "undecided", "proposed")


def write_version_report(params: PublishParams, version: str, folder: Path, root: Path = Path(".")) -> Contents:
    """Write the report of the published `version` into `folder`. Raises StoreError: it is not published, or altered."""
    model = RegisteredModel(params, root)
    manifest = model.manifest(version)
    records = [record for record in model.log() if record.version == version and record.decision in DECISIONS]
    contents = _contents(model, manifest, records[-1] if records else Record(0, "open", version, None, None, ""))
    write_report(contents, folder)
    return contents


def report_decision(params: PublishParams, version: str, folder: Path, root: Path = Path(".")) -> list[str]:
    """`write_version_report` after a decision, which stands even if the report fails; returns warnings."""
    try:
        write_version_report(params, version, folder, root)
    except (RuntimeError, ValueError, OSError) as error:
        return [f"the report could not be written: {error}"]
    return []


def _contents(model: RegisteredModel, manifest: Manifest, record: Record) -> Contents:
    adapter, evaluation, parity = (model.fetch(manifest, part) for part in ("adapter", "evaluation", "parity"))
    scores, settings = read_scores(evaluation) | read_scores(parity), manifest["evaluation"]
    base, candidate, merged = (
        System(name, scores[name], pq.read_table(folder / f"items.{name}.parquet"))
        for name, folder in (("base", evaluation), ("adapter", evaluation), ("merged", parity))
    )
    old, systems, notes = base, [base, candidate, merged], list(record.notes)
    label = model.label(manifest["version"])
    about = {"model": manifest["name"], "version": label, "published": manifest["created"][:10]}
    version_facts = facts(manifest, "version", "name", "created", "git")
    parts = file_parts(adapter, evaluation, settings)
    if record.decision != "open":
        about["decided"] = record.time[:10]
        version_facts |= {
            "compared with": record.previous or BASE,
            "decided": record.time,
            "by": record.actor,
            "overruled": ", ".join(record.overruled) or "nothing",
            "gate": json.dumps(record.gate).replace('"', "").strip("{}"),
        }
    if record.previous is not None:
        champion = read_manifest(model.store, record.previous)
        try:
            if champion is None:
                raise CompareError("it is no longer in the store")
            champion_evaluation = model.fetch(champion, "evaluation")
            # Scores on the same items with the same settings: as published, or as the gate scored it again.
            items = merged_items(model, champion, settings, may_score=False)
            old = scored_system("champion", champion, settings, items)
            systems.insert(1, old)
            sources = {"base": (evaluation, "base"), "champion": (champion_evaluation, "adapter")}
            parts["prompts"] = read_prompts(sources | {"adapter": (evaluation, "adapter")})
        except CompareError as error:
            notes.append(f"Champion {model.label(record.previous)} is left out: {error}.")
    times = {stage: "not measured here" if (s := manifest["time"][stage]) is None else clock(s) for stage in STAGES}
    parts["facts"] = {
        "Version": version_facts,
        "Data": facts(manifest["data"], "rows", "test_sha256", "dvc_md5"),
        "Time and cost": times | facts(manifest, "cost"),
    } | parts["facts"]
    return Contents.compare(
        systems,
        old,
        settings["params"],
        about=about,
        title=title(record.word, label, model.label(record.champion) if record.champion else None),
        verdict=record.reason,
        next=next_step(record, label.split(" ")[0], manifest),
        decision=record.word,
        changes=gate_changes(record.comparison),
        notes=notes,
        **parts,
    )
