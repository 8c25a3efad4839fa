"""Two versions next to each other: scores, differences, parameters and data that differ, texts that changed most.

In come names of versions, or `workspace` for the present artifacts. Both are compared on the same test items: those
that they were published with, or where these differ the workspace's, on which a version is scored again. Nothing is
decided or published here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import graph
from pipeline.params import Params
from pipeline.registry import compare as comparing
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import open_store
from pipeline.registry.compare import CompareError
from pipeline.registry.manifest import Manifest
from pipeline.registry.mlflow import ModelRegistry, resolve
from pipeline.report.contents import Contents, System, compare_items, differences
from pipeline.report.tables import Row, number

WORKSPACE = "workspace"
OLD, NEW = "champion", "merged"  # the systems of the page; what they are called is in `Contents.labels`
SECTIONS = ("prepare", "train", "evaluate", "merge")


@dataclass(frozen=True)
class Side:
    label: str
    manifest: Manifest
    here: bool  # the workspace's, not a published version


def compare_versions(params: Params, old: str, new: str, root: Path = Path(".")) -> Contents:
    """`new` against `old`: v3, an id, champion or workspace.

    Raises:
        CompareError: one is not there, both are one, or they answered different test items.
        SignatureError: one has to be scored again, and publish.require_signature does not let it be loaded.
    """
    sides = [_side(params, name, root) for name in (old, new)]
    before, after = sides
    if before.manifest["version"] == after.manifest["version"]:
        raise CompareError(f"{old} and {new} are both version {before.manifest['version']}; name two")
    alike = before.manifest["evaluation"] == after.manifest["evaluation"]
    settings = after.manifest["evaluation"] if alike else comparing.settings_of(after.manifest, root)
    systems = [_system(params, side, key, settings, root) for side, key in zip(sides, (OLD, NEW), strict=True)]
    if systems[0].items.column("id").to_pylist() != systems[1].items.column("id").to_pylist():
        raise CompareError(f"{old} and {new} answered different test items; `retune run` makes those of today")
    options = settings["params"]["bootstrap_samples"], settings["params"]["seed"]
    changes = compare_items(systems[1], systems[0], *options)
    better, worse, best, worst = differences(systems[1], systems[0])
    labels = {OLD: before.label, NEW: after.label}
    primary = next((c for c in changes if c.metric == params.promote.primary_metric), changes[0] if changes else None)
    return Contents(
        about={"model": params.publish.registered_model_name, "compared": f"{after.label} against {before.label}"},
        title=f"{after.label} against {before.label}",
        verdict=""
        if primary is None
        else f"{primary.metric} is {primary.words} ({number(primary.metric, primary.old)} → "
        f"{number(primary.metric, primary.new)}); no gate was asked",
        decision="compared",
        systems=systems,
        new=NEW,
        old=OLD,
        changes=changes,
        better=better,
        worse=worse,
        best=best,
        worst=worst,
        curve=[],
        facts={},
        notes=_notes(before, after, settings),
        tables={
            "Parameters that differ": _differing(_parameters(before), _parameters(after), labels, "parameter"),
            "Data and code that differ": _differing(_origins(before), _origins(after), labels, "what"),
        },
        labels=labels,
    )


def as_json(contents: Contents) -> dict[str, Any]:
    """The same for scripts."""
    columns = ("new", "old", "difference", "low", "high")
    return {
        "old": contents.labels[OLD],
        "new": contents.labels[NEW],
        "test_items": contents.systems[-1].metrics["num_samples"],
        "better": contents.better,
        "worse": contents.worse,
        "same": contents.same,
        "metrics": {change.metric: {key: getattr(change, key) for key in columns} for change in contents.changes},
        "tables": contents.tables,
        "texts": {
            kind: [
                {"task": d.task, "prompt": d.prompt, "expected": d.reference, "old": d.old, "new": d.new} for d in some
            ]
            for kind, some in (("improved", contents.best), ("worsened", contents.worst))
        },
        "notes": contents.notes,
    }


def change_rows(contents: Contents) -> list[Row]:
    """The differences as text, a row for each metric."""
    return [
        {
            "metric": change.metric,
            contents.labels[OLD]: number(change.metric, change.old),
            contents.labels[NEW]: number(change.metric, change.new),
            "difference": number(change.metric, change.difference, "+"),
            "95 % interval": f"{number(change.metric, change.low, '+')} to {number(change.metric, change.high, '+')}",
            "": change.words,
        }
        for change in contents.changes
    ]


def _side(params: Params, name: str, root: Path) -> Side:
    if name == WORKSPACE:
        if not (root / "artifacts" / "parity" / "parity.json").is_file():
            raise CompareError("the workspace holds no scored model; `retune run` or `dvc repro` makes one")
        return Side(WORKSPACE, manifests.build(params.publish, graph.version_id(root), {}, root), True)
    store, model = open_store(params.publish, root), params.publish.registered_model_name
    registry = ModelRegistry(params.publish.tracking_uri, model, root)
    version = resolve(name, store, registry, model, root)
    manifest = manifests.read_manifest(store, version)
    if manifest is None:
        raise CompareError(f"version {version} is not published in {store.uri}; `retune history` lists those that are")
    return Side(registry.label(version), manifest, False)


def _system(params: Params, side: Side, key: str, settings: dict[str, Any], root: Path) -> System:
    items: pa.Table
    if side.here:
        items = pq.read_table(root / "artifacts" / "parity" / "items.merged.parquet")
    else:
        items = comparing.current_items(params.publish, side.manifest, settings, root)
    if side.manifest["evaluation"] == settings:
        return System(key, side.manifest["metrics"]["merged"], items)
    from pipeline.scoring.items import scoring_params, summarise  # brings torch

    return System(key, summarise(items, scoring_params(settings)), items)


def _notes(before: Side, after: Side, settings: dict[str, Any]) -> list[str]:
    notes = [
        f"{side.label} was published with other test items or another decoding and was scored again"
        for side in (before, after)
        if side.manifest["evaluation"] != settings
    ]
    shares = {side.manifest["params"]["prepare"]["test_fraction"] for side in (before, after)}
    if len(shares) > 1:
        notes.append(
            "prepare.test_fraction differs: the version with the smaller one may have been trained on some of these "
            "test items, which makes its scores too high"
        )
    return notes


def _parameters(side: Side) -> dict[str, Any]:
    return {
        name: value
        for section in SECTIONS
        for name, value in _flat(side.manifest["params"].get(section, {}), f"{section}.")
    }


def _origins(side: Side) -> dict[str, Any]:
    """Where a version comes from: rows, snapshot, base model, code and packages."""
    manifest = side.manifest
    packages = {f"{name} ({stage})": v for stage, names in manifest["packages"].items() for name, v in names.items()}
    return {
        **{f"{split} rows": count for split, count in manifest["data"]["rows"].items()},
        **{path: md5[:12] for path, md5 in manifest["data"]["dvc_md5"].items()},
        "test split": manifest["data"]["test_sha256"][:12],
        "base model": manifest["base_model"]["name_or_path"],
        "base digest": manifest["base_model"]["digest"][:12],
        "git commit": manifest["git"]["commit"][:12],
        **packages,
    }


def _flat(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _differing(before: dict[str, Any], after: dict[str, Any], labels: dict[str, str], what: str) -> list[Row]:
    missing = "–"
    return [
        {what: key, labels[OLD]: str(before.get(key, missing)), labels[NEW]: str(after.get(key, missing))}
        for key in dict.fromkeys([*before, *after])
        if before.get(key, missing) != after.get(key, missing)
    ]
