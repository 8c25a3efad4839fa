"""Attention within each row of packed sequences, with one kernel for GPUs and one for CPUs.

A dense mask computes T × T scores and throws away all of those between rows. Instead, a GPU uses PyTorch's
FlashAttention, which takes the bounds of rows; a CPU computes rows as a batch, padded to the longest.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from pipeline.training.footprint import attention_dropout
from pipeline.training.packing import Batch, Collate, rows_of
from pipeline.weights.loading import ModelError, compute_dtype

# Arguments: query (T, heads, width), key and value (T, key heads, width), bounds (rows + 1), length of the longest row;
# scale, dropout, and window (tokens that a query sees, including itself; None: all since the row's start).
Kernel = Callable[..., Tensor]


def packed_attention(
    kernel: Kernel,
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, width)
    key: Tensor,  # (1, key heads, T, width)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows, in the form that transformers calls."""
    extras = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if extras or cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError(f"its attention takes {extras[0]}" if extras else "rows are not packed")
    heads = [x[0].transpose(0, 1) for x in (query, key, value)]
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    output = kernel(*heads, cu_seq_lens_q, max_length_q, scale=scaling, window=window, dropout=dropout)
    return output[None].contiguous(), None


def side_by_side(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
    """The kernel for CPUs: scaled_dot_product_attention over a batch of rows, padded to the longest."""
    lengths = bounds.diff().long()
    # Each token's position in the flattened batch. Padding follows a row's end, where causal queries do not look.
    offsets = (torch.arange(len(lengths)) * longest - bounds[:-1]).long()
    positions = torch.arange(len(query)) + offsets.repeat_interleave(lengths)

    def to_batch(x: Tensor) -> Tensor:  # (rows, heads, longest, width)
        flat = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, positions, x)
        return repeat_kv(flat.view(len(lengths), longest, *x.shape[1:]).transpose(1, 2), query.shape[1] // x.shape[1])

    mask = None
    if options["window"] is not None:
        mask = torch.ones(longest, longest, dtype=torch.bool).tril().triu(1 - options["window"])
    q, k, v = to_batch(query), to_batch(key), to_batch(value)
    output = scaled_dot_product_attention(q, k, v, mask, options["dropout"], mask is None, scale=options["scale"])
    return output.transpose(1, 2).flatten(0, 1)[positions]


def varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, varlen_attn: Any = None, **options: Any
) -> Tensor:
    """The kernel for GPUs: PyTorch's `varlen_attn` (or a replacement), which has no float32 and no dropout."""
    if varlen_attn is None:
        from torch.nn.attention.varlen import varlen_attn
    if options["dropout"]:
        raise NotImplementedError(f"its attention has a dropout of {options['dropout']:g}")
    groups, dtype, bounds = query.shape[1] // key.shape[1], query.dtype, bounds.to(torch.int32)
    grouping = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouping = {"enable_gqa": groups > 1}
    else:  # PyTorch 2.11
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if query.is_cuda and dtype is torch.float32:
        query, key, value = (x.to(compute_dtype()) for x in (query, key, value))
    window = (-1 if options["window"] is None else options["window"] - 1, 0)
    sizes = (bounds, bounds, longest, longest)
    return varlen_attn(query, key, value, *sizes, scale=options["scale"], window_size=window, **grouping).to(dtype)


def use_packed_attention(model: Any, sequences: Dataset, kernel: Kernel | None = None) -> str:
    """Switch `model` to its device's kernel if that changes no result; returns which attention it has now, and why."""
    on_gpu, before, family = model.device.type == "cuda", model.config._attn_implementation, model.config.model_type
    kernel, dropout = kernel or (varlen if on_gpu else side_by_side), attention_dropout(model.config.get_text_config())
    if before != "sdpa":
        reason: str | None = f"{family} has {before} attention"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = f"{family} does not take its attention from transformers' interface"
    elif dropout and kernel is not side_by_side:
        reason = f"its attention has a dropout of {dropout:g}"
    else:
        # No mask function is registered, so transformers builds no mask.
        AttentionInterface.register("packed_rows", partial(packed_attention, kernel))
        reason = _try_registered(model, sequences)
    if reason is None:
        return "varlen, PyTorch's FlashAttention for packed rows" if on_gpu else "row by row"
    model.set_attn_implementation(before)
    return f"{before} ({'varlen' if on_gpu else 'row by row'} is not used: {reason})"


def _try_registered(model: Any, sequences: Dataset) -> str | None:
    """Switch `model` to the registered kernel; returns why it may not be used, or None.

    An architecture with its own mask (such as chunks) computes values that differ by more than its noise, which is the
    difference when the same rows come in another order. What depends on distance shows only in long rows.
    """
    row_lists = [_rows_of_largest(sequences, size) for size in (len, max)]
    expected = [last_hidden(model, rows) for rows in row_lists]
    noise = max(_largest(_reordered(model, rows) - hidden) for rows, hidden in zip(row_lists, expected, strict=True))
    model.set_attn_implementation("packed_rows")
    try:
        switched = [last_hidden(model, rows) for rows in row_lists]
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, RuntimeError) as problem:
        return str(problem).splitlines()[0]
    error = max(_largest(now - before) for now, before in zip(switched, expected, strict=True))
    if error <= max(3 * noise, 1e-3 * max(map(_largest, expected))):
        return None
    return f"{model.config.model_type} computes other values (by {error:.2g}, its own noise is {noise:.2g})"


def require_isolation(model: Any, sequences: Dataset) -> None:
    """Refuse a model whose output for a row depends on the row before it in a packed sequence."""
    first, *others = _rows_of_largest(sequences, len)
    start, vocabulary = len(first["input_ids"]), model.config.get_text_config().vocab_size
    changed = first | {"input_ids": [(token + 1) % vocabulary for token in first["input_ids"]]}
    try:
        before, after = (last_hidden(model, [row, *others[:1]])[start:] for row in (first, changed))
    except ValueError as error:  # Qwen 3.5 and others need a package to keep rows apart
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model.config.model_type} cannot be packed ({reason}); set train.packing to false") from None
    if not others:
        return  # no sequence has two rows
    change = _largest(before - after)
    if not change <= 1e-3 * _largest(before):
        raise ModelError(
            f"{model.config.model_type} does not keep packed rows apart (a row changes by {change:.3g} with its "
            "neighbour); set train.packing to false"
        )


@torch.no_grad()
def last_hidden(model: Any, rows: list[Batch]) -> Tensor:
    """The output layer's input (T, hidden) for packed `rows`, in float32; logits would take much more memory."""
    batch = Collate(0, packed=True)(rows)  # nothing is padded
    batch = {key: value for key, value in batch.items() if key not in ("rows", "labels")}
    batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items()}
    hidden: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden.append(inputs[0][0].float())
        return (inputs[0][:, -1:],)

    was_training, handle = model.training, model.get_output_embeddings().register_forward_pre_hook(keep)
    in_float32 = model.device.type == "cuda" and model.dtype is torch.float32
    try:
        with torch.autocast(model.device.type, compute_dtype(), enabled=in_float32):
            model.eval()(**batch, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    return hidden[0]


def _rows_of_largest(sequences: Dataset, size: Callable[[list[int]], int]) -> list[Batch]:
    """The rows of the sequence whose rows' lengths have the largest `size`."""
    lengths = sequences["seq_lengths"][:]
    return rows_of(sequences[max(range(len(lengths)), key=lambda i: size(lengths[i]))])


def _reordered(model: Any, rows: list[Batch]) -> Tensor:
    """`last_hidden` of the same rows, computed in reverse order; a single row is computed next to itself."""
    order = rows[::-1] if len(rows) > 1 else rows * 2
    parts = torch.split(last_hidden(model, order), [len(row["input_ids"]) for row in order])
    return torch.cat(parts[::-1] if len(rows) > 1 else parts[:1])


def _largest(hidden: Tensor) -> float:
    """The largest root mean square of a token."""
    return float(hidden.pow(2).mean(-1).sqrt().max())
