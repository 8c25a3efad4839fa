"""plan: what training, evaluation and merge will take, from parameters and the model's configuration alone.

No weights are read and no GPU is needed. A training that cannot fit is refused, with the changes that save memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from ruamel.yaml import YAML
from transformers import AutoConfig, PreTrainedConfig

from pipeline.core.combinations import VIRTUAL_TOKENS
from pipeline.core.progress import clock
from pipeline.params import Params, TrainParams
from pipeline.training.footprint import (
    FREE_FRACTION,
    GIB,
    SHARDED,
    Counts,
    Gpu,
    UnplannedError,
    batches,
    count,
    flops_per_token,
    step_memory,
    weight_bytes,
)
from pipeline.training.packing import lengths_of, training_sequences
from pipeline.weights.checkpoint import SHARD_BYTES

WEIGHTS_FRACTION = 0.9  # of a GPU, for the weights of a model that is scored
GPUS = Path(__file__).parents[2] / "infra" / "gpus.yaml"
# What saves memory, the cheapest in quality and time first.
SAVING = {
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
    "method": "qlora",
    "load_in_4bit": True,
    "optim": "paged_adamw_8bit",
}


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
    memory: dict[str, int]  # bytes, see `step_memory`
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
    kind, train, config = None if gpu is None else gpu_kind(gpu), params.train, _configuration(params)
    lengths = [] if dataset is None else lengths_of(training_sequences(dataset / "train.parquet", train))
    longest = max(lengths or [params.prepare.max_length, train.packed_length if train.packing else 0])
    try:
        counts = count(config, train)
    except UnplannedError as error:
        raise PlanError(
            f"a step of {error} cannot be planned; train without a plan: what does not fit is retried in smaller pieces"
        ) from None
    size = 0 if kind is None else int(kind.memory_gib * GIB)
    rows, accumulation = batches(train, counts, Gpu(gpu, size, size) if gpu else None, lengths or [longest])
    memory = step_memory(counts, train, rows, longest, on_gpu=kind is not None)
    if kind is not None and memory["peak"] > kind.room and train.strategy not in SHARDED:
        raise PlanError(
            f"this training needs {memory['peak'] / GIB:.1f} GiB; the {gpu} has {kind.room / GIB:.1f} GiB available; "
            f"{_ways_out(config, train, rows, longest, kind)}"
        )
    flops = flops_per_token(counts, train, rows, longest)
    tokens = steps = seconds = cost = None
    if lengths:
        each_epoch = math.ceil(len(lengths) / (rows * accumulation * train.num_processes))
        steps = train.max_steps if train.max_steps > 0 else math.ceil(each_epoch * train.num_train_epochs)
        tokens = round(sum(lengths) * steps / each_epoch)
        if kind is not None:
            seconds = flops * tokens / (kind.bf16_tflops * 1e12 * kind.utilization) / train.num_processes
            cost = seconds / 3600 * kind.usd_per_hour * train.num_processes
    return Plan(
        counts.trainable, counts.parameters + (0 if train.method == "full" else counts.trainable), longest, rows,
        accumulation, memory, flops, tokens, steps, gpu, seconds, cost, *_later_stages(counts, params, kind),
    )  # fmt: skip


def describe(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    share = plan.trainable_parameters / plan.parameters
    steps = "not known before there is a dataset; `dvc repro prepare` makes it"
    if plan.steps is not None:
        steps = f"{plan.steps:,}, {plan.tokens:,} tokens"
    lines = [
        f"parameters   {plan.parameters:,}, of which {plan.trainable_parameters:,} are trained ({share:.2%})",
        f"train        {plan.rows} × {plan.sequence_length:,} tokens at a time, {plan.accumulation} times a step",
        *(f"             {size / GIB:7.2f} GiB  {name}" for name, size in plan.memory.items()),
        f"work         {plan.flops_per_token / 1e9:,.3g} GFLOP a token",
        f"steps        {steps}",
    ]
    if plan.seconds is not None:
        lines.append(f"time         about {clock(plan.seconds)} on a {plan.gpu}, {plan.cost_usd:,.2f} USD")
    return "\n".join([*lines, f"evaluate     {plan.evaluate}", f"merge        {plan.merge}"])


def gpu_kind(name: str) -> GpuKind:
    known = TypeAdapter(dict[str, GpuKind]).validate_python(YAML(typ="safe").load(GPUS.read_text(encoding="utf-8")))
    if name not in known:
        raise PlanError(f"{name} is not a GPU of infra/gpus.yaml; it has {', '.join(known)}: add yours there")
    return known[name]


def _later_stages(counts: Counts, params: Params, kind: GpuKind | None) -> tuple[str, str]:
    """What evaluation and merge need: the weights in plain numbers if they fit, in 4 bits, or through a device map."""
    train, width = params.train, 4 if kind is None else 2
    plain, packed = counts.parameters * width, weight_bytes(counts, train, on_gpu=kind is not None)
    room = math.inf if kind is None else WEIGHTS_FRACTION * kind.memory_gib * GIB
    whole = f"{plain / GIB:.2f} GiB in {'float32' if kind is None else 'bfloat16'}"
    if plain > room:
        whole += ", by accelerate's device map, partly in host memory or on disk: slow"
    in_4_bits = plain > room and train.load_in_4bit and packed <= room
    base = f"{packed / GIB:.2f} GiB in 4 bits, several times as slow" if in_4_bits else whole
    # Keys and values of a prompt and its answer, the widest layer's numbers, and the last logits.
    length = params.prepare.max_length + params.evaluate.max_new_tokens
    prompt = length * 2 * width * (counts.layers * counts.keys + counts.inner) + 4 * counts.head // counts.hidden
    merge = f"{min(SHARD_BYTES, plain) / GIB:.2f} GiB of host memory, shard by shard; the merged model {whole}"
    if train.method in VIRTUAL_TOKENS:
        merge = f"not possible after train.method {train.method}"
    return f"the base, {base}; {prompt / 2**20:.1f} MiB for each prompt at a time", merge


def _configuration(params: Params) -> PreTrainedConfig:
    name, revision = params.prepare.model_name_or_path, params.prepare.model_revision
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=params.prepare.trust_remote_code)
    except (OSError, ValueError) as error:
        raise PlanError(f"no model configuration could be read from {name}: {str(error).splitlines()[0]}") from None


def _ways_out(config: PreTrainedConfig, train: TrainParams, rows: int, length: int, kind: GpuKind) -> str:
    """What the training would take with everything that saves memory; `rows` are what `auto` came to."""
    used = vars(train) | {"per_device_train_batch_size": rows}
    changes = [f"train.{key}: {str(value).lower()}" for key, value in SAVING.items() if used[key] != value]
    saving = train.model_copy(update=SAVING)
    least = step_memory(count(config, saving), saving, 1, length, on_gpu=True)["peak"]
    needed = f"with {' and '.join(changes)} it needs {least / GIB:.1f}" if changes else "nothing saves more"
    shorter = "prepare.max_length and train.packed_length" if train.packing else "prepare.max_length"
    return needed if least <= kind.room else f"{needed}; lower {shorter}, or take a larger GPU"
