"""merge: base and adapter in, one standard `save_pretrained` model out, and the proof that it answers alike.

The adapter was trained on the quantised base, so it corrects that base's rounding too. Merging adds it to the
full-precision base or to the base after the NF4 round trip, whichever is measured closer to what was evaluated; never
into packed 4-bit weights. The scores that the gate reads are measured on the merged files, read back from disk.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig

from pipeline.chat.template import ChatTemplate, load_contract, load_shipped, local_source
from pipeline.evaluate import require_same_contract, test_items
from pipeline.files import read_json, whole_directory, write_json
from pipeline.generate import Answer, generate
from pipeline.likelihood import reference_losses
from pipeline.model import Quantisation, load_base, load_tuned, record_dtype, untuned, use_free_cores
from pipeline.params import MergeParams
from pipeline.scoring import Metrics, provenance, score_items, scoring_params, summarise
from pipeline.security.sanitise import clean_folder, portable
from pipeline.statistics import LOWER_IS_BETTER, METRICS, PERCENT, headline, read_scores
from pipeline.weights.checkpoint import open_checkpoint
from pipeline.weights.combination import combine
from pipeline.weights.export import export
from pipeline.weights.gguf import require_programs
from pipeline.weights.merging import MergeError, Merging, merge_adapter, require_mergeable

LOGIT_PROMPTS = 16  # prompts whose every position is compared; the answers are compared on all of them


@dataclass(frozen=True)
class Merged:
    base: str  # full | nf4
    merging: Merging
    logit_error: dict[str, float]  # mean absolute difference to adapter-on-quantised-base, by base tried
    agreement: float  # fraction of the adapter's answer tokens that the merged model chooses, given the text so far
    identical: float  # fraction of test prompts with the very same answer; one close call changes all that follows it
    metrics: Metrics
    exports: dict[str, Metrics]


def merge(
    params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path, exports: Path
) -> Merged:
    """Write the merged model to `output`, its other forms to `exports`, and to `parity` what was measured.

    `parity` holds `parity.json` (how it was merged and how far it is from the adapter), `scores.json`, `metrics.json`
    (what `dvc metrics` shows of them), `items.merged.parquet`, and with `params.combine` the combined adapter that was
    merged. `exports` holds a folder for each of `params.export`, and `exports.json`: their scores, and how far these
    are from the merged model's.

    Raises:
        MergeError: a module did not change, the merged model is further from the adapter than `params` allow, or
            adapter or base are of a kind that cannot be merged.
        WeightsError: a shard of the base is missing or damaged.
        CombinationError: an adapter to combine is not the one that `params` name.
        ExportError: an export failed, or needs a program that is not installed.
        TemplateError, ModelError: the base is not the one the adapter was trained on.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    identity = contract["model"]
    require_mergeable(adapter)
    require_programs(params.export)
    _refuse_merged_base(contract)
    open_checkpoint(identity["name_or_path"], identity["revision"])  # says what is wrong where a digest only differs
    template = load_contract(contract)
    use_free_cores()
    settings = read_json(evaluation / "evaluation.json")
    evaluated = scoring_params(settings)
    test = test_items(dataset, evaluated.max_samples)
    prompts, tools = (test.column(name).to_pylist() for name in ("input_ids", "tools"))
    quantisation = read_json(adapter / "training.json")["quantisation"]

    def answer(model: Any, system: str) -> list[Answer]:
        limits = (evaluated.max_new_tokens, evaluated.batch_size)
        return generate(model, template, prompts, *limits, "merge", system, tools=tools)

    def score(kind: str, folder: Path, place: Path) -> Metrics:
        return summarise(scored(export(kind, folder, place), f"the {kind} export")[0], evaluated)

    def scored(model: Any, system: str, answers: list[Answer] | None = None) -> tuple[pa.Table, dict[str, str]]:
        losses = reference_losses(model, template, test, "merge", system)
        return score_items(test, answer(model, system) if answers is None else answers, losses)

    with whole_directory(output) as folder, whole_directory(parity) as proof, whole_directory(exports) as others:
        if params.combine is not None:
            adapter = combine(params.combine, contract, adapter, proof / "combined_adapter")
        quantised = load_tuned(identity, quantisation, adapter)
        expected = _logits(quantised, prompts[:LOGIT_PROMPTS])
        with untuned(quantised, identity) as before:
            reach = _difference(expected, _logits(before, prompts[:LOGIT_PROMPTS]))
        if params.combine is None:
            expected_ids = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
            adapter_metrics = read_scores(evaluation)["adapter"]
        else:
            answers = answer(quantised, "the combined adapter")
            expected_ids = [each.ids for each in answers]
            adapter_metrics = summarise(scored(quantised, "the combined adapter", answers)[0], evaluated)
        del quantised

        chosen, merging, errors = _merge_closest(params, identity, adapter, quantisation, folder, prompts, expected)
        shipped = load_base(local_source(folder))
        _complete(folder, template, contract, shipped.generation_config.bos_token_id)
        answers = answer(shipped, "the merged model")
        agreement = _token_agreement(shipped, prompts, expected_ids)
        items, signatures = scored(shipped, "the merged model", answers)
        del shipped
        metrics = summarise(items, evaluated)
        identical = sum(a.ids == ids for a, ids in zip(answers, expected_ids, strict=True)) / len(answers)
        differences = _metric_differences(metrics, adapter_metrics)
        _require_parity(params, errors, chosen, reach, agreement, differences)
        exported: dict[str, Metrics] = {kind: score(kind, folder, others / kind) for kind in params.export}
        write_json(
            others / "exports.json",  # always there: DVC warns of an empty folder
            {
                kind: {"metrics": scores, "metric_difference": _metric_differences(scores, metrics)}
                for kind, scores in exported.items()
            },
        )
        pq.write_table(items, proof / "items.merged.parquet")
        write_json(proof / "scores.json", {"merged": metrics})
        write_json(proof / "metrics.json", headline(metrics, read_scores(evaluation)["base"]))
        write_json(
            proof / "parity.json",
            {
                "base": chosen,
                **asdict(merging),
                "mean_absolute_logit_error": errors,
                "mean_absolute_logit_change": reach,
                "token_agreement": agreement,
                "identical_answers": identical,
                "metric_difference": differences,
                "prompts": len(prompts),
                "combined": params.combine.model_dump() if params.combine else None,
                "evaluation": provenance(evaluated, dataset, signatures),
            },
        )
    return Merged(chosen, merging, errors, agreement, identical, metrics, exported)


def score_model(model_folder: Path, dataset: Path, settings: dict[str, Any], output: Path) -> None:
    """Score a merged model on the dataset's test split as `settings` (an `evaluation.json`) say: `items.parquet`.

    The prompts are rendered with the model's own template, which may be older than the dataset's.
    """
    template = load_shipped(model_folder)
    use_free_cores()
    params = scoring_params(settings)
    test = test_items(dataset, params.max_samples)
    messages, tools = (test.column(name).to_pylist() for name in ("messages", "tools"))
    prompts = [template.prompt_ids(json.loads(m), offered) for m, offered in zip(messages, tools, strict=True)]
    model = load_base(local_source(model_folder))
    limits = (params.max_new_tokens, params.batch_size)
    answers = generate(model, template, prompts, *limits, "promote", "the champion", tools=tools)
    losses = reference_losses(model, template, test, "promote", "the champion")
    items, signatures = score_items(test, answers, losses)
    with whole_directory(output) as folder:
        pq.write_table(items, folder / "items.parquet")
        write_json(folder / "evaluation.json", provenance(params, dataset, signatures))


def _merge_closest(
    params: MergeParams,
    identity: dict[str, Any],
    adapter: Path,
    quantisation: Quantisation,
    folder: Path,
    prompts: list[list[int]],
    expected: list[torch.Tensor],
) -> tuple[str, Merging, dict[str, float]]:
    """Merge into each base that `params` name and keep in `folder` the one whose logits are closest to `expected`.

    Returns: that base (full or nf4), how it was merged, and the mean absolute logit difference by base.
    """
    mergings: dict[str, Merging] = {}
    errors: dict[str, float] = {}
    choices = ["full", "nf4"] if quantisation["load_in_4bit"] else ["full"]
    dtype = None if params.dtype == "auto" else getattr(torch, params.dtype)
    for choice in choices if params.base == "auto" else [params.base]:
        place = folder / choice
        place.mkdir()
        mergings[choice] = merge_adapter(identity, adapter, place, quantisation if choice == "nf4" else None, dtype)
        model = load_base(local_source(place))
        errors[choice] = _difference(expected, _logits(model, prompts[:LOGIT_PROMPTS]))
        del model  # one at a time
    chosen = min(errors, key=lambda choice: errors[choice])
    for path in list((folder / chosen).iterdir()):
        path.rename(folder / path.name)
    for choice in errors:
        shutil.rmtree(folder / choice)
    return chosen, mergings[chosen], errors


def _refuse_merged_base(contract: dict[str, Any]) -> None:
    """A base in whose place a model merged from that very base now lies would get the adapter twice."""
    model = contract["model"]
    shipped = Path(model["name_or_path"]) / "contract.json"
    if shipped.is_file() and read_json(shipped)["model"]["digest"] == model["digest"]:
        raise MergeError(
            f"{model['name_or_path']} already has an adapter merged into it (its contract.json names the base it came "
            f"from, digest {model['digest'][:12]}, which is the one the adapter was trained on); put that base back"
        )


def _complete(folder: Path, template: ChatTemplate, contract: dict[str, Any], bos_id: int | None) -> None:
    """All that a server needs beside the weights; it stops where the evaluation stopped."""
    tokenizer = template.tokenizer
    tokenizer.chat_template = template.served_text()
    tokenizer.save_pretrained(str(folder))
    GenerationConfig(
        bos_token_id=bos_id, eos_token_id=sorted(template.stop_ids), pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(str(folder))
    record_dtype(folder)
    clean_folder(folder)
    write_json(folder / "contract.json", portable(contract))


def _metric_differences(metrics: Metrics, others: Metrics) -> dict[str, float]:
    """How much higher each of `metrics` is than in `others`, where both count (bleu, chrf 0-100; the others 0-1).

    Perplexity, which has no range, as a fraction of the other.
    """
    return {
        m: (metrics[m]["score"] - others[m]["score"]) / (others[m]["score"] if m in LOWER_IS_BETTER else 1)
        for m in METRICS
        if metrics[m] and others[m]
    }


def _require_parity(
    params: MergeParams,
    errors: dict[str, float],
    chosen: str,
    reach: float,
    agreement: float,
    differences: dict[str, float],
) -> None:
    advice = "Set merge.dtype to float32, or merge.base to the other base (mean logit errors: {})".format(
        ", ".join(f"{base} {error:.4f}" for base, error in errors.items())
    )
    if agreement < params.min_agreement:
        raise MergeError(
            f"the merged model chooses {agreement:.2%} of the adapter's answer tokens; merge.min_agreement is "
            f"{params.min_agreement:.2%}. {advice}"
        )
    if not errors[chosen] <= params.max_logit_error * reach:
        raise MergeError(
            f"the merged model's logits differ from the adapter's by {errors[chosen]:.4f} in the mean, and the adapter "
            f"changes those of its base by {reach:.4f}; merge.max_logit_error allows {params.max_logit_error:g} of it. "
            f"{advice}"
        )
    for metric, difference in differences.items():
        if metric in LOWER_IS_BETTER:
            worse, than = difference, f"{difference:.2%} above the adapter's"
        else:
            worse, than = -difference / (100 if metric in PERCENT else 1), f"{-difference:.4f} below the adapter's"
        if worse > params.max_metric_drop:
            raise MergeError(
                f"{metric} of the merged model is {than}; merge.max_metric_drop is {params.max_metric_drop:g} of the "
                f"metric's range, or of a perplexity. {advice}"
            )


@torch.inference_mode()
def _logits(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits of each prompt, (T, V) each, in float32."""
    model.eval()
    device = next(model.parameters()).device
    return [model(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in prompts]


@torch.inference_mode()
def _token_agreement(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Fraction of `answers` tokens that are `model`'s first choice after the prompt and the tokens before them."""
    device = next(model.parameters()).device
    agreed = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=device)
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]  # (A, V)
        agreed += int((logits.argmax(-1).cpu() == torch.tensor(answer)).sum())
        total += len(answer)
    return agreed / total


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    total = sum(float((a - b).abs().sum(dtype=torch.float64)) for a, b in zip(expected, actual, strict=True))
    return total / sum(a.numel() for a in expected)
