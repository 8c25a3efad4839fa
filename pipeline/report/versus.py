"""Compares two versions: scores, the parameters and data that differ, and the texts that changed most.

`workspace` is the unpublished model in artifacts/. Both are compared on the test items that they were published with;
if these differ, on the workspace's, on which they are scored again. Nothing is decided or published here.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import graph
from pipeline.params import Params
from pipeline.registry import manifest as manifests
from pipeline.registry.compare import merged_items, scoring_settings
from pipeline.registry.gate import CompareError
from pipeline.registry.manifest import Manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.wording import number
from pipeline.report.contents import Contents, System
from pipeline.report.stage import flatten
from pipeline.report.tables import Row

WORKSPACE = "workspace"
DIGEST = re.compile("sha256|md5|digest|commit")
OLD, NEW = "champion", "merged"  # systems of the page; `Contents.labels` has their names


@dataclass(frozen=True)
class Side:
    label: str
    manifest: Manifest
    items: pa.Table | None = None  # of the workspace; those of a published version are fetched


def compare_versions(params: Params, old: str, new: str, root: Path = Path(".")) -> Contents:
    """Compare `new` with `old`: v3, an id, champion or workspace. Raises StoreError, SignatureError, CompareError."""
    model = RegisteredModel(params.publish, root)
    before, after = (_find_side(model, name) for name in (old, new))
    if before.manifest["version"] == after.manifest["version"]:
        raise CompareError(f"{old} and {new} are the same version, {before.manifest['version']}; name two versions")
    settings = after.manifest["evaluation"]
    if before.manifest["evaluation"] != settings:
        settings = scoring_settings(after.manifest, before.manifest["version"], root)
    systems = []
    for key, side in ((OLD, before), (NEW, after)):
        items = merged_items(model, side.manifest, settings) if side.items is None else side.items
        systems.append(scored_system(key, side.manifest, settings, items))
    if systems[0].items.column("id").to_pylist() != systems[1].items.column("id").to_pylist():
        raise CompareError(f"{old} and {new} answered different test items; run `retune run`, then compare again")
    labels = {OLD: before.label, NEW: after.label}
    old_values, new_values = (flatten(side.manifest["params"] | {"publish": {}}) for side in (before, after))
    contents = Contents.compare(
        systems,
        systems[0],
        settings["params"],
        about={"model": model.name, "compared": f"{after.label} against {before.label}"},
        title=f"{after.label} against {before.label}",
        verdict="",
        decision="compared",
        notes=_notes((before, after), settings),
        tables={
            "Parameters that differ": _differing_rows(old_values, new_values, labels, "parameter"),
            "Data and code that differ": _differing_rows(_origins(before), _origins(after), labels, "what"),
        },
        labels=labels,
    )
    verdict = "the gate was not asked"
    changes = {change.metric: change for change in contents.changes}
    if change := changes.get(params.promote.primary_metric) or next(iter(contents.changes), None):
        scores = f"{number(change.metric, change.old)} → {number(change.metric, change.new)}"
        verdict = f"{change.metric} is {change.direction} ({scores}); {verdict}"
    return replace(contents, verdict=verdict)


def scored_system(name: str, manifest: Manifest, settings: dict[str, Any], items: pa.Table) -> System:
    """A version's merged model with its scores on `items`, which were decoded with `settings`."""
    if manifest["evaluation"] == settings:
        return System(name, manifest["metrics"]["merged"], items)
    from pipeline.scoring.items import scoring_params, summarise  # imports torch

    return System(name, summarise(items, scoring_params(settings)), items)


def comparison_json(contents: Contents) -> dict[str, Any]:
    columns = ("new", "old", "difference", "low", "high")
    texts = {
        kind: [{"task": d.task, "prompt": d.prompt, "expected": d.reference, "old": d.old, "new": d.new} for d in rows]
        for kind, rows in (("improved", contents.best), ("worsened", contents.worst))
    }
    shared = {key: getattr(contents, key) for key in ("better", "worse", "same", "tables", "notes")}
    return shared | {
        "old": contents.labels[OLD],
        "new": contents.labels[NEW],
        "test_items": contents.items,
        "metrics": {change.metric: {key: getattr(change, key) for key in columns} for change in contents.changes},
        "texts": texts,
    }


def _find_side(model: RegisteredModel, name: str) -> Side:
    if name != WORKSPACE:
        version = model.find(name)
        return Side(model.label(version), model.manifest(version))
    parity = model.root / "artifacts" / "parity"
    if not (parity / "parity.json").is_file():
        raise CompareError("the workspace has no scored model; run `retune run` or `dvc repro`")
    manifest = manifests.build(model.params, graph.version_id(model.root), {}, model.root)
    return Side(WORKSPACE, manifest, pq.read_table(parity / "items.merged.parquet"))


def _notes(sides: tuple[Side, Side], settings: dict[str, Any]) -> list[str]:
    notes = [
        f"{side.label} was published with other test items or evaluation parameters, so it was scored again"
        for side in sides
        if side.manifest["evaluation"] != settings
    ]
    if len({side.manifest["params"]["prepare"]["test_fraction"] for side in sides}) > 1:
        notes.append(
            "prepare.test_fraction differs: the version with the smaller one may have been trained on some of these "
            "test items, so its scores may be too high"
        )
    return notes


def _origins(side: Side) -> dict[str, Any]:
    """Where a version comes from: rows, snapshot, base model, code and packages."""
    manifest = side.manifest
    origins = {key: manifest[key] for key in ("data", "base_model", "packages")} | {"commit": manifest["git"]["commit"]}
    return {key: value[:12] if DIGEST.search(key) else value for key, value in flatten(origins).items()}


def _differing_rows(before: dict[str, Any], after: dict[str, Any], labels: dict[str, str], title: str) -> list[Row]:
    return [
        {title: key, labels[OLD]: str(before.get(key, "–")), labels[NEW]: str(after.get(key, "–"))}
        for key in dict.fromkeys([*before, *after])
        if before.get(key, "–") != after.get(key, "–")
    ]
