"""Attention within each row of a packed line: one function for transformers, two kernels behind it.

A dense mask over a line computes T × T scores, of which all but those within rows are thrown away. On a GPU PyTorch's
own FlashAttention takes the bounds of rows instead; on a CPU rows lie side by side, as long as the longest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from pipeline.training.footprint import attention_dropout
from pipeline.training.packing import Batch, Collate, rows_of
from pipeline.weights.loading import ModelError, compute_dtype

# query (T, heads, width), key and value (T, key heads, width), bounds (rows + 1), tokens of the longest row; then
# scale, window (tokens that a query looks back on, itself among them; None: to the row's start) and dropout.
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
    """What transformers calls: causal attention within rows, by `kernel`."""
    extras = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if extras or cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError(f"its attention takes {extras[0]}" if extras else "rows are not packed")
    heads = [x[0].transpose(0, 1) for x in (query, key, value)]
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    output = kernel(*heads, cu_seq_lens_q, max_length_q, scale=scaling, window=window, dropout=dropout)
    return output[None].contiguous(), None


def side_by_side(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
    """The kernel for CPUs: a table of rows, padded to the longest, through scaled_dot_product_attention."""
    lengths = bounds.diff().long()
    # Where each token lies in the table; padding comes after a row's end, where causal queries do not look.
    offsets = (torch.arange(len(lengths)) * longest - bounds[:-1]).long()
    cells = torch.arange(len(query)) + offsets.repeat_interleave(lengths)

    def table(x: Tensor) -> Tensor:  # (rows, heads, longest, width)
        flat = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, cells, x)
        return repeat_kv(flat.view(len(lengths), longest, *x.shape[1:]).transpose(1, 2), query.shape[1] // x.shape[1])

    mask = None
    if options["window"] is not None:
        mask = torch.ones(longest, longest, dtype=torch.bool).tril().triu(1 - options["window"])
    q, k, v = table(query), table(key), table(value)
    output = scaled_dot_product_attention(q, k, v, mask, options["dropout"], mask is None, scale=options["scale"])
    return output.transpose(1, 2).flatten(0, 1)[cells]


def varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
    """The kernel for GPUs: PyTorch's `varlen_attn`, which has no float32 and no dropout."""
    if options["dropout"]:
        raise NotImplementedError(f"its attention has a dropout of {options['dropout']:g}")
    grouped, dtype, bounds = query.shape[1] > key.shape[1], query.dtype, bounds.to(torch.int32)
    if query.is_cuda and dtype is torch.float32:
        query, key, value = (x.to(compute_dtype()) for x in (query, key, value))
    window = (-1 if options["window"] is None else options["window"] - 1, 0)
    output: Any = varlen_attn(
        query, key, value, bounds, bounds, longest, longest,
        scale=options["scale"], window_size=window, enable_gqa=grouped,
    )  # fmt: skip
    return output.to(dtype)


def use_packed_attention(model: Any, sequences: Dataset, kernel: Kernel | None = None) -> str:
    """Let `model` compute attention by the kernel of its device, where that changes nothing; returns which attention
    it has now, and why not the faster one."""
    on_gpu, before, kind = model.device.type == "cuda", model.config._attn_implementation, model.config.model_type
    kernel, dropout = kernel or (varlen if on_gpu else side_by_side), attention_dropout(model.config.get_text_config())
    if before != "sdpa":
        reason: str | None = f"{kind} has {before} attention"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = f"{kind} does not take its attention from transformers' interface"
    elif dropout and kernel is not side_by_side:
        reason = f"its attention has a dropout of {dropout:g}"
    else:
        # Registered without a mask function, so transformers builds no mask.
        AttentionInterface.register("packed_rows", partial(packed_attention, kernel))
        reason = _difference(model, sequences)
    if reason is None:
        return "varlen, PyTorch's FlashAttention for packed rows" if on_gpu else "row by row"
    model.set_attn_implementation(before)
    return f"{before} ({'varlen' if on_gpu else 'row by row'} does not fit: {reason})"


def _difference(model: Any, sequences: Dataset) -> str | None:
    """Switch `model` to the registered kernel; what speaks against it, None if nothing does.

    Masks of an architecture's own (chunks, say) show as a difference larger than what the model itself makes of the
    same rows in another order. What depends on distance shows on long rows alone.
    """
    lengths = sequences["seq_lengths"][:]
    chosen = (_fullest(lengths), max(range(len(lengths)), key=lambda i: max(lengths[i])))
    lines = [rows_of(sequences[i]) for i in chosen]
    expected = torch.cat([_last_hidden(model, rows) for rows in lines])
    reordered = torch.cat([_reordered(model, rows) for rows in lines])
    model.set_attn_implementation("packed_rows")
    try:
        actual = torch.cat([_last_hidden(model, rows) for rows in lines])
    except (TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return str(error).splitlines()[0]
    apart, noise = _largest(actual - expected), _largest(reordered - expected)
    if apart <= max(3 * noise, 1e-3 * _largest(expected)):
        return None
    return f"{model.config.model_type} computes other values (by {apart:.2g}, its own noise is {noise:.2g})"


def require_isolation(model: Any, sequences: Dataset) -> None:
    """See that a row comes out of the model the same whatever its neighbour in a packed line says."""
    first, *others = rows_of(sequences[_fullest(sequences["seq_lengths"][:])])
    if not others:
        return  # no line holds two rows
    vocabulary = model.config.get_text_config().vocab_size
    changed = first | {"input_ids": [(token + 1) % vocabulary for token in first["input_ids"]]}
    start = len(first["input_ids"])
    before, after = (_last_hidden(model, [row, others[0]])[start:] for row in (first, changed))
    apart = _largest(before - after)
    if not apart <= 1e-3 * _largest(before):
        raise ModelError(
            f"{model.config.model_type} does not keep packed rows apart (a row changes by {apart:.3g} with its "
            "neighbour); set train.packing to false"
        )


@torch.no_grad()
def _last_hidden(model: Any, rows: list[Batch]) -> Tensor:
    """(T, hidden) of `rows` in one line, in float32: what the output layer sees, which costs no logits."""
    batch = Collate(0, packed=True)(rows)  # nothing is padded
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    del batch["rows"], batch["labels"]
    seen: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(inputs[0][0].float())
        return (inputs[0][:, -1:],)

    was_training, handle = model.training, model.get_output_embeddings().register_forward_pre_hook(keep)
    in_float32 = model.device.type == "cuda" and model.dtype is torch.float32
    try:
        with torch.autocast(model.device.type, compute_dtype(), enabled=in_float32):
            model.eval()(**batch, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    return seen[0]


def _fullest(lengths: list[list[int]]) -> int:
    return max(range(len(lengths)), key=lambda i: len(lengths[i]))


def _reordered(model: Any, rows: list[Batch]) -> Tensor:
    """`_last_hidden` of the same rows, computed in reverse order; of a single row, next to itself."""
    order = rows[::-1] if len(rows) > 1 else rows * 2
    parts = torch.split(_last_hidden(model, order), [len(row["input_ids"]) for row in order])
    return torch.cat(parts[::-1] if len(rows) > 1 else parts[:1])


def _largest(hidden: Tensor) -> float:
    """The largest token, as the root of its mean square."""
    return float(hidden.pow(2).mean(-1).sqrt().max())
