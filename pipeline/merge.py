"""merge: adds the adapter to its base, writes a plain `save_pretrained` model, and proves that it answers alike.

The adapter was trained on the quantised base, so it corrects that base's rounding too. Merging adds it to the
full-precision base or to the base after the NF4 round trip, whichever is measured closer to what was evaluated; never
into packed 4-bit weights. The scores that the gate reads are measured on the merged files, read back from disk.
"""

import json
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
from pipeline.scoring.classification import class_provenance, compute_logits, make_predictions, score_classes
from pipeline.scoring.generation import generate
from pipeline.scoring.items import provenance, score_items, scoring_params, summarise, test_items
from pipeline.scoring.likelihood import per_sequence, reference_losses, token_agreement
from pipeline.scoring.parity import Merged, merge_closest, prove
from pipeline.scoring.resampling import read_scores
from pipeline.weights.loading import Quantisation, record_dtype, use_free_cores
from pipeline.weights.merging import require_mergeable
from pipeline.weights.placement import load_for_scoring, load_tuned, untuned

LOGIT_PROMPTS, LOGIT_POSITIONS = 16, 64  # whose logits are compared; answers are compared on all prompts


def merge(params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path) -> Merged:
    """Write the merged model to `output`, and to `parity` how it was merged and how far it is from the adapter.

    `parity` holds `parity.json`, `scores.json`, `metrics.json` (for `dvc metrics`) and `items.merged.parquet`.

    Raises:
        MergeError: a module did not change, the merged model is further from the adapter than `params` allow, or
            adapter or base are of a kind that cannot be merged.
        WeightsError: a shard of the base is missing or damaged.
        TemplateError, ModelError: the base is not the one the adapter was trained on.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    require_mergeable(adapter)
    use_free_cores()
    quantisation, labels = read_json(adapter / "training.json")["quantisation"], contract.get("labels")
    evaluate_params = scoring_params(read_json(evaluation / "evaluation.json"))
    tuned: _TunedClassifier | _TunedModel
    if labels:
        tuned = _TunedClassifier(contract, dataset, evaluation, evaluate_params)
    else:
        tuned = _TunedModel(contract, dataset, evaluation, evaluate_params, adapter, quantisation)
    with whole_directory(output) as folder, whole_directory(parity) as proof:
        base, merging, errors = merge_closest(
            params, contract["model"], adapter, quantisation, folder, tuned.logit_error, labels
        )
        items, recorded, agreement, identical = tuned.score_merged(folder, base)
        metrics = summarise(items, evaluate_params)
        merged = Merged(base, merging, errors, tuned.logit_change, agreement, identical, metrics)
        prove(params, proof, items, merged, read_scores(evaluation), recorded)
    return merged


class _TunedModel:
    """The adapter on its base: the logits and answers that a merged model is compared with."""

    def __init__(
        self,
        contract: dict[str, Any],
        dataset: Path,
        evaluation: Path,
        params: EvaluateParams,
        adapter: Path,
        quantisation: Quantisation,
    ) -> None:
        self.contract, self.dataset, self.params = contract, dataset, params
        self.test, self.template = test_items(dataset, params.max_samples), load_contract(contract)
        self.prompts = self.test.column("input_ids").to_pylist()
        self.answer_ids = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
        model = load_tuned(contract["model"], quantisation, adapter)
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
        answers, items, signatures = _score(
            model, template, self.test, self.prompts, self.params, "merge", "the merged model"
        )
        agreement = token_agreement(model, self.prompts, self.answer_ids, pad, "merge", "the merged model")
        identical = sum(answer.ids == ids for answer, ids in zip(answers, self.answer_ids, strict=True)) / len(answers)
        return items, provenance(self.params, self.dataset, signatures), agreement, identical

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
        items = score_classes(self.test, make_predictions(logits, self.contract["labels"]))
        agreement = float((logits.argmax(axis=1) == self.logits.argmax(axis=1)).mean())
        return items, class_provenance(self.params, self.dataset), agreement, agreement


def _score(
    model: Any, template: ChatTemplate, test: pa.Table, prompts: Any, params: EvaluateParams, stage: str, system: str
) -> tuple[list[Answer], pa.Table, dict[str, str]]:
    """A model's answers to the test split, the scored items and each metric's signature."""
    settings = (int(params.max_new_tokens), params.batch_size, stage, system)
    answers = generate(model, template, prompts, *settings, tools=test.column("tools").to_pylist())
    losses = reference_losses(model, template, test, stage, system)
    return answers, *score_items(test, answers, losses)


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
        items, recorded = score_classes(test, make_predictions(logits, labels)), class_provenance(params, dataset)
    else:
        template = load_shipped(model_folder)
        messages, tools = (test.column(name).to_pylist() for name in ("messages", "tools"))
        prompts = [template.prompt_ids(json.loads(m), offered) for m, offered in zip(messages, tools, strict=True)]
        model = load_for_scoring(source)
        _, items, signatures = _score(model, template, test, prompts, params, "promote", "the champion")
        recorded = provenance(params, dataset, signatures)
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
