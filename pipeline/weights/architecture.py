"""What is known of a base without loading its weights: shapes, names in the checkpoint, weights that 4 bits round."""

from collections.abc import Mapping
from copy import deepcopy
from statistics import fmean
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from pipeline.weights.checkpoint import FLOATS, Checkpoint, Edits, round_trip
from pipeline.weights.loading import (
    UNQUANTISED,
    ModelError,
    Quantisation,
    class_settings,
    compute_dtype,
    device,
    fix_4bit_layers,
)


def base_config(identity: Mapping[str, Any], labels: list[str] | None = None) -> PretrainedConfig:
    """The base's configuration, without code of its repository; ModelError if transformers has no class for it."""
    name = identity["name_or_path"]
    try:
        config = AutoConfig.from_pretrained(
            name, revision=identity["revision"], trust_remote_code=False, **class_settings(labels)
        )
        config.architectures = [type(empty_model(config)).__name__]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} needs Python code from its own repository, which is never run or shipped, so no adapter can be "
            f"merged into it ({str(error).splitlines()[0]})"
        ) from None
    if hasattr(config, "auto_map"):
        del config.auto_map  # names Python files that are not shipped
    return config


def attention_widths(text_config: PretrainedConfig) -> tuple[float, float]:
    """Values per token of all query heads, and of all key heads; as means over layers, which differ in Gemma 4."""
    queries, keys = list[int](), list[int]()
    for layer in text_config.per_layer_config:
        heads = layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or getattr(layer, "v_head_dim", None) or layer.hidden_size // heads
        queries.append(heads * width)
        keys.append((getattr(layer, "num_key_value_heads", None) or heads) * width)
    return fmean(queries), fmean(keys)


def auto_class(config: PretrainedConfig) -> Any:
    """The class that loads a model: for classification if the configuration has a problem type (`class_settings`)."""
    return AutoModelForCausalLM if config.problem_type is None else AutoModelForSequenceClassification


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: parameters have shapes but take no memory."""
    with init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(deepcopy(config), dtype=torch.float32, trust_remote_code=False)


def checkpoint_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter → the tensor that transformers loads into it unchanged; parameters that it converts are left out."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    names = {}
    for key, stored in checkpoint.items():
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, converted = key, None
        fits = name in parameters and parameters[name].shape == stored.shape and stored.dtype in FLOATS
        if converted is None and fits:
            names[name] = key
    return names


def rounded_weights(config: PretrainedConfig, quantisation: Quantisation | None) -> Edits:
    """The weights that loading in 4 bits rounds, each with an edit that rounds it in the same way."""
    if quantisation is None or not quantisation["load_in_4bit"]:
        return {}
    model = empty_model(config)
    skip = None if config.problem_type is None else list(UNQUANTISED)
    settings = BitsAndBytesConfig(**quantisation, llm_int8_skip_modules=skip)
    Bnb4BitHfQuantizer(settings, pre_quantized=False).preprocess_model(model, device_map=None)
    fix_4bit_layers(model, config.name_or_path)
    return {
        f"{name}.weight": round_trip(quantisation, compute_dtype(), device(), module.source_cls is Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
