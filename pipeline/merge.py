"""merge: adds the adapter to its base, writes a plain `save_pretrained` model, and proves that it answers alike.

The adapter was trained on the quantised base, so it corrects that base's rounding too. Merging adds it to the
full-precision base or to the base after the NF4 round trip, whichever is measured closer to what was evaluated; never
into packed 4-bit weights. The scores that the gate reads are measured on the merged files, read back from disk.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from pipeline.chat.responses import Answer
from pipeline.chat.template import ChatTemplate, load_contract, load_shipped, local_source, require_same_contract
from pipeline.core.files import read_json, whole_directory, write_json
from pipeline.core.sanitise import clean_folder, portable
from pipeline.data.classes import load_classes
from pipeline.params import EvaluateParams, MergeParams
from pipeline.scoring.classification import class_provenance, compute_logits, score_classes
from pipeline.scoring.generation import generate
from pipeline.scoring.items import Metrics, provenance, score_items, scoring_params, summarise, test_items
from pipeline.scoring.likelihood import per_sequence, reference_losses, token_agreement
from pipeline.scoring.resampling import LOWER_IS_BETTER, METRICS, PERCENT, difference, read_scores
from pipeline.weights.loading import record_dtype, use_free_cores
from pipeline.weights.merging import MergeError, Merging, merge_adapter, require_mergeable
from pipeline.weights.placement import load_for_scoring, load_tuned, untuned

LOGIT_PROMPTS, LOGIT_POSITIONS = 16, 64  # whose logits are compared; answers are compared on all prompts


@dataclass(frozen=True)
class Merged:
    base: str  # full | nf4
    merging: Merging
    logit_error: dict[str, float]  # mean absolute difference from the adapter on its quantised base, by base tried
    logit_change: float  # mean absolute difference between adapter and base
    agreement: float  # fraction of the adapter's classes or answer tokens that it chooses, given the tokens before
    identical: float  # fraction of test prompts with the same answer; one close call changes all tokens after it
    metrics: Metrics


def merge(params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path) -> Merged:
    """Write the merged model to `output`, and to `parity` how it was merged and how far it is from the adapter.

    Raises:
        MergeError: adapter or base cannot be merged, a module did not change, or `params` forbid the difference.
        WeightsError: a shard of the base is missing or damaged.
        TemplateError, ModelError: the base is not the one the adapter was trained on.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), f"of {adapter}; `dvc repro` makes it again")
    require_mergeable(adapter)
    use_free_cores()
    quantisation, labels = read_json(adapter / "training.json")["quantisation"], contract.get("labels")
    settings = scoring_params(read_json(evaluation / "evaluation.json"))
    tuned: _TunedClassifier | _TunedModel
    if labels:
        tuned = _TunedClassifier(contract, dataset, evaluation, settings)
    else:
        tuned = _TunedModel(contract, dataset, evaluation, settings, adapter)
    bases = ["full", "nf4"] if quantisation["load_in_4bit"] else ["full"]
    dtype = None if params.dtype == "auto" else getattr(torch, params.dtype)
    with whole_directory(output) as folder, whole_directory(parity) as proof:
        mergings, errors = dict[str, Merging](), dict[str, float]()
        for base in bases if params.base == "auto" else [params.base]:
            (folder / base).mkdir()
            rounded = quantisation if base == "nf4" else None
            mergings[base] = merge_adapter(contract["model"], adapter, folder / base, rounded, dtype, labels)
            errors[base] = tuned.logit_error(base, folder / base)
        closest = min(errors, key=lambda base: errors[base])
        for path in list((folder / closest).iterdir()):
            path.rename(folder / path.name)
        for base in errors:
            shutil.rmtree(folder / base)
        items, recorded, agreement, identical = tuned.score_merged(folder, closest)
        merged = Merged(
            closest, mergings[closest], errors, tuned.logit_change, agreement, identical, summarise(items, settings)
        )
        _prove(params, proof, items, merged, read_scores(evaluation), recorded)
    return merged


class _TunedModel:
    """The adapter on its base: the logits and answers that a merged model is compared with."""

    def __init__(
        self, contract: dict[str, Any], dataset: Path, evaluation: Path, params: EvaluateParams, adapter: Path
    ) -> None:
        self.contract, self.dataset, self.params = contract, dataset, params
        self.test, self.template = test_items(dataset, params.max_samples), load_contract(contract)
        self.prompts = self.test.column("input_ids").to_pylist()
        self.answer_ids = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
        model = load_tuned(contract["model"], read_json(adapter / "training.json")["quantisation"], adapter)
        self.logits = self._logits(model)
        with untuned(model, contract["model"]) as base:
            self.logit_change = _mean_difference(self.logits, self._logits(base))

    def logit_error(self, _: str, folder: Path) -> float:
        """How far the merged model in `folder` is from the adapter, on some prompts."""
        return _mean_difference(self.logits, self._logits(load_for_scoring(local_source(folder))))

    def score_merged(self, folder: Path, _: str) -> tuple[pa.Table, dict[str, Any], float, float]:
        """Complete `folder` and score it: items, their provenance, and shares of equal tokens and of equal answers."""
        template, pad = self.template, self.template.tokenizer.pad_token_id
        model = load_for_scoring(local_source(folder))
        bos, stop_ids = model.generation_config.bos_token_id, sorted(template.stop_ids)
        # A server stops where the evaluation stopped.
        GenerationConfig(bos_token_id=bos, eos_token_id=stop_ids, pad_token_id=pad).save_pretrained(str(folder))
        template.tokenizer.chat_template = template.served_text()
        _complete(folder, template.tokenizer, self.contract)
        answers, items, recorded = _score(model, template, self.test, self.prompts, self.params, self.dataset, "merge")
        agreement = token_agreement(model, self.prompts, self.answer_ids, pad, "merge", "the merged model")
        identical = sum(answer.ids == ids for answer, ids in zip(answers, self.answer_ids, strict=True)) / len(answers)
        return items, recorded, agreement, identical

    def _logits(self, model: Any) -> list[torch.Tensor]:
        """Logits of the last LOGIT_POSITIONS tokens of the first LOGIT_PROMPTS prompts, (T, V) each, in float32."""
        sequences = [
            (ids, [-100] * max(1, len(ids) - LOGIT_POSITIONS) + ids[1:][-LOGIT_POSITIONS:])
            for ids in self.prompts[:LOGIT_PROMPTS]
        ]

        def split(logits: torch.Tensor, _: torch.Tensor, labelled: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.split(logits.float().cpu(), labelled.sum(dim=1).tolist()))

        return per_sequence(model, sequences, self.template.tokenizer.pad_token_id, split, "merge", "prompts")


class _TunedClassifier:
    """As `_TunedModel` for classes, by the logits of all test texts, which the evaluation recorded."""

    def __init__(self, contract: dict[str, Any], dataset: Path, evaluation: Path, params: EvaluateParams) -> None:
        self.contract, self.dataset, self.params = contract, dataset, params
        self.test, self.encoder = test_items(dataset, params.max_samples), load_classes(contract)
        self.logits, base_logits = (
            np.array(pq.read_table(evaluation / f"items.{system}.parquet")["logits"].to_pylist(), np.float32)
            for system in ("adapter", "base")
        )
        self.logit_change = float(np.abs(self.logits - base_logits).mean())
        self.merged_logits: dict[str, NDArray[np.float32]] = {}  # by the base that was merged into

    def logit_error(self, base: str, folder: Path) -> float:
        model = load_for_scoring(local_source(folder), None, self.contract["labels"])
        rows, system = self.test.column("input_ids").to_pylist(), f"the merged model ({base})"
        logits = compute_logits(model, self.encoder, rows, self.params.batch_size, "merge", system)
        self.merged_logits[base] = logits
        return float(np.abs(logits - self.logits).mean())

    def score_merged(self, folder: Path, base: str) -> tuple[pa.Table, dict[str, Any], float, float]:
        _complete(folder, self.encoder.tokenizer, self.contract)
        logits = self.merged_logits[base]
        items = score_classes(self.test, logits, self.contract["labels"])
        agreement = float((logits.argmax(axis=1) == self.logits.argmax(axis=1)).mean())
        return items, class_provenance(self.params, self.dataset), agreement, agreement


def _prove(
    params: MergeParams, folder: Path, items: pa.Table, merged: Merged, evaluated: dict[str, Any], recorded: Any
) -> None:
    """Compare `merged` with `evaluated` (scores of base and adapter); write `parity.json`, scores and items."""
    metrics, adapter, base = merged.metrics, evaluated["adapter"], evaluated["base"]
    # How much higher than the adapter's, where both count; of perplexity as a fraction.
    differences = {m: difference(m, metrics[m], adapter[m]) for m in METRICS if metrics[m] and adapter[m]}
    _require_parity(params, merged, differences)
    pq.write_table(items, folder / "items.merged.parquet")
    write_json(folder / "scores.json", {"merged": metrics})
    shown: dict[str, Any] = {m: metrics[m]["score"] for m in METRICS if metrics[m]}
    shown["base"] = {m: base[m]["score"] for m in ("accuracy", "rougeL") if base[m]}
    write_json(folder / "metrics.json", shown)
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


def _score(
    model: Any, template: ChatTemplate, test: pa.Table, prompts: Any, params: EvaluateParams, dataset: Path, stage: str
) -> tuple[list[Answer], pa.Table, dict[str, Any]]:
    """A model's answers to the test split, the scored items and their provenance."""
    system = {"merge": "the merged model", "promote": "the champion"}[stage]
    settings = (int(params.max_new_tokens), params.batch_size, stage, system)
    answers = generate(model, template, prompts, *settings, tools=test.column("tools").to_pylist())
    items, signatures = score_items(test, answers, reference_losses(model, template, test, stage, system))
    return answers, items, provenance(params, dataset, signatures)


def score_model(model_folder: Path, dataset: Path, settings: dict[str, Any], output: Path) -> None:
    """Write `items.parquet`: a merged model's scores on the dataset's test split, by `settings` (`evaluation.json`).

    The prompts are rendered with the model's own template, which may be older than the dataset's.
    """
    use_free_cores()
    contract, params = read_json(model_folder / "contract.json"), scoring_params(settings)
    source = local_source(model_folder)
    test = test_items(dataset, params.max_samples)
    if labels := contract.get("labels"):
        encoder = load_classes(contract, source)
        texts = [encoder.prompt([{"role": "user", "content": text}])[1] for text in test.column("prompt").to_pylist()]
        model = load_for_scoring(source, None, labels)
        logits = compute_logits(model, encoder, texts, params.batch_size, "promote", "the champion")
        items, recorded = score_classes(test, logits, labels), class_provenance(params, dataset)
    else:
        template = load_shipped(model_folder)
        messages, tools = (test.column(name).to_pylist() for name in ("messages", "tools"))
        prompts = [template.prompt_ids(json.loads(m), offered) for m, offered in zip(messages, tools, strict=True)]
        model = load_for_scoring(source)
        _, items, recorded = _score(model, template, test, prompts, params, dataset, "promote")
    with whole_directory(output) as folder:
        pq.write_table(items, folder / "items.parquet")
        write_json(folder / "evaluation.json", recorded)


def _complete(folder: Path, tokenizer: Any, contract: dict[str, Any]) -> None:
    """Write everything that a server needs in addition to the weights."""
    tokenizer.save_pretrained(str(folder))
    record_dtype(folder)
    clean_folder(folder)
    write_json(folder / "contract.json", portable(contract))


def _mean_difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    total = sum(float((a - b).abs().sum(dtype=torch.float64)) for a, b in zip(expected, actual, strict=True))
    return total / sum(a.numel() for a in expected)
