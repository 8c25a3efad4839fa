"""Checks before training that every frozen layer passes gradients back.

A layer that passes none leaves all layers below it untrained, silently; 4-bit layers on CPUs did so after an inference
(see `fix_4bit_layers`).
"""

from functools import partial
from typing import Any

import torch

from pipeline.training.packing import short_row
from pipeline.training.watching import TrainError, shortened


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def require_gradients(trainer: Any) -> None:
    """Run one short row forward and backward, without a step; refuse a model with a layer that blocks gradients."""
    model = trainer.model.train()
    if trainer.args.activation_checkpointing:  # the trainer turns it on only when training starts
        checkpoint_activations(model)
    entered, reached, passed = set[str](), set[str](), set[str]()
    hooks: list[Any] = []

    def mark(names: set[str], name: str, gradient: torch.Tensor) -> None:
        if gradient.any():
            names.add(name)

    def enter(name: str, _: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not isinstance(arguments[0], torch.Tensor) or not arguments[0].requires_grad:
            return None  # the first layers: nothing below them is trained
        view: Any = arguments[0].view_as(arguments[0])  # layers share an input, and the hook must see only its own
        view.register_hook(partial(mark, passed, name))
        entered.add(name)
        return view, *arguments[1:]

    def leave(name: str, _: Any, __: Any, output: Any) -> None:
        if name in entered and getattr(output, "requires_grad", False):
            output.register_hook(partial(mark, reached, name))

    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # not module.weight: PEFT's wrappers return that of the inner layer
        if weight is not None and weight.dim() == 2 and not weight.requires_grad:
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        batch = trainer._prepare_inputs(trainer.data_collator([short_row(trainer.train_dataset)]))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    blocked = sorted(reached - passed)
    if blocked:
        raise TrainError(
            f"{len(blocked)} frozen layers pass no gradient back, so the layers below them cannot learn: "
            f"{shortened(blocked)}; set train.load_in_4bit to false"
        )
