"""merge: base and adapter in, one standard `save_pretrained` model out, and the proof that it answers alike.

The adapter was trained on the quantised base, so it corrects that base's rounding too. Merging adds it to the
full-precision base or to the base after the NF4 round trip, whichever is measured closer to what was evaluated; never
into packed 4-bit weights. The scores that the gate reads are measured on the merged files, read back from disk.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.evaluate import Metrics, provenance, require_same_contract, score_items, summarise, test_items
from pipeline.files import read_json, whole_directory, write_json
from pipeline.generate import generate
from pipeline.model import compute_dtype, load_adapter, load_base, use_free_cores
from pipeline.params import EvaluateParams, MergeParams
from pipeline.sanitise import clean_folder, portable
from pipeline.template import load_contract, load_shipped, local_source

LOGIT_PROMPTS = 16  # prompts whose every position is compared; the answers are compared on all of them


class MergeError(ValueError):
    """The merged model is not what was evaluated; nothing was written."""


@dataclass(frozen=True)
class Merged:
    base: str  # full | nf4
    logit_error: dict[str, float]  # mean absolute difference to adapter-on-quantised-base, by base tried
    agreement: float  # fraction of the adapter's answer tokens that the merged model chooses, given the text so far
    identical: float  # fraction of test prompts with the very same answer; one close call changes all that follows it
    metrics: Metrics


def merge(params: MergeParams, dataset: Path, adapter: Path, evaluation: Path, output: Path, parity: Path) -> Merged:
    """Write the merged model to `output`, and `parity.json`, `metrics.json` and `items.merged.parquet` to `parity`.

    Raises:
        MergeError: a module did not change, or fewer than `min_agreement` of the adapter's tokens are chosen.
        TemplateError, ModelError: the base is not the one the adapter was trained on.
    """
    contract = read_json(dataset / "contract.json")
    template = load_contract(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    settings = read_json(evaluation / "evaluation.json")
    evaluated = EvaluateParams.model_validate(settings["params"])
    test = test_items(dataset, evaluated.max_samples)
    prompts = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    identity = contract["model"]

    quantised = load_adapter(load_base(identity, quantisation), adapter)
    expected = _logits(quantised, prompts[:LOGIT_PROMPTS])
    round_trip = _dequantised(quantised.get_base_model()) if quantisation["load_in_4bit"] else {}
    del quantised

    choices = [params.base] if params.base != "auto" else ["full", "nf4"] if round_trip else ["full"]
    merged: dict[str, PreTrainedModel] = {}
    errors: dict[str, float] = {}
    for choice in choices:
        model = _merged(identity, adapter, round_trip if choice == "nf4" else {})
        errors[choice] = _difference(expected, _logits(model, prompts[:LOGIT_PROMPTS]))
        if errors[choice] == min(errors.values()):
            merged = {choice: model}
    [(chosen, model)] = merged.items()
    # What was measured in compute precision is cast to what is written, and measured again from the files.
    model = model.to(_output_dtype(identity, params.dtype))
    # Whoever serves it stops where the evaluation stopped.
    model.generation_config.eos_token_id = sorted(template.stop_ids)
    model.generation_config.pad_token_id = template.tokenizer.pad_token_id
    with whole_directory(output) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer = template.tokenizer
        tokenizer.chat_template = template.text
        tokenizer.save_pretrained(str(folder))
        clean_folder(folder)
        write_json(folder / "contract.json", portable(contract))
        del model, merged
        shipped = load_base(local_source(folder))
        answers = generate(
            shipped,
            template,
            prompts,
            evaluated.max_new_tokens,
            evaluated.batch_size,
            "merge",
            system="the merged model",
        )
        items, signatures = score_items(test, answers)
        expected_ids = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
        identical = sum(a.ids == ids for a, ids in zip(answers, expected_ids, strict=True)) / len(answers)
        agreement = _token_agreement(shipped, prompts, expected_ids)
        result = Merged(chosen, errors, agreement, identical, summarise(items, evaluated))
        if agreement < params.min_agreement:
            raise MergeError(
                f"the merged model chooses {agreement:.2%} of the adapter's answer tokens; merge.min_agreement is "
                f"{params.min_agreement:.2%}. Set merge.dtype to float32, or merge.base to the other base (mean logit "
                f"errors: {', '.join(f'{base} {error:.4f}' for base, error in errors.items())})"
            )
        with whole_directory(parity) as proof:
            pq.write_table(items, proof / "items.merged.parquet")
            write_json(proof / "metrics.json", {"merged": result.metrics})
            write_json(
                proof / "parity.json",
                {
                    "base": chosen,
                    "mean_absolute_logit_error": errors,
                    "token_agreement": agreement,
                    "identical_answers": identical,
                    "prompts": len(prompts),
                    "evaluation": provenance(evaluated, dataset, signatures),
                },
            )
    return result


def score_model(model_folder: Path, dataset: Path, settings: dict[str, Any], output: Path) -> None:
    """Score a merged model on the dataset's test split as `settings` (an `evaluation.json`) say: `items.parquet`.

    The prompts are rendered with the model's own template, which may be older than the dataset's.
    """
    template = load_shipped(model_folder)
    use_free_cores()
    params = EvaluateParams.model_validate(settings["params"])
    test = test_items(dataset, params.max_samples)
    prompts = [
        template.prompt_ids(json.loads(messages), tools)
        for messages, tools in zip(test.column("messages").to_pylist(), test.column("tools").to_pylist(), strict=True)
    ]
    model = load_base(local_source(model_folder))
    answers = generate(model, template, prompts, params.max_new_tokens, params.batch_size, "promote", "the champion")
    items, signatures = score_items(test, answers)
    with whole_directory(output) as folder:
        pq.write_table(items, folder / "items.parquet")
        write_json(folder / "evaluation.json", provenance(params, dataset, signatures))


def _merged(identity: dict[str, Any], adapter: Path, round_trip: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The full-precision base, or with `round_trip` weights in its place, with the adapter added to its weights."""
    base = load_base(identity)
    for name, weight in round_trip.items():
        base.get_submodule(name).weight.data.copy_(weight)
    model = load_adapter(base, adapter)
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and not module.get_delta_weight("default").abs().max() > 0:
            raise MergeError(f"the adapter changes nothing in {name}; it was not trained, or is not the one evaluated")
    return model.merge_and_unload(safe_merge=True)


def _dequantised(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of every 4-bit layer as the quantised model computes with them, by module name of the plain model."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weights[name.removesuffix(".base_layer")] = weight.to(compute_dtype())
    return weights


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


def _output_dtype(identity: dict[str, Any], dtype: str) -> torch.dtype:
    """The type to write: the base checkpoint's own, unless one is named."""
    if dtype == "auto":
        source = {"revision": identity["revision"], "trust_remote_code": identity["trust_remote_code"]}
        config = AutoConfig.from_pretrained(identity["name_or_path"], **source)
        return config.dtype or compute_dtype()
    named: torch.dtype = getattr(torch, dtype)
    return named
