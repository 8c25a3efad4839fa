"""train: a dataset and its base model in, a (Q)LoRA adapter out, through TRL's SFTTrainer.

The base is quantised to NF4 as it is loaded, on a GPU or a CPU. Loss is on the tokens that prepare labelled. A killed
run goes on from its last checkpoint; checkpoints lie under a hash of everything that shapes the result, so a run never
continues another one. `training/` holds the parts.
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
from transformers import AutoConfig, PrinterCallback, set_seed
from trl import SFTConfig

from pipeline.chat.template import load_contract
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import WORK_DIR, read_json, sha256_file, whole_directory, write_json
from pipeline.core.sanitise import clean_folder, portable
from pipeline.core.vetting import check_settings
from pipeline.data.classes import load_classes
from pipeline.params import TrainParams
from pipeline.training.attention import require_isolation, use_packed_attention
from pipeline.training.checkpoints import last_checkpoint, open_run, versions
from pipeline.training.classifier import ClassCollate, ClassTrainer, class_sequences
from pipeline.training.footprint import Gpu, UnplannedError, batches, count
from pipeline.training.gradients import require_gradients
from pipeline.training.hardware import require_kernels, use_liger
from pipeline.training.launch import launch, run_one
from pipeline.training.methods import AllocateRanks, adapter_config, require_context, settings_of
from pipeline.training.packing import Collate, lengths_of, training_sequences
from pipeline.training.sharding import shard_on_cpus
from pipeline.training.targets import describe_experts
from pipeline.training.trainer import AdapterTrainer
from pipeline.training.warm_start import check_init, load_init
from pipeline.training.watching import LOSS, SPEED, Interrupted, TrainError, Watch, write_table
from pipeline.weights.loading import compute_dtype, load_base, sort_sets, use_free_cores, use_threads

QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
RECORDED = ("steps", "shipped_step", "loss", "validation_loss", "trainable_parameters")


@dataclass(frozen=True)
class Trained:
    """What a training reports."""

    steps: int
    shipped_step: int  # whose weights the adapter has: with early stopping the best one, else the last
    loss: float  # nats a trained token, mean over up to logging_steps steps before and with the shipped one
    validation_loss: float | None  # after the shipped step
    trainable_parameters: int
    tokens_per_second: float  # real tokens, padding not counted; of all processes, resumed steps not counted
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
    """Train an adapter on `dataset` and write it to `output` as PEFT saves it (safetensors), with the tokenizer.

    Beside it: `contract.json` (copied from the dataset), `training.json` (resolved parameters, versions, final losses)
    and `loss.csv` (step, loss in nats a token, validation loss, learning rate, gradient norm, weight change) for
    `dvc plots`. What differs between two equal runs (speed, memory, retries) goes to the folder `tables`.

    Args:
        init: the folder of an adapter whose weights this one starts with.

    Raises:
        InitError, MethodError, TemplateError, ModelError: adapter, target modules or base are not what they should be.
        TrainError: a loss of NaN or one that jumps, a layer that passes no gradient, an adapter that did not change.
        HardwareError, OutOfMemory: a kernel or memory is asked for that this machine does not have.
        Interrupted: SIGTERM, or max_hours is spent; a checkpoint was saved.
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
    batch = _batches(params, contract["model"], lengths_of(train_rows))
    model, adapter = _model(params, contract, init)
    folder = open_run(params, dataset, checkpoints, init)
    sources = pq.read_table(dataset / "train.parquet", columns=["source"]).column("source").to_pylist()
    used = _use_fast_paths(params, model, train_rows)
    trainer = _trainer(
        params, init, adapter, model=model, watch=Watch(params, sources), args=_arguments(params, folder, *batch),
        train_dataset=train_rows, eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=tokenizer,
        data_collator=ClassCollate(tokenizer) if labels else Collate(tokenizer.pad_token_id, params.packing),
    )  # fmt: skip
    _say(
        f"attention: {used['attention']} · loss: {trainer.loss_used} · layers: {used['layers']} · {batch[0]} × "
        f"{batch[1]} sequences a step"
    )
    trained = _run(trainer, params, folder)
    used |= {"micro_batch": batch[0], "threads": threads, "resumed_from_step": trained.resumed_from_step}
    _write(trainer, output, portable(contract), portable(_record(params, contract, trained, init)), tables, used)
    return trained


def _say(line: str) -> None:
    print(f"train · {line}", flush=True)


def _model(params: TrainParams, contract: dict[str, Any], init: Path | None) -> tuple[Any, PeftConfig | None]:
    """The base as it is trained on, and the adapter to put on it."""
    attention = None if params.attn_implementation == "auto" else params.attn_implementation
    model = load_base(contract["model"], quantisation_of(params), contract.get("labels"), attention)
    if params.method == "full":
        model.float()  # the weights that are updated; on a GPU autocast computes in bfloat16
    require_context(params, model.config, contract["max_length"])
    adapter = adapter_config(params, model)
    if line := describe_experts(params, model):
        _say(line)
    if init is not None and adapter is not None:
        check_init(init, contract, adapter)
    return model, adapter


def _use_fast_paths(params: TrainParams, model: Any, rows: Dataset) -> dict[str, Any]:
    """Give `model` the fastest attention and layers that change nothing; says which it has."""
    attention = model.config._attn_implementation
    if params.packing and params.task != CLASSIFICATION:
        require_isolation(model, rows)
        if params.attn_implementation == "auto":
            attention = use_packed_attention(model, rows)
    return {"attention": attention, "layers": use_liger(model, params)}


def _trainer(params: TrainParams, init: Path | None, adapter: PeftConfig | None, **settings: Any) -> AdapterTrainer:
    """The trainer with its adapter, new or with the weights of the one in `init`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT 0.21 asks transformers by the old name
        kind = ClassTrainer if params.task == CLASSIFICATION else AdapterTrainer
        trainer: AdapterTrainer = kind(peft_config=adapter, **settings)
    if params.strategy == "fsdp" and not torch.cuda.is_available():
        shard_on_cpus(trainer)
    if adapter is not None:
        check_settings(settings_of(trainer.model), "this training's adapter")
    if params.method == "adalora":
        trainer.add_callback(AllocateRanks(trainer.model.base_model))
    if compute_dtype() is not torch.bfloat16:
        # TRL makes adapters of quantised models bfloat16, as QLoRA does on GPUs; a CPU gains no speed by it and
        # loses the small updates, and float16's loss scale wants float32.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if init is not None:
        load_init(trainer.model, init)
        _say(f"the adapter starts from {init}")
    # The trainer's own printer of raw dictionaries; `watch` prints lines people read.
    trainer.pop_callback(PrinterCallback)
    return trainer


def _run(trainer: AdapterTrainer, params: TrainParams, folder: Path) -> Trained:
    """Train to the end, from the last checkpoint in `folder` if there is one; the model has the weights that ship."""
    watch, trainable = trainer.watch, sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    require_gradients(trainer)
    watch.remember_start(trainer.model)
    start = last_checkpoint(folder)
    resumed = int(start.name.split("-")[1]) if start else 0
    if start:
        _say(f"going on from step {resumed} ({start})")
        trainer.go_on_from(start)
    with watch:
        # Killed after its last step, it has nothing left to train; the loop would take a step more.
        if start is None or not trainer.is_finished(start):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    step = trainer.state.global_step
    if (watch.interrupted or watch.out_of_time) and step < trainer.state.max_steps:
        why = "by a signal" if watch.interrupted else f"after train.max_hours ({params.max_hours})"
        raise Interrupted(f"stopped {why} at step {step}; the next run goes on from there")
    shipped = trainer.load_best()
    if not any(watch.changes(trainer.model).values()):
        raise TrainError(
            f"the adapter did not change in {step} steps; with very few of them set train.warmup_ratio to 0, else no "
            "gradient reached it"
        )
    return Trained(
        steps=step,
        shipped_step=shipped,
        loss=watch.row(shipped)["loss"],
        validation_loss=watch.row(shipped).get("validation_loss"),
        trainable_parameters=trainable,
        tokens_per_second=watch.tokens / max(watch.seconds, 1e-9),
        resumed_from_step=resumed,
    )


def _write(
    trainer: AdapterTrainer, output: Path, contract: Any, record: Any, tables: Path | None, used: dict[str, Any]
) -> None:
    """The adapter's folder, the same files for two equal trainings, and `tables` with what differs from run to run."""
    trainer.accelerator.wait_for_everyone()  # nobody reads a checkpoint any more: the first process removes them
    if not trainer.is_world_process_zero():
        trainer.save_model()  # of a sharded model every process gives its part
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
            used |= {"memory": [vars(rung) for rung in trainer.rungs[1:]]}
            with whole_directory(tables) as folder:
                write_table(folder / "speed.csv", SPEED, trainer.watch.speed_rows)
                write_json(folder / "run.json", used | {"earlier_seconds": trainer.watch.earlier_seconds})
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def quantisation_of(params: TrainParams) -> dict[str, Any]:
    """How the base is loaded for training; the storage dtype changes no value, so no later stage needs it."""
    storage = {"bnb_4bit_quant_storage": params.bnb_4bit_quant_storage} if params.strategy == "fsdp" else {}
    return {key: getattr(params, key) for key in QUANTISATION} | storage


def _batches(params: TrainParams, base: dict[str, Any], lengths: list[int]) -> tuple[int, int]:
    """Sequences of a micro-batch and micro-batches of a step; the same in every process."""
    card = counts = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        card = Gpu(torch.cuda.get_device_name(), total, free)
        if compute_dtype() is torch.float16:
            _say(f"the {card.name} has no bfloat16; computing in float16, with a scaled loss")
        config = AutoConfig.from_pretrained(
            base["name_or_path"], revision=base["revision"], trust_remote_code=base["trust_remote_code"]
        )
        try:
            counts = count(config, params)
        except UnplannedError as error:
            _say(f"the memory of {error} cannot be planned; one sequence at a time")
    rows, accumulation = batches(params, counts, card, lengths)
    if card is not None and params.strategy == "ddp":
        PartialState()
        fitting = sorted({*gather_object([rows])})
        if len(fitting) > 1:
            _say(f"the GPUs have room for {' and '.join(map(str, fitting))} sequences at a time; all take {fitting[0]}")
        rows, accumulation = fitting[0], accumulation * rows // fitting[0]
    return rows, accumulation


def _arguments(params: TrainParams, folder: Path, rows: int, accumulation: int) -> SFTConfig:
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_ratio,  # below 1 it is a fraction of all steps (transformers 5)
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        num_train_epochs=params.num_train_epochs,
        max_steps=params.max_steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        # prepare has tokenised, labelled and measured the rows, and `training_sequences` has packed them.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        padding_free=False,  # `Collate` does it, with the rows of a batch beside it
        # Unpacked rows of like length share a batch, so there is little padding.
        train_sampling_strategy="random" if params.packing else "group_by_length",
        max_length=None,
        activation_checkpointing=params.gradient_checkpointing,
        torch_compile=params.torch_compile,
        optim=params.optim,
        logging_strategy="no",  # `Watch` logs, and says when to validate
        eval_strategy="no",
        save_steps=params.save_steps,
        save_total_limit=2 if params.early_stopping_patience is None else 3,  # the best, and two to go on from
        seed=params.seed,
        bf16=compute_dtype() is torch.bfloat16,
        fp16=compute_dtype() is torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_nan_inf_filter=False,  # by default a NaN is logged as the mean of the steps before
        report_to="none",
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
