"""Where a model that is scored goes: one device, several GPUs or, where it is larger, CPU memory and disk as well.

An adapter that was trained on a 4-bit base is scored on those very numbers. Held as plain bfloat16 (float32 on a CPU)
they compute several times as fast, so they are held so where memory allows, and in 4 bits elsewhere.
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

from pipeline.core.files import WORK_DIR
from pipeline.core.memory import free
from pipeline.core.progress import note
from pipeline.weights.architecture import base_config, checkpoint_names, empty_model, rounded_weights
from pipeline.weights.checkpoint import Edit, open_checkpoint, rewrite
from pipeline.weights.loading import (
    ModelError,
    Quantisation,
    compute_dtype,
    device,
    is_whole,
    load_adapter,
    load_base,
)

VARIABLE = "RETUNE_MAX_MEMORY"
GIB = 2**30
ROOM = 0.1  # of a device's memory, for activations and the cache of keys and values
PACKED = 0.53  # bytes of a number in 4 bits, scales included
CPU_BYTES_PER_S, DISK_BYTES_PER_S = 12e9, 1.5e9  # over PCIe 4, from an SSD; for a sentence alone
Memory = dict[int | str, int]  # bytes for weights: of each GPU by its number, and "cpu"


def load_for_scoring(
    identity: dict[str, Any], quantisation: Quantisation | None = None, labels: list[str] | None = None
) -> PreTrainedModel:
    """The base, with the numbers that 4 bits leave of it if training quantised it, wherever it fits.

    Raises:
        ModelError: as `load_base`, or another process fills the GPU.
    """
    try:
        config = base_config(identity, labels)
    except ModelError:  # known by its repository's code alone: only its own loader can place it
        return load_base(identity, quantisation, labels)
    rounded = rounded_weights(config, quantisation)
    numbers = {name: parameter.numel() for name, parameter in empty_model(config).named_parameters()}
    width = compute_dtype().itemsize
    plain = sum(numbers.values()) * width  # bytes
    packed = int(plain - (width - PACKED) * sum(numbers[name] for name in rounded))
    memory = available_memory()
    if (where := place(plain, memory)) is not None:
        model = load_base(identity, None, labels, **where)
        for parameter, round_weight in rounded.items():
            weight = model.get_parameter(parameter).data
            weight.copy_(round_weight(weight))
        return model
    if rounded and (where := place(packed, memory)) is not None:
        note(
            f"the base stays in 4 bits, which takes several times as long: {_gib(plain)} of plain weights do not "
            f"fit into {_gib(_largest(memory))} of free memory"
        )
        return load_base(identity, quantisation, labels, **where)
    _refuse_full_gpu(packed, memory)
    return _offloaded(identity, config, rounded, labels, plain, memory)


def available_memory() -> Memory:
    """Bytes that weights may take now; RETUNE_MAX_MEMORY (`gpu=6GiB,cpu=20GiB`) in the environment lowers them."""
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
        found = re.fullmatch(r"\s*(gpu|cpu)=(\d+(?:\.\d+)?)([KMG])iB\s*", part)
        if found is None:
            raise ModelError(f"{VARIABLE} has {part!r}; write it like gpu=6GiB,cpu=20GiB (of each GPU, of CPU memory)")
        limits[found[1]] = int(float(found[2]) * 1024 ** (" KMG".index(found[3])))
    return limits


def place(size: int, memory: Memory) -> dict[str, Any] | None:
    """`from_pretrained`'s arguments for `size` bytes on the first device, or on all GPUs; None: they do not fit."""
    gpus = {name: limit for name, limit in memory.items() if name != "cpu"}
    if size <= _largest(memory):
        return {"device_map": {"": device()}}
    # Layers are not cut in two, so some of each GPU stays empty.
    if len(gpus) > 1 and size <= (1 - ROOM) * sum(gpus.values()):
        note(f"{_gib(size)} of weights are spread over {len(gpus)} GPUs, which compute one after the other")
        return {"device_map": "auto", "max_memory": gpus}
    return None


def _largest(memory: Memory) -> int:
    """Bytes for weights on the device that computes."""
    return memory.get(0, memory["cpu"])


def _refuse_full_gpu(size: int, memory: Memory) -> None:
    """A GPU that another process fills is a mistake more often than a wish to wait for CPU memory at every token."""
    if 0 not in memory or "gpu" in _limits():
        return
    unused, total = torch.cuda.mem_get_info(0)
    others = total - unused - torch.cuda.memory_reserved(0)
    if size <= memory[0] + others - GIB:  # of which a CUDA context takes half a GiB
        raise ModelError(
            f"the model needs {_gib(size)} on the GPU, and other processes use {_gib(others)} of its {_gib(total)} "
            f"(`nvidia-smi` lists them): end them, or set {VARIABLE}=gpu={memory[0] // 2**20}MiB to compute with CPU "
            "memory as well"
        )


def _offloaded(
    identity: dict[str, Any],
    config: PretrainedConfig,
    rounded: dict[str, Edit],
    labels: list[str] | None,
    size: int,
    memory: Memory,
) -> PreTrainedModel:
    """The model with those weights on the GPU that fit; the others come from CPU memory and disk at each pass."""
    gpus = sum(limit for where, limit in memory.items() if where != "cpu")
    on_disk = max(0, size - gpus - memory["cpu"])
    in_memory = size - gpus - on_disk if gpus else 0
    seconds = in_memory / CPU_BYTES_PER_S + on_disk / DISK_BYTES_PER_S
    note(
        f"the model ({_gib(size)}) is larger than the memory of the device ({_gib(_largest(memory))} free): "
        f"{_gib(in_memory)} in CPU memory and {_gib(on_disk)} on disk are read for every token of a batch, about "
        f"{seconds:.2g} s each time"
    )
    parent = (WORK_DIR / "offload").absolute()
    for left in parent.glob("*-*"):  # by processes that were killed
        if not psutil.pid_exists(int(left.name.partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    source = identity
    if rounded:
        # 4-bit weights cannot be offloaded, so a copy of the base holds the same numbers.
        checkpoint = open_checkpoint(identity["name_or_path"], identity["revision"])
        names = checkpoint_names(empty_model(config), checkpoint)
        if lacking := rounded.keys() - names.keys():
            raise ModelError(
                f"{identity['name_or_path']} is larger than the memory here, and its {sorted(lacking)[0]} is not "
                "stored under a name of its own: score it on a machine with more memory"
            )
        (folder / "base").mkdir()
        edits = {names[parameter]: round_weight for parameter, round_weight in rounded.items()}
        rewrite(checkpoint, folder / "base", edits, compute_dtype())
        config.save_pretrained(folder / "base")
        source = {"name_or_path": str(folder / "base"), "revision": None, "trust_remote_code": False}
    model = load_base(source, None, labels, device_map="auto", max_memory=memory, offload_folder=str(folder / "disk"))
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def load_tuned(
    identity: dict[str, Any], quantisation: Quantisation, folder: Path, labels: list[str] | None = None
) -> Any:
    """What `train` made in `folder`: the base with its adapter on top, or the whole model; raises as `load_base`."""
    if is_whole(folder):
        whole = {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}
        return load_for_scoring(whole, None, labels).eval()
    return load_adapter(load_for_scoring(identity, quantisation, labels), folder)


@contextmanager
def untuned(model: Any, identity: dict[str, Any], labels: list[str] | None = None) -> Iterator[Any]:
    """The base that `load_tuned` put `model` on, as it was before training. A whole model is of no use afterwards."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
        return
    model.to_empty(device="meta")  # its memory is the base's now
    yield load_for_scoring(identity, None, labels).eval()


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / 2**20:.1f} MiB"
