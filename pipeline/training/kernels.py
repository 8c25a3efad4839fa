"""Kernels that are faster on a GPU, and are packages of their own: asked for by name, never taken without a word."""

import importlib.util

import torch

from pipeline.params import TrainParams

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class KernelError(ValueError):
    """A kernel cannot run here."""


def require_kernels(params: TrainParams) -> None:
    """Refuse the kernels of `params` that this machine cannot run.

    Raises:
        KernelError: no GPU, or the package is not installed.
    """
    asked = []
    if params.attn_implementation in PACKAGES:
        asked.append(
            (f"attn_implementation {params.attn_implementation}", PACKAGES[params.attn_implementation], "auto")
        )
    if params.use_liger_kernel:
        asked.append(("use_liger_kernel", "liger_kernel", "false"))
    if params.torch_compile:
        asked.append(("torch_compile", "torch", "false"))
    for what, package, instead in asked:
        lacking = []
        if not torch.cuda.is_available():
            lacking.append("a GPU")
        if importlib.util.find_spec(package) is None:
            lacking.append(f"the Python package {package}")
        if lacking:
            raise KernelError(f"train.{what} needs {' and '.join(lacking)}; set it to {instead}")
