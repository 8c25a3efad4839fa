"""What a training step takes: bytes and arithmetic by a closed formula over the model's sizes, and the batch that fits.

Sizes are counted on PyTorch's meta device, without weights; the constants are fitted to the measurements in
tests/test_plan.py. From it follow `retune plan` and `train.per_device_train_batch_size: auto`.
"""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from pipeline.core.combinations import CLASSIFICATION
from pipeline.params import TrainParams
from pipeline.training.hardware import HardwareError, uses_liger
from pipeline.training.methods import adapter_config
from pipeline.training.targets import expert_parameters

GIB = 2**30
FREE_FRACTION = 0.92  # of a GPU's memory: the rest is the CUDA context and what the allocator cannot use
SMALL_TENSORS = 1.04  # what the formula leaves out
TILE = (4096, 32768)  # tokens and words of which TRL 1.16 computes the loss at a time
SHARDED = ("fsdp", "deepspeed")  # strategies of which a GPU holds a part that is not known here


class UnplannedError(ValueError):
    """The configuration lacks the sizes that the formula needs."""


class Gpu(NamedTuple):
    """Memory in bytes; `free`: of it, what other processes leave."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Counts:
    """A base model with its adapter, in numbers (bytes come later)."""

    layers: int
    hidden: int
    queries: int  # width of all heads
    keys: int  # width of all heads that keys and values have
    heads: int
    inner: int  # of the feed-forward part, of all experts that a token goes to
    gated: bool
    attention_dropout: float
    parameters: int
    trainable: int
    quantisable: int  # weights that bitsandbytes would hold in 4 bits: every linear layer's but the heads'
    used: int  # weights of linear layers and experts that a token is multiplied with
    largest_layer: int
    head: int  # weights of the output layer; 0 with classes
    dropped: int  # numbers a token that LoRA's dropout keeps


def count(config: PreTrainedConfig, params: TrainParams) -> Counts:
    """The sizes of the model of `config` with the adapter of `params`."""
    try:
        return _count(config, params)
    except (AttributeError, TypeError) as error:
        raise UnplannedError(f"{config.model_type} ({error})") from None


def _count(config: PreTrainedConfig, params: TrainParams) -> Counts:
    text = config.get_text_config()
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    width = getattr(text, "head_dim", None) or getattr(text, "v_head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    auto = AutoModelForSequenceClassification if params.task == CLASSIFICATION else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        kept = tuple(f"{key}." for key in get_keys_to_not_convert(model))
        linear = [
            module.weight.numel()
            for name, module in model.named_modules()
            if type(module) in (torch.nn.Linear, Conv1D) and not f"{name}.".startswith(kept)
        ]
        experts = [parameter for _, parameter in expert_parameters(model)]
        gated = any("gate" in name for name, _ in model.named_parameters())
        parameters = model.num_parameters()
        head = 0 if params.task == CLASSIFICATION else model.get_output_embeddings().weight.numel()
        settings = adapter_config(params, model)
        tuned = get_peft_model(model, settings, autocast_adapter_dtype=False) if settings else model.requires_grad_()
    used = sum(linear)
    if experts:
        shared = getattr(text, "n_shared_experts", None) or 0
        inner = (getattr(text, "moe_intermediate_size", None) or inner) * (text.num_experts_per_tok + shared)
        used += sum(p.numel() for p in experts) * text.num_experts_per_tok // experts[0].shape[0]
    return Counts(
        layers=layers,
        hidden=hidden,
        queries=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        inner=inner,
        gated=gated,
        attention_dropout=attention_dropout(text),
        parameters=parameters,
        trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        quantisable=sum(linear),
        used=used,
        largest_layer=max(linear),
        head=head,
        dropped=sum(m.in_features for m in tuned.modules() if params.lora_dropout and hasattr(m, "lora_dropout")),
    )


def attention_dropout(text_config: Any) -> float:
    return getattr(text_config, "attention_dropout", None) or getattr(text_config, "attn_pdrop", None) or 0.0


def weight_bytes(counts: Counts, params: TrainParams, on_gpu: bool) -> int:
    """Of the frozen base; in 4 bits half a byte a weight, and a constant for each 64 (QLoRA, Dettmers et al. 2023)."""
    each = 4 if params.method == "full" or not on_gpu else 2
    if not params.load_in_4bit:
        return counts.parameters * each
    constant = 1 + 4 / 256 if params.bnb_4bit_use_double_quant else 4
    return int((counts.parameters - counts.quantisable) * each + counts.quantisable * (0.5 + constant / 64))


def step_memory(counts: Counts, params: TrainParams, rows: int, length: int, on_gpu: bool) -> dict[str, int]:
    """Bytes at the moment of the peak of a micro-batch of `rows` sequences of `length` tokens: `peak` and its parts.

    These are `weights` (the frozen base), `adapter`, `optimizer`, `activations` (kept from the forward pass through
    the layers) and `backward` (gradients, loss, and what is recomputed or short-lived, at the worst moment).
    """
    full, width = params.method == "full", 2 if on_gpu else 4  # bytes of a number, as `compute_dtype` has it
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    tokens = rows * length
    # Packed sequences lie in one line, whose dense mask a token sees whole.
    layer = tokens * SMALL_TENSORS * _layer_bytes(counts, params, tokens if params.packing else length, on_gpu)
    again = params.gradient_checkpointing  # then a layer keeps its input alone, and one is computed again at a time
    trained = counts.trainable * (2 if on_gpu and params.load_in_4bit else 4)  # as TRL and PEFT keep them
    unpacked = 2 * width * counts.largest_layer if params.load_in_4bit else 0
    cast = counts.trainable * width if full and on_gpu else 0  # autocast's copies of trained weights
    tile = min(tokens, TILE[0]) * min(counts.head // counts.hidden, TILE[1]) * (width if on_gpu else 9 * 4)
    short_lived = max(tile + tokens * counts.hidden * 4, tokens * width * 4 * counts.inner)
    parts = {
        "weights": weight_bytes(counts, params, on_gpu),
        "adapter": 0 if full else trained,
        "optimizer": 2 * (trained if params.optim == "adamw_torch" else counts.trainable),
        "activations": int(counts.layers * (tokens * width * counts.hidden if again else layer)),
        "backward": int((layer if again else 0) + trained + unpacked + cast + short_lived),
    }
    return parts | {"peak": sum(parts.values())}


def _layer_bytes(counts: Counts, params: TrainParams, seen: int, on_gpu: bool) -> float:
    """Bytes a token that one layer keeps for the backward pass."""
    width = 2 if on_gpu else 4
    # A GPU's attention may take the bounds of rows instead of a mask (FlashAttention, PyTorch's varlen).
    auto = params.attn_implementation == "auto" and params.packing
    flash = on_gpu and (auto or params.attn_implementation.startswith("flash_attention"))
    fused = on_gpu and uses_liger(params)
    # Both norms: the input in float32, and the output that LoRA reads.
    norms = 2 * counts.hidden * ((width if fused else 4) + width)
    # Queries, output, keys and values; scaled_dot_product_attention with a mask takes keys and values of all heads.
    attention = width * 2 * (counts.queries + (counts.keys if flash else counts.queries))
    if params.attn_implementation == "eager" or (counts.attention_dropout and not on_gpu):
        attention += width * 3 * counts.heads * seen  # scores, dropout's mask and their product
    feedforward = width * counts.inner * (3 if fused else 4 if counts.gated else 5)
    # Of LoRA's dropout each target keeps its own input and mask, none shares one.
    shared = width * (2 * counts.hidden + counts.inner)
    dropout = max(0.0, (width + 1) * counts.dropped / counts.layers - shared) if counts.dropped else 0.0
    return norms + attention + feedforward + dropout


def flops_per_token(counts: Counts, params: TrainParams, rows: int, length: int) -> float:
    """Forward and backward; frozen weights take no gradient."""
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    seen = rows * length if params.packing else length
    # 2 products of 2 · queries · seen a token; 2.5 times that in the backward pass, as in FlashAttention.
    attention = 4 * counts.layers * counts.queries * seen
    full = params.method == "full"
    forward = 2 * counts.used + attention + (0 if full else 2 * counts.trainable)
    backward = 2 * counts.used + 2.5 * attention + (2 if full else 4) * counts.trainable
    return forward * (2 if params.gradient_checkpointing else 1) + backward + 6 * counts.head


def batches(params: TrainParams, counts: Counts | None, card: Gpu | None, lengths: list[int]) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of an optimiser step; `lengths` are the sequences' tokens.

    `auto` takes the largest micro-batch that fits and that the step is a multiple of, so the rows of a step are the
    same on every card. It takes one sequence on a CPU, where more are no faster, and of a sharded model.

    Args:
        counts: of the model; None where the formula does not know its architecture.

    Raises:
        HardwareError: another process holds the memory that the training needs.
    """
    auto = params.per_device_train_batch_size == "auto"
    rows = 1 if auto else int(params.per_device_train_batch_size)
    if params.tokens_per_step is None:
        per_step = rows * int(params.gradient_accumulation_steps)
    else:
        each = params.packed_length if params.packing else sum(lengths) / max(len(lengths), 1)
        per_step = max(1, round(params.tokens_per_step / each / params.num_processes))
    if card is not None and counts is not None and params.strategy not in SHARDED:

        def needed(number: int) -> int:
            return step_memory(counts, params, number, max(lengths), on_gpu=True)["peak"]

        room = card.free * FREE_FRACTION
        if auto:
            rows = next((n for n in range(per_step, 1, -1) if per_step % n == 0 and needed(n) <= room), 1)
        if room < needed(rows) <= card.total * FREE_FRACTION:
            raise HardwareError(
                f"this training needs {needed(rows) / GIB:.1f} GiB, and of the {card.name}'s {card.total / GIB:.1f} "
                f"other processes leave {card.free / GIB:.1f}; stop them, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
    return rows, max(1, round(per_step / rows))
