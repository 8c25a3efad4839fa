"""A merged model in the forms that servers load: bitsandbytes in 4 or 8 bits, and GGUF.

Each form is a folder of its own, and the model as it is read back from there is returned.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from pipeline.chat.template import local_source
from pipeline.weights.checkpoint import open_checkpoint
from pipeline.weights.gguf import GGUF, ExportError, convert
from pipeline.weights.loading import compute_dtype, device, load_base

QUANTISED: dict[str, dict[str, Any]] = {
    "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-8bit": {"load_in_8bit": True},
}


def export(kind: str, merged: Path, folder: Path) -> PreTrainedModel:
    """Write `merged` to `folder` as `kind` and read it back, on `device()`.

    Args:
        kind: bnb-4bit (NF4 with double quantisation), bnb-8bit (LLM.int8), gguf-f16, gguf-bf16 or gguf-q8_0.

    Raises:
        ExportError: bitsandbytes or llama.cpp's converter cannot write this model.
    """
    if kind.startswith(GGUF):
        return _gguf(kind, merged, folder)
    _quantise(kind, merged, folder)
    return load_base(local_source(folder))


def _quantise(kind: str, merged: Path, folder: Path) -> None:
    dtype = open_checkpoint(merged).dtype
    config = BitsAndBytesConfig(**QUANTISED[kind], bnb_4bit_compute_dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            merged, quantization_config=config, dtype=dtype, device_map={"": device()}, use_safetensors=True
        )
        model.save_pretrained(folder)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ExportError(f"merge.export {kind} failed: {str(error).splitlines()[0]}") from None
    for path in merged.iterdir():
        if not (path.name.startswith("model") or (folder / path.name).exists()):
            shutil.copy(path, folder / path.name)


def _gguf(kind: str, merged: Path, folder: Path) -> PreTrainedModel:
    """transformers undoes the file's codes: the scores are those of its weights, not of llama.cpp's kernels."""
    folder.mkdir()
    file = folder / "model.gguf"
    convert(kind, merged, file)
    shutil.copy(merged / "contract.json", folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=compute_dtype(), device_map={"": device()}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"merge.export {kind}: transformers cannot read {file.name} back: {error}") from None
    model.generation_config = GenerationConfig.from_pretrained(merged)
    return model
