"""What a training step takes: bytes and arithmetic by a closed formula over the model's sizes.

Sizes are counted on PyTorch's meta device, without weights; the constants are fitted to the measurements in
tests/test_plan.py. From it follow `retune plan` and `train.per_device_train_batch_size: auto`.
"""

import importlib.util
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from pipeline.core.combinations import CLASSIFICATION
from pipeline.params import TrainParams
from pipeline.training.methods import adapter_config
from pipeline.training.targets import expert_parameters

GIB = 2**30
SMALL_TENSORS = 1.04  # what the formula leaves out
TILE = (4096, 32768)  # tokens and words of which TRL 1.16 computes the loss at a time


class UnplannedError(ValueError):
    """The configuration lacks the sizes that the formula needs."""


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
    buffers: int
    quantisable: int  # weights that bitsandbytes would hold in 4 bits: every linear layer's but the heads'
    blocks: int  # of 64 of them
    used: int  # weights of linear layers and experts that a token is multiplied with
    largest_layer: int
    head: int  # weights of the output layer; 0 with classes
    dropped: int  # numbers a token that LoRA's dropout keeps

    @property
    def base(self) -> int:
        return self.parameters + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak."""

    weights: int  # of the frozen base, quantised or not, with the quantiser's own constants
    adapter: int
    optimizer: int
    activations: int  # kept from the forward pass through the layers
    backward: int  # gradients, loss, and what is recomputed or short-lived, at the worst moment

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.backward


def count(config: PreTrainedConfig, params: TrainParams) -> Counts:
    """The sizes of the model of `config` with the adapter of `params`."""
    for size in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if not hasattr(config.get_text_config(), size):
            raise UnplannedError(f"{config.model_type} (it has no {size})")
    auto = AutoModelForSequenceClassification if params.task == CLASSIFICATION else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        kept = get_keys_to_not_convert(model)
        linear = [
            module.weight.numel()
            for name, module in model.named_modules()
            if type(module) in (torch.nn.Linear, Conv1D)
            and not any(name == k or name.startswith(f"{k}.") for k in kept)
        ]
        experts = [parameter for _, parameter in expert_parameters(model)]
        gated = any("gate" in name for name, _ in model.named_parameters())
        parameters = sum(p.numel() for p in model.parameters())
        buffers = sum(b.numel() for b in model.buffers())
        head = 0 if params.task == CLASSIFICATION else model.get_output_embeddings().weight.numel()
        settings = adapter_config(params, model)
        tuned = get_peft_model(model, settings, autocast_adapter_dtype=False) if settings else model
        if settings is None:
            model.requires_grad_(True)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    dropped = sum(m.in_features for m in tuned.modules() if params.lora_dropout and hasattr(m, "lora_dropout"))
    text = config.get_text_config()
    try:
        heads, hidden = text.num_attention_heads, text.hidden_size
        keys = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or getattr(text, "v_head_dim", None) or hidden // heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        used = sum(linear)
        if experts:
            shared = getattr(text, "n_shared_experts", None) or 0
            inner = (getattr(text, "moe_intermediate_size", None) or inner) * (text.num_experts_per_tok + shared)
            used += sum(p.numel() for p in experts) * text.num_experts_per_tok // experts[0].shape[0]
        return Counts(
            layers=text.num_hidden_layers, hidden=hidden, queries=heads * width, keys=keys * width, heads=heads,
            inner=inner, gated=gated, attention_dropout=attention_dropout(text), parameters=parameters,
            trainable=trainable, buffers=buffers, quantisable=sum(linear),
            blocks=sum(math.ceil(n / 64) for n in linear), used=used, largest_layer=max(linear), head=head,
            dropped=dropped,
        )  # fmt: skip
    except (AttributeError, TypeError) as error:
        raise UnplannedError(f"{config.model_type} ({error})") from None


def attention_dropout(text_config: Any) -> float:
    return getattr(text_config, "attention_dropout", None) or getattr(text_config, "attn_pdrop", None) or 0.0


def weight_bytes(counts: Counts, params: TrainParams, on_gpu: bool) -> int:
    """Of the frozen base; in 4 bits half a byte a weight, and a constant for each 64 (QLoRA, Dettmers et al. 2023)."""
    each = 4 if params.method == "full" or not on_gpu else 2
    if not params.load_in_4bit:
        return counts.base * each
    constants = 1 + 4 / 256 if params.bnb_4bit_use_double_quant else 4
    packed = counts.quantisable / 2 + counts.blocks * constants
    return math.ceil((counts.base - counts.quantisable) * each + packed)


def step_memory(counts: Counts, params: TrainParams, rows: int, length: int, on_gpu: bool) -> Memory:
    """One micro-batch of `rows` sequences of `length` tokens."""
    full, width = params.method == "full", 2 if on_gpu else 4  # bytes of a number, as `compute_dtype` has it
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    tokens = rows * length
    # Packed sequences lie in one line, whose dense mask a token sees whole.
    layer = tokens * SMALL_TENSORS * _layer_bytes(counts, params, tokens if params.packing else length, on_gpu)
    again = params.gradient_checkpointing  # then a layer keeps its input alone, and one is computed again at a time
    activations = counts.layers * (tokens * width * counts.hidden if again else layer)
    trained = counts.trainable * (2 if on_gpu and params.load_in_4bit else 4)  # as TRL and PEFT keep them
    unpacked = 2 * width * counts.largest_layer if params.load_in_4bit else 0
    cast = counts.trainable * width if full and on_gpu else 0  # autocast's copies of trained weights
    words = counts.head // counts.hidden
    tile = min(tokens, TILE[0]) * min(words, TILE[1]) * (width if on_gpu else 9 * 4)
    short_lived = max(tile + tokens * counts.hidden * 4, tokens * width * 4 * counts.inner)
    state = {"adamw_torch": 2 * trained, "paged_adamw_8bit": 2 * counts.trainable}
    return Memory(
        weights=weight_bytes(counts, params, on_gpu),
        adapter=0 if full else trained,
        optimizer=state[params.optim],
        activations=math.ceil(activations),
        backward=math.ceil((layer if again else 0) + trained + unpacked + cast + short_lived),
    )


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


def uses_liger(params: TrainParams) -> bool:
    """Whether Liger's layers are asked for, or `auto` finds that they can run."""
    choice = params.use_liger_kernel
    return choice is True or (choice == "auto" and lacking_for_liger() is None)


def lacking_for_liger() -> str | None:
    """What Liger's layers lack here: Triton compiles the launchers of their kernels when they first run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if has_c_compiler() else "Triton finds no C compiler"


def has_c_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
