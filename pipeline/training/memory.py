"""What to do when memory runs out: smaller pieces of the same batch, then gradient checkpointing, then a sentence.

The effective batch and the scale of the loss stay as they are, since a piece's loss is divided by the tokens of the
whole step. Each rung is taken from the step that failed on, and recorded.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


class OutOfMemory(RuntimeError):
    """Memory ran out on the last rung; the message says what to change."""


@dataclass(frozen=True)
class Rung:
    """`pieces`: into how many parts, split between rows, a batch goes through the model one after the other."""

    step: int = 0
    pieces: int = 1
    gradient_checkpointing: bool = False

    def record(self) -> dict[str, Any]:
        return asdict(self)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )


def free() -> None:
    """Give back what the failed attempt still holds. Call it outside the `except` block, whose traceback holds more."""
    clear_device_cache(garbage_collection=True)


def next_rung(rung: Rung, step: int, rows: int) -> Rung | None:
    """The rung below, for a batch of `rows` rows that did not fit; None below the last."""
    if rung.pieces < rows:
        return Rung(step, min(rung.pieces * 2, rows), rung.gradient_checkpointing)
    if not rung.gradient_checkpointing:
        return Rung(step, rung.pieces, gradient_checkpointing=True)
    return None
