"""merge: base and adapter in, one standard `save_pretrained` model out, and the proof that it answers alike.

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
from pipeline.scoring.classification import class_provenance, predict, predictions, score_classes
from pipeline.scoring.generation import generate
from pipeline.scoring.items import provenance, score_items, scoring_params, summarise, test_items
from pipeline.scoring.likelihood import per_sequence, reference_losses, token_agreement
from pipeline.scoring.parity import Merged, merge_closest, prove
from pipeline.scoring.resampling import read_scores
from pipeline.weights.loading import record_dtype, use_free_cores
from pipeline.weights.merging import require_mergeable
from pipeline.weights.placement import load_for_scoring, load_tuned, untuned

LOGIT_PROMPTS, LOGIT_POSITIONS = 16, 64  # whose logits are compared; the answers are compared on all prompts


def merge(params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path) -> Merged:
    """Write the merged model to `output`, and to `parity` how it was merged and how far it is from the adapter.

    `parity` holds `parity.json`, `scores.json`, `metrics.json` (what `dvc metrics` shows of them) and
    `items.merged.parquet`.

    Raises:
        MergeError: a module did not change, the merged model is further from the adapter than `params` allow, or
            adapter or base are of a kind that cannot be merged.
        WeightsError: a shard of the base is missing or damaged.
        TemplateError, ModelError: the base is not the one the adapter was trained on.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    identity = contract["model"]
    require_mergeable(adapter)
    use_free_cores()
    settings = read_json(evaluation / "evaluation.json")
    evaluated = scoring_params(settings)
    test = test_items(dataset, evaluated.max_samples)
    if "labels" in contract:
        return _merge_classes(params, test, evaluated, settings, adapter, evaluation, output, parity, contract)
    template = load_contract(contract)
    prompts = test.column("input_ids").to_pylist()
    quantisation, pad = read_json(adapter / "training.json")["quantisation"], template.tokenizer.pad_token_id
    quantised = load_tuned(identity, quantisation, adapter)
    expected = _logits(quantised, prompts[:LOGIT_PROMPTS], pad)
    with untuned(quantised, identity) as before:
        reach = _difference(expected, _logits(before, prompts[:LOGIT_PROMPTS], pad))
    del quantised, before  # or both names would keep it in the memory of the GPU

    def error_of(_: str, folder: Path) -> float:
        return _difference(expected, _logits(load_for_scoring(local_source(folder)), prompts[:LOGIT_PROMPTS], pad))

    with whole_directory(output) as folder, whole_directory(parity) as proof:
        chosen, merging, errors = merge_closest(params, identity, adapter, quantisation, folder, error_of)
        shipped = load_for_scoring(local_source(folder))
        bos, stops = shipped.generation_config.bos_token_id, sorted(template.stop_ids)
        # A server stops where the evaluation stopped.
        GenerationConfig(bos_token_id=bos, eos_token_id=stops, pad_token_id=pad).save_pretrained(str(folder))
        template.tokenizer.chat_template = template.served_text()
        _complete(folder, template.tokenizer, contract)
        answers, items, signatures = _score(shipped, "the merged model", template, test, prompts, evaluated, "merge")
        expected_ids = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
        agreement = token_agreement(shipped, prompts, expected_ids, pad, "merge", "the merged model")
        identical = sum(a.ids == ids for a, ids in zip(answers, expected_ids, strict=True)) / len(answers)
        merged = Merged(chosen, merging, errors, reach, agreement, identical, summarise(items, evaluated))
        recorded = provenance(evaluated, dataset, signatures)
        prove(params, proof, items, merged, read_scores(evaluation), recorded)
    return merged


def _score(
    model: Any,
    system: str,
    template: ChatTemplate,
    test: pa.Table,
    prompts: list[list[int]],
    params: EvaluateParams,
    stage: str,
) -> tuple[list[Answer], pa.Table, dict[str, str]]:
    """A model's answers to the test split, the scored items and each metric's signature."""
    tools = test.column("tools").to_pylist()
    limits = (params.max_new_tokens, params.batch_size)
    answers = generate(model, template, prompts, *limits, stage, system, tools=tools)
    losses = reference_losses(model, template, test, stage, system)
    return answers, *score_items(test, answers, losses)


def score_model(model_folder: Path, dataset: Path, settings: dict[str, Any], output: Path) -> None:
    """Score a merged model on the dataset's test split as `settings` (an `evaluation.json`) say: `items.parquet`.

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
        logits = predict(model, encoder, texts, params.batch_size, "promote", "the champion")
        items, recorded = score_classes(test, predictions(logits, labels)), class_provenance(params, dataset)
    else:
        template = load_shipped(model_folder)
        messages, tools = (test.column(name).to_pylist() for name in ("messages", "tools"))
        prompts = [template.prompt_ids(json.loads(m), offered) for m, offered in zip(messages, tools, strict=True)]
        model = load_for_scoring(source)
        _, items, signatures = _score(model, "the champion", template, test, prompts, params, "promote")
        recorded = provenance(params, dataset, signatures)
    with whole_directory(output) as folder:
        pq.write_table(items, folder / "items.parquet")
        write_json(folder / "evaluation.json", recorded)


def _complete(folder: Path, tokenizer: Any, contract: dict[str, Any]) -> None:
    """All that a server needs next to the weights."""
    tokenizer.save_pretrained(str(folder))
    record_dtype(folder)
    clean_folder(folder)
    write_json(folder / "contract.json", portable(contract))


def _logits(model: Any, prompts: list[list[int]], pad: int) -> list[torch.Tensor]:
    """Logits of the last LOGIT_POSITIONS tokens of each prompt, (T, V) each, in float32."""
    sequences = [(ids, [-100] * max(1, len(ids) - LOGIT_POSITIONS) + ids[1:][-LOGIT_POSITIONS:]) for ids in prompts]

    def rows(logits: torch.Tensor, _: torch.Tensor, labelled: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(logits.float().cpu(), labelled.sum(dim=1).tolist()))

    return per_sequence(model, sequences, pad, rows, "merge", "prompts")


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    total = sum(float((a - b).abs().sum(dtype=torch.float64)) for a, b in zip(expected, actual, strict=True))
    return total / sum(a.numel() for a in expected)


def _merge_classes(
    params: MergeParams,
    test: pa.Table,
    evaluated: EvaluateParams,
    settings: dict[str, Any],
    adapter: Path,
    evaluation: Path,
    output: Path,
    parity: Path,
    contract: dict[str, Any],
) -> Merged:
    """`merge` for classes: the same files, and parity by the classes and logits of all test texts."""
    labels, identity, encoder = contract["labels"], contract["model"], load_classes(contract)
    rows = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    expected, before = (
        np.array(pq.read_table(evaluation / f"items.{system}.parquet")["logits"].to_pylist(), dtype=np.float32)
        for system in ("adapter", "base")
    )
    reach = float(np.abs(expected - before).mean())
    logits: dict[str, NDArray[np.float32]] = {}

    def error_of(choice: str, folder: Path) -> float:
        model, system = load_for_scoring(local_source(folder), None, labels), f"the merged model ({choice})"
        logits[choice] = predict(model, encoder, rows, evaluated.batch_size, "merge", system)
        return float(np.abs(logits[choice] - expected).mean())

    with whole_directory(output) as folder, whole_directory(parity) as proof:
        chosen, merging, errors = merge_closest(params, identity, adapter, quantisation, folder, error_of, labels)
        _complete(folder, encoder.tokenizer, contract)
        items = score_classes(test, predictions(logits[chosen], labels))
        agreement = float((logits[chosen].argmax(axis=1) == expected.argmax(axis=1)).mean())
        merged = Merged(chosen, merging, errors, reach, agreement, agreement, summarise(items, evaluated))
        prove(params, proof, items, merged, read_scores(evaluation), settings)
    return merged
