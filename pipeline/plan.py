"""plan: what a training will take, from parameters and the model's configuration alone: no weights, no GPU.

One step runs on PyTorch's meta device with the very modules, adapter and loss that `train` uses; what is allocated is
added up, nothing is computed. In go `params.yaml` and, for steps and time, the dataset; out come parameters, memory by
part, FLOPs, time and cost on a named GPU. A run that cannot fit is refused, with the changes that would make it fit.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pipeline.params import Params, TrainParams
from pipeline.progress import clock
from pipeline.training.combinations import CLASSIFICATION, VIRTUAL_TOKENS
from pipeline.training.counting import Attention, Live, TiledLoss, experts, fold_adapters, packed_bytes, quantise
from pipeline.training.methods import adapter_config
from pipeline.training.packing import training_sequences

GIB = 2**30
FREE_FRACTION = 0.92  # of a GPU's memory: the rest is the CUDA context and what the allocator cannot use
GPUS = Path(__file__).parent.parent / "infra" / "gpus.yaml"


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


def _one_step(config: PreTrainedConfig, params: TrainParams, length: int, on_gpu: bool) -> _Step:
    """Forward and backward of one micro-batch on the meta device, counted.

    Raises:
        PlanError: the architecture computes with what the meta device does not have, such as numbers.
        MethodError: an adapter that the model cannot have.
    """
    try:
        return _counted(config, params, length, on_gpu)
    except (RuntimeError, TypeError) as error:
        raise PlanError(
            f"a step of {config.model_type} cannot be counted without its weights ({str(error).splitlines()[0]}); "
            "train without a plan: what does not fit is retried in smaller pieces"
        ) from None


def _counted(config: PreTrainedConfig, params: TrainParams, length: int, on_gpu: bool) -> _Step:
    dtype = torch.bfloat16 if on_gpu else torch.float32  # as model.compute_dtype
    attention = Attention(on_gpu)
    AttentionInterface.register("counted", attention)
    ALL_EXPERTS_FUNCTIONS.register("counted", experts)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = params.task == CLASSIFICATION
        auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype, attn_implementation="counted", experts_implementation="counted")
        model.requires_grad_(False)
        if params.method == "full":
            model.float()
        quantised = quantise(model) if params.load_in_4bit else []
        weights = sum(packed_bytes(m.weight, params) for m in quantised)
        packed = {id(m.weight) for m in quantised}
        weights += sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in packed)
        weights += sum(b.numel() * b.element_size() for b in model.buffers())
        settings = adapter_config(params, model)
        tuned = get_peft_model(model, settings, autocast_adapter_dtype=False) if settings else model
        if settings is None:
            model.requires_grad_(True)
        adapter = [p for p in tuned.parameters() if p.requires_grad]
        if params.method == "prompt":  # prefix's are keys and values that no layer computes
            length += params.num_virtual_tokens
        # As TRL and PEFT make them; in the step itself autocast computes in `dtype` whatever they are kept in.
        trained_bytes = sum(p.numel() for p in adapter) * (2 if on_gpu and params.load_in_4bit else 4)
        fold_adapters(tuned)
        tuned.train()
        if params.gradient_checkpointing:
            # The other kind keeps as much (test_plan measures it), but its bookkeeping leaks on the meta device.
            tuned.gradient_checkpointing_enable({"use_reentrant": True})
        if params.gradient_checkpointing or params.method in VIRTUAL_TOKENS:
            # Virtual tokens come in before the first layer, so that every layer passes gradients back.
            tuned.enable_input_require_grads()
        live = Live([*tuned.parameters(), *tuned.buffers()])
        shape = (params.per_device_train_batch_size, length)
        if params.packing:  # padding-free: one row of all tokens
            shape = (1, shape[0] * shape[1])
        inputs = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(shape, dtype=torch.long),
        }
        activations = 0

        def end_of_layers(*_: Any) -> None:
            nonlocal activations
            activations = live.now

        model.base_model.register_forward_hook(end_of_layers)
        with FlopCounterMode(display=False) as flops, live:
            for _ in range(min(params.gradient_accumulation_steps, 2)):  # from the second on, gradients are there
                if classes:
                    model(**inputs).logits.sum().backward()
                    continue
                hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
                head = model.get_output_embeddings()
                TiledLoss.apply(hidden.flatten(0, 1), head.weight, not on_gpu).backward()
    state = {"adamw_torch": 2 * trained_bytes, "paged_adamw_8bit": 2 * sum(p.numel() for p in adapter)}
    passes = min(params.gradient_accumulation_steps, 2)
    head = 0 if classes else model.get_output_embeddings().weight.numel()
    per_token = (flops.get_total_flops() + attention.flops) / passes / math.prod(shape) + 3 * 2 * head
    return _Step(
        trainable_parameters=sum(p.numel() for p in adapter),
        parameters=sum(p.numel() for p in tuned.parameters()),
        memory=Memory(
            weights, trained_bytes if settings else 0, state[params.optim], activations, live.peak - activations
        ),
        flops_per_token=per_token,
    )


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
