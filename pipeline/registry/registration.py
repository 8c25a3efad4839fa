"""A version's entry in the model registry, made from the store alone."""

import csv
import tempfile
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlencode

from pipeline.registry import manifest as manifests
from pipeline.registry import signature
from pipeline.registry.artifact_store import ArtifactStore, StoreError
from pipeline.registry.decisions import read_log
from pipeline.registry.fetching import fetch_file
from pipeline.registry.manifest import Manifest, read_manifest
from pipeline.registry.mlflow import ModelRegistry, Registration
from pipeline.scoring.resampling import METRICS


def register(store: ArtifactStore, registry: ModelRegistry, manifest: Manifest) -> str:
    """The version's MLflow number; makes the entry, from the store alone, if the registry has none (any more).

    Versions that were decided on before it come first, so that the registries of two clones number them alike.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    number = registry.version_of(manifest["version"])
    if number is not None:
        return number
    known, decided = registry.numbers(), dict.fromkeys(each.version for each in read_log(store, manifest["name"]))
    for version in takewhile(lambda each: each != manifest["version"], decided):
        with suppress(StoreError):  # one that is damaged has no number here
            earlier = read_manifest(store, version) if version not in known else None
            if earlier is not None:
                registry.register(_registration(store, earlier))
    return registry.register(_registration(store, manifest))


def _registration(store: ArtifactStore, manifest: Manifest) -> Registration:
    """What MLflow shows of a version, read from the store: tags, parameters, final scores, curves and reports."""
    merged, git = manifest["metrics"]["merged"], manifest["git"]
    scores = {metric: merged[metric]["score"] for metric in METRICS if merged.get(metric)}
    data = manifests.encode(manifest)
    tags = {
        "base_model": manifest["base_model"]["name_or_path"],
        "base_digest": manifest["base_model"]["digest"][:16],
        "git_commit": git["commit"][:12] + ("-dirty" if git["dirty"] else ""),
        "data": " ".join(manifest["data"]["dvc_md5"].values()),
        "test_sha256": manifest["data"]["test_sha256"][:16],
        "train_rows": str(manifest["data"]["rows"]["train"]),
        "manifest_sha256": manifests.digest(manifest),
        "signed": str(signature.read_signature(store, manifest["version"], data) is not None).lower(),
    } | {metric: f"{score:.4f}" for metric, score in scores.items()}
    with tempfile.TemporaryDirectory() as folder:
        texts = {}
        for name in ("adapter/loss.csv", "evaluation/report.md", "README.md"):
            if name in manifest["files"]:
                fetch_file(store, manifest["files"][name], Path(folder) / name)
                texts[Path(name).name] = (Path(folder) / name).read_text(encoding="utf-8")
    return Registration(
        version=manifest["version"],
        source=_source(store, manifest),
        tags=tags,
        params=manifest["params"]["train"],
        metrics=scores,
        curve=_curve(texts.pop("loss.csv", "")),
        reports=texts,
    )


def _source(store: ArtifactStore, manifest: Manifest) -> str:
    """Where MLflow's clients find the version; for S3 with what they need to know of the server, never a credential."""
    known = manifest["params"]["publish"]
    options = {key: known[key] for key in ("endpoint_url", "region_name", "addressing_style") if known[key]}
    query = f"?{urlencode(options)}" if store.uri.startswith("s3:") else ""
    return f"retune-{store.uri}/versions/{manifest['version']}{query}"


def _curve(table: str) -> list[tuple[str, float, int]]:
    return [
        (key, float(row[key]), int(row["step"]))
        for row in csv.DictReader(table.splitlines())
        for key in ("loss", "validation_loss", "learning_rate", "grad_norm", "weight_change")
        if row.get(key)
    ]
