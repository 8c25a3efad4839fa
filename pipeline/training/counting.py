"""Counting the memory and the arithmetic of a step on PyTorch's meta device, where nothing is allocated or computed.

Attention, experts, 4-bit products and the loss are replaced by functions that keep what the real kernels keep.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from pipeline.params import TrainParams


class Live(TorchDispatchMode):
    """Adds up the bytes of all storages that live; those of `known` tensors do not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # "are these rows unpacked?", asked of a tensor without values: the mask is made
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Attention:
    """Attention as fused kernels keep it: q, k, v, the output and a sum a query; never the score matrix."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self.flops = on_gpu, 0.0

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        bias = None
        if mask is not None:  # scaled_dot_product_attention then takes whole heads, and the mask as numbers
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
            bias = torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        scores = None
        if settings.get("dropout") and not self.on_gpu:  # no fused kernel on a CPU: scores, dropout mask and product
            scores = torch.empty((3, *query.shape[:3], key.shape[2]), dtype=query.dtype, device=query.device)
        out = _FusedAttention.apply(query, key, value, bias, scores, self)
        return out.transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, scores: Any, counter: Attention) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums, bias, scores)
        # 2 products of 2 · T · T · d a head
        ctx.counter, ctx.flops = counter, 2 * (q.numel() + out.numel()) * k.shape[2]
        counter.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        ctx.counter.flops += 2.5 * ctx.flops
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None, None


def experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A mixture of experts as grouped products compute it: each token's row once for each expert that it goes to."""
    rows = hidden.repeat_interleave(chosen.shape[-1], dim=0)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _by_expert(module, rows, name)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _by_expert(module, inner, "down_proj") * weights.reshape(-1, 1)
    return out.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


def _by_expert(module: Any, rows: torch.Tensor, name: str) -> torch.Tensor:
    weight = getattr(module, name)[0]  # the shape of each; which tokens go to which is not known here
    out = rows @ (weight if module.is_transposed else weight.T)
    return out + getattr(module, f"{name}_bias")[0] if module.has_bias else out


def fold_adapters(model: torch.nn.Module) -> None:
    """Have PEFT's LoRA on experts add itself to their weights in a way that the meta device knows (no autocast)."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module._activate_lora = MethodType(_folded, module)


@contextmanager
def _folded(wrapper: Any, names: list[str]) -> Iterator[None]:
    layer, name = wrapper.get_base_layer(), wrapper.parameter_name
    left, right, scale = wrapper.get_delta_factors(names[0])
    weight = layer._parameters.pop(name)
    setattr(layer, name, torch.baddbmm(weight, left, right, alpha=scale))
    try:
        yield
    finally:
        delattr(layer, name)
        layer.register_parameter(name, weight)


class TiledLoss(torch.autograd.Function):
    """Cross-entropy from hidden states (N, D) and head (V, D) without the logits, tile by tile, as TRL 1.16 does it."""

    TOKENS, VOCABULARY = 4096, 32768  # of a tile
    COPIES = 8  # float32 copies of a tile that live at once in the backward pass where no Triton kernel works in place

    @staticmethod
    def _tile(hidden: torch.Tensor, head: torch.Tensor, copies: bool) -> list[torch.Tensor]:
        shape = (min(len(hidden), TiledLoss.TOKENS), TiledLoss.VOCABULARY)
        used = (shape[0], min(shape[1], len(head)))
        extra = [torch.empty(used, device=hidden.device) for _ in range(TiledLoss.COPIES)] if copies else []
        return [torch.empty(shape, dtype=hidden.dtype, device=hidden.device), *extra]

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, copies: bool) -> torch.Tensor:
        TiledLoss._tile(hidden, head, copies)
        ctx.save_for_backward(hidden)
        ctx.head, ctx.copies = head, copies
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        [hidden] = ctx.saved_tensors
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        TiledLoss._tile(hidden, ctx.head, ctx.copies)
        return gradient.to(hidden.dtype), None, None


def _forward_unpacking(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    return _UnpackedProduct.apply(x, weight, layer.bias)


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty(weight.shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        unpacked = torch.empty(ctx.weight.shape, dtype=gradient.dtype, device=gradient.device)
        return gradient @ unpacked, None, None


def quantise(model: PreTrainedModel) -> list[torch.nn.Linear]:
    kept = get_keys_to_not_convert(model)
    quantised = []
    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D) and not any(name == k or name.startswith(f"{k}.") for k in kept):
            # bitsandbytes unpacks the weight for each product
            module.forward = MethodType(_forward_unpacking, module)
            quantised.append(module)
    return quantised


def packed_bytes(weight: torch.Tensor, params: TrainParams) -> int:
    """Half a byte a weight, and a constant for each 64 (QLoRA, Dettmers et al. 2023, section 3)."""
    blocks = math.ceil(weight.numel() / 64)
    constants = blocks + 4 * math.ceil(blocks / 256) if params.bnb_4bit_use_double_quant else 4 * blocks
    return math.ceil(weight.numel() / 2) + constants
