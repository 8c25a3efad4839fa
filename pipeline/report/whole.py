"""The whole report of a version: base, champion, candidate and merged model, and what the gate decided.

`artifacts/report.html` and `.md` lie outside the stages' outputs, since no stage may read what comes after it:
everything is taken from the version's manifest, its files and the promotion log.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.files import WORK_DIR, read_json
from pipeline.core.graph import STAGES
from pipeline.core.progress import clock
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, open_store
from pipeline.registry.decisions import Record, read_log, word_of
from pipeline.registry.fetching import fetch_version
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.rescore import RescoreError, answer_prompts
from pipeline.registry.verdict import next_step, title
from pipeline.report.contents import (
    Contents,
    System,
    compare_items,
    contract_facts,
    data_facts,
    differences,
    evaluation_facts,
    gate_changes,
    read_curve,
    read_other_sets,
    read_prompts,
    training_facts,
)
from pipeline.report.evaluation_pages import write_report
from pipeline.scoring.resampling import read_scores

DECIDED = ("promoted", "refused", "undecided", "proposed")


class ReportError(RuntimeError):
    """There is nothing to report on."""


def report(params: PublishParams, version: str, folder: Path, root: Path = Path(".")) -> Contents:
    """Write the report of the published `version` into `folder`.

    Raises:
        ReportError: the version is not published.
        StoreError: a file of it is missing or altered.
    """
    store = open_store(params, root)
    manifest = read_manifest(store, version)
    if manifest is None:
        raise ReportError(f"version {version} is not published in {store.uri}; `retune run` makes and publishes one")
    log = read_log(store, params.registered_model_name)
    decided = [record for record in log if record.version == version and record.decision in DECIDED]
    registry = ModelRegistry(params.tracking_uri, params.registered_model_name, root)
    contents = _contents(store, manifest, decided[-1] if decided else None, registry, root)
    write_report(contents, folder)
    return contents


def report_decision(params: PublishParams, version: str, folder: Path, root: Path = Path(".")) -> list[str]:
    """`report`, for a decision that stands whatever becomes of its page; returns warnings."""
    try:
        report(params, version, folder, root)
    except (RuntimeError, ValueError, OSError) as error:
        return [f"the report could not be written: {error}"]
    return []


def _contents(
    store: ArtifactStore, manifest: Manifest, record: Record | None, registry: ModelRegistry, root: Path
) -> Contents:
    work = root / WORK_DIR / "versions" / manifest["version"]
    adapter, evaluation, parity = (
        fetch_version(store, manifest, part, work) for part in ("adapter", "evaluation", "parity")
    )
    metrics = read_scores(evaluation) | read_scores(parity)
    base = System("base", metrics["base"], pq.read_table(evaluation / "items.base.parquet"))
    candidate = System("adapter", metrics["adapter"], pq.read_table(evaluation / "items.adapter.parquet"))
    merged = System("merged", metrics["merged"], pq.read_table(parity / "items.merged.parquet"))
    settings = manifest["evaluation"]
    notes = list(record.notes) if record else []
    systems, old = [base, candidate, merged], base
    answered = {"base": (evaluation, "base")}
    if record is not None and record.previous is not None:
        champion = _champion(store, record.previous, settings, root)
        if champion is None:
            champion_name = registry.label(record.previous)
            notes.append(f"Champion {champion_name} is left out: its answers to these test items are not here.")
        else:
            old, systems = champion, [base, champion, candidate, merged]
        serving = read_manifest(store, record.previous)
        if serving is not None:
            folder = fetch_version(store, serving, "evaluation", root / WORK_DIR / "versions" / record.previous)
            answered["champion"] = (folder, "adapter")
            asked = [one.prompt for one in read_prompts({"adapter": (evaluation, "adapter")})]
            known = {one.prompt for one in read_prompts({"adapter": (folder, "adapter")})}
            if set(asked) - known:
                try:
                    limit = settings["params"]["max_new_tokens"]
                    answered["champion"] = (answer_prompts(record.previous, asked, limit, root), "merged")
                except RescoreError as error:
                    notes.append(str(error))
    changes = gate_changes(record.comparison) if record else []
    if not changes:
        changes = compare_items(merged, old, settings["params"]["bootstrap_samples"], settings["params"]["seed"])
    better, worse, best, worst = differences(merged, old)
    training = read_json(adapter / "training.json")
    version, word = manifest["version"], word_of(record) if record else "open"
    label, serving_now = registry.label(version), record.champion if record else None
    command = label.split(" ")[0]  # v4, or the id
    return Contents(
        about={"model": manifest["name"], "version": label, "published": manifest["created"][:10]}
        | ({"decided": record.time[:10]} if record else {}),
        title=title(word, label, registry.label(serving_now) if serving_now else None),
        verdict=record.reason if record else "",
        next=next_step(word, command, record.comparison if record else {}, manifest, not (record and record.previous)),
        decision=word,
        systems=systems,
        new=merged.name,
        old=old.name,
        changes=changes,
        better=better,
        worse=worse,
        best=best,
        worst=worst,
        curve=read_curve((adapter / "loss.csv").read_text(encoding="utf-8")),
        facts={
            "Version": _version_facts(manifest, record),
            "Data": data_facts(manifest["data"]) | manifest["data"]["dvc_md5"],
            "Time and cost": _cost_facts(manifest),
            "Template contract": contract_facts(read_json(adapter / "contract.json")),
            "Training": training_facts(training),
            "Evaluation": evaluation_facts(settings),
        },
        notes=notes,
        prompts=read_prompts(answered | {"adapter": (evaluation, "adapter")}),
        tables=read_other_sets(evaluation),
    )


def _champion(store: ArtifactStore, version: str, settings: dict[str, Any], root: Path) -> System | None:
    """The champion on the same items by the same settings: as published, or as the gate scored it again."""
    manifest = read_manifest(store, version)
    work = root / WORK_DIR / "versions" / version
    if manifest is not None and manifest["evaluation"] == settings:
        items = pq.read_table(fetch_version(store, manifest, "parity", work) / "items.merged.parquet")
        return System("champion", manifest["metrics"]["merged"], items)
    scored = work / "scored"
    if not (scored / "evaluation.json").is_file() or read_json(scored / "evaluation.json") != settings:
        return None
    from pipeline.scoring.items import scoring_params, summarise  # brings torch, which a report seldom needs

    items = pq.read_table(scored / "items.parquet")
    return System("champion", summarise(items, scoring_params(settings)), items)


def _version_facts(manifest: Manifest, record: Record | None) -> dict[str, str]:
    git = manifest["git"]
    facts = {
        "version": manifest["version"],
        "name": manifest["name"],
        "published": manifest["created"],
        "code": (git["commit"][:12] or "no git commit") + (", with changes" if git["dirty"] else ""),
    }
    if record is None:
        return facts
    return facts | {
        "compared with": record.previous or "the base model",
        "decided": record.time,
        "by": record.actor,
        "overruled": ", ".join(record.overruled) or "nothing",
        "gate": json.dumps(record.gate).replace('"', "").strip("{}"),
    }


def _cost_facts(manifest: Manifest) -> dict[str, str]:
    times = {
        stage: "not measured here" if seconds is None else clock(seconds)
        for stage, seconds in sorted(manifest["time"].items(), key=lambda item: STAGES.index(item[0]))
    }
    cost = manifest["cost"]
    price = "not priced: " + (
        "publish.price_per_hour is null" if cost["price_per_hour"] is None else "a stage was not timed here"
    )
    if cost["total"] is not None:
        price = f"{cost['total']:.2f} at {cost['price_per_hour']:g} an hour"
    return times | {"cost": price}
