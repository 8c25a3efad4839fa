"""Chooses the base to merge into, and proves that the merged model answers like the adapter.

The adapter was trained on the quantised base, so it is added to the full-precision base or to the base after the NF4
round trip, whichever is measured closer.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.core.files import write_json
from pipeline.params import MergeParams
from pipeline.scoring.items import Metrics
from pipeline.scoring.resampling import LOWER_IS_BETTER, METRICS, PERCENT, difference
from pipeline.weights.loading import Quantisation
from pipeline.weights.merging import MergeError, Merging, merge_adapter


@dataclass(frozen=True)
class Merged:
    base: str  # full | nf4
    merging: Merging
    logit_error: dict[str, float]  # mean absolute difference from the adapter on its quantised base, by base tried
    logit_change: float  # mean absolute difference between adapter and base
    agreement: float  # fraction of the adapter's classes or answer tokens that it chooses, given the tokens before
    identical: float  # fraction of test prompts with the same answer; one close call changes all tokens after it
    metrics: Metrics


def merge_closest(
    params: MergeParams,
    identity: Mapping[str, Any],
    adapter: Path,
    quantisation: Quantisation,
    folder: Path,
    logit_error: Callable[[str, Path], float],
    labels: list[str] | None = None,
) -> tuple[str, Merging, dict[str, float]]:
    """Merge into each base that `params` allow, and keep in `folder` the model with logits closest to the adapter's.

    Args:
        logit_error: returns the mean absolute logit difference of the merged model, given its base and folder.

    Returns: the chosen base (full or nf4), how it was merged, and the logit errors by base.
    """
    mergings: dict[str, Merging] = {}
    errors: dict[str, float] = {}
    choices = ["full", "nf4"] if quantisation["load_in_4bit"] else ["full"]
    dtype = None if params.dtype == "auto" else getattr(torch, params.dtype)
    for choice in choices if params.base == "auto" else [params.base]:
        model = folder / choice
        model.mkdir()
        rounded = quantisation if choice == "nf4" else None
        mergings[choice] = merge_adapter(identity, adapter, model, rounded, dtype, labels)
        errors[choice] = logit_error(choice, model)
    chosen = min(errors, key=lambda choice: errors[choice])
    for path in list((folder / chosen).iterdir()):
        path.rename(folder / path.name)
    for choice in errors:
        shutil.rmtree(folder / choice)
    return chosen, mergings[chosen], errors


def prove(
    params: MergeParams,
    folder: Path,
    items: pa.Table,
    merged: Merged,
    evaluated: dict[str, Metrics],
    recorded: dict[str, Any],
) -> None:
    """Check `merged` against the adapter; write `items.merged.parquet`, `scores.json`, `metrics.json`, `parity.json`.

    Args:
        evaluated: scores of `base` and `adapter`.
        recorded: the provenance of `items`.

    Raises:
        MergeError: it differs from the adapter by more than `params` allow.
    """
    differences = {}  # how much higher than the adapter's, where both count; of perplexity as a fraction
    for metric in METRICS:
        ours, theirs = merged.metrics[metric], evaluated["adapter"][metric]
        if ours and theirs:
            differences[metric] = difference(metric, ours, theirs)
    _require_parity(params, merged, differences)
    pq.write_table(items, folder / "items.merged.parquet")
    write_json(folder / "scores.json", {"merged": merged.metrics})
    shown = {metric: merged.metrics[metric]["score"] for metric in METRICS if merged.metrics[metric]}
    base = {m: evaluated["base"][m]["score"] for m in ("accuracy", "rougeL") if evaluated["base"][m]}
    write_json(folder / "metrics.json", shown | {"base": base})
    proof = asdict(merged.merging) | {
        "base": merged.base,
        "mean_absolute_logit_error": merged.logit_error,
        "mean_absolute_logit_change": merged.logit_change,
        "token_agreement": merged.agreement,
        "identical_answers": merged.identical,
        "metric_difference": differences,
        "prompts": len(items),
        "evaluation": recorded,
    }
    write_json(folder / "parity.json", proof)


def _require_parity(params: MergeParams, merged: Merged, differences: dict[str, float]) -> None:
    errors = ", ".join(f"{base} {error:.4f}" for base, error in merged.logit_error.items())
    advice = f"Set merge.dtype to float32, or merge.base to the other base (mean logit errors: {errors})"
    error, change, agreement = merged.logit_error[merged.base], merged.logit_change, merged.agreement
    if agreement < params.min_agreement:
        raise MergeError(
            f"the merged model agrees with the adapter on {agreement:.2%}; merge.min_agreement is "
            f"{params.min_agreement:.2%}. {advice}"
        )
    if not error <= params.max_logit_error * change:
        raise MergeError(
            f"the merged model's logits differ from the adapter's by {error:.4f} on average; merge.max_logit_error "
            f"allows {params.max_logit_error:g} of the adapter's own change of {change:.4f}. {advice}"
        )
    for metric, higher in differences.items():
        worse = (1 if metric in LOWER_IS_BETTER else -1) * higher / (100 if metric in PERCENT else 1)
        if worse > params.max_metric_drop:
            raise MergeError(
                f"{metric} of the merged model is worse than the adapter's by {worse:.4f} (of the metric's range, or "
                f"of the adapter's perplexity); merge.max_metric_drop is {params.max_metric_drop:g}. {advice}"
            )
