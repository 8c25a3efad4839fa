"""The train stage: trains a (Q)LoRA adapter on the prepared dataset with TRL's SFTTrainer.

The base is quantised to NF4 as it is loaded, on a GPU or a CPU. The loss covers the tokens that prepare labelled. A
killed run continues from its last checkpoint; checkpoints are stored under a hash of everything that shapes the result,
so a run never continues a different one. The parts are in `training/`.
"""

import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from transformers import PrinterCallback, set_seed
from trl import SFTConfig

from pipeline.chat.template import load_config, load_contract
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import WORK_DIR, read_json, sha256_file, whole_directory, write_json
from pipeline.core.sanitise import clean_folder, portable
from pipeline.data.classes import load_classes
from pipeline.params import TrainParams
from pipeline.training import methods
from pipeline.training.attention import require_isolation, use_packed_attention
from pipeline.training.checkpoints import last_checkpoint, open_run, versions
from pipeline.training.footprint import Gpu, UnplannedError, choose_batches, count
from pipeline.training.hardware import require_kernels, use_liger
from pipeline.training.launch import launch, run_one
from pipeline.training.packing import ClassCollate, Collate, class_sequences, lengths_of, training_sequences
from pipeline.training.sharding import shard_on_cpus
from pipeline.training.targets import describe_experts
from pipeline.training.trainer import AdapterTrainer, ClassTrainer
from pipeline.training.watching import LOSS, SPEED, Interrupted, TrainError, Watch, say, write_table
from pipeline.weights.loading import PEFT_WARNINGS, compute_dtype, load_base, sort_sets, use_free_cores, use_threads

QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
RECORDED = ("steps", "shipped_step", "loss", "validation_loss", "trainable_parameters")


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    steps: int
    shipped_step: int  # the step of the saved weights: the best one with early stopping, else the last
    loss: float  # nats per trained token, a mean over up to logging_steps steps that end with the shipped one
    validation_loss: float | None  # after the shipped step
    trainable_parameters: int
    tokens_per_second: float  # of all processes, without padding and steps before the resume
    resumed_from_step: int


def train(
    params: TrainParams,
    dataset: Path,
    output: Path,
    checkpoints: Path = WORK_DIR / "checkpoints",
    *,
    tables: Path | None = None,
    init: Path | None = None,
) -> Trained:
    """Train an adapter on `dataset`, from the adapter in `init` if there is one, and save it in `output` as PEFT does.

    `output` also has the tokenizer, `contract.json` (the dataset's), `training.json` (resolved parameters, versions,
    final losses) and `loss.csv` (losses in nats per token, learning rate, gradient norm, weight change). Figures that
    differ between equal runs (speed, memory, retries) go to the folder `tables`.

    Raises:
        TemplateError, ModelError: template or base are refused.
        TrainError: modules, first adapter or machine are refused, the loss diverged, or the adapter did not change.
        OutOfMemory: out of memory with a single row and gradient checkpointing.
        Interrupted: SIGTERM, or max_hours is over; a checkpoint was saved.
    """
    if params.num_processes > 1 and "LOCAL_RANK" not in os.environ:
        folders = {"dataset": dataset, "output": output, "checkpoints": checkpoints, "tables": tables, "init": init}
        return Trained(**launch(params, **folders))
    contract = read_json(dataset / "contract.json")
    labels = contract.get("labels")  # of sequence classification
    if (labels is not None) != (params.task == CLASSIFICATION):
        raise TrainError(
            f"train.task is {params.task}, but the dataset was prepared for another task; run `dvc repro prepare`"
        )
    require_kernels(params, torch.cuda.is_available())
    tokenizer = (load_classes if labels else load_contract)(contract).tokenizer
    threads = use_free_cores() if params.num_threads == "auto" else use_threads(params.num_threads)
    set_seed(params.seed)
    train_rows, validation_rows = (
        class_sequences(path, labels) if labels else training_sequences(path, params)
        for path in (dataset / "train.parquet", dataset / "validation.parquet")
    )
    micro_batch, accumulation = _choose_batches(params, contract["model"], lengths_of(train_rows))
    model, adapter = _load_model(params, contract, init)
    folder = open_run(params, dataset, checkpoints, init)
    sources = pq.read_table(dataset / "train.parquet", columns=["source"])["source"].to_pylist()
    run = _use_fast_paths(params, model, train_rows)
    trainer = _make_trainer(
        params, contract, init, adapter, model=model, watch=Watch(params, sources),
        args=_arguments(params, folder, micro_batch, accumulation),
        train_dataset=train_rows, eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=tokenizer,
        data_collator=ClassCollate(tokenizer) if labels else Collate(tokenizer.pad_token_id, params.packing),
    )  # fmt: skip
    say(
        f"attention: {run['attention']} · loss: {trainer.loss_description} · layers: {run['layers']} · {micro_batch} × "
        f"{accumulation} sequences per step"
    )
    trained = _run(trainer, params, folder)
    run |= {"micro_batch": micro_batch, "threads": threads, "resumed_from_step": trained.resumed_from_step}
    _write(trainer, output, portable(contract), portable(_record(params, contract, trained, init)), tables, run)
    return trained


def _load_model(params: TrainParams, contract: dict[str, Any], init: Path | None) -> tuple[Any, PeftConfig | None]:
    """The base model and the configuration of its adapter."""
    attention = {} if params.attn_implementation == "auto" else {"attn_implementation": params.attn_implementation}
    model = load_base(contract["model"], quantisation_of(params), contract.get("labels"), **attention)
    if params.method == "full":
        model.float()  # weights are updated in float32; on a GPU autocast computes in bfloat16
    methods.require_room_for_virtual_tokens(params, model.config, contract["max_length"])
    adapter = methods.adapter_config(params, model)
    if line := describe_experts(params, model):
        say(line)
    if init is not None and adapter is not None:
        methods.check_init(init, contract, adapter)
    return model, adapter


def _use_fast_paths(params: TrainParams, model: Any, rows: Dataset) -> dict[str, Any]:
    """Give `model` the fastest attention and layers that change no result; returns which it has."""
    attention = model.config._attn_implementation
    if params.packing:
        require_isolation(model, rows)
        if params.attn_implementation == "auto":
            attention = use_packed_attention(model, rows)
    return {"attention": attention, "layers": use_liger(model, params)}


def _make_trainer(
    params: TrainParams, contract: dict[str, Any], init: Path | None, adapter: PeftConfig | None, **settings: Any
) -> AdapterTrainer:
    """The trainer, whose adapter is new or starts with the weights in `init`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_WARNINGS)
        trainer_class = ClassTrainer if params.task == CLASSIFICATION else AdapterTrainer
        trainer: AdapterTrainer = trainer_class(peft_config=adapter, **settings)
        if adapter is not None:
            methods.require_loadable(trainer.model, contract, Path(trainer.args.output_dir))
    if params.task != CLASSIFICATION:
        trainer.use_fused_head()
    if params.strategy == "fsdp" and not torch.cuda.is_available():
        shard_on_cpus(trainer)
    if params.method == "adalora":
        trainer.add_callback(methods.AllocateRanks(trainer.model.base_model))
    if compute_dtype() is not torch.bfloat16:
        # TRL casts adapters of quantised models to bfloat16, as QLoRA does on GPUs. A CPU gains no speed from it and
        # loses small updates, and the loss scale of float16 needs float32.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if init is not None:
        methods.load_init(trainer.model, init)
        say(f"the adapter starts from {init}")
    trainer.pop_callback(PrinterCallback)  # it prints raw dictionaries; `Watch` prints progress
    return trainer


def _run(trainer: AdapterTrainer, params: TrainParams, folder: Path) -> Trained:
    """Train, from the last checkpoint in `folder` if there is one; then the model has the weights to save."""
    watch, trainable = trainer.watch, trainer.get_num_trainable_parameters()
    methods.require_gradients(trainer)
    watch.remember_start(trainer.model)
    start = last_checkpoint(folder)
    resumed = int(start.name.split("-")[1]) if start else 0
    if start:
        say(f"continuing from step {resumed} ({start})")
        trainer.restore(start)
    with watch:
        # A run that was killed after its last step has nothing left to train; the loop would take one more step.
        if start is None or not trainer.is_finished(start):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    step = trainer.state.global_step
    if (watch.interrupted or watch.out_of_time) and step < trainer.state.max_steps:
        why = "by a signal" if watch.interrupted else f"after train.max_hours ({params.max_hours})"
        raise Interrupted(f"stopped {why} at step {step}; the next run continues from there")
    shipped = trainer.load_best()
    if not any(watch.changes(trainer.model).values()):
        raise TrainError(
            f"the adapter did not change in {step} steps; if these are very few, set train.warmup_ratio to 0, "
            "otherwise no gradient reached it"
        )
    row, speed = watch.row(shipped), watch.tokens / max(watch.seconds, 1e-9)
    return Trained(step, shipped, row["loss"], row.get("validation_loss"), trainable, speed, resumed)


def _write(
    trainer: AdapterTrainer, output: Path, contract: Any, record: Any, tables: Path | None, run: dict[str, Any]
) -> None:
    """Write the adapter's folder, which is the same in equal runs, and `tables`, which is not."""
    trainer.accelerator.wait_for_everyone()  # then no process reads checkpoints, and the first one deletes them
    if not trainer.is_world_process_zero():
        trainer.save_model()  # every process of a sharded model contributes its part
    else:
        with whole_directory(output) as folder:
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; its content is in training.json
            if (folder / "adapter_config.json").exists():
                sort_sets(folder)
            trainer.processing_class.save_pretrained(str(folder))
            clean_folder(folder)
            write_json(folder / "contract.json", contract)
            write_json(folder / "training.json", record)
            write_table(folder / "loss.csv", LOSS, trainer.watch.loss_rows)
        if tables is not None:
            run |= {"memory": [vars(fallback) for fallback in trainer.fallbacks[1:]]}
            with whole_directory(tables) as folder:
                write_table(folder / "speed.csv", SPEED, trainer.watch.speed_rows)
                write_json(folder / "run.json", run | {"earlier_seconds": trainer.watch.earlier_seconds})
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def quantisation_of(params: TrainParams) -> dict[str, Any]:
    """How training loads the base; later stages do not need the storage dtype, which changes no value."""
    storage = {"bnb_4bit_quant_storage": params.bnb_4bit_quant_storage} if params.strategy == "fsdp" else {}
    return {key: getattr(params, key) for key in QUANTISATION} | storage


def _choose_batches(params: TrainParams, base: dict[str, Any], lengths: list[int]) -> tuple[int, int]:
    """Sequences per micro-batch and micro-batches per step, the same in every process."""
    gpu = counts = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        gpu = Gpu(torch.cuda.get_device_name(), total, free)
        if compute_dtype() is torch.float16:
            say(f"the {gpu.name} has no bfloat16; computing in float16, with a scaled loss")
        try:
            counts = count(load_config(base), params)
        except UnplannedError as error:
            say(f"the memory for {error} cannot be planned; training one sequence at a time")
    rows, accumulation = choose_batches(params, counts, gpu, lengths)
    if gpu is not None and params.strategy == "ddp":
        PartialState()
        sizes = sorted({*gather_object([rows])})
        if len(sizes) > 1:
            say(f"the GPUs have room for {' and '.join(map(str, sizes))} sequences at a time; all take {sizes[0]}")
        rows, accumulation = sizes[0], accumulation * rows // sizes[0]
    return rows, accumulation


def _arguments(params: TrainParams, folder: Path, rows: int, accumulation: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_ratio,  # a value below 1 is a fraction of all steps (transformers 5)
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        num_train_epochs=params.num_train_epochs,
        max_steps=params.max_steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        # prepare has tokenised and labelled the rows, and `training_sequences` has packed them.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        # Unpacked rows of similar length share a batch, so there is little padding.
        train_sampling_strategy="random" if params.packing else "group_by_length",
        max_length=None,
        activation_checkpointing=params.gradient_checkpointing,
        torch_compile=params.torch_compile,
        router_aux_loss_coef=0.0,  # TRL's default adds a loss for balanced experts to that of the answers
        optim=params.optim,
        logging_strategy="no",  # `Watch` logs and decides when to validate
        save_steps=params.save_steps,
        save_total_limit=2 if params.early_stopping_patience is None else 3,  # the best and two others
        seed=params.seed,
        bf16=compute_dtype() is torch.bfloat16,
        fp16=compute_dtype() is torch.float16,
        use_cpu=not torch.cuda.is_available(),
        logging_nan_inf_filter=False,  # the default replaces a NaN by the mean of earlier steps
        disable_tqdm=True,
    )


def _record(params: TrainParams, contract: dict[str, Any], trained: Trained, init: Path | None) -> dict[str, Any]:
    return {
        "params": params.model_dump(),
        "quantisation": {key: getattr(params, key) for key in QUANTISATION},
        "base_model": contract["model"],
        "init_adapter_sha256": None if init is None else sha256_file(init / "adapter_model.safetensors"),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    } | {key: getattr(trained, key) for key in RECORDED}


if __name__ == "__main__":  # one of several processes
    sys.exit(run_one(sys.argv[1], train))
