"""Chooses the modules that an adapter changes, from `train.lora_target_modules` and the base model.

Output layers, classification heads and the routers of mixtures of experts are never targets. A name that cannot be a
target is an error that lists the possible names.
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
from pipeline.training.watching import TrainError
from pipeline.weights.loading import HEADS

ROUTERS = ("gate", "shared_expert_gate")  # layers that choose the experts of a token
CHOOSING = {"router", "indexer"}  # parts of paths whose layers choose experts or earlier tokens, so pass no gradient
MAMBA = {"mamba", "mixer"}  # parts of paths; they use the weights of these layers directly, without an adapter
USED_DIRECTLY = ("dt_proj", "out_proj")


def target_modules(params: TrainParams, model: Any) -> str | list[str]:
    """`all-linear`, or the sorted names of linear layers of `model`."""
    experts, linear, text = target_parameters(params, model), dict(linear_modules(model)), _language_model(model)
    fixed = bool(experts) or any(_is_fixed(name) for name, _ in model.named_modules())
    if params.lora_target_modules == "all-linear" and params.method != "ia3" and not (fixed or text):
        return "all-linear"  # PEFT resolves this name, but not for IA3
    names = _target_names(params, model, linear, experts)
    if text:  # the parts for images and sound have layers with the same names
        names = [path for path in linear if any(_matches(name, [path]) for name in names)]
    return sorted(names)


def target_parameters(params: TrainParams, model: Any) -> list[str]:
    """Stacked weights of experts that LoRA changes, as PEFT's `target_parameters` names them."""
    experts, targets = _expert_names(model), params.lora_target_modules
    chosen = experts if targets == "all-linear" else [name for name in experts if name in targets]
    if chosen and (not METHODS[params.method].trains_experts or params.lora_dropout):
        raise TrainError(
            f"train.method is {params.method} and train.lora_dropout is {params.lora_dropout:g}, but experts "
            f"({', '.join(chosen)}) need {', '.join(name for name in METHODS if METHODS[name].trains_experts)} without "
            "dropout; change these, or set train.lora_target_modules to attention"
        )
    return chosen


def describe_experts(params: TrainParams, model: Any) -> str | None:
    """What is not trained or not quantised in a mixture of experts, despite the parameters; None if nothing."""
    experts = [weight for _, weight in expert_parameters(model)]
    if not experts or params.method in ("full", *VIRTUAL_TOKENS):
        return None
    linear, targets = dict(linear_modules(model)), target_modules(params, model)
    missing = sorted({_short(path, linear) for path in linear if not any(_matches(name, [path]) for name in targets)})
    all_linear = params.lora_target_modules == "all-linear"
    parts = [f"not trained together with the experts: {', '.join(missing)}"] if all_linear and missing else []
    if params.load_in_4bit:
        share = sum(p.numel() for p in experts) / model.num_parameters()
        parts.append(f"the experts, {share:.0%} of the parameters, are not quantised but in {experts[0].dtype}")
    return "; ".join(parts) or None


def linear_modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Path and module of each linear layer that an adapter can change: of the text part, neither head nor fixed."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    text = _language_model(model)
    for name, module in model.named_modules():
        outside = name.split(".")[0] in HEADS or name in getattr(model, "new_modules", ()) or not name.startswith(text)
        if isinstance(module, torch.nn.Linear | Conv1D) and not (module is head or outside or _is_fixed(name)):
            yield name, module


def expert_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Path and weights of mixtures of experts, each (experts, out, in) or (experts, in, out)."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if path.split(".")[-1] == "experts" and parameter.dim() == 3:
                yield f"{path}.{name}", parameter


def feedforward_modules(model: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """IA3's targets outside attention, whose inputs are scaled; of those in attention the outputs are."""
    outside = [f".{name}" for name, _ in linear_modules(model) if not _in_attention(name)]
    return [target for target in targets if any(name.endswith(f".{target}") for name in outside)]


def _expert_names(model: Any) -> list[str]:
    return sorted({".".join(path.split(".")[-2:]) for path, _ in expert_parameters(model)})


def _names_kept_by_peft(names: list[str], params: TrainParams, model: Any) -> set[str]:
    """The `names` that PEFT does not take for experts, which were modules in transformers 4 and are weights now."""
    if params.method in ("ia3", "adalora"):
        return set(names)
    trial = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # a name of one of two modules that are one weight now
        return {name for name in names if _names_kept_by_peft([name], params, model)} if len(names) > 1 else set()
    return set(trial.target_modules or ())


def _target_names(params: TrainParams, model: Any, linear: dict[str, torch.nn.Module], experts: list[str]) -> list[str]:
    """The shortest names of the linear layers that `lora_target_modules` means."""
    targets = params.lora_target_modules
    if targets == "all-linear":
        return list(_names_kept_by_peft(sorted({_short(name, linear) for name in linear}), params, model))
    in_attention = sorted({_short(name, linear) for name in linear if _in_attention(name)})
    if targets == "attention":
        return in_attention
    if targets == "auto":
        family = str(getattr(getattr(model, "config", None), "model_type", ""))
        default = {"ia3": IA3_MODULES, "adalora": ADALORA_MODULES}.get(params.method, LORA_MODULES).get(family)
        # PEFT's default may be a pattern, or have names of transformers 4.
        usable = isinstance(default, list) and all(_matches(name, linear) for name in default)
        return default if usable and _names_kept_by_peft(default, params, model) == {*default} else in_attention
    names = sorted(set(targets) - set(experts))
    kept = _names_kept_by_peft(names, params, model)
    for name in names:
        if name not in kept or not _matches(name, linear):
            possible = sorted({_short(path, linear) for path in linear} | set(_expert_names(model)))
            raise TrainError(
                f"train.lora_target_modules names {name}, which is not a linear layer that an adapter can change "
                "(output layers, embeddings, routers, some layers of Mamba and those for images stay frozen, and PEFT "
                f"takes some names for experts); possible names are {', '.join(possible)}"
            )
    return names


def _matches(name: str, paths: Iterable[str]) -> bool:
    """Whether `name` is the end of one of the `paths`."""
    return any(f".{path}".endswith(f".{name}") for path in paths)


def _language_model(model: Any) -> str:
    """Path prefix of the text layers in a model with other parts, such as images; empty if all are for text."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config(decoder=True) is config:
        return ""
    decoder = model.get_decoder()
    return next(f"{path}." for path, module in model.named_modules() if module is decoder)


def _is_fixed(name: str) -> bool:
    """Whether an adapter on this layer would be ignored or get no gradient."""
    *path, last = name.split(".")
    direct = last in USED_DIRECTLY and not MAMBA.isdisjoint(path[-1:])
    return direct or last in ROUTERS or not CHOOSING.isdisjoint([*path, last])


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _short(name: str, linear: dict[str, torch.nn.Module]) -> str:
    """The shortest end of a path that is not shared between attention and other parts, such as `attn.c_proj`."""
    parts = name.split(".")
    if parts[-1].isdigit():  # of a list, and a number alone would also mean whole layers
        return name
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        matching = [path for path in linear if _matches(end, [path])]
        if end.split(".")[0].isdigit() or all(_in_attention(path) == _in_attention(name) for path in matching):
            return end
    return name
