"""Out of memory: smaller pieces of the same batch, then gradient checkpointing, then a clear error.

The effective batch and the scale of the loss stay the same, since a piece's loss is divided by the tokens of the whole
step. Each fallback applies from the step that failed on, and is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """Out of memory with the last fallback; the message says what to change."""


@dataclass(frozen=True)
class Fallback:
    """How a batch is computed from a step on."""

    step: int = 0
    pieces: int = 1  # parts that the batch is split into, between rows
    gradient_checkpointing: bool = False


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def free() -> None:
    """Release memory of a failed attempt. Call it outside of the `except` block, whose traceback holds references."""
    clear_device_cache(garbage_collection=True)


def in_fitting_batch(size: int, attempt: Callable[[int], T], of: str) -> tuple[int, T]:
    """Call `attempt(size)`, halving `size` until it fits in memory; returns that size and the result."""
    while True:
        try:
            return size, attempt(size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        free()
        if size == 1:
            raise OutOfMemory(
                f"out of memory with one {of} ({reason}); lower prepare.max_length, or use a machine with more memory"
            )
        size, failed = (size + 1) // 2, size
        print(f"out of memory with a batch of {failed} ({of}); retrying with {size}", flush=True)
