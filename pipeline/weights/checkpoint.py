"""Reads and writes safetensors checkpoints tensor by tensor, with one output shard in memory at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import hf_hub_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.core.files import read_json, write_json
from pipeline.core.progress import Progress

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTHS = {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}  # bytes per number; other integers take 1
SHARD_BYTES = 2**30  # maximum of an output shard, unless a single tensor is larger

Edit = Callable[[torch.Tensor], torch.Tensor]
Edits = dict[str, Edit]  # by the name of a parameter or tensor


class WeightsError(ValueError):
    """A checkpoint is incomplete or damaged; the message names the file."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    path: Path
    name: str
    dtype: str  # in safetensors' spelling, such as BF16
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Size in bytes; floating-point numbers are counted as `dtype` if it is given."""
        is_float = self.dtype in FLOATS
        return prod(self.shape) * ((dtype or FLOATS[self.dtype]).itemsize if is_float else WIDTHS.get(self.dtype, 1))


Checkpoint = dict[str, Stored]  # by the tensor's name


def open_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Checkpoint:
    """The tensors of a folder, or of a Hub repository at `revision`; reads and checks every shard's header."""
    if single := _locate(name_or_path, revision, SINGLE):
        return _header(single)
    if not (index := _locate(name_or_path, revision, INDEX)):
        raise WeightsError(f"{name_or_path} has neither {SINGLE} nor {INDEX}; only safetensors weights are loaded")
    try:
        shard_of: dict[str, str] = read_json(index)["weight_map"]
        names = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged ({error}); download the checkpoint again") from None
    shards = {name: _header(_locate(name_or_path, revision, name) or index.with_name(name)) for name in names}
    if missing := [tensor for tensor, name in shard_of.items() if tensor not in shards[name]]:
        raise WeightsError(
            f"{INDEX} of {name_or_path} lists {len(missing)} tensors that are not in their shards "
            f"({', '.join(missing[:3])}); download the checkpoint again"
        )
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _locate(name_or_path: str | Path, revision: str | None, file: str) -> Path | None:
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision))
    except EntryNotFoundError:
        return None


def _header(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:  # fails if the header does not match the file
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is missing, cut short or damaged ({error}); download it again") from None


def rewrite(checkpoint: Checkpoint, folder: Path, edits: Edits, dtype: torch.dtype | None, stage: str) -> None:
    """Write `checkpoint` to `folder`, with `edits` by tensor name and floats as `dtype` (None: as stored)."""
    plan = split_state_dict_into_shards_factory(
        checkpoint,
        get_storage_size=lambda stored: stored.size(dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    progress = Progress(stage, len(plan.filename_to_tensors), "files of weights")
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        shard = {}
        for name in names:
            stored, tensor = checkpoint[name], checkpoint[name].load()
            if stored.dtype in FLOATS:
                edited = edits[name](tensor) if name in edits else tensor
                tensor = edited.to(dtype or FLOATS[stored.dtype]).contiguous()
            shard[name] = tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
        progress.update(number)
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    written = {name: stored.shape for name, stored in open_checkpoint(folder).items()}
    if written != {name: stored.shape for name, stored in checkpoint.items()}:
        raise WeightsError(f"the tensors written to {folder} differ in name or shape from those of their base")


def round_trip(quantisation: Mapping[str, Any], dtype: torch.dtype, device: torch.device, transposed: bool) -> Edit:
    """An edit that quantises a weight to 4 bits and back, bit for bit as the quantised model uses it in `dtype`.

    `transposed`: for a Conv1D weight, (in, out), which bitsandbytes stores as (out, in).
    """

    def edit(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.T.contiguous() if transposed else weight
        codes, state = bnb.functional.quantize_4bit(
            weight.to(device, dtype),
            blocksize=64,  # the default of bitsandbytes, which transformers uses
            compress_statistics=quantisation["bnb_4bit_use_double_quant"],
            quant_type=quantisation["bnb_4bit_quant_type"],
        )
        rounded = bnb.functional.dequantize_4bit(codes, state).to(weight.device)
        return rounded.T if transposed else rounded

    return edit
