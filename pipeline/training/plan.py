"""plan: what training, evaluation and merge will take, from parameters and the model's configuration alone.

No weights are read and no GPU is needed. A training that cannot fit is refused, with the changes that make it fit.
"""

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from ruamel.yaml import YAML
from transformers import AutoConfig, PreTrainedConfig

from pipeline.core.combinations import VIRTUAL_TOKENS
from pipeline.core.progress import clock
from pipeline.params import Params, TrainParams
from pipeline.training.footprint import (
    GIB,
    Counts,
    Memory,
    UnplannedError,
    count,
    flops_per_token,
    micro_batch,
    sequences_per_step,
    step_memory,
    weight_bytes,
)
from pipeline.training.hardware import FREE_FRACTION
from pipeline.training.packing import lengths_of, training_sequences
from pipeline.weights.checkpoint import SHARD_BYTES

PARTS = ("weights of the base", "adapter", "optimizer", "activations", "gradients, loss, short-lived")
WEIGHTS_FRACTION = 0.9  # of a GPU, for the weights of a model that is scored
GPUS = Path(__file__).parents[2] / "infra" / "gpus.yaml"


class PlanError(ValueError):
    """The run cannot fit, or there is no such GPU; the message says what would do."""


@checked(config=ConfigDict(extra="forbid", frozen=True))
class GpuKind:
    """An entry of infra/gpus.yaml."""

    memory_gib: float
    bf16_tflops: float  # dense
    usd_per_hour: float
    utilization: float  # fraction of bf16_tflops that adapter training reaches

    @property
    def room(self) -> float:
        """Bytes that a process can use."""
        return self.memory_gib * GIB * FREE_FRACTION


@dataclass(frozen=True)
class Plan:
    trainable_parameters: int
    parameters: int
    sequence_length: int  # tokens of the longest sequence of a micro-batch
    rows: int  # sequences of a micro-batch
    accumulation: int
    memory: Memory
    flops_per_token: float
    tokens: int | None  # of the whole training; None without a dataset
    steps: int | None
    gpu: str | None
    seconds: float | None
    cost_usd: float | None
    evaluate: str  # what the later stages need, and how they will be done
    merge: str


def plan(params: Params, dataset: Path | None = None, gpu: str | None = None) -> Plan:
    """What the stages will take with `params`, on the GPU that infra/gpus.yaml calls `gpu`, or on a CPU.

    Args:
        dataset: the prepare stage's output, for the number of steps and the true longest row; None plans a step with a
            row of `prepare.max_length` tokens.

    Raises:
        PlanError: no such GPU, no such model, or the training cannot fit into the GPU's memory.
    """
    kind, train, config = None if gpu is None else _kind(gpu), params.train, _configuration(params)
    lengths = [] if dataset is None else lengths_of(training_sequences(dataset / "train.parquet", train))
    longest = max(train.packed_length if train.packing else 0, *(lengths or [params.prepare.max_length]))
    try:
        counts = count(config, train)
    except UnplannedError as error:
        raise PlanError(
            f"a step of {error} cannot be planned; train without a plan: what does not fit is retried in smaller pieces"
        ) from None
    per_step = sequences_per_step(train, sum(lengths) / len(lengths) if lengths else params.prepare.max_length)
    rows = 1 if train.per_device_train_batch_size == "auto" else int(train.per_device_train_batch_size)
    if kind is not None and train.per_device_train_batch_size == "auto":
        rows = micro_batch(counts, train, per_step, longest, kind.room)
    memory = step_memory(counts, train, rows, longest, on_gpu=kind is not None)
    sharded = train.strategy in ("fsdp", "deepspeed")  # of which a GPU holds a part that only they know
    if kind is not None and memory.peak > kind.room and not sharded:
        raise PlanError(_too_large(config, counts, train, rows, longest, f"{gpu}", kind.room))
    flops = flops_per_token(counts, train, rows, longest)
    tokens = steps = seconds = cost = None
    if lengths:
        each_epoch = math.ceil(len(lengths) / (per_step * train.num_processes))
        steps = train.max_steps if train.max_steps > 0 else math.ceil(each_epoch * train.num_train_epochs)
        tokens = round(sum(lengths) * steps / each_epoch)
        if kind is not None:
            seconds = flops * tokens / (kind.bf16_tflops * 1e12 * kind.utilization) / train.num_processes
            cost = seconds / 3600 * kind.usd_per_hour * train.num_processes
    return Plan(
        counts.trainable, counts.parameters + (0 if train.method == "full" else counts.trainable), longest, rows,
        max(1, round(per_step / rows)), memory, flops, tokens, steps, gpu, seconds, cost,
        _evaluation(counts, params, kind), _merge(counts, params, kind),
    )  # fmt: skip


def describe(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    share = plan.trainable_parameters / plan.parameters
    sizes = [*zip(PARTS, astuple(plan.memory), strict=True), ("peak", plan.memory.peak)]
    lines = [
        f"parameters   {plan.parameters:,}, of which {plan.trainable_parameters:,} are trained ({share:.2%})",
        f"train        {plan.rows} × {plan.sequence_length:,} tokens at a time, {plan.accumulation} times a step",
        *(f"             {size / GIB:7.2f} GiB  {name}" for name, size in sizes),
        f"work         {plan.flops_per_token / 1e9:,.3g} GFLOP a token",
        "steps        not known before there is a dataset; `dvc repro prepare` makes it"
        if plan.steps is None
        else f"steps        {plan.steps:,}, {plan.tokens:,} tokens",
    ]
    if plan.seconds is not None:
        lines.append(f"time         about {clock(plan.seconds)} on a {plan.gpu}, {plan.cost_usd:,.2f} USD")
    return "\n".join([*lines, f"evaluate     {plan.evaluate}", f"merge        {plan.merge}"])


def _evaluation(counts: Counts, params: Params, kind: GpuKind | None) -> str:
    """What generation needs: the base in plain numbers if it fits, else in 4 bits, and prompts with their cache."""
    width, room = (4, math.inf) if kind is None else (2, kind.room)
    bases = [("in float32" if kind is None else "in bfloat16", counts.base * width)]
    if params.train.load_in_4bit:
        bases.append(("in 4 bits, several times as slow", weight_bytes(counts, params.train, on_gpu=kind is not None)))
    adapter = 0 if params.train.method == "full" else counts.trainable * width
    each = _prompt_bytes(counts, params.prepare.max_length + params.evaluate.max_new_tokens, width)
    most = params.evaluate.batch_size
    if most == "auto":  # as scoring/generation.py has it
        most = 64 if kind is None else 256
    for how, base in bases:
        if kind is None or base <= WEIGHTS_FRACTION * kind.memory_gib * GIB:
            prompts = max(1, int(min(most, (room - base - adapter) // each)))
            return f"{(base + adapter + prompts * each) / GIB:.2f} GiB: the base {how}, {prompts} prompts at a time"
    return _offloaded("base and adapter", bases[0][1] + adapter, kind)


def _merge(counts: Counts, params: Params, kind: GpuKind | None) -> str:
    """What merging needs: host memory for a shard, and the merged model for its proof."""
    if params.train.method in VIRTUAL_TOKENS:
        return f"not possible after train.method {params.train.method}"
    width = 4 if kind is None else 2
    merged, each = counts.base * width, _prompt_bytes(counts, params.prepare.max_length, width)
    proof = f"{(merged + each) / GIB:.2f} GiB"
    if kind is not None and merged > WEIGHTS_FRACTION * kind.memory_gib * GIB:
        proof = _offloaded("the merged model", merged, kind)
    return f"{min(SHARD_BYTES, merged) / GIB:.2f} GiB of host memory, shard by shard; its proof {proof}"


def _prompt_bytes(counts: Counts, length: int, width: int) -> int:
    """A sequence in generation: keys and values of every layer, the widest layer's numbers, and its last logits."""
    cache = 2 * counts.layers * counts.keys * width
    return length * (cache + width * 2 * counts.inner) + 4 * counts.head // counts.hidden


def _offloaded(what: str, size: int, kind: GpuKind | None) -> str:
    on_gpu = 0.0 if kind is None else WEIGHTS_FRACTION * kind.memory_gib
    return (
        f"{size / GIB:.2f} GiB: {what} by accelerate's device map, {on_gpu:.1f} GiB on the GPU, "
        f"{size / GIB - on_gpu:.1f} in host memory or on disk: slow"
    )


def _kind(name: str) -> GpuKind:
    known = TypeAdapter(dict[str, GpuKind]).validate_python(YAML(typ="safe").load(GPUS.read_text(encoding="utf-8")))
    if name not in known:
        raise PlanError(f"{name} is not a GPU of infra/gpus.yaml; it has {', '.join(known)}: add yours there")
    return known[name]


def _configuration(params: Params) -> PreTrainedConfig:
    name, revision = params.prepare.model_name_or_path, params.prepare.model_revision
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=params.prepare.trust_remote_code)
    except (OSError, ValueError) as error:
        raise PlanError(f"no model configuration could be read from {name}: {str(error).splitlines()[0]}") from None


def _too_large(
    config: PreTrainedConfig, counts: Counts, params: TrainParams, rows: int, length: int, name: str, room: float
) -> str:
    """The refusal, with the changes that would make the training fit, the cheapest in quality and time first."""
    memory = step_memory(counts, params, rows, length, on_gpu=True)
    sentence = f"this training needs {memory.peak / GIB:.1f} GiB; the {name} has {room / GIB:.1f} GiB available"
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1},
        {"method": "qlora", "load_in_4bit": True},
        {"optim": "paged_adamw_8bit"},
    ]
    params = params.model_copy(update={"per_device_train_batch_size": rows})
    would: list[str] = []
    for change, part in [*((each, 1) for each in changes), *(({}, n) for n in (2, 4, 8))]:
        new = {key: value for key, value in change.items() if getattr(params, key) != value}
        params = params.model_copy(update=new)
        would += [f"train.{key}: {str(value).lower()}" for key, value in new.items()]
        rows = int(params.per_device_train_batch_size)
        counts = count(config, params) if "method" in new else counts
        peak = step_memory(counts, params, rows, length // part, on_gpu=True).peak
        if peak <= room:
            shorter = "prepare.max_length and train.packed_length" if params.packing else "prepare.max_length"
            limit = [] if part == 1 else [f"{shorter} of {length // part} at most"]
            return f"{sentence}; with {' and '.join([*would, *limit])} it needs {peak / GIB:.1f}"
    return (
        f"{sentence}; no setting makes it fit (weights alone take {memory.weights / GIB:.1f}): choose a larger GPU of "
        "infra/gpus.yaml"
    )
