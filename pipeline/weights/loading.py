"""Loading base models and adapters: quantised as they were trained, on the device there is, with threads that fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from pipeline.core.files import read_json, write_json
from pipeline.core.processes import available_cores
from pipeline.core.progress import note
from pipeline.core.vetting import check_adapter, check_model

disable_progress_bar()  # its carriage returns would fill logs; stages print their own progress

Quantisation = dict[str, Any]  # load_in_4bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant


HEADS = ("classifier", "score")  # of classification models: trained and saved whole, whatever the method
UNQUANTISED = (*HEADS, "pooler.dense", "pre_classifier")  # often new, and then there is nothing to quantise
PROMPT = "prompt_embeddings"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class ModelError(ValueError):
    """A base model or adapter that cannot be used; the message says which and why."""


@cache
def device() -> torch.device:
    """The GPU, or the CPU; a GPU that PyTorch cannot use is said once."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if NVIDIA_DRIVER.exists():
        reason = (
            "is a build for CPUs" if torch.version.cuda is None else f"needs a driver for CUDA {torch.version.cuda}"
        )
        note(f"the GPU of this machine is not used: PyTorch {torch.__version__} {reason}; computing on the CPU")
    return torch.device("cpu")


def input_device(model: torch.nn.Module) -> torch.device:
    """Where `model` takes its tokens. Offloaded weights are on no device until they are needed."""
    first = next(model.parameters()).device
    return device() if first.type == "meta" else first


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def compute_dtype() -> torch.dtype:
    """bfloat16 on a GPU, float16 on one too old for it; float32 on a CPU, as fast at small sizes, and exact."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def use_free_cores() -> int:
    """Give torch the cores that are idle now, at least one; oversubscribed threads are 10 to 40 times slower."""
    cores = available_cores()
    busy = cores * psutil.cpu_percent(interval=0.3) / 100
    return use_threads(max(1, min(cores, round(cores - busy))))


def use_threads(threads: int) -> int:
    torch.set_num_threads(threads)
    return threads


def record_dtype(folder: Path) -> None:
    """Have a plain `from_pretrained` of the model in `folder` compute as it was scored: in `compute_dtype()`."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"dtype": str(compute_dtype()).removeprefix("torch.")})


def load_base(
    identity: dict[str, Any],
    quantisation: Quantisation | None = None,
    labels: list[str] | None = None,
    attn_implementation: str | None = None,
    **placement: Any,
) -> PreTrainedModel:
    """The base model of a contract, frozen as it is, on `device()`; in `compute_dtype()` unless quantised to 4 bits.

    Args:
        identity: `model` of the template contract (name_or_path, revision, trust_remote_code).
        quantisation: None, or load_in_4bit false, loads full-precision weights.
        labels: the classes of a sequence classification model; a head that the files lack is random, always the same.
        attn_implementation: as in transformers; None is what it prefers.
        placement: `device_map` and what belongs to it, as in transformers; by default all weights are on `device()`.

    Raises:
        ModelError: the model cannot be loaded from safetensors, or a CPU cannot compute with it in 4 bits.
        UnsafeModelError, UnsafeFileError: its files would do more than that; see `check_model`.
    """
    check_model(identity["name_or_path"], identity["revision"])
    # Left out, not None: that would load weights that are stored quantised as if they were not, with just a warning.
    quantised = {}
    if quantisation is not None and quantisation["load_in_4bit"]:
        config = BitsAndBytesConfig(
            **quantisation,
            bnb_4bit_compute_dtype=compute_dtype(),
            llm_int8_skip_modules=list(UNQUANTISED) if labels else None,
        )
        quantised["quantization_config"] = config
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
            model, loaded = auto.from_pretrained(
                output_loading_info=True,
                pretrained_model_name_or_path=identity["name_or_path"],
                revision=identity["revision"],
                trust_remote_code=identity["trust_remote_code"],
                **quantised,
                **class_settings(labels),
                dtype=compute_dtype(),
                **({"device_map": {"": device()}} | placement),
                use_safetensors=True,
                attn_implementation=attn_implementation,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{identity['name_or_path']} cannot be loaded: {str(error).splitlines()[0]}") from None
    keep_4bit_weights_trainable(model)
    refuse_ragged_blocks(model, identity["name_or_path"])
    if labels:
        # A pooler, say, that the published model lacks: made here, so the adapter must train and carry it.
        lacking = {key.rpartition(".")[0] for key in loaded["missing_keys"]}
        model.new_modules = sorted(name for name in lacking if name.split(".")[0] not in HEADS)
        return model
    # Its sampling habits (repetition_penalty, num_beams, …) would fill every gap of `generate`'s own settings.
    tokens = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def class_settings(labels: list[str] | None) -> dict[str, Any]:
    """What a configuration says of the classes of a sequence classification model."""
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def keep_4bit_weights_trainable(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights at the first inference on a CPU with AVX512-BF16.

    The repacked form has no backward pass and dequantises to noise, both without a warning (bitsandbytes 0.50): a
    validation before or during training would stop every frozen layer from passing gradients back.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_ragged_blocks(model: torch.nn.Module, name: str) -> None:
    """On a CPU bitsandbytes 0.50 finds wrong scales where a row ends within a block of 64: twice the rounding error."""
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and device().type == "cpu" and module.in_features % 64:
            raise ModelError(
                f"{path} of {name} has rows of {module.in_features} numbers, not a multiple of 64; bitsandbytes "
                "computes wrongly with those in 4 bits on a CPU: set train.method to lora, or use a GPU"
            )


def sort_sets(adapter: Path) -> None:
    """Give adapter_config.json one order of its module names: PEFT writes sets, which change it from run to run."""
    path = adapter / "adapter_config.json"
    config = read_json(path)
    sets = ("target_modules", "target_parameters", "feedforward_modules", "modules_to_save")
    names = {key: sorted(config[key]) for key in sets if isinstance(config.get(key), list)}
    write_json(path, config | names)


def is_whole(folder: Path) -> bool:
    """Whether `train` left a whole model in `folder` (`train.method: full`) and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def load_adapter(base: Any, folder: Path, name: str = "default", empty: bool = False) -> PeftModel:
    """`base` with the adapter in `folder` on top, for inference.

    Args:
        base: a model, or one with adapters, which gets another.
        empty: `base` has no weights; the adapter's own are put in, and nothing is computed.

    Raises:
        ModelError: no safetensors adapter there, or one for another architecture.
        UnsafeModelError, UnsafeFileError: it is not plain LoRA; see `check_adapter`.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} holds no adapter_model.safetensors; run `dvc repro train`")
    check_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    try:
        with _stand_ins(base, config):
            model = base if isinstance(base, PeftModel) else get_peft_model(base, config, name, low_cpu_mem_usage=empty)
            loaded = model.load_adapter(str(folder), name, low_cpu_mem_usage=empty)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the adapter in {folder} does not fit {base.config.name_or_path}: {reason}") from None
    # PEFT says nothing of either by itself; half an adapter must not pass for one.
    # Of prompt and prefix tuning it loads this one by itself, with its shape checked, and calls it unexpected.
    unexpected = [key for key in loaded.unexpected_keys if not (config.is_prompt_learning and key == PROMPT)]
    for what, keys in (("lacks", loaded.missing_keys), ("has no place in it for", unexpected)):
        if keys:
            raise ModelError(
                f"the adapter in {folder} does not fit {base.config.name_or_path}: it {what} {len(keys)} weights: "
                f"{', '.join(keys)}"
            )
    return model.eval()


@contextmanager
def _stand_ins(model: Any, config: PeftConfig) -> Iterator[None]:
    """Let PEFT put an adapter on a model of which some weights lie in CPU memory or on disk until they are needed.

    accelerate brings the weights at the first pass. PEFT's own way (`hf_device_map`) copies them, and cannot.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device_map = vars(base).pop("hf_device_map", None)
    if device_map is not None:
        needs_weights = [
            key for key in ("use_dora", "modules_to_save", "target_parameters") if getattr(config, key, None)
        ]
        if needs_weights and any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"it has {needs_weights[0]}, and parts of the base are not in the device's memory")
        stand_in_for_weights(model, device())
    yield
    if device_map is not None:
        base.hf_device_map = device_map


def stand_in_for_weights(model: torch.nn.Module, where: torch.device) -> None:
    """Put one number in the shape of each weight that is nowhere: PEFT moves an adapter to its layer's weight."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                stand_in = torch.zeros(1, dtype=weight.dtype, device=where).expand(weight.shape)
                setattr(module, name, torch.nn.Parameter(stand_in, requires_grad=False))
