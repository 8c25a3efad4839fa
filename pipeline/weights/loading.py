"""Loading base models and adapters: quantised as they were trained, on the device there is, with threads that fit."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.core.vetting import check_adapter, check_model
from pipeline.core.workers import available_cores

disable_progress_bar()  # its carriage returns would fill logs; stages print their own progress

Quantisation = dict[str, Any]  # load_in_4bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant


HEADS = ("classifier", "score")  # of classification models: trained and saved whole, whatever the method
UNQUANTISED = (*HEADS, "pooler.dense", "pre_classifier")  # often new, and then there is nothing to quantise
PROMPT = "prompt_embeddings"


class ModelError(ValueError):
    """A base model or adapter that cannot be used; the message says which and why."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
) -> PreTrainedModel:
    """The base model of a contract, frozen as it is, on `device()`; in `compute_dtype()` unless quantised to 4 bits.

    Args:
        identity: `model` of the template contract (name_or_path, revision, trust_remote_code).
        quantisation: None, or load_in_4bit false, loads full-precision weights.
        labels: the classes of a sequence classification model; a head that the files lack is random, always the same.
        attn_implementation: as in transformers; None is what it prefers.

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
            model, found = auto.from_pretrained(
                output_loading_info=True,
                pretrained_model_name_or_path=identity["name_or_path"],
                revision=identity["revision"],
                trust_remote_code=identity["trust_remote_code"],
                **quantised,
                **class_settings(labels),
                dtype=compute_dtype(),
                device_map={"": device()},
                use_safetensors=True,
                attn_implementation=attn_implementation,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{identity['name_or_path']} cannot be loaded: {str(error).splitlines()[0]}") from None
    keep_4bit_weights_trainable(model)
    _refuse_ragged_blocks(model, identity["name_or_path"])
    if labels:
        # A pooler, say, that the published model lacks: made here, so the adapter must train and carry it.
        lacking = {key.rpartition(".")[0] for key in found["missing_keys"]}
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


def _refuse_ragged_blocks(model: torch.nn.Module, name: str) -> None:
    """On a CPU bitsandbytes 0.50 finds wrong scales where a row ends within a block of 64: twice the rounding error."""
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.weight.device.type == "cpu" and module.in_features % 64:
            raise ModelError(
                f"{path} of {name} has rows of {module.in_features} numbers, no multiple of 64; bitsandbytes computes "
                "wrongly with those in 4 bits on a CPU: set train.method to lora (and merge.export to []), or "
                "use a GPU"
            )


def load_tuned(
    identity: dict[str, Any], quantisation: Quantisation, folder: Path, labels: list[str] | None = None
) -> Any:
    """What `train` made in `folder`: the base with its adapter on top, or the whole model that was trained.

    Raises:
        ModelError, UnsafeModelError, UnsafeFileError: see `load_base` and `load_adapter`.
    """
    if is_whole(folder):
        return load_base(
            {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}, None, labels
        ).eval()
    return load_adapter(load_base(identity, quantisation, labels), folder)


@contextmanager
def untuned(model: Any, identity: dict[str, Any], labels: list[str] | None = None) -> Iterator[Any]:
    """The base that `load_tuned` put `model` on, as it was before training."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
        return
    place = next(model.parameters()).device
    model.to("cpu")
    yield load_base(identity, None, labels).eval()
    model.to(place)


def is_whole(folder: Path) -> bool:
    """Whether `train` left a whole model in `folder` (`train.method: full`) and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def load_adapter(base: PreTrainedModel, folder: Path, empty: bool = False) -> PeftModel:
    """`base` with the adapter in `folder` on top, for inference.

    Args:
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
        model = get_peft_model(base, config, low_cpu_mem_usage=empty)
        loaded = model.load_adapter(str(folder), "default", low_cpu_mem_usage=empty)
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
