"""Which modules an adapter is put on: names for PEFT, from `train.lora_target_modules` and the base model.

Output layers, classification heads and the routers of mixtures of experts are never targets. A name that the
adapter cannot be put on is an error that lists the names there are.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as ADALORA_MODULES
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from pipeline.core.combinations import METHODS, VIRTUAL_TOKENS
from pipeline.params import TrainParams
from pipeline.weights.loading import HEADS

ROUTERS = ("gate", "router", "shared_expert_gate")  # they choose the experts of a token


class MethodError(ValueError):
    """The method cannot be used on this model; the message says what the model has."""


def target_modules(params: TrainParams, model: Any) -> str | list[str]:
    """`all-linear` for PEFT to resolve, or names of which each matches a linear layer of `model`, sorted."""
    experts, linear, text = target_parameters(params, model), dict(linear_modules(model)), _language_model(model)
    routed = bool(experts) or any(_is_router(name) for name, _ in model.named_modules())
    if params.lora_target_modules == "all-linear" and params.method != "ia3" and not (routed or text):
        return "all-linear"  # PEFT knows the shorthand for LoRA alone; with IA3 feed-forward modules are told apart
    names = _chosen(params, model, linear, experts)
    if text:  # the parts for pictures and sound have layers of the same names
        names = [path for path in linear if any(_matches(name, [path]) for name in names)]
    return sorted(names)


def target_parameters(params: TrainParams, model: Any) -> list[str]:
    """Stacked weights of experts that LoRA is put on, as PEFT's `target_parameters` names them."""
    experts, targets = _experts(model), params.lora_target_modules
    chosen = experts if targets == "all-linear" else [name for name in experts if name in targets]
    if chosen and (not METHODS[params.method].trains_experts or params.lora_dropout):
        raise MethodError(
            f"train.method is {params.method} and train.lora_dropout is {params.lora_dropout:g}, but experts "
            f"({', '.join(chosen)}) take {', '.join(name for name in METHODS if METHODS[name].trains_experts)} without "
            "dropout; set train.lora_target_modules to attention, or change these"
        )
    return chosen


def describe_experts(params: TrainParams, model: Any) -> str | None:
    """A sentence on what training a mixture of experts does not do, though its parameters might seem to say so."""
    experts = [weight for _, weight in expert_parameters(model)]
    if not experts or params.method in ("full", *VIRTUAL_TOKENS):
        return None
    linear, targets = dict(linear_modules(model)), target_modules(params, model)
    missed = sorted({_short(path, linear) for path in linear if not any(_matches(name, [path]) for name in targets)})
    whole = params.lora_target_modules == "all-linear"
    parts = [f"not trained next to the experts: {', '.join(missed)}"] if whole and missed else []
    if params.load_in_4bit:
        share = sum(p.numel() for p in experts) / model.num_parameters()
        parts.append(f"not quantised, but in {experts[0].dtype}: the experts, {share:.0%} of the parameters")
    return "; ".join(parts) or None


def linear_modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every linear layer by its path; the output layer, the classification head, routers and what texts do not pass
    (parts for pictures and sound) left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text = _language_model(model)
    for name, module in model.named_modules():
        outside = name.split(".")[0] in HEADS or name in getattr(model, "new_modules", ()) or not name.startswith(text)
        if isinstance(module, torch.nn.Linear | Conv1D) and not (module is head or outside or _is_router(name)):
            yield name, module


def expert_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights of mixtures of experts by path, (experts, out, in) or (experts, in, out) each."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if path.split(".")[-1] == "experts" and parameter.dim() == 3:
                yield f"{path}.{name}", parameter


def feedforward(model: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """Those of IA3's targets that (also) lie outside attention: their inputs are scaled, of the others the outputs."""
    outside = [f".{name}" for name, _ in linear_modules(model) if not _in_attention(name)]
    return [target for target in targets if any(name.endswith(f".{target}") for name in outside)]


def _experts(model: Any) -> list[str]:
    return sorted({".".join(path.split(".")[-2:]) for path, _ in expert_parameters(model)})


def _taken_as_named(names: list[str], params: TrainParams, model: Any) -> set[str]:
    """The `names` that stay modules when PEFT translates an adapter of transformers 4, whose experts were modules."""
    if params.method in ("ia3", "adalora"):
        return set(names)
    trial = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # one of two modules that are one weight now
        return {name for name in names if _taken_as_named([name], params, model)} if len(names) > 1 else set()
    return set(trial.target_modules or ())


def _chosen(params: TrainParams, model: Any, linear: dict[str, torch.nn.Module], experts: list[str]) -> list[str]:
    """Names, as short as they can be, of the linear layers that `lora_target_modules` means."""
    targets = params.lora_target_modules
    if targets == "all-linear":
        return list(_taken_as_named(sorted({_short(name, linear) for name in linear}), params, model))
    in_attention = sorted({_short(name, linear) for name in linear if _in_attention(name)})
    if targets == "attention":
        return in_attention
    if targets == "auto":
        family = str(getattr(getattr(model, "config", None), "model_type", ""))
        known = {"ia3": IA3_MODULES, "adalora": ADALORA_MODULES}.get(params.method, LORA_MODULES).get(family)
        # One family has a pattern, which is loaded from nowhere else; some have names of transformers 4.
        whole = isinstance(known, list) and all(_matches(name, linear) for name in known)
        return known if whole and _taken_as_named(known, params, model) == {*known} else in_attention
    names = sorted(set(targets) - set(experts))
    taken = _taken_as_named(names, params, model)
    for name in names:
        if name not in taken or not _matches(name, linear):
            choice = sorted({_short(path, linear) for path in linear} | set(_experts(model)))
            raise MethodError(
                f"train.lora_target_modules names {name}, which is not a linear layer that texts pass through and an "
                "adapter can change (output layers, embeddings and routers stay frozen; PEFT takes some names for "
                f"experts); it can be {', '.join(choice)}"
            )
    return names


def _matches(name: str, paths: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for path in paths)


def _language_model(model: Any) -> str:
    """Where the layers lie that texts pass, in a model that has others; empty: everywhere."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config(decoder=True) is config:
        return ""
    decoder = model.get_decoder()
    return next(f"{path}." for path, module in model.named_modules() if module is decoder)


def _is_router(name: str) -> bool:
    return name.split(".")[-1] in ROUTERS


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _short(name: str, linear: dict[str, torch.nn.Module]) -> str:
    """The end of a path that tells its module from those of other parts: `q_proj`, but `attention.output.dense`."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        same = [other for other in linear if f".{other}".endswith(f".{end}")]
        if end.split(".")[0].isdigit() or all(_in_attention(other) == _in_attention(name) for other in same):
            return end
    return name
