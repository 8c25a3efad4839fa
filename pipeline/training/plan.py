"""plan: what a training will take, from parameters and the model's configuration alone: no weights, no GPU.

The model is built on PyTorch's meta device to count its parameters; memory and arithmetic are a closed formula over its
sizes. A run that cannot fit is refused, with the changes that would make it fit.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from ruamel.yaml import YAML
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.progress import clock
from pipeline.params import Params, TrainParams
from pipeline.training.methods import adapter_config
from pipeline.training.packing import training_sequences
from pipeline.training.targets import expert_parameters

GIB = 2**30
FREE_FRACTION = 0.92  # of a GPU's memory: the rest is the CUDA context and what the allocator cannot use
SMALL_TENSORS = 1.04  # what the formula leaves out; fitted to the measurements in tests/test_plan.py
TILE = (4096, 32768)  # tokens and words of which TRL 1.16 computes the loss at a time
GPUS = Path(__file__).parents[2] / "infra" / "gpus.yaml"


class PlanError(ValueError):
    """The run cannot fit, or there is no such GPU; the message says what would do."""


@checked(config=ConfigDict(extra="forbid", frozen=True))
class Gpu:
    memory_gib: float
    bf16_tflops: float  # dense
    usd_per_hour: float
    utilization: float  # fraction of bf16_tflops that adapter training reaches


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak."""

    weights: int  # of the frozen base, quantised or not, with the quantiser's own constants
    adapter: int
    optimizer: int
    activations: int  # kept from the forward pass through the layers
    backward: int  # gradients, loss, and what is recomputed or passes by, at the worst moment

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.backward


@dataclass(frozen=True)
class Plan:
    trainable_parameters: int
    parameters: int
    sequence_length: int  # tokens of the longest sequence of a micro-batch
    memory: Memory
    flops_per_token: float
    tokens: int | None  # of the whole training; None without a dataset
    steps: int | None
    gpu: str | None
    seconds: float | None
    cost_usd: float | None


def plan(params: Params, dataset: Path | None = None, gpu: str | None = None) -> Plan:
    """What `train` will take with `params`, on the GPU that infra/gpus.yaml calls `gpu`, or on a CPU.

    Args:
        dataset: the prepare stage's output, for the number of steps and the true longest row; None plans a step with a
            row of `prepare.max_length` tokens.

    Raises:
        PlanError: no such GPU, no such model, or the run cannot fit into the GPU's memory.
    """
    card = None if gpu is None else _gpu(gpu)
    config = _configuration(params)
    length, tokens, sequences = _lengths(params, dataset)
    made = _one_step(config, params.train, length, on_gpu=card is not None)
    steps = None
    if sequences is not None:
        train = params.train
        per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * train.num_processes
        each = math.ceil(sequences / per_step)
        steps = train.max_steps if train.max_steps > 0 else math.ceil(each * train.num_train_epochs)
        tokens = round(tokens * steps / each)
    seconds = cost = None
    if card is not None and steps is not None:
        cards = params.train.num_processes
        seconds = made.flops_per_token * tokens / (card.bf16_tflops * 1e12 * card.utilization) / cards
        cost = seconds / 3600 * card.usd_per_hour * cards
    sharded = params.train.strategy in ("fsdp", "deepspeed")  # of which a GPU holds a part that only they know
    room = math.inf if card is None or sharded else card.memory_gib * GIB * FREE_FRACTION
    if card is not None and gpu is not None and made.memory.peak > room:
        raise PlanError(_too_large(config, params.train, length, made.memory, gpu, card))
    return Plan(
        made.trainable_parameters, made.parameters, length, made.memory, made.flops_per_token,
        tokens if steps is not None else None, steps, gpu, seconds, cost,
    )  # fmt: skip


def describe(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    memory = plan.memory
    parts = {
        "weights of the base": memory.weights,
        "adapter": memory.adapter,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "gradients, loss, passing by": memory.backward,
        "peak": memory.peak,
    }
    share = plan.trainable_parameters / plan.parameters
    lines = [
        f"parameters   {plan.parameters:,}, of which {plan.trainable_parameters:,} are trained ({share:.2%})",
        f"memory       one micro-batch with a sequence of {plan.sequence_length:,} tokens",
        *(f"             {size / GIB:7.2f} GiB  {name}" for name, size in parts.items()),
        f"work         {plan.flops_per_token / 1e9:,.3g} GFLOP a token",
    ]
    if plan.steps is None:
        lines.append("steps        not known before there is a dataset; `dvc repro prepare` makes it")
    else:
        lines.append(f"steps        {plan.steps:,}, {plan.tokens:,} tokens")
    if plan.seconds is not None:
        lines.append(f"time         about {clock(plan.seconds)} on a {plan.gpu}, {plan.cost_usd:,.2f} USD")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Step:
    trainable_parameters: int
    parameters: int
    memory: Memory
    flops_per_token: float


@dataclass(frozen=True)
class _Sizes:
    """What a token passes in a layer, in numbers (bytes come later)."""

    layers: int
    hidden: int
    queries: int  # of all heads
    keys: int  # of all heads that keys and values have
    heads: int
    inner: int  # of the feed-forward part, of all experts that a token goes to
    gated: bool
    attention_dropout: float

    @classmethod
    def of(cls, config: PreTrainedConfig, model: PreTrainedModel) -> "_Sizes":
        text = config.get_text_config()
        heads = text.num_attention_heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or getattr(text, "v_head_dim", None) or text.hidden_size // heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        if any(True for _ in expert_parameters(model)):
            inner = (getattr(text, "moe_intermediate_size", None) or inner) * (
                text.num_experts_per_tok + (getattr(text, "n_shared_experts", None) or 0)
            )
        return cls(
            text.num_hidden_layers, text.hidden_size, heads * width, keys * width, heads, inner,
            any("gate" in name for name, _ in model.named_parameters()),
            getattr(text, "attention_dropout", 0.0) or getattr(text, "attn_pdrop", 0.0) or 0.0,
        )  # fmt: skip


def _one_step(config: PreTrainedConfig, params: TrainParams, length: int, on_gpu: bool) -> _Step:
    """One micro-batch with rows of `length` tokens, by the formula that docs/decisions.md compares with a GPU.

    Raises:
        PlanError: the configuration lacks the sizes that the formula needs.
        MethodError: an adapter that the model cannot have.
    """
    classes = params.task == CLASSIFICATION
    width = 2 if on_gpu else 4  # bytes of a number: bfloat16 or float32, as model.compute_dtype
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
        model.requires_grad_(False)
        try:
            sizes = _Sizes.of(config, model)
        except (AttributeError, TypeError) as error:
            raise PlanError(
                f"a step of {config.model_type} cannot be planned ({error}); train without a plan: what does not fit "
                "is retried in smaller pieces"
            ) from None
        linear = _linear_layers(model)
        frozen = sum(p.numel() for p in linear)
        experts = [p.numel() for _, p in expert_parameters(model)]
        if experts:
            text = config.get_text_config()
            every = next(p.shape[0] for _, p in expert_parameters(model))
            frozen += sum(experts) * text.num_experts_per_tok // every
        weights = _weight_bytes(model, linear, params, width)
        head = 0 if classes else model.get_output_embeddings().weight.numel()
        settings = adapter_config(params, model)
        tuned = get_peft_model(model, settings, autocast_adapter_dtype=False) if settings else model
        if settings is None:
            model.requires_grad_(True)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    dropped = [m.in_features for m in tuned.modules() if params.lora_dropout and hasattr(m, "lora_dropout")]
    length += params.num_virtual_tokens if params.method == "prompt" else 0
    rows = params.per_device_train_batch_size
    tokens, seen = rows * length, length * (rows if params.packing else 1)  # packed rows lie in one line
    kept = _layer_bytes(sizes, params, seen, width, on_gpu) + _dropout_bytes(sizes, dropped, width)
    layer = tokens * kept * SMALL_TENSORS
    again = params.gradient_checkpointing  # then a layer keeps its input alone, and one is computed again at a time
    activations = sizes.layers * (tokens * width * sizes.hidden if again else layer)
    trained = trainable * (2 if on_gpu and params.load_in_4bit else 4)  # as TRL and PEFT keep them
    unpacked = 2 * width * max(p.numel() for p in linear) if params.load_in_4bit else 0
    cast = trainable * width if settings is None and on_gpu else 0  # autocast's copies of trained weights
    tile = 0 if classes else min(tokens, TILE[0]) * min(head // sizes.hidden, TILE[1]) * (width if on_gpu else 9 * 4)
    passing = max(tile + tokens * sizes.hidden * 4, tokens * width * 4 * sizes.inner)
    backward = (layer if again else 0) + trained + unpacked + cast + passing
    # Attention: 2 products of 2 · queries · seen a token; 2.5 times that in the backward pass, as in FlashAttention.
    attention = 4 * sizes.layers * sizes.queries * seen
    forward = 2 * frozen + attention + (2 * trainable if settings is not None else 0)
    flops = forward + 2 * frozen + 2.5 * attention + (4 if settings is not None else 2) * trainable + 6 * head
    flops += forward if again else 0
    state = {"adamw_torch": 2 * trained, "paged_adamw_8bit": 2 * trainable}
    return _Step(
        trainable_parameters=trainable,
        parameters=sum(p.numel() for p in tuned.parameters()),
        memory=Memory(
            weights, trained if settings else 0, state[params.optim], math.ceil(activations), math.ceil(backward)
        ),
        flops_per_token=flops,
    )


def _layer_bytes(sizes: _Sizes, params: TrainParams, seen: int, width: int, on_gpu: bool) -> float:
    """Bytes a token that one layer keeps for the backward pass."""
    fused = on_gpu and params.use_liger_kernel
    flash = params.attn_implementation.startswith("flash_attention")
    # Both norms: the input in float32, and the output that LoRA reads.
    norms = 2 * sizes.hidden * ((width if fused else 4) + width)
    # Queries, output, keys and values; scaled_dot_product_attention with a mask takes keys and values of all heads.
    attention = width * 2 * (sizes.queries + (sizes.keys if flash else sizes.queries))
    if params.attn_implementation == "eager" or (sizes.attention_dropout and not on_gpu):
        attention += width * 3 * sizes.heads * seen  # scores, dropout's mask and their product
    feedforward = width * sizes.inner * (3 if fused else 4 if sizes.gated else 5)
    return norms + attention + feedforward


def _dropout_bytes(sizes: _Sizes, inputs: list[int], width: int) -> float:
    """Bytes a token and layer that LoRA's dropout adds: each target keeps its own input and mask, none shares one."""
    shared = width * (2 * sizes.hidden + sizes.inner)
    return max(0.0, (width + 1) * sum(inputs) / sizes.layers - shared) if inputs else 0.0


def _linear_layers(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The weights that bitsandbytes would quantise: every linear layer's but the heads'."""
    kept = get_keys_to_not_convert(model)
    return [
        module.weight
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and not any(name == k or name.startswith(f"{k}.") for k in kept)
    ]


def _weight_bytes(model: PreTrainedModel, linear: list[torch.nn.Parameter], params: TrainParams, width: int) -> int:
    """Of the frozen base; in 4 bits half a byte a weight, and a constant for each 64 (QLoRA, Dettmers et al. 2023)."""
    each = 4 if params.method == "full" else width
    numbers = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    if not params.load_in_4bit:
        return numbers * each
    packed = sum(p.numel() for p in linear)
    blocks = sum(math.ceil(p.numel() / 64) for p in linear)
    constants = blocks * (1 + 4 / 256) if params.bnb_4bit_use_double_quant else 4 * blocks
    return math.ceil((numbers - packed) * each + packed / 2 + constants)


def _gpu(name: str) -> Gpu:
    known = TypeAdapter(dict[str, Gpu]).validate_python(YAML(typ="safe").load(GPUS.read_text(encoding="utf-8")))
    if name not in known:
        raise PlanError(f"{name} is no GPU of infra/gpus.yaml; it has {', '.join(known)}: add yours there")
    return known[name]


def _configuration(params: Params) -> PreTrainedConfig:
    name = params.prepare.model_name_or_path
    try:
        return AutoConfig.from_pretrained(
            name, revision=params.prepare.model_revision, trust_remote_code=params.prepare.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise PlanError(f"no model configuration could be read from {name}: {str(error).splitlines()[0]}") from None


def _lengths(params: Params, dataset: Path | None) -> tuple[int, int, int | None]:
    """Tokens of the longest sequence, tokens of an epoch, sequences of an epoch (None: no dataset)."""
    packed = params.train.packed_length if params.train.packing else 0
    if dataset is None:
        return max(packed, params.prepare.max_length), 0, None
    lengths = [len(ids) for ids in training_sequences(dataset / "train.parquet", params.train)["input_ids"]]
    return max(packed, *lengths), sum(lengths), len(lengths)


def _too_large(config: PreTrainedConfig, params: TrainParams, length: int, memory: Memory, name: str, gpu: Gpu) -> str:
    room = gpu.memory_gib * GIB * FREE_FRACTION
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1},
        {"method": "qlora", "load_in_4bit": True},
        {"optim": "paged_adamw_8bit"},
    ]
    made, would = params, []
    for change in changes:  # one on top of the other, the cheapest in quality and time first
        if all(getattr(made, key) == value for key, value in change.items()):
            continue
        made = made.model_copy(update=change)
        would.append(", ".join(f"train.{key}: {str(value).lower()}" for key, value in change.items()))
        peak = _one_step(config, made, length, on_gpu=True).memory.peak
        if peak <= room:
            return (
                f"this training needs {memory.peak / GIB:.1f} GiB; the {name} has {room / GIB:.1f} GiB available; "
                f"with {' and '.join(would)} it needs {peak / GIB:.1f}"
            )
    for shorter in (length // 2, length // 4, length // 8):
        peak = _one_step(config, made, shorter, on_gpu=True).memory.peak
        if peak <= room:
            keys = "prepare.max_length and train.packed_length" if params.packing else "prepare.max_length"
            return (
                f"this training needs {memory.peak / GIB:.1f} GiB; the {name} has {room / GIB:.1f} GiB available; with "
                f"{' and '.join([*would, f'{keys} of {shorter} at most'])} it needs {peak / GIB:.1f}"
            )
    return (
        f"this training needs {memory.peak / GIB:.1f} GiB; the {name} has {room / GIB:.1f} GiB available; "
        f"no setting makes it fit (weights alone take {memory.weights / GIB:.1f}): choose a larger GPU of "
        "infra/gpus.yaml"
    )
