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
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, transpose
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.weights.architecture import auto_class, base_config, checkpoint_names, empty_model, rounded_weights
from pipeline.weights.checkpoint import FLOATS, Checkpoint, Edit, open_checkpoint, rewrite, round_trip
from pipeline.weights.loading import Quantisation, compute_dtype, device, is_whole, load_adapter

# Settings of a LoRA that say nothing more than which weights it changes and how much.
UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out"),
    *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "runtime_config", "loftq_config"),
}


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
        MergeError: the adapter changes nothing in a module that it targets, holds weights for modules that the base
            does not have, or cannot be merged; or the base is quantised or needs its repository's Python code.
        WeightsError: the base is not whole.
    """
    require_mergeable(adapter)
    if is_whole(adapter):
        return _copy_whole(adapter, folder, dtype)
    settings = PeftConfig.from_pretrained(str(adapter))
    config = base_config(identity, labels)
    checkpoint = open_checkpoint(identity["name_or_path"], identity["revision"])
    try:
        edits, modules = _edits(config, checkpoint, settings, adapter, quantisation, dtype)
    except _OnlyPeft as why:
        modules = _merge_with_peft(identity, config, checkpoint, adapter, folder, quantisation, dtype)
        return Merging("peft", str(why), modules)
    rewrite(checkpoint, folder, edits, dtype)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    return Merging("shards", None, modules)


def require_mergeable(adapter: Path) -> None:
    """Refuse what cannot become one model with its base.

    Raises:
        MergeError: prompt and prefix tuning.
    """
    if is_whole(adapter):
        return
    settings = PeftConfig.from_pretrained(str(adapter))
    if settings.is_prompt_learning:
        raise MergeError(
            f"{adapter} is {settings.peft_type.value} and changes no weight: it cannot be merged, and ships as the "
            "adapter that it is, on its base"
        )


def _copy_whole(trained: Path, folder: Path, dtype: torch.dtype | None) -> Merging:
    """A model of which every weight was trained: nothing is added to it, but its numbers may become narrower."""
    config = AutoConfig.from_pretrained(trained, trust_remote_code=False)
    checkpoint = open_checkpoint(trained)
    rewrite(checkpoint, folder, {}, dtype)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    return Merging("whole", None, len(checkpoint.tensors))


def empty_base(identity: Mapping[str, Any]) -> PreTrainedModel:
    """The base with the shapes of its parameters and without their numbers: adapters can be put on it, no more."""
    model = empty_model(base_config(identity))
    _without_weights(model)
    return model


def _edits(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    settings: PeftConfig,
    adapter: Path,
    quantisation: Quantisation | None,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Edit], int]:
    """What is to be done to which tensor of the checkpoint, and how many modules the adapter targets."""
    _require_understood(settings)
    empty = empty_model(config)
    names = checkpoint_names(empty, checkpoint)
    tied = {*empty.all_tied_weights_keys, *empty.all_tied_weights_keys.values()}

    def stored_as(parameter: str) -> str:
        if parameter in tied:
            raise _OnlyPeft(f"{parameter}, which the adapter changes, is tied to another weight")
        if parameter not in names:
            raise _OnlyPeft(f"{parameter} is not stored as floating-point numbers under a name of its own")
        return names[parameter]

    edits: dict[str, Edit] = {}
    if quantisation is not None:
        for parameter, transposed in rounded_weights(config, quantisation).items():
            edits[stored_as(parameter)] = round_trip(quantisation, compute_dtype(), device(), transposed)
    placeholders = _without_weights(empty)
    model = load_adapter(empty, adapter, empty=True).get_base_model()
    for path, value in model.named_parameters():
        # Whole tensors that the adapter brings along: biases, and modules that were trained beside it.
        if id(value) not in placeholders and not any(part.startswith("lora_") for part in path.split(".")):
            name = stored_as(path.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."))
            edits[name] = partial(_replaced, value.data)
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for path, module in modules:
        if type(module) is not LoraLinear or not isinstance(module.get_base_layer(), torch.nn.Linear | Conv1D):
            raise _OnlyPeft(f"{path} is a {type(module).__name__} of {type(module).__module__}")
        name = stored_as(f"{path}.weight")
        written = dtype or FLOATS[checkpoint.tensors[name].dtype]
        edits[name] = partial(_added, path, module, edits.get(name), written)
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and type(wrapper) is not ModulesToSaveWrapper:
            raise _OnlyPeft(f"{path} is wrapped in {type(wrapper).__name__}")
    return edits, len(modules)


def _require_understood(settings: PeftConfig) -> None:
    if type(settings) is not LoraConfig:
        raise _OnlyPeft(f"the method is {settings.peft_type.value}")
    default = LoraConfig()
    for key, value in vars(settings).items():
        if key not in UNDERSTOOD and value and value != getattr(default, key, None):
            raise _OnlyPeft(f"the adapter has {key}")
    if settings.init_lora_weights not in (True, False, "gaussian"):
        raise _OnlyPeft(f"init_lora_weights is {settings.init_lora_weights}, which may change the base's weights")


def _without_weights(model: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Give `model` parameters that have a shape but share one number, and return them by `id`.

    PEFT moves an adapter to the device of its base layer; on the meta device its weights would be lost.
    """
    placeholders: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.nn.Parameter(torch.zeros(1).expand(old.shape), requires_grad=False)
            placeholders[id(new)] = new
            setattr(module, name, new)
    return placeholders


def _added(
    path: str, layer: LoraLinear, before: Edit | None, written: torch.dtype, tensor: torch.Tensor
) -> torch.Tensor:
    """The LoRA at `path` added to what the edit `before` leaves of its base weight."""
    base = before(tensor) if before else tensor
    # As `get_delta_weight` computes it, but scaled in place. PEFT has loaded the adapter as float32.
    delta = layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
    new = (base + transpose(delta.mul_(layer.scaling["default"]), layer.fan_in_fan_out)).to(written)
    if not torch.isfinite(new).all():
        raise MergeError(_infinite(path, written))
    if torch.equal(new, base.to(written)):
        raise MergeError(_unchanged(path, written))
    return new


def _replaced(value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return value


def _infinite(module: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"with the adapter, {module} is infinite or not a number in {name}; train it again, or set merge.dtype"


def _unchanged(module: str, dtype: torch.dtype) -> str:
    return (
        f"the adapter changes nothing in {module}: it was not trained, is not the one evaluated, or its change is "
        f"less than a step of {str(dtype).removeprefix('torch.')} (merge.dtype: float32 would keep it)"
    )


def _merge_with_peft(
    identity: Mapping[str, Any],
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    adapter: Path,
    folder: Path,
    quantisation: Quantisation | None,
    dtype: torch.dtype | None,
) -> int:
    """`merge_adapter` by `merge_and_unload`, with the whole model in memory; on the CPU, in the checkpoint's type."""
    out = dtype or checkpoint.dtype
    base = auto_class(config).from_pretrained(
        identity["name_or_path"],
        revision=identity["revision"],
        config=config,
        dtype=out if quantisation is None else torch.promote_types(out, compute_dtype()),
        use_safetensors=True,
        trust_remote_code=False,
    )
    if quantisation is not None:
        for parameter, transposed in rounded_weights(config, quantisation).items():
            weight = base.get_parameter(parameter).data
            weight.copy_(round_trip(quantisation, compute_dtype(), device(), transposed)(weight))
    model = load_adapter(base, adapter)
    layers = [(p, m) for p, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    try:
        for path, layer in layers:
            weights = list(layer.get_base_layer().parameters())
            before = [weight.data.clone() for weight in weights]
            layer.merge()  # the safe form rounds the change to the weight's type before it is added
            if not all(torch.isfinite(weight).all() for weight in weights):
                raise MergeError(_infinite(path, out))
            if all(torch.equal(old, weight.data) for old, weight in zip(before, weights, strict=True)):
                raise MergeError(_unchanged(path, out))
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
