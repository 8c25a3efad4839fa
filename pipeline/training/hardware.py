"""Optional GPU kernels: refuses those that the parameters name if they cannot run; uses Liger's if they can."""

import importlib.util
import logging
import os
import shutil
from typing import Any

from pipeline.params import TrainParams
from pipeline.training.watching import TrainError

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def require_kernels(params: TrainParams, cuda: bool) -> None:
    """Refuse kernels that the parameters name and this machine cannot run."""
    compiled = cuda and _has_c_compiler()
    choices = [
        (f"attn_implementation {params.attn_implementation}", PACKAGES.get(params.attn_implementation), cuda, "auto"),
        ("use_liger_kernel", "liger_kernel" if params.use_liger_kernel is True else None, compiled, "auto"),
        ("torch_compile", "torch" if params.torch_compile else None, compiled, "false"),
    ]
    for parameter, package, can_run, instead in choices:
        if package is not None and not (can_run and importlib.util.find_spec(package)):
            raise TrainError(
                f"train.{parameter} needs a GPU, the Python package {package} and, for Triton, a C compiler; set it to "
                f"{instead}"
            )


def why_no_liger(params: TrainParams) -> str | None:
    """Why Liger's layers are not used on a GPU, or None. Triton needs a C compiler when a kernel first runs."""
    if params.use_liger_kernel != "auto":
        return None if params.use_liger_kernel else "train.use_liger_kernel is false"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if _has_c_compiler() else "Triton finds no C compiler"


def use_liger(model: Any, params: TrainParams) -> str:
    """Give `model` Liger's fused layers, if `use_liger_kernel` and Liger allow; returns which layers it has and why."""
    family = model.config.model_type
    if model.device.type != "cuda":
        return f"{family}'s own"
    if reason := why_no_liger(params):
        return f"{family}'s own ({reason})"
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of layers for other makers' hardware
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    reason = f"Liger does not know {family}"
    if family in MODEL_TYPE_TO_APPLY_LIGER_FN:
        try:
            # Without Liger's loss, which would replace the model's forward pass and with it the trainer's loss.
            _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
            return "Liger's"
        except ImportError as error:  # Liger 0.8.5 lacks a part of its layers for Qwen 3.5's experts
            reason = f"Liger's layers for it cannot be imported: {error}"
    if params.use_liger_kernel is True:
        raise TrainError(f"train.use_liger_kernel is true, but {reason}; set it to auto")
    return f"{family}'s own ({reason})"


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
