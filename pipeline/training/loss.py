"""The loss of trained tokens in chunks, so that no tensor of tokens × vocabulary is needed.

Only labelled positions pass the output layer, a chunk at a time, and each chunk's gradient is computed while its logits
exist. It is for frozen output layers on a CPU; elsewhere TRL's fused head does the same, with kernels for GPUs.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.utils import ModelOutput

CHUNK = 2**22  # logits at a time: 16 MiB in float32


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, width)
        weight: torch.Tensor,  # (vocabulary, width)
        bias: torch.Tensor | None,
        labels: torch.Tensor,  # (N,)
    ) -> torch.Tensor:
        rows = max(1, CHUNK // len(weight))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            scale = logits.logsumexp(-1, keepdim=True)
            total += (scale.squeeze(-1) - logits.gather(-1, labels[part, None]).squeeze(-1)).sum()
            if gradient is not None:
                # d loss / d logits = softmax - one-hot, in place of the logits
                probabilities = logits.sub_(scale).exp_()
                probabilities[torch.arange(len(logits)), labels[part]] -= 1
                gradient[part] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad, None, None, None


# Sum of -log p(label) in nats. The arguments are those of `forward`; only `hidden` may need a gradient.
sum_of_nats: Callable[..., torch.Tensor] = _ChunkedLoss.apply


def has_plain_frozen_head(model: Any) -> bool:
    """Whether the output layer is frozen and its output is not capped or scaled, as in Gemma 2 and Cohere."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return (
        type(head) is torch.nn.Linear
        and not head.weight.requires_grad
        and not any(getattr(config, name, None) for name in scales)
        and not getattr(config, "output_router_logits", False)
    )


def add_chunked_loss(model: Any) -> None:
    """Let `model` accept `model(…, labels=…, chunked_loss=True)`, which returns `loss`, a sum in nats."""
    plain_forward = model.forward

    def forward(self: Any, *args: Any, chunked_loss: bool = False, **inputs: Any) -> Any:
        if not chunked_loss:
            return plain_forward(*args, **inputs)
        labels = inputs.pop("labels")[:, 1:]
        hidden = self.base_model(*args, **inputs, use_cache=False).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        trained = labels != -100
        return ModelOutput(loss=sum_of_nats(hidden[trained], head.weight, head.bias, labels[trained]))

    model.forward = types.MethodType(forward, model)
