"""Safetensors checkpoints, read and written a block of rows at a time, so that no whole tensor need be in memory.

A checkpoint of one or many shards comes in; one with the same shards, names and shapes goes out, with edits to some of
its tensors. Refused: a shard that is missing or cut short, and an index that names a tensor which no shard holds.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from pipeline.files import read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
BLOCK = 2**18  # elements in memory at a time; they fit the processor's cache
BLOCKSIZE = 64  # elements that share a scale in 4 bits: the default of bitsandbytes, which transformers uses

Blocks = Iterator[tuple[int, torch.Tensor]]  # first row, rows (R, …)
Edit = Callable[[Blocks], Blocks]


class WeightsError(ValueError):
    """A checkpoint that is not whole; the message names the file and what it lacks."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a shard: where its bytes are."""

    path: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes

    def blocks(self) -> Blocks:
        """The rows in turn, a multiple of 64 of them each time but the last."""
        rows = self.shape[0] if self.shape else 1
        step = BLOCKSIZE * max(1, BLOCK // (BLOCKSIZE * max(1, prod(self.shape[1:]))))
        with self.path.open("rb") as file:
            file.seek(self.start)
            for row in range(0, rows, step):
                block = torch.empty((min(step, rows - row), *self.shape[1:]), dtype=FLOATS[self.dtype])
                file.readinto(_bytes(block))
                yield row, block


@dataclass(frozen=True)
class Checkpoint:
    shards: dict[str, dict[str, Stored]]  # file name → name → tensor, in the order of their bytes

    @property
    def tensors(self) -> dict[str, Stored]:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that most of its bytes are in."""
        sizes = {name: sum(t.size for t in self.tensors.values() if t.dtype == name) for name in FLOATS}
        return FLOATS[max(sizes, key=lambda name: sizes[name])]


def open_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Checkpoint:
    """The safetensors weights in a folder, or of a Hub repository at `revision`; every header is read and checked.

    Raises:
        WeightsError: there are none, a shard is missing or damaged, or the index names a tensor that is not there.
    """
    single = _locate(name_or_path, revision, SINGLE)
    if single is not None:
        return Checkpoint({SINGLE: _header(single)})
    index = _locate(name_or_path, revision, INDEX)
    if index is None:
        raise WeightsError(f"{name_or_path} holds neither {SINGLE} nor {INDEX}; pickled weights are not loaded")
    try:
        files: dict[str, str] = read_json(index)["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged ({error}); fetch the checkpoint again") from None
    shards = {}
    for name in names:
        path = _locate(name_or_path, revision, name)
        if path is None:
            raise WeightsError(f"{name_or_path} lacks the shard {name} that {INDEX} names; fetch the checkpoint again")
        shards[name] = _header(path)
    absent = [tensor for tensor, name in files.items() if tensor not in shards[name]]
    if absent:
        raise WeightsError(
            f"{INDEX} of {name_or_path} names {len(absent)} tensors that are not in their shards "
            f"({', '.join(absent[:3])}); the checkpoint is incomplete, fetch it again"
        )
    return Checkpoint(shards)


def rewrite(
    checkpoint: Checkpoint, folder: Path, edits: Mapping[str, Edit], dtype: torch.dtype | None = None
) -> Checkpoint:
    """Write `checkpoint` to `folder` with `edits` by tensor name, in the same shards, and return it as read back.

    Args:
        dtype: what floating-point tensors are written in; None keeps each in its own.
    """
    for file, tensors in checkpoint.shards.items():
        _write_shard(folder / file, tensors, edits, dtype)
    if SINGLE not in checkpoint.shards:
        total = sum(tensor.size for tensor in checkpoint.tensors.values())
        places = {name: file for file, tensors in checkpoint.shards.items() for name in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    written = open_checkpoint(folder)
    if {n: t.shape for n, t in written.tensors.items()} != {n: t.shape for n, t in checkpoint.tensors.items()}:
        raise WeightsError(f"what was written to {folder} reads back with other tensors than its base has")
    return written


def round_trip(quantisation: Mapping[str, Any], dtype: torch.dtype, where: torch.device, transposed: bool) -> Edit:
    """What 4-bit quantisation leaves of a weight, bit for bit as the quantised model computes with it.

    The scales are quantised all together (double quantisation), so the 4-bit codes of the whole tensor are kept
    between two passes: 0.5 byte an element. `load_base` refuses the weights that bitsandbytes gets wrong on a CPU.

    Args:
        quantisation: bnb_4bit_quant_type, bnb_4bit_use_double_quant.
        dtype: type that the weight is quantised from, and computed in.
        transposed: a Conv1D weight, (in, out), which bitsandbytes holds as (out, in).
    """
    kind, double = quantisation["bnb_4bit_quant_type"], quantisation["bnb_4bit_use_double_quant"]

    def edit(blocks: Blocks) -> Blocks:
        if transposed:
            whole = torch.cat([block for _, block in blocks]).T.contiguous()
            yield 0, torch.cat([block for _, block in rounded(iter([(0, whole)]))]).T
        else:
            yield from rounded(blocks)

    def rounded(blocks: Blocks) -> Blocks:
        parts = []
        for row, block in blocks:
            codes, state = bnb.functional.quantize_4bit(
                block.to(where, dtype), blocksize=BLOCKSIZE, compress_statistics=False, quant_type=kind
            )
            parts.append((row, codes, state))
        scales = torch.cat([state.absmax for _, _, state in parts])
        if double:
            offset = scales.mean()
            quantised, nested = bnb.functional.quantize_blockwise(scales - offset, blocksize=256)
            scales = bnb.functional.dequantize_blockwise(quantised, nested) + offset
        done = 0
        for row, codes, state in parts:
            count = len(state.absmax)
            state.absmax = scales[done : done + count]
            done += count
            yield row, bnb.functional.dequantize_4bit(codes, state).cpu()

    return edit


def _locate(name_or_path: str | Path, revision: str | None, file: str) -> Path | None:
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision))
    except EntryNotFoundError:
        return None


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):  # refuses a header that does not fit the file
            pass
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        for start, end in [entry["data_offsets"]]
    }


def _write_shard(
    path: Path, tensors: Mapping[str, Stored], edits: Mapping[str, Edit], dtype: torch.dtype | None
) -> None:
    def target(tensor: Stored) -> str:
        return NAMES[dtype] if dtype is not None and tensor.dtype in FLOATS else tensor.dtype

    def size(tensor: Stored) -> int:
        kind = target(tensor)
        return tensor.size if kind == tensor.dtype else prod(tensor.shape) * FLOATS[kind].itemsize

    # Wide types first, as safetensors writes them: every tensor lies at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -size(tensors[name]) // max(1, prod(tensors[name].shape)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + size(tensors[name])
        kind = target(tensors[name])
        header[name] = {"dtype": kind, "shape": tensors[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor, kind = tensors[name], target(tensors[name])
            if name not in edits and kind == tensor.dtype:
                _copy(tensor, file)
                continue
            blocks = tensor.blocks()
            for _, block in edits[name](blocks) if name in edits else blocks:
                file.write(_bytes(block.to(FLOATS[kind]).contiguous()))


def _copy(tensor: Stored, file: Any) -> None:
    with tensor.path.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.size
        while left:
            data = source.read(min(left, 2 * BLOCK))
            file.write(data)
            left -= len(data)


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor, as files read and write it."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
