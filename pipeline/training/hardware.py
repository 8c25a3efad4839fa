"""The GPU of a training: the micro-batch that fits it, and the kernels that are packages of their own.

Decisions are functions of the values that PyTorch reports, so they are tested without a GPU.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

from pipeline.params import TrainParams
from pipeline.training.footprint import GIB, Counts, has_c_compiler, lacking_for_liger, step_memory, uses_liger

FREE_FRACTION = 0.92  # of a GPU's memory: the rest is the CUDA context and what the allocator cannot use
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class HardwareError(ValueError):
    """This machine cannot run the training as it is asked for; the message says what to change."""


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; `free`: of it, what other processes leave."""

    name: str
    total: int
    free: int


def require_kernels(params: TrainParams, cuda: bool) -> None:
    """Refuse kernels that are asked for by name and that this machine cannot run."""
    attention = params.attn_implementation
    choices = [
        (attention in PACKAGES, f"attn_implementation {attention}", PACKAGES.get(attention, ""), "auto"),
        (params.use_liger_kernel is True, "use_liger_kernel", "liger_kernel", "auto"),
        (params.torch_compile, "torch_compile", "torch", "false"),
    ]
    for is_chosen, what, package, instead in choices:
        runs = cuda and (package in PACKAGES.values() or has_c_compiler())
        if is_chosen and not (runs and importlib.util.find_spec(package)):
            raise HardwareError(
                f"train.{what} needs a GPU, the Python package {package} and, for Triton, a C compiler; set it to "
                f"{instead}"
            )


def batches(params: TrainParams, counts: Counts | None, card: Gpu | None, lengths: list[int]) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of an optimiser step; `lengths` are the sequences' tokens.

    `auto` takes the largest micro-batch that fits and that the step is a multiple of, so the rows of a step are the
    same on every card. It takes one sequence on a CPU, where more are no faster, and of a sharded model (FSDP,
    DeepSpeed), of which a GPU holds a part that is not known here.

    Args:
        counts: of the model; None where the formula does not know its architecture.

    Raises:
        HardwareError: another process holds the memory that the training needs.
    """
    auto = params.per_device_train_batch_size == "auto"
    rows = 1 if auto else int(params.per_device_train_batch_size)
    if params.tokens_per_step is None:
        per_step = rows * int(params.gradient_accumulation_steps)
    else:
        each = params.packed_length if params.packing else sum(lengths) / max(len(lengths), 1)
        per_step = max(1, round(params.tokens_per_step / each / params.num_processes))
    if card is not None and counts is not None and params.strategy not in ("fsdp", "deepspeed"):
        parts = [n for n in range(per_step, 1, -1) if per_step % n == 0] if auto else []
        needed = {n: step_memory(counts, params, n, max(lengths), on_gpu=True).peak for n in [*parts, rows]}
        room = card.free * FREE_FRACTION
        rows = next((n for n in parts if needed[n] <= room), rows)
        if room < needed[rows] <= card.total * FREE_FRACTION:
            raise HardwareError(
                f"this training needs {needed[rows] / GIB:.1f} GiB, and of the {card.name}'s {card.total / GIB:.1f} "
                f"other processes leave {card.free / GIB:.1f}; stop them, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
    return rows, max(1, round(per_step / rows))


def use_liger(model: Any, params: TrainParams) -> str:
    """Give `model` Liger's fused layers where `use_liger_kernel` allows and Liger knows the architecture; says which
    layers it has. Nothing is fetched: the package is the extra `gpu`."""
    kind = model.config.model_type
    if model.device.type != "cuda":
        return f"{kind}'s own"
    if not uses_liger(params):
        reason = lacking_for_liger() if params.use_liger_kernel == "auto" else "train.use_liger_kernel is false"
        return f"{kind}'s own ({reason})"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if params.use_liger_kernel is True:
            raise HardwareError(f"Liger has no layers for {kind}; set train.use_liger_kernel to auto")
        return f"{kind}'s own (Liger does not know {kind})"
    # The loss is the trainer's: Liger's would replace the model's forward pass.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    return "Liger's"
