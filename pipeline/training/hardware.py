"""Kernels that a GPU may lack: those asked for by name are refused without it, Liger's are used where they run."""

import importlib.util
import os
import shutil
from typing import Any

from pipeline.params import TrainParams

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class HardwareError(ValueError):
    """This machine cannot run the training as it is asked for; the message says what to change."""


def require_kernels(params: TrainParams, cuda: bool) -> None:
    """Refuse kernels that are asked for by name and that this machine cannot run."""
    compiled = cuda and _has_c_compiler()
    choices = [
        (f"attn_implementation {params.attn_implementation}", PACKAGES.get(params.attn_implementation), cuda, "auto"),
        ("use_liger_kernel", "liger_kernel" if params.use_liger_kernel is True else None, compiled, "auto"),
        ("torch_compile", "torch" if params.torch_compile else None, compiled, "false"),
    ]
    for what, package, runs, instead in choices:
        if package is not None and not (runs and importlib.util.find_spec(package)):
            raise HardwareError(
                f"train.{what} needs a GPU, the Python package {package} and, for Triton, a C compiler; set it to "
                f"{instead}"
            )


def uses_liger(params: TrainParams) -> bool:
    """Whether Liger's layers are asked for, or `auto` finds that they can run."""
    choice = params.use_liger_kernel
    return choice is True or (choice == "auto" and _lacking_for_liger() is None)


def use_liger(model: Any, params: TrainParams) -> str:
    """Give `model` Liger's fused layers where `use_liger_kernel` allows and Liger knows the architecture; says which
    layers it has. Nothing is fetched: the package is the extra `gpu`."""
    kind = model.config.model_type
    if model.device.type != "cuda":
        return f"{kind}'s own"
    if not uses_liger(params):
        reason = _lacking_for_liger() if params.use_liger_kernel == "auto" else "train.use_liger_kernel is false"
        return f"{kind}'s own ({reason})"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if params.use_liger_kernel is True:
            raise HardwareError(f"Liger has no layers for {kind}; set train.use_liger_kernel to auto")
        return f"{kind}'s own (Liger does not know {kind})"
    # The loss is the trainer's: Liger's would replace the model's forward pass.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    return "Liger's"


def _lacking_for_liger() -> str | None:
    """What Liger's layers lack here: Triton compiles the launchers of their kernels when they first run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if _has_c_compiler() else "Triton finds no C compiler"


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
