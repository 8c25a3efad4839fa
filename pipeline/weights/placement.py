"""Places a model for scoring: on one device, on several GPUs or, if it is too large, also in CPU memory and on disk.

An adapter that was trained on a 4-bit base is scored on the same rounded weights. Held as plain bfloat16 (float32 on a
CPU) they compute several times faster than in 4 bits, so they stay in 4 bits only if memory requires it.
"""

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.chat.template import local_source
from pipeline.core.files import WORK_DIR
from pipeline.core.memory import free
from pipeline.core.progress import note
from pipeline.weights.architecture import base_config, checkpoint_names, empty_model, rounded_weights
from pipeline.weights.checkpoint import Edits, open_checkpoint, rewrite
from pipeline.weights.loading import ModelError, Quantisation, compute_dtype, device, is_whole, load_adapter, load_base

VARIABLE = "RETUNE_MAX_MEMORY"
GIB = 2**30
ROOM = 0.1  # share of a device's memory that is left to activations and the cache of keys and values
PACKED = 0.53  # bytes per 4-bit number, with scales
CPU_BYTES_PER_S, DISK_BYTES_PER_S = 12e9, 1.5e9  # over PCIe 4, from an SSD; only for a message
Memory = dict[int | str, int]  # bytes that weights may take, by GPU number and "cpu"


def load_for_scoring(
    identity: dict[str, Any], quantisation: Quantisation | None = None, labels: list[str] | None = None
) -> PreTrainedModel:
    """The base, with its weights rounded to 4 bits if training quantised it, placed where it fits.

    Raises as `load_base`, and ModelError if other processes fill the GPU.
    """
    try:
        config = base_config(identity, labels)
    except ModelError:  # it needs its repository's code, so its size is unknown here
        return load_base(identity, quantisation, labels)
    rounded = rounded_weights(config, quantisation)
    numbers = {name: parameter.numel() for name, parameter in empty_model(config).named_parameters()}
    width = compute_dtype().itemsize
    plain = sum(numbers.values()) * width  # bytes
    packed = int(plain - (width - PACKED) * sum(numbers[name] for name in rounded))
    memory = available_memory()
    if (placement := placement_for(plain, memory)) is not None:
        model = load_base(identity, None, labels, **placement)
        for parameter, round_weight in rounded.items():
            weight = model.get_parameter(parameter).data
            weight.copy_(round_weight(weight))
        return model
    if rounded and (placement := placement_for(packed, memory)) is not None:
        note(
            f"the base stays in 4 bits, which is several times slower: {_gib(plain)} of plain weights do not fit into "
            f"{_gib(_first_device(memory))} of free memory"
        )
        return load_base(identity, quantisation, labels, **placement)
    _refuse_full_gpu(packed, memory)
    gpus = sum(limit for name, limit in memory.items() if name != "cpu")
    on_disk = max(0, plain - gpus - memory["cpu"])
    in_memory = plain - gpus - on_disk if gpus else 0
    seconds = in_memory / CPU_BYTES_PER_S + on_disk / DISK_BYTES_PER_S
    note(
        f"the model ({_gib(plain)}) is larger than the memory of the device ({_gib(_first_device(memory))} free): each "
        f"token of a batch reads {_gib(in_memory)} from CPU memory and {_gib(on_disk)} from disk, which takes about "
        f"{seconds:.2g} s"
    )
    return _offloaded(identity, config, rounded, labels, memory)


def available_memory() -> Memory:
    """Bytes that weights may take now; the variable RETUNE_MAX_MEMORY (`gpu=6GiB,cpu=20GiB`) lowers them."""
    limits = _limits()
    memory: Memory = {}
    if torch.cuda.is_available():
        free()
        for gpu in range(torch.cuda.device_count()):
            unused, total = torch.cuda.mem_get_info(gpu)
            memory[gpu] = max(0, min(int(unused - ROOM * total), limits.get("gpu", total)))
    memory["cpu"] = min(int(psutil.virtual_memory().available * (1 - ROOM)), limits.get("cpu", 2**62))
    return memory


def _limits() -> dict[str, int]:
    limits = {}
    for part in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"\s*(gpu|cpu)=(\d+(?:\.\d+)?)([KMG])iB\s*", part)
        if match is None:
            raise ModelError(f"{VARIABLE} contains {part!r}; write it like gpu=6GiB,cpu=20GiB (gpu: for each GPU)")
        limits[match[1]] = int(float(match[2]) * 1024 ** (" KMG".index(match[3])))
    return limits


def placement_for(size: int, memory: Memory) -> dict[str, Any] | None:
    """`load_base`'s placement of `size` bytes: on the first device or on all GPUs; None if they do not fit."""
    gpus = {name: limit for name, limit in memory.items() if name != "cpu"}
    if size <= _first_device(memory):
        return {"device_map": {"": device()}}
    # Layers are not split, so some of each GPU stays empty.
    if len(gpus) > 1 and size <= (1 - ROOM) * sum(gpus.values()):
        note(f"{_gib(size)} of weights are spread over {len(gpus)} GPUs, which compute one after the other")
        return {"device_map": "auto", "max_memory": gpus}
    return None


def _first_device(memory: Memory) -> int:
    """Bytes for weights on the first GPU, or on the CPU without one."""
    return memory.get(0, memory["cpu"])


def _refuse_full_gpu(size: int, memory: Memory) -> None:
    """Raise ModelError if the model would fit but for other processes; offloading would then be slow for no reason."""
    if 0 not in memory or "gpu" in _limits():
        return
    unused, total = torch.cuda.mem_get_info(0)
    others = total - unused - torch.cuda.memory_reserved(0)
    if size <= memory[0] + others - GIB:  # a CUDA context takes half a GiB of it
        raise ModelError(
            f"the model needs {_gib(size)} on the GPU, but other processes use {_gib(others)} of its {_gib(total)} "
            f"(`nvidia-smi` lists them); stop them, or set {VARIABLE}=gpu={memory[0] // 2**20}MiB to use CPU memory "
            "as well"
        )


def _offloaded(
    identity: dict[str, Any], config: PretrainedConfig, rounded: Edits, labels: list[str] | None, memory: Memory
) -> PreTrainedModel:
    """The model with as many weights on the GPU as fit; the others are read from CPU memory and disk at each pass."""
    parent = (WORK_DIR / "offload").absolute()
    for leftover in parent.glob("*-*"):  # of killed processes
        if not psutil.pid_exists(int(leftover.name.partition("-")[0])):
            shutil.rmtree(leftover, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    source = identity
    if rounded:
        # 4-bit weights cannot be offloaded, so write a copy of the base with the same rounded numbers.
        checkpoint = open_checkpoint(identity["name_or_path"], identity["revision"])
        names = checkpoint_names(empty_model(config), checkpoint)
        if missing := rounded.keys() - names.keys():
            raise ModelError(
                f"{identity['name_or_path']} does not fit into memory, and cannot be offloaded because its checkpoint "
                f"has no tensor of its own for {sorted(missing)[0]}; score it on a machine with more memory"
            )
        (folder / "base").mkdir()
        edits = {names[parameter]: round_weight for parameter, round_weight in rounded.items()}
        rewrite(checkpoint, folder / "base", edits, compute_dtype(), "load")
        config.save_pretrained(folder / "base")
        source = local_source(folder / "base")
    model = load_base(source, None, labels, device_map="auto", max_memory=memory, offload_folder=str(folder / "disk"))
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def load_tuned(
    identity: dict[str, Any], quantisation: Quantisation, folder: Path, labels: list[str] | None = None
) -> Any:
    """The result of `train` in `folder`: the base with its adapter, or the whole model; raises as `load_base`."""
    if is_whole(folder):
        return load_for_scoring(local_source(folder), None, labels).eval()
    return load_adapter(load_for_scoring(identity, quantisation, labels), folder)


@contextmanager
def untuned(model: Any, identity: dict[str, Any], labels: list[str] | None = None) -> Iterator[Any]:
    """The base of `model` (from `load_tuned`), as it was before training. Afterwards, a whole model is unusable."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
        return
    model.to_empty(device="meta")  # frees its memory for the base
    yield load_for_scoring(identity, None, labels).eval()


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / 2**20:.1f} MiB"
