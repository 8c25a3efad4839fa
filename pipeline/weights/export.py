"""A merged model in the quantised forms that servers load: bitsandbytes in 4 or 8 bits, as `save_pretrained` writes it.

The merged folder comes in; a folder that `from_pretrained` loads as it is goes out.
"""

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.model import device
from pipeline.weights.checkpoint import open_checkpoint


class ExportError(ValueError):
    """The merged model cannot be written in that form."""


def export(kind: str, merged: Path, folder: Path) -> Path:
    """Write `merged` to `folder` as bnb-4bit (NF4 with double quantisation) or bnb-8bit (LLM.int8), and return it.

    Raises:
        ExportError: bitsandbytes cannot quantise this model here.
    """
    dtype = open_checkpoint(merged).dtype
    if kind == "bnb-4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
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
    return folder
