"""The memory and work of a training step, by a formula over the model's sizes, and the largest batch that fits.

Sizes are counted on PyTorch's meta device, without weights; constants are fitted to the measurements in
tests/test_plan.py. `retune plan` and `train.per_device_train_batch_size: auto` use it.
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
from pipeline.training.hardware import why_no_liger
from pipeline.training.methods import adapter_config
from pipeline.training.targets import expert_parameters
from pipeline.training.watching import TrainError
from pipeline.weights.architecture import attention_widths

GIB = 2**30
FREE_FRACTION = 0.92  # of a GPU's memory; the rest is the CUDA context and what the allocator cannot use
SMALL_TENSORS = 1.04  # factor for tensors that the formula leaves out
TILE = (4096, 32768)  # tokens and vocabulary entries for which TRL 1.16 computes the loss at a time
SHARDED = ("fsdp", "deepspeed")  # strategies where each GPU holds a part of unknown size


class UnplannedError(ValueError):
    """The model's configuration lacks sizes that the formula needs; the message names the model type."""


class Gpu(NamedTuple):
    name: str
    total: int  # bytes
    free: int  # bytes that other processes leave


@dataclass(frozen=True)
class Counts:
    """Sizes of a base model and its adapter, as numbers of weights or of values per token."""

    layers: int
    hidden: int
    query_width: float  # of all heads together
    key_width: float  # of all key heads together; values have the same
    heads: int
    feedforward_width: int  # of all experts together that a token passes
    gated: bool
    attention_dropout: float
    parameters: int
    trainable: int
    quantisable: int  # weights that bitsandbytes can hold in 4 bits: all linear layers except the heads
    active: int  # weights of linear layers and experts that a token passes
    largest_layer: int
    head: int  # weights of the output layer; 0 for a classifier
    adapter_inputs: int  # values per token that LoRA's modules read


def count(config: PreTrainedConfig, params: TrainParams) -> Counts:
    """The sizes of the model of `config` with the adapter of `params`; raises UnplannedError."""
    try:
        text = config.get_text_config()
        query_width, key_width = attention_widths(text)
        feedforward = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        auto = AutoModelForSequenceClassification if params.task == CLASSIFICATION else AutoModelForCausalLM
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_config(config, dtype=torch.bfloat16)
            model.requires_grad_(False)
            not_quantised = tuple(f"{key}." for key in get_keys_to_not_convert(model))
            linear = [
                module.weight.numel()
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear | Conv1D) and not f"{name}.".startswith(not_quantised)
            ]
            experts = [parameter for _, parameter in expert_parameters(model)]
            parameters = model.num_parameters()
            head = 0 if params.task == CLASSIFICATION else model.get_output_embeddings().weight.numel()
            adapter = adapter_config(params, model)
            tuned = get_peft_model(model, adapter, autocast_adapter_dtype=False) if adapter else model.requires_grad_()
        active = sum(linear)
        if experts:
            per_token = getattr(text, "top_k_experts", None) or text.num_experts_per_tok  # the first is Gemma 4's name
            shared = getattr(text, "n_shared_experts", None) or 0
            feedforward = (getattr(text, "moe_intermediate_size", None) or feedforward) * (per_token + shared)
            active += sum(p.numel() for p in experts) * per_token // experts[0].shape[0]
        return Counts(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query_width=query_width,
            key_width=key_width,
            heads=max(layer.num_attention_heads for layer in text.per_layer_config),
            feedforward_width=feedforward,
            gated=any("gate" in name for name, _ in tuned.named_parameters()),
            attention_dropout=attention_dropout(text),
            parameters=parameters,
            trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
            quantisable=sum(linear),
            active=active,
            largest_layer=max(linear),
            head=head,
            adapter_inputs=sum(module.in_features for module in tuned.modules() if hasattr(module, "lora_dropout")),
        )
    except (AttributeError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise UnplannedError(f"{config.model_type} ({error})") from None


def attention_dropout(text_config: Any) -> float:
    return getattr(text_config, "attention_dropout", None) or getattr(text_config, "attn_pdrop", None) or 0.0


def weight_bytes(counts: Counts, params: TrainParams, on_gpu: bool) -> int:
    """Bytes of the base. In 4 bits: half a byte a weight and a constant for each 64 (QLoRA, Dettmers et al. 2023)."""
    width = 4 if params.method == "full" or not on_gpu else 2
    if not params.load_in_4bit:
        return counts.parameters * width
    constant = 1 + 4 / 256 if params.bnb_4bit_use_double_quant else 4
    return int((counts.parameters - counts.quantisable) * width + counts.quantisable * (0.5 + constant / 64))


def step_memory(counts: Counts, params: TrainParams, rows: int, length: int, on_gpu: bool) -> dict[str, int]:
    """Peak memory in bytes of a micro-batch of `rows` sequences of `length` tokens: `peak` and its parts.

    The parts are `weights` (the frozen base), `adapter`, `optimizer`, `activations` (kept by the forward pass) and
    `backward` (gradients, loss, recomputed and short-lived tensors at the peak).
    """
    full, width = params.method == "full", 2 if on_gpu else 4  # bytes of a value in `compute_dtype`
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    tokens = rows * length
    # Packed sequences form one long sequence, and a dense mask covers all of it.
    layer = tokens * SMALL_TENSORS * _layer_bytes(counts, params, tokens if params.packing else length, on_gpu)
    recomputes = params.gradient_checkpointing  # each layer keeps only its input; one at a time is computed again
    trained = counts.trainable * (2 if on_gpu and params.load_in_4bit else 4)  # in TRL's and PEFT's dtype
    dequantised = 2 * width * counts.largest_layer if params.load_in_4bit else 0
    cast = counts.trainable * width if full and on_gpu else 0  # autocast's copies of trained weights
    tile = min(tokens, TILE[0]) * min(counts.head // counts.hidden, TILE[1]) * (width if on_gpu else 9 * 4)
    short_lived = max(tile + tokens * counts.hidden * 4, tokens * width * 4 * counts.feedforward_width)
    parts = {
        "weights": weight_bytes(counts, params, on_gpu),
        "adapter": 0 if full else trained,
        "optimizer": 2 * (trained if params.optim == "adamw_torch" else counts.trainable),
        "activations": int(counts.layers * (tokens * width * counts.hidden if recomputes else layer)),
        "backward": int((layer if recomputes else 0) + trained + dequantised + cast + short_lived),
    }
    return parts | {"peak": sum(parts.values())}


def _layer_bytes(counts: Counts, params: TrainParams, context: int, on_gpu: bool) -> float:
    """Bytes per token that one layer keeps for the backward pass; a token attends to `context` tokens."""
    width = 2 if on_gpu else 4
    # FlashAttention and PyTorch's varlen take the bounds of rows instead of a mask.
    auto = params.attn_implementation == "auto" and params.packing
    flash = on_gpu and (auto or params.attn_implementation.startswith("flash_attention"))
    fused = on_gpu and why_no_liger(params) is None
    # Two norms, each with its input in float32 and its output, which LoRA reads.
    norms = 2 * counts.hidden * ((width if fused else 4) + width)
    # Queries, output, keys and values; scaled_dot_product_attention with a mask repeats keys and values for all heads.
    attention = width * 2 * (counts.query_width + (counts.key_width if flash else counts.query_width))
    if params.attn_implementation == "eager" or (counts.attention_dropout and not on_gpu):
        attention += width * 3 * counts.heads * context  # scores, dropout's mask and their product
    feedforward = width * counts.feedforward_width * (3 if fused else 4 if counts.gated else 5)
    # Targets share their inputs, unless each keeps its own after dropout, with a mask, or cast from PEFT's float32.
    own = 0.0
    if params.lora_dropout or (on_gpu and not params.load_in_4bit):
        kept = (width + (params.lora_dropout > 0)) * counts.adapter_inputs / counts.layers
        own = max(0.0, kept - width * (2 * counts.hidden + counts.feedforward_width))
    return norms + attention + feedforward + own


def flops_per_token(counts: Counts, params: TrainParams, rows: int, length: int) -> float:
    """Floating-point operations of forward and backward pass; frozen weights need no gradient."""
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    # A dense mask covers all packed sequences of a micro-batch; otherwise tokens of other rows cost nothing.
    context = rows * length if params.packing and params.attn_implementation in ("sdpa", "eager") else length
    # Per token 2 products of 2 · query_width · context; 2.5 times that in the backward pass, as in FlashAttention.
    attention = 4 * counts.layers * counts.query_width * context
    full = params.method == "full"
    forward = 2 * counts.active + attention + (0 if full else 2 * counts.trainable)
    backward = 2 * counts.active + 2.5 * attention + (2 if full else 4) * counts.trainable
    return forward * (2 if params.gradient_checkpointing else 1) + backward + 6 * counts.head


def choose_batches(params: TrainParams, counts: Counts | None, gpu: Gpu | None, lengths: list[int]) -> tuple[int, int]:
    """Sequences per micro-batch, and micro-batches per optimiser step; `lengths` are the tokens of each sequence.

    `auto` takes the largest micro-batch that fits and divides the step, so a step has the same rows on every GPU. It is
    one sequence on a CPU, for a sharded model, and for an architecture that the formula does not know (no `counts`).
    Raises TrainError if other processes use the memory that the training needs.
    """
    auto = params.per_device_train_batch_size == "auto"
    rows = 1 if auto else int(params.per_device_train_batch_size)
    if params.tokens_per_step is None:
        per_step = rows * int(params.gradient_accumulation_steps)
    else:
        length = params.packed_length if params.packing else sum(lengths) / max(len(lengths), 1)
        per_step = max(1, round(params.tokens_per_step / length / params.num_processes))
    if gpu is not None and counts is not None and params.strategy not in SHARDED:

        def peak(rows: int) -> int:
            return step_memory(counts, params, rows, max(lengths), on_gpu=True)["peak"]

        available = gpu.free * FREE_FRACTION
        if auto:
            rows = next((n for n in range(per_step, 1, -1) if per_step % n == 0 and peak(n) <= available), 1)
        if available < peak(rows) <= gpu.total * FREE_FRACTION:
            raise TrainError(
                f"this training needs {peak(rows) / GIB:.1f} GiB; of the {gpu.name}'s {gpu.total / GIB:.1f} GiB, other "
                f"processes leave {gpu.free / GIB:.1f}; stop them, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
    return rows, max(1, round(per_step / rows))
