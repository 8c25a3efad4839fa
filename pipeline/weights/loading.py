"""Loads base models and adapters, quantised as in training, on the GPU or CPU, with threads for the idle cores."""

import warnings
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
HEADS = ("classifier", "score")  # of classification models: every method trains and saves them whole
UNQUANTISED = (*HEADS, "pooler.dense", "pre_classifier")  # often new in training, so without published weights
PROMPT = "prompt_embeddings"
# PEFT 0.21 uses an old name of transformers'; an adapter keeps its base's name without the path.
PEFT_WARNINGS = "`is_gradient_checkpointing`|The PEFT config's `base_model_name_or_path`"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class ModelError(ValueError):
    """A base model or adapter that cannot be used; the message says which and why."""


@cache
def device() -> torch.device:
    """The GPU, or the CPU; prints once why a GPU of this machine is not used."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if NVIDIA_DRIVER.exists():
        cuda = torch.version.cuda
        reason = f"needs a driver for CUDA {cuda}" if cuda else "is a build for CPUs"
        note(f"computing on the CPU: PyTorch {torch.__version__} {reason}, so it cannot use the GPU of this machine")
    return torch.device("cpu")


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that `model` takes its tokens on; offloaded weights are on the meta device until they are needed."""
    first = next(model.parameters()).device
    return device() if first.type == "meta" else first


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def compute_dtype() -> torch.dtype:
    """bfloat16 on a GPU, float16 on one too old for it; float32 on a CPU: exact, and as fast for small models."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def use_free_cores() -> int:
    """Give torch as many threads as cores are idle now, at least one; too many make it 10 to 40 times slower."""
    cores = available_cores()
    busy = cores * psutil.cpu_percent(interval=0.3) / 100
    return use_threads(max(1, min(cores, round(cores - busy))))


def use_threads(threads: int) -> int:
    torch.set_num_threads(threads)
    return threads


def record_dtype(folder: Path) -> None:
    """Write `compute_dtype()` into config.json, so that a plain `from_pretrained` computes as the model was scored."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"dtype": str(compute_dtype()).removeprefix("torch.")})


def load_base(
    identity: dict[str, Any], quantisation: Quantisation | None = None, labels: list[str] | None = None, **options: Any
) -> PreTrainedModel:
    """Load the base model of a contract in `compute_dtype()`, or quantised to 4 bits.

    Args:
        identity: `model` of the template contract (name_or_path, revision, trust_remote_code).
        labels: the classes of a sequence classification model; a missing head is initialised with a fixed seed.
        options: `attn_implementation`, `device_map` and so on of transformers; by default all weights on `device()`.

    Raises:
        ModelError: the model cannot be loaded from safetensors, or not be computed in 4 bits on a CPU.
        UnsafeModelError, UnsafeFileError: see `check_model`.
    """
    check_model(identity["name_or_path"], identity["revision"])
    # Left out without 4 bits: None would load weights that are stored quantised as if they were not, with a warning.
    quantised = {}
    if quantisation is not None and quantisation["load_in_4bit"]:
        skip = list(UNQUANTISED) if labels else None
        config = BitsAndBytesConfig(**quantisation, bnb_4bit_compute_dtype=compute_dtype(), llm_int8_skip_modules=skip)
        quantised["quantization_config"] = config
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto_class = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
            model, loading_info = auto_class.from_pretrained(
                output_loading_info=True,
                pretrained_model_name_or_path=identity["name_or_path"],
                revision=identity["revision"],
                trust_remote_code=identity["trust_remote_code"],
                **quantised,
                **class_settings(labels),
                dtype=compute_dtype(),
                **({"device_map": {"": device()}} | options),
                use_safetensors=True,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{identity['name_or_path']} cannot be loaded: {str(error).splitlines()[0]}") from None
    fix_4bit_layers(model, identity["name_or_path"])
    if labels:
        # Modules that the published model lacks, such as a pooler: the adapter must train and save them.
        missing = {key.rpartition(".")[0] for key in loading_info["missing_keys"]}
        model.new_modules = sorted(name for name in missing if name.split(".")[0] not in HEADS)
        return model
    # Drop its sampling defaults (repetition_penalty, num_beams, …), which `generate` would use for what it is not told.
    tokens = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def class_settings(labels: list[str] | None) -> dict[str, Any]:
    """The settings of a sequence classification model's configuration for its classes."""
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def fix_4bit_layers(model: torch.nn.Module, name: str) -> None:
    """Keep 4-bit weights trainable on a CPU; raise ModelError for rows that end within a block of 64.

    bitsandbytes 0.50 does both wrong without a warning: with AVX512-BF16 it repacks weights at the first inference, and
    then they pass no gradient and dequantise to noise; a ragged row gets wrong scales, which double its rounding error.
    """
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if device().type == "cpu" and module.in_features % 64:
                raise ModelError(
                    f"{path} of {name} has rows of {module.in_features} numbers, not a multiple of 64: on a CPU, 4-bit "
                    "results would be wrong; set train.method to lora, or use a GPU"
                )


def sort_sets(adapter: Path) -> None:
    """Sort the module names in adapter_config.json; PEFT writes sets, whose order changes from run to run."""
    config = read_json(adapter / "adapter_config.json")
    sets = ("target_modules", "target_parameters", "feedforward_modules", "modules_to_save")
    names = {key: sorted(config[key]) for key in sets if isinstance(config.get(key), list)}
    write_json(adapter / "adapter_config.json", config | names)


def is_whole(folder: Path) -> bool:
    """Whether `train` left a whole model in `folder` (`train.method: full`) and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def load_adapter(base: Any, folder: Path, name: str = "default", empty: bool = False) -> PeftModel:
    """`base` (a model, or a PeftModel, which gets another adapter) with the adapter in `folder`, for inference.

    `empty`: `base` is on the meta device, and only the adapter's weights are loaded.

    Raises:
        ModelError: `folder` has no safetensors adapter, or it does not fit the base.
        UnsafeModelError, UnsafeFileError: see `check_adapter`.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; run `dvc repro train`")
    check_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    misfit = f"the adapter in {folder} does not fit {base.config.name_or_path}"
    try:
        with _placeholders(base, config), warnings.catch_warnings():
            warnings.filterwarnings("ignore", PEFT_WARNINGS)
            model = base if isinstance(base, PeftModel) else get_peft_model(base, config, name, low_cpu_mem_usage=empty)
            loading_info = model.load_adapter(str(folder), name, low_cpu_mem_usage=empty)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{misfit}: {str(error).splitlines()[0]}") from None
    # PEFT ignores both, but half an adapter must not pass for a whole one. It lists the embeddings of prompt and prefix
    # tuning as unexpected, although it loads them and checks their shape.
    unexpected = [key for key in loading_info.unexpected_keys if not (config.is_prompt_learning and key == PROMPT)]
    for kind, keys in (("missing", loading_info.missing_keys), ("unexpected", unexpected)):
        if keys:
            raise ModelError(f"{misfit}: {len(keys)} {kind} weights (first {keys[0]})")
    return model.eval()


@contextmanager
def _placeholders(model: Any, config: PeftConfig) -> Iterator[None]:
    """Let PEFT add an adapter to a model with offloaded weights, which accelerate loads at the first pass.

    PEFT's own way (`hf_device_map`) tries to copy these weights and fails.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device_map = vars(base).pop("hf_device_map", None)
    if device_map is not None:
        settings = ("use_dora", "modules_to_save", "target_parameters")
        needs_weights = [key for key in settings if getattr(config, key, None)]
        if needs_weights and any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"with {needs_weights[0]}, the whole base must fit into the device's memory")
        fill_with_placeholders(model, device())
    yield
    if device_map is not None:
        base.hf_device_map = device_map


def fill_with_placeholders(model: torch.nn.Module, target: torch.device) -> None:
    """Replace each meta weight by one number, expanded to its shape: PEFT moves an adapter to its layer's device."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                placeholder = torch.zeros(1, dtype=weight.dtype, device=target).expand(weight.shape)
                setattr(module, name, torch.nn.Parameter(placeholder, requires_grad=False))
