"""An adapter added to the weights of its base: from safetensors to safetensors, without the model in memory.

PEFT's own layers, built on a base without weights, say what is added to which weight and how scaled; the sum is bit for
bit that of `merge_and_unload` on a CPU. Adapters other than LoRA on linear layers go through PEFT, with the reason;
those that cannot be merged at all (prompt and prefix tuning) are refused.
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
from pipeline.weights.checkpoint import FLOATS, Checkpoint, Edit, open_checkpoint, rewrite
from pipeline.weights.loading import Quantisation, compute_dtype, is_whole, load_adapter, stand_in_for_weights


class MergeError(ValueError):
    """Base and adapter cannot become one model, or it is not what was evaluated; nothing was written."""


class _OnlyPeft(Exception):
    """Why this adapter, or this base, is merged by PEFT and not shard by shard."""


@dataclass(frozen=True)
class Merging:
    method: str  # shards | peft | whole (no adapter: the model itself was trained)
    reason: str | None  # why PEFT had to do it
    modules: int  # modules that the adapter changed: all that it targets, or MergeError


def merge_adapter(
    identity: Mapping[str, Any],
    adapter: Path,
    folder: Path,
    quantisation: Quantisation | None = None,
    dtype: torch.dtype | None = None,
    labels: list[str] | None = None,
) -> Merging:
    """Write the base with the adapter added to `folder`: weights in shards of 1 GiB at most, and config.json.

    Args:
        identity: `model` of the template contract; its Python code is never run.
        quantisation: adds to what the 4-bit round trip leaves of the base; None adds to the base itself.
        dtype: of the written weights; None keeps each in the checkpoint's own type.
        labels: the classes of a sequence classification model, whose head comes from the adapter.

    Raises:
        MergeError: the adapter changes nothing in a module that it targets, or cannot be merged.
        ModelError: it holds weights for modules that the base does not have, or the base needs its own Python code.
        WeightsError: the base is not whole.
    """
    require_mergeable(adapter)
    if is_whole(adapter):  # nothing is added to it, but its numbers may become narrower
        config, checkpoint = AutoConfig.from_pretrained(adapter, trust_remote_code=False), open_checkpoint(adapter)
        edits: dict[str, Edit] = {}
        merging = Merging("whole", None, len(checkpoint))
    else:
        config = base_config(identity, labels)
        checkpoint = open_checkpoint(identity["name_or_path"], identity["revision"])
        rounded = rounded_weights(config, quantisation)
        try:
            edits, modules = _edits(config, checkpoint, adapter, rounded, dtype)
        except _OnlyPeft as why:
            modules = _merge_with_peft(identity, config, checkpoint, adapter, folder, rounded, dtype)
            return Merging("peft", str(why), modules)
        merging = Merging("shards", None, modules)
    rewrite(checkpoint, folder, edits, dtype)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    return merging


def require_mergeable(adapter: Path) -> None:
    """Raise MergeError for prompt and prefix tuning, which cannot become one model with their base."""
    settings = None if is_whole(adapter) else PeftConfig.from_pretrained(str(adapter))
    if settings is not None and settings.is_prompt_learning:
        raise MergeError(
            f"{adapter} is {settings.peft_type.value} and changes no weight: it cannot be merged, and ships as the "
            "adapter that it is, on its base"
        )


def _edits(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    adapter: Path,
    rounded: dict[str, Edit],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Edit], int]:
    """What is to be done to which tensor of the checkpoint, and how many modules the adapter targets."""
    _require_plain_lora(adapter)
    empty = empty_model(config)
    names = checkpoint_names(empty, checkpoint)
    tied = {*empty.all_tied_weights_keys, *empty.all_tied_weights_keys.values()}

    def stored_as(parameter: str) -> str:
        if parameter in tied:
            raise _OnlyPeft(f"{parameter}, which the adapter changes, is tied to another weight")
        if parameter not in names:
            raise _OnlyPeft(f"{parameter} is not stored as floating-point numbers under a name of its own")
        return names[parameter]

    edits = {stored_as(parameter): round_weight for parameter, round_weight in rounded.items()}
    stand_in_for_weights(empty, torch.device("cpu"))
    model, targeted = load_adapter(empty, adapter, empty=True).get_base_model(), 0
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, value in module.modules_to_save["default"].named_parameters():
                edits[stored_as(f"{path}.{name}")] = partial(_replaced, value.data)
        elif isinstance(module, BaseTunerLayer):
            if type(module) is not LoraLinear or not isinstance(module.get_base_layer(), torch.nn.Linear | Conv1D):
                raise _OnlyPeft(f"{path} is a {type(module).__name__} of {type(module).__module__}")
            name = stored_as(f"{path}.weight")
            edits[name] = partial(_added, path, module, edits.get(name), dtype or FLOATS[checkpoint[name].dtype])
            targeted += 1
    return edits, targeted


def _require_plain_lora(adapter: Path) -> None:
    """Leave all that is more than a sum of A and B to PEFT, and whole modules: magnitudes, biases, embeddings."""
    settings = PeftConfig.from_pretrained(str(adapter))
    if type(settings) is not LoraConfig:
        raise _OnlyPeft(f"the method is {settings.peft_type.value}")
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            whole = any(f".{module}." in key for module in settings.modules_to_save or ())
            if not whole and not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise _OnlyPeft(f"the adapter holds {key}")


def _added(
    path: str, layer: LoraLinear, before: Edit | None, written: torch.dtype, tensor: torch.Tensor
) -> torch.Tensor:
    """The LoRA at `path` added to what the edit `before` leaves of its base weight."""
    base = before(tensor) if before else tensor
    new = (base + layer.get_delta_weight("default").detach()).to(written)  # PEFT has loaded the adapter as float32
    _require_change(path, [base.to(written)], [new], written)
    return new


def _replaced(value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return value


def _require_change(module: str, before: list[torch.Tensor], after: list[torch.Tensor], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if not all(torch.isfinite(weight).all() for weight in after):
        raise MergeError(
            f"with the adapter, {module} is infinite or not a number in {name}; train it again, or set merge.dtype"
        )
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        raise MergeError(
            f"the adapter changes nothing in {module}: it was not trained, is not the one evaluated, or its change is "
            f"less than a step of {name} (merge.dtype: float32 would keep it)"
        )


def _merge_with_peft(
    identity: Mapping[str, Any],
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    adapter: Path,
    folder: Path,
    rounded: dict[str, Edit],
    dtype: torch.dtype | None,
) -> int:
    """`merge_adapter` by `merge_and_unload`, with the whole model in memory; on the CPU, in the checkpoint's type."""
    stored = {name: sum(t.size() for t in checkpoint.values() if t.dtype == name) for name in FLOATS}
    out = dtype or FLOATS[max(stored, key=lambda name: stored[name])]  # the type that most of its bytes are in
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
    layers = [(p, m) for p, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    try:
        for path, layer in layers:
            weights = list(layer.get_base_layer().parameters())
            before = [weight.data.clone() for weight in weights]
            layer.merge()  # the safe form rounds the change to the weight's type before it is added
            _require_change(path, before, [weight.data for weight in weights], out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are merged already, and are no longer tied
            merged = model.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, MergeError):
            raise
        reason = str(error).splitlines()[0]
        raise MergeError(f"PEFT cannot merge {adapter} ({model.peft_type}): {reason}") from None
    merged.to(out).save_pretrained(folder)
    return len(layers)
