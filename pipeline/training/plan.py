"""Predicts memory, time and cost of training, evaluation and merge, from the parameters and the model's configuration.

No weights are read and no GPU is needed. A training that does not fit is refused, with the changes that save memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from ruamel.yaml import YAML
from transformers import PreTrainedConfig

from pipeline.chat.template import load_config, model_identity
from pipeline.core.combinations import VIRTUAL_TOKENS
from pipeline.core.progress import clock
from pipeline.params import Params, TrainParams
from pipeline.training import footprint
from pipeline.training.footprint import GIB, Counts, UnplannedError, count, step_memory
from pipeline.training.packing import lengths_of, training_sequences
from pipeline.weights.checkpoint import SHARD_BYTES

WEIGHTS_FRACTION = 0.9  # of a GPU's memory, for the weights of a model that is scored
GPUS = Path(__file__).parents[2] / "infra" / "gpus.yaml"
# Changes that save memory; the first cost least quality and time.
SAVING_CHANGES = {
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
    "method": "qlora",
    "load_in_4bit": True,
    "optim": "paged_adamw_8bit",
}


class PlanError(ValueError):
    """The training does not fit, or the GPU is unknown; the message says what to change."""


@checked(config=ConfigDict(extra="forbid", frozen=True))
class GpuKind:
    """An entry of infra/gpus.yaml."""

    memory_gib: float
    bf16_tflops: float  # dense
    usd_per_hour: float
    utilization: float  # fraction of bf16_tflops that adapter training reaches

    @property
    def usable(self) -> float:
        """Bytes that a process can use."""
        return self.memory_gib * GIB * footprint.FREE_FRACTION


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
    evaluate: str  # memory that the later stages need
    merge: str


def plan(params: Params, dataset: Path | None = None, gpu: str | None = None) -> Plan:
    """Plan a run on the GPU of infra/gpus.yaml that `gpu` names, or on a CPU; raises PlanError or TemplateError.

    `dataset`, the prepare stage's output, gives the number of steps and the longest row. None plans one step with rows
    of `prepare.max_length` tokens.
    """
    gpu, kind = (None, None) if gpu is None else find_gpu(gpu)
    train, base = params.train, params.prepare
    if not Path(base.model_name_or_path).is_dir():  # of a folder, it would read all weights
        model_identity(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    source = {"name_or_path": base.model_name_or_path, "revision": base.model_revision}
    config = load_config(source | {"trust_remote_code": base.trust_remote_code})
    lengths = [] if dataset is None else lengths_of(training_sequences(dataset / "train.parquet", train))
    longest = max(lengths or [base.max_length, train.packed_length if train.packing else 0])
    try:
        counts = count(config, train)
    except UnplannedError as error:
        raise PlanError(
            f"training {error} cannot be planned; train without a plan: a batch that does not fit is split and retried"
        ) from None
    size = 0 if kind is None else int(kind.memory_gib * GIB)
    device = footprint.Gpu(gpu, size, size) if gpu else None
    rows, accumulation = footprint.choose_batches(train, counts, device, lengths or [longest])
    memory = step_memory(counts, train, rows, longest, on_gpu=kind is not None)
    if kind is not None and memory["peak"] > kind.usable and train.strategy not in footprint.SHARDED:
        raise PlanError(
            f"this training needs {memory['peak'] / GIB:.1f} GiB; the {gpu} has {kind.usable / GIB:.1f} GiB available; "
            f"{_advise(config, train, rows, longest, kind)}"
        )
    flops = footprint.flops_per_token(counts, train, rows, longest)
    tokens = steps = seconds = cost = None
    if lengths:
        epoch_steps = math.ceil(len(lengths) / (rows * accumulation * train.num_processes))
        steps = train.max_steps if train.max_steps > 0 else math.ceil(epoch_steps * train.num_train_epochs)
        tokens = round(sum(lengths) * steps / epoch_steps)
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
    steps = "not known without a dataset; run `dvc repro prepare`"
    if plan.steps is not None:
        steps = f"{plan.steps:,}, {plan.tokens:,} tokens"
    lines = [
        f"parameters   {plan.parameters:,}, of which {plan.trainable_parameters:,} are trained ({share:.2%})",
        f"train        {plan.rows} × {plan.sequence_length:,} tokens at a time, {plan.accumulation} times per step",
        *(f"             {size / GIB:7.2f} GiB  {name}" for name, size in plan.memory.items()),
        f"work         {plan.flops_per_token / 1e9:,.3g} GFLOP per token",
        f"steps        {steps}",
    ]
    if plan.seconds is not None:
        lines.append(f"time         about {clock(plan.seconds)} on a {plan.gpu}, {plan.cost_usd:,.2f} USD")
    return "\n".join([*lines, f"evaluate     {plan.evaluate}", f"merge        {plan.merge}"])


def find_gpu(text: str) -> tuple[str, GpuKind]:
    """Name and entry of the GPU called `text`, else of the only one whose name contains it; case does not count."""
    known = TypeAdapter(dict[str, GpuKind]).validate_python(YAML(typ="safe").load(GPUS.read_text(encoding="utf-8")))
    matches = [name for name in known if text.casefold() in name.casefold()]
    names = [name for name in matches if text.casefold() == name.casefold()] or matches
    if len(names) != 1:
        problem = f"fits {' and '.join(names)}" if names else "is not a GPU"
        raise PlanError(f"{text} {problem} in infra/gpus.yaml, which has {', '.join(known)}; name one, or add yours")
    return names[0], known[names[0]]


def _later_stages(counts: Counts, params: Params, kind: GpuKind | None) -> tuple[str, str]:
    """The memory that evaluation and merge need; weights that do not fit are loaded in 4 bits or by a device map."""
    train, width = params.train, 4 if kind is None else 2
    full_bytes, bytes_in_4_bits = counts.parameters * width, footprint.weight_bytes(counts, train, kind is not None)
    available = math.inf if kind is None else WEIGHTS_FRACTION * kind.memory_gib * GIB
    full = f"{full_bytes / GIB:.2f} GiB in {'float32' if kind is None else 'bfloat16'}"
    if full_bytes > available:
        full += ", by accelerate's device map, partly in host memory or on disk: slow"
    in_4_bits = full_bytes > available and train.load_in_4bit and bytes_in_4_bits <= available
    base = f"{bytes_in_4_bits / GIB:.2f} GiB in 4 bits, several times as slow" if in_4_bits else full
    # Keys and values of a prompt and its answer, the activations of the widest layer, and the last logits.
    answer = params.evaluate.max_new_tokens
    length = params.prepare.max_length + (0 if answer == "auto" else answer)  # rows of max_length have their answer
    values_per_token = counts.layers * counts.key_width + counts.feedforward_width
    prompt = length * 2 * width * values_per_token + 4 * counts.head // counts.hidden
    merge = f"{min(SHARD_BYTES, full_bytes) / GIB:.2f} GiB of host memory, shard by shard; the merged model {full}"
    if train.method in VIRTUAL_TOKENS:
        merge = f"not possible after train.method {train.method}"
    return f"the base, {base}; {prompt / 2**20:.1f} MiB for each prompt at a time", merge


def _advise(config: PreTrainedConfig, train: TrainParams, rows: int, length: int, kind: GpuKind) -> str:
    """What to change so that the training fits; `rows` is the planned micro-batch."""
    planned = vars(train) | {"per_device_train_batch_size": rows}
    changes = [f"train.{key}: {str(value).lower()}" for key, value in SAVING_CHANGES.items() if planned[key] != value]
    saving = train.model_copy(update=SAVING_CHANGES)
    least = step_memory(count(config, saving), saving, 1, length, on_gpu=True)["peak"]
    advice = f"with {' and '.join(changes)} it needs {least / GIB:.1f}" if changes else "no parameter saves more"
    lengths = "prepare.max_length and train.packed_length" if train.packing else "prepare.max_length"
    return advice if least <= kind.usable else f"{advice}; lower {lengths}, or use a larger GPU"
