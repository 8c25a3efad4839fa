"""The GPUs that a training finds, what it says about them, and the kernels that are packages of their own.

Decisions are functions of the values that PyTorch reports, so they are tested without a GPU.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.params import TrainParams
from pipeline.training.footprint import (
    GIB,
    Counts,
    has_c_compiler,
    lacking_for_liger,
    sequences_per_step,
    step_memory,
    uses_liger,
)
from pipeline.training.footprint import micro_batch as largest_micro_batch

FREE_FRACTION = 0.92  # of a GPU's memory: the rest is the CUDA context and what the allocator cannot use
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class HardwareError(ValueError):
    """This machine cannot run the training as it is asked for; the message says what to change."""


@dataclass(frozen=True)
class Gpu:
    """As PyTorch reports it; memory in bytes."""

    name: str
    total: int
    free: int
    bfloat16: bool


def gpus() -> list[Gpu]:
    """The GPUs that this process may use, its own first; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    current = torch.cuda.current_device()
    free = torch.cuda.mem_get_info(current)[0]
    cards = []
    for index in [current, *(i for i in range(torch.cuda.device_count()) if i != current)]:
        properties = torch.cuda.get_device_properties(index)
        # What is free elsewhere stays unasked: the question alone takes half a GiB of a GPU.
        room = free if index == current else properties.total_memory
        cards.append(Gpu(properties.name, properties.total_memory, room, bfloat16=properties.major >= 8))
    return cards


def remarks(cards: list[Gpu]) -> list[str]:
    """What a person should know of the GPUs that a training uses, a sentence each."""
    sentences = [
        f"the {name} has no bfloat16; computing in float16, with a scaled loss"
        for name in sorted({card.name for card in cards if not card.bfloat16})
    ]
    sizes = sorted(card.total for card in cards)
    if sizes and sizes[-1] - sizes[0] > 0.05 * sizes[-1]:
        shown = " and ".join(f"{size / GIB:.0f}" for size in dict.fromkeys(sizes))
        sentences.append(f"the GPUs have {shown} GiB; all take the micro-batch that fits the smallest")
    return sentences


def require_kernels(params: TrainParams, cuda: bool) -> None:
    """Refuse kernels that are asked for by name and that this machine cannot run.

    Raises:
        HardwareError: no GPU, or the package is not installed.
    """
    attention = params.attn_implementation
    choices = [
        (attention in PACKAGES, f"attn_implementation {attention}", PACKAGES.get(attention, ""), "auto"),
        (params.use_liger_kernel is True, "use_liger_kernel", "liger_kernel", "auto"),
        (params.torch_compile, "torch_compile", "torch", "false"),
    ]
    for is_chosen, what, package, instead in choices:
        lacking = [] if cuda else ["a GPU"]
        if is_chosen and importlib.util.find_spec(package) is None:
            lacking.append(f"the Python package {package}")
        if is_chosen and package in ("liger_kernel", "torch") and not has_c_compiler():
            lacking.append("a C compiler (gcc), with which Triton makes kernels")
        if is_chosen and lacking:
            raise HardwareError(f"train.{what} needs {' and '.join(lacking)}; set it to {instead}")


def batches(params: TrainParams, counts: Counts | None, card: Gpu | None, lengths: list[int]) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of an optimiser step; `lengths` are the sequences' tokens.

    On a CPU `auto` takes one sequence at a time: more are no faster there.

    Args:
        counts: of the model; None where the formula does not know its architecture.

    Raises:
        HardwareError: another process holds the memory that the training needs.
    """
    mean, longest = sum(lengths) / max(len(lengths), 1), max(lengths, default=1)
    per_step, auto = sequences_per_step(params, mean), params.per_device_train_batch_size == "auto"
    rows = 1 if auto else int(params.per_device_train_batch_size)
    if card is not None and counts is not None:
        if auto:
            rows = largest_micro_batch(counts, params, per_step, longest, card.free * FREE_FRACTION)
        needed = step_memory(counts, params, rows, longest, on_gpu=True).peak
        sharded = params.strategy in ("fsdp", "deepspeed")
        if not sharded and card.free * FREE_FRACTION < needed <= card.total * FREE_FRACTION:
            raise HardwareError(
                f"this training needs {needed / GIB:.1f} GiB, and of the {card.name}'s {card.total / GIB:.1f} other "
                f"processes leave {card.free / GIB:.1f}; stop them, or choose a GPU with CUDA_VISIBLE_DEVICES"
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
