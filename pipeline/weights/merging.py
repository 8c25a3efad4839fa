"""Adds an adapter to the weights of its base, from safetensors to safetensors, without the model in memory.

PEFT's own layers, built on a base without weights, give what is added to which weight and how it is scaled; the sum is
bit for bit that of `merge_and_unload` on a CPU. PEFT merges adapters other than LoRA on linear layers.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.weights.architecture import auto_class, base_config, checkpoint_names, empty_model, rounded_weights
from pipeline.weights.checkpoint import FLOATS, Checkpoint, Edit, Edits, open_checkpoint, rewrite
from pipeline.weights.loading import Quantisation, compute_dtype, fill_with_placeholders, is_whole, load_adapter


class MergeError(ValueError):
    """Base and adapter cannot be merged, or the merged model differs from what was evaluated; nothing was written."""


class _NeedsPeft(Exception):
    """The reason why PEFT merges this adapter, not `rewrite`."""


@dataclass(frozen=True)
class Merging:
    method: str  # shards | peft | whole (no adapter: the model itself was trained)
    reason: str | None  # for method peft
    modules: int  # that the adapter targets; each has changed


def merge_adapter(
    identity: Mapping[str, Any],
    adapter: Path,
    folder: Path,
    quantisation: Quantisation | None = None,
    dtype: torch.dtype | None = None,
    labels: list[str] | None = None,
) -> Merging:
    """Write the base with the adapter added to it into `folder`: config.json, and weights in shards of up to 1 GiB.

    Args:
        identity: `model` of the template contract; its Python code is never run.
        quantisation: the 4-bit rounding of the base before the adapter is added; None adds to the base itself.
        dtype: of the written weights; None keeps each in the checkpoint's own type.

    Raises:
        MergeError: the adapter changes nothing in a module that it targets, or cannot be merged.
        ModelError: it has weights for modules that the base does not have, or the base needs its own Python code.
        WeightsError: the base is incomplete or damaged.
    """
    require_mergeable(adapter)
    if is_whole(adapter):  # nothing to add, but the type may change
        config, checkpoint = AutoConfig.from_pretrained(adapter, trust_remote_code=False), open_checkpoint(adapter)
        edits: Edits = {}
        merging = Merging("whole", None, len(checkpoint))
    else:
        config = base_config(identity, labels)
        checkpoint = open_checkpoint(identity["name_or_path"], identity["revision"])
        rounded = rounded_weights(config, quantisation)
        try:
            edits, modules = _edits(config, checkpoint, adapter, rounded, dtype)
        except _NeedsPeft as reason:
            bytes_by_type = {name: sum(t.size() for t in checkpoint.values() if t.dtype == name) for name in FLOATS}
            out = dtype or FLOATS[max(bytes_by_type, key=lambda name: bytes_by_type[name])]
            modules = _merge_with_peft(identity, config, adapter, folder, rounded, out)
            return Merging("peft", str(reason), modules)
        merging = Merging("shards", None, modules)
    rewrite(checkpoint, folder, edits, dtype, "merge")
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    return merging


def require_mergeable(adapter: Path) -> None:
    """Raise MergeError for prompt and prefix tuning, which change no weight of the base."""
    settings = None if is_whole(adapter) else PeftConfig.from_pretrained(str(adapter))
    if settings is not None and settings.is_prompt_learning:
        raise MergeError(
            f"{adapter} is {settings.peft_type.value}, which changes no weight, so it cannot be merged; only merged "
            "models are published: choose another train.method"
        )


def _edits(
    config: PretrainedConfig, checkpoint: Checkpoint, adapter: Path, rounded: Edits, dtype: torch.dtype | None
) -> tuple[Edits, int]:
    """The edits that merge the adapter, by tensor of the checkpoint, and the number of modules that it targets."""
    _require_plain_lora(adapter)
    empty = empty_model(config)
    names = checkpoint_names(empty, checkpoint)
    tied = {*empty.all_tied_weights_keys, *empty.all_tied_weights_keys.values()}

    def stored_as(parameter: str) -> str:
        if parameter in tied:
            raise _NeedsPeft(f"the adapter changes {parameter}, which is tied to another weight")
        if parameter not in names:
            raise _NeedsPeft(f"the checkpoint has no floating-point tensor of its own for {parameter}")
        return names[parameter]

    edits = {stored_as(parameter): round_weight for parameter, round_weight in rounded.items()}
    fill_with_placeholders(empty, torch.device("cpu"))
    model, targeted = load_adapter(empty, adapter, empty=True).get_base_model(), 0
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, value in module.modules_to_save["default"].named_parameters():
                edits[stored_as(f"{path}.{name}")] = partial(_replaced, value.data)
        elif isinstance(module, BaseTunerLayer):
            if type(module) is not LoraLinear or not isinstance(module.get_base_layer(), torch.nn.Linear | Conv1D):
                raise _NeedsPeft(f"{path} is a {type(module).__name__} of {type(module).__module__}")
            name = stored_as(f"{path}.weight")
            edits[name] = partial(_added, path, module, edits.get(name), dtype or FLOATS[checkpoint[name].dtype])
            targeted += 1
    return edits, targeted


def _require_plain_lora(adapter: Path) -> None:
    """Raise _NeedsPeft for anything besides A, B and whole modules: magnitudes, biases, embeddings."""
    settings = PeftConfig.from_pretrained(str(adapter))
    if type(settings) is not LoraConfig:
        raise _NeedsPeft(f"the method is {settings.peft_type.value}")
    if settings.use_dora:
        raise _NeedsPeft("the method is DoRA")
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            whole = any(f".{module}." in key for module in settings.modules_to_save or ())
            if not whole and not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise _NeedsPeft(f"the adapter has {key}")


def _added(
    path: str, layer: LoraLinear, first_edit: Edit | None, dtype: torch.dtype, tensor: torch.Tensor
) -> torch.Tensor:
    """The base weight of the module `path`, after `first_edit`, plus the module's LoRA."""
    base = first_edit(tensor) if first_edit else tensor
    new = (base + layer.get_delta_weight("default").detach()).to(dtype)  # PEFT has loaded the adapter as float32
    _require_change(path, [base.to(dtype)], [new], dtype)
    return new


def _replaced(value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return value


def _require_change(module: str, before: list[torch.Tensor], after: list[torch.Tensor], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if not all(torch.isfinite(weight).all() for weight in after):
        raise MergeError(
            f"with the adapter, {module} has infinite or NaN weights in {name}; set merge.dtype to float32, or train "
            "again"
        )
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        raise MergeError(
            f"the adapter changes nothing in {module}: the model does not use this layer (then leave it out of "
            f"train.lora_target_modules), or the change is too small for {name} (then set merge.dtype to float32)"
        )


def _merge_with_peft(
    identity: Mapping[str, Any], config: PretrainedConfig, adapter: Path, folder: Path, rounded: Edits, out: torch.dtype
) -> int:
    """Merge with PEFT's `merge_and_unload`, with the whole model in CPU memory; returns the number of modules."""
    base = auto_class(config).from_pretrained(
        identity["name_or_path"],
        revision=identity["revision"],
        config=config,
        dtype=torch.promote_types(out, compute_dtype()) if rounded else out,
        use_safetensors=True,
        trust_remote_code=False,
    )
    for parameter, round_weight in rounded.items():
        weight = base.get_parameter(parameter).data
        weight.copy_(round_weight(weight))
    model = load_adapter(base, adapter)
    modules = model.get_base_model().named_modules()
    layers = [(path, module) for path, module in modules if isinstance(module, BaseTunerLayer)]
    try:
        for path, layer in layers:
            weights = list(layer.get_base_layer().parameters())
            before = [weight.data.clone() for weight in weights]
            layer.merge()  # not safe_merge, which rounds the change to the weight's type before it adds it
            if not hasattr(layer, "lora_E") or layer.lora_E["default"].numel():  # AdaLoRA may leave a module no rank
                _require_change(path, before, [weight.data for weight in weights], out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "already merged", "no longer tied"
            merged = model.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, MergeError):
            raise
        reason = str(error).splitlines()[0]
        raise MergeError(f"PEFT cannot merge {adapter} ({model.peft_type}): {reason}") from None
    merged.to(out).save_pretrained(folder)
    return len(layers)
