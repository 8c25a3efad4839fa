"""promote: a published version in; it becomes champion if it is measurably better, or is refused with both numbers.

Candidate and champion are compared on the same frozen test items, by the scores of the merged models that would serve.
Scores that a version was published with count only if test split, decoding, metric signatures and library versions are
today's; else the version is fetched and scored again.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import graph
from pipeline.files import WORK_DIR, read_json, write_json
from pipeline.params import PromoteParams, PublishParams
from pipeline.process import python_ending_with_parent
from pipeline.publish import Manifest, fetch_version, read_manifest
from pipeline.registry import ModelRegistry, Record, append, champion, champions, read_log, rolled_back
from pipeline.statistics import corpus_score, group_of, metric_items, num_groups, paired_difference
from pipeline.store import ArtifactStore, open_store

RESAMPLES = 2000
MIN_GROUPS = 20  # independent test items (or groups of them) below which nothing is promoted


class PromoteError(RuntimeError):
    """The comparison cannot be made or the version is not there; the champion is as it was."""


@dataclass(frozen=True)
class Decision:
    decision: str  # promoted | refused | unchanged
    version: str
    number: str | None  # MLflow's version number
    champion: str | None  # version that serves after the decision
    against: str  # what the candidate was compared with: a version, or "the base model"
    reason: str
    comparison: dict[str, Any]  # metric → candidate, champion, difference, low, high, margin, passed


def promote(
    publishing: PublishParams, params: PromoteParams, version: str | None = None, root: Path = Path(".")
) -> Decision:
    """Decide on `version` (content id, or MLflow number), by default the one that the workspace's artifacts are.

    Raises:
        PromoteError: no such version, or the primary metric counts no test item.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name)
    candidate = _resolve(version, registry, root)
    manifest = read_manifest(store, candidate)
    if manifest is None:
        raise PromoteError(f"version {candidate} is not published in {store.uri}; `retune publish` does that")
    while True:
        log = read_log(store, name)
        serving = champion(log)
        settled = settled_reason(log, candidate, params)
        if settled is not None:
            registry.project(serving)
            return Decision("unchanged", candidate, registry.version_of(candidate), serving, serving or "", settled, {})
        comparison = compare(store, manifest, serving, params, root)
        refusals = [metric for metric, row in comparison.items() if not row["passed"]]
        against = serving or "the base model"
        reason = _reason(comparison, refusals, params, _label(serving, registry))
        record = Record(
            number=len(log) + 1,
            decision="refused" if refusals else "promoted",
            version=candidate,
            champion=serving if refusals else candidate,
            previous=serving,
            reason=reason,
            comparison=comparison,
            gate=params.model_dump(),
        )
        if append(store, name, record):
            registry.project(record.champion)
            number = registry.version_of(candidate)
            return Decision(record.decision, candidate, number, record.champion, against, reason, comparison)
        # Another promoter wrote this record first; the champion may be another one now.


def rollback(
    publishing: PublishParams, to: str | None = None, reason: str = "rolled back by hand", root: Path = Path(".")
) -> Record:
    """Make the champion before this one (or version `to`) champion again.

    Raises:
        PromoteError: there is no earlier champion, or `to` never was one.
    """
    store = open_store(publishing, root)
    name = publishing.registered_model_name
    registry = ModelRegistry(publishing.tracking_uri, name)
    while True:
        log = read_log(store, name)
        line = champions(log)
        if to is None and len(line) < 2:
            raise PromoteError(f"{name} has no champion before the present one; `retune history` lists the decisions")
        target = line[-2] if to is None else _resolve(to, registry, root)
        if target == champion(log):
            raise PromoteError(f"version {target} is the champion already")
        if target not in {record.champion for record in log}:
            raise PromoteError(f"version {target} never was champion of {name}; `retune promote` decides on it first")
        if read_manifest(store, target) is None:
            raise PromoteError(f"version {target} is no longer in {store.uri}")
        record = Record(len(log) + 1, "rollback", target, target, champion(log), reason)
        if append(store, name, record):
            registry.project(target)
            return read_log(store, name)[record.number - 1]


def history(publishing: PublishParams, root: Path = Path(".")) -> list[Record]:
    """Every decision, oldest first; puts the registry's alias right on the way."""
    log = read_log(open_store(publishing, root), publishing.registered_model_name)
    if log:
        ModelRegistry(publishing.tracking_uri, publishing.registered_model_name).project(champion(log))
    return log


def settled_reason(log: list[Record], version: str, params: PromoteParams) -> str | None:
    """Why there is nothing to decide about `version`, or None when there is.

    Nothing is decided twice by the same gate against the same champion, and a version that was rolled back stays back.
    """
    serving = champion(log)
    if version == serving:
        return "it is the champion"
    if version in rolled_back(log):
        return f"it was rolled back; `retune rollback --to {version}` makes it champion again"
    earlier = next((record for record in reversed(log) if record.version == version), None)
    if earlier is not None and earlier.previous == serving and earlier.gate == params.model_dump():
        return f"refused before, and champion and gate are the same: {earlier.reason}"
    return None


def settled(publishing: PublishParams, params: PromoteParams, version: str, root: Path = Path(".")) -> str | None:
    """As `settled_reason`, for a published version; None when it is not published. Quick: asks no registry."""
    store = open_store(publishing, root)
    if read_manifest(store, version) is None:
        return None
    return settled_reason(read_log(store, publishing.registered_model_name), version, params)


def compare(
    store: ArtifactStore, candidate: Manifest, serving: str | None, params: PromoteParams, root: Path = Path(".")
) -> dict[str, Any]:
    """Each gating metric: both scores, the paired difference with its 95 % interval, the margin, and whether it passes.

    The primary metric passes when the whole interval lies above `min_improvement`; a guard metric when it lies above
    minus its margin. Without a champion the base model that the candidate was tuned from stands in.
    """
    if serving is None:
        folder = root / WORK_DIR / "versions" / candidate["version"]
        ours = pq.read_table(fetch_version(store, candidate, "parity", folder) / "items.merged.parquet")
        theirs = pq.read_table(fetch_version(store, candidate, "evaluation", folder) / "items.base.parquet")
    else:
        manifest = read_manifest(store, serving)
        if manifest is None:
            raise PromoteError(f"the champion {serving} is no longer in {store.uri}; restore it, or roll back")
        ours = _current_items(store, candidate, root)
        theirs = _current_items(store, manifest, root)
    if ours.column("id").to_pylist() != theirs.column("id").to_pylist():
        raise PromoteError("candidate and champion answered different test items; run `retune run` to score both again")
    margins = {params.primary_metric: None} | {
        metric: margin for metric, margin in params.guard_metrics.items() if metric != params.primary_metric
    }
    result: dict[str, Any] = {}
    groups = group_of(ours)
    for metric, margin in margins.items():
        a, b = metric_items(ours, metric), metric_items(theirs, metric)
        difference = paired_difference(a, b, RESAMPLES, params.seed, groups)
        if difference.score != difference.score:  # NaN
            if margin is None:
                raise PromoteError(
                    f"promote.primary_metric is {metric}, but no test item counts for it; choose another"
                )
            continue
        independent = num_groups(a, groups)
        passed = difference.low > params.min_improvement if margin is None else difference.low >= -margin
        if margin is None and independent < MIN_GROUPS:
            passed = False  # an interval over a handful of items is narrower than the truth
        result[metric] = {
            "candidate": corpus_score(a),
            "champion": corpus_score(b),
            **{"difference" if key == "score" else key: value for key, value in asdict(difference).items()},
            "margin": margin,
            "items": num_groups(a),  # each item its own group
            "groups": independent,
            "passed": bool(passed),
        }
    return result


def _current_items(store: ArtifactStore, manifest: Manifest, root: Path) -> pa.Table:
    """A version's merged-model scores on the workspace's test split, measured again if what they rest on changed."""
    folder = root / WORK_DIR / "versions" / manifest["version"]
    wanted = read_json(root / "artifacts" / "parity" / "parity.json")["evaluation"]
    if manifest["parity"]["evaluation"] == wanted:
        return pq.read_table(fetch_version(store, manifest, "parity", folder) / "items.merged.parquet")
    scored = folder / "scored"
    if not (scored / "evaluation.json").is_file() or read_json(scored / "evaluation.json") != wanted:
        model = fetch_version(store, manifest, "merged", folder)
        settings = folder / "settings.json"
        write_json(settings, wanted)
        # A process of its own: promotion stays light, and the model's memory is returned when it ends.
        command = python_ending_with_parent(
            "pipeline",
            "score",
            str(model.resolve()),
            "--settings",
            str(settings.resolve()),
            "--output",
            str(scored.resolve()),
        )
        done = subprocess.run(command, cwd=root, env=graph.environment(), stdout=sys.stderr)
        if done.returncode != 0:
            raise PromoteError(f"version {manifest['version']} could not be scored again on today's test split")
    return pq.read_table(scored / "items.parquet")


def _resolve(version: str | None, registry: ModelRegistry, root: Path) -> str:
    if version is None:
        return graph.version_id(root)
    return registry.id_of(version) if version.removeprefix("v").isdigit() and len(version) < 10 else version


def _label(version: str | None, registry: ModelRegistry) -> str:
    if version is None:
        return "the base model"
    number = registry.version_of(version)
    return f"champion v{number}" if number else f"champion {version}"


def _reason(comparison: dict[str, Any], refusals: list[str], params: PromoteParams, against: str) -> str:
    def numbers(metric: str) -> str:
        row = comparison[metric]
        digits = 1 if metric == "bleu" else 3
        return (
            f"{metric} {row['candidate']:.{digits}f} against {row['champion']:.{digits}f} of {against} on "
            f"{row['items']} test items "
            f"(difference {row['difference']:+.{digits}f}, 95 % CI {row['low']:+.{digits}f} to "
            f"{row['high']:+.{digits}f})"
        )

    if not refusals:
        return numbers(params.primary_metric)
    parts = []
    for metric in refusals:
        margin = comparison[metric]["margin"]
        need = f"more than {params.min_improvement:g}" if margin is None else f"no worse than -{margin:g}"
        if margin is None and comparison[metric]["groups"] < MIN_GROUPS:
            need = f"at least {MIN_GROUPS} independent test items, there are {comparison[metric]['groups']}"
        parts.append(f"{numbers(metric)}; needed: {need}")
    return " and ".join(parts)
