"""What to do when memory runs out: smaller pieces of the same batch, then gradient checkpointing, then a sentence.

The effective batch and the scale of the loss stay as they are, since a piece's loss is divided by the tokens of the
whole step. Each rung is taken from the step that failed on, and recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """Memory ran out on the last rung; the message says what to change."""


@dataclass(frozen=True)
class Rung:
    step: int = 0
    pieces: int = 1  # into how many parts, split between rows, a batch goes through the model one after the other
    gradient_checkpointing: bool = False


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def free() -> None:
    """Give back what the failed attempt still holds. Call it outside the `except` block, whose traceback holds more."""
    clear_device_cache(garbage_collection=True)


def in_fitting_batch(size: int, attempt: Callable[[int], T], of: str) -> tuple[int, T]:
    """The result of `attempt(size)`, or of half as much, and half of that, until it fits; and the size that did."""
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
                f"memory ran out with one {of} ({reason}); lower prepare.max_length, or take a machine with more memory"
            )
        size, failed = (size + 1) // 2, size
        print(f"memory ran out with {failed} of a {of} at once; it goes on with {size}", flush=True)
