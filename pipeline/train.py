"""train: a dataset and its base model in, an adapter out (or a model, with `full`), through TRL's SFTTrainer.

The base is quantised to NF4 as it is loaded, on a GPU or a CPU. Loss is on the tokens that prepare labelled. A killed
run goes on from its last checkpoint; checkpoints lie under a hash of everything that shapes the result, so a run never
continues another one.
"""

import csv
import math
import shutil
import signal
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, List, Value, concatenate_datasets
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from pipeline.chat.template import load_contract
from pipeline.classification import class_rows, class_trainer
from pipeline.data.classes import load_contract as load_classes
from pipeline.files import WORK_DIR, read_json, sha256_file, sha256_json, whole_directory, write_json
from pipeline.model import compute_dtype, load_base, use_free_cores, use_threads
from pipeline.params import TrainParams
from pipeline.progress import Progress
from pipeline.security.sanitise import clean_folder, portable
from pipeline.security.vetting import STATES, UnsafeModelError, check_checkpoint
from pipeline.training.combinations import CLASSIFICATION
from pipeline.training.methods import AllocateRanks, adapter_config, require_context, sort_sets
from pipeline.training.warm_start import check_init, load_init

QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


class TrainError(ValueError):
    """Training cannot start or did not finish; the message says why and what to change."""


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint was saved; the same command goes on from there."""


@dataclass(frozen=True)
class Trained:
    steps: int
    loss: float  # nats a trained token, mean over the last logging_steps
    validation_loss: float | None
    trainable_parameters: int
    tokens_per_second: float  # real tokens, padding not counted; of this process, resumed steps not counted
    resumed_from_step: int


def train(
    params: TrainParams,
    dataset: Path,
    output: Path,
    checkpoints: Path = WORK_DIR / "checkpoints",
    init: Path | None = None,
) -> Trained:
    """Train an adapter on `dataset` and write it to `output` as PEFT saves it (safetensors), with the tokenizer.

    Beside it: `contract.json` (copied from the dataset), `training.json` (resolved parameters, versions, final losses)
    and `loss.csv` (step, loss in nats a token, validation loss, learning rate, gradient norm) for `dvc plots`.

    Args:
        init: the folder of an adapter whose weights this one starts with.

    Raises:
        InitError: that adapter is of another base, method or other settings.
        TemplateError, ModelError: base model or tokenizer is not what the dataset was prepared for.
        MethodError: a target module that the model lacks.
        TrainError: a loss of NaN or infinity, or an adapter that did not change.
        Interrupted: SIGTERM; a checkpoint was saved.
    """
    contract = read_json(dataset / "contract.json")
    labels = contract.get("labels")  # of sequence classification
    if (labels is not None) != (params.task == CLASSIFICATION):
        raise TrainError(
            f"train.task is {params.task}, but the dataset was prepared for another task; run `dvc repro prepare`"
        )
    tokenizer = (load_classes if labels else load_contract)(contract).tokenizer
    threads = use_free_cores() if params.num_threads == "auto" else use_threads(params.num_threads)
    set_seed(params.seed)
    model = load_base(contract["model"], {key: getattr(params, key) for key in QUANTISATION}, labels)
    if params.method == "full":
        model.float()  # the weights that are updated; on a GPU autocast computes in bfloat16
    require_context(params, model.config, contract["max_length"])
    adapter = adapter_config(params, model)
    if init is not None and adapter is not None:
        check_init(init, contract, adapter)
    folder = checkpoints / run_key(params, dataset, init)
    train_rows, validation_rows = (
        class_rows(path, labels) if labels else training_sequences(path, params)
        for path in (dataset / "train.parquet", dataset / "validation.parquet")
    )
    watch = _Watch()
    trainer = (class_trainer if labels else SFTTrainer)(
        model=model,
        args=_arguments(params, folder, has_validation=len(validation_rows) > 0),
        train_dataset=train_rows,
        eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[watch],
    )
    if params.method == "adalora":
        trainer.add_callback(AllocateRanks(trainer.model.base_model))
    if not torch.cuda.is_available():
        # TRL makes adapters of quantised models bfloat16, as QLoRA does on GPUs; a CPU gains no speed by it and
        # loses the small updates.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if init is not None:
        load_init(trainer.model, init)
        print(f"train · the adapter starts from {init}", flush=True)
    # The trainer's own printer of raw dictionaries; `watch` prints lines people read.
    trainer.pop_callback(_printer(trainer))
    before = _adapter_norm(trainer.model)
    start = last_checkpoint(folder)
    resumed = int(start.name.split("-")[1]) if start else 0
    if start:
        print(f"train · going on from step {resumed} ({start})", flush=True)
    tokens = sum(len(ids) for ids in train_rows["input_ids"])
    with watch:
        result = trainer.train(resume_from_checkpoint=str(start) if start else None)
    if watch.interrupted:
        raise Interrupted(f"stopped by a signal at step {trainer.state.global_step}; the next run goes on from there")
    if not math.isfinite(result.training_loss):  # it came after the last logging step
        raise TrainError(f"the loss became {result.training_loss}; lower train.learning_rate or train.max_grad_norm")
    if _adapter_norm(trainer.model) == before:
        raise TrainError(
            f"the adapter did not change in {trainer.state.global_step} steps; with very few of them set "
            "train.warmup_ratio to 0, else no gradient reached it"
        )
    steps_here = trainer.state.global_step - resumed
    epochs_here = trainer.state.epoch * steps_here / max(trainer.state.global_step, 1)
    trained = Trained(
        steps=trainer.state.global_step,
        loss=next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), result.training_loss),
        validation_loss=next((e["eval_loss"] for e in reversed(trainer.state.log_history) if "eval_loss" in e), None),
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        tokens_per_second=tokens * epochs_here / max(watch.seconds, 1e-9),
        resumed_from_step=resumed,
    )
    with whole_directory(output) as whole:
        trainer.save_model(str(whole))
        (whole / "training_args.bin").unlink(missing_ok=True)  # a pickle; its content is in training.json
        if adapter is not None:
            sort_sets(whole / "adapter_config.json")
        tokenizer.save_pretrained(str(whole))
        clean_folder(whole)
        write_json(whole / "contract.json", portable(contract))
        write_json(whole / "training.json", portable(_record(params, contract, trained, threads, init)))
        _write_curve(whole / "loss.csv", trainer.state.log_history)
    shutil.rmtree(folder, ignore_errors=True)
    return trained


def run_key(params: TrainParams, dataset: Path, init: Path | None = None) -> str:
    """Hash of data, template contract (with the base model's digest), parameters, first weights, code and versions."""
    here = Path(__file__)
    code = (
        here,
        here.with_name("model.py"),
        here.with_name("classification.py"),
        *sorted(here.with_name("training").glob("*.py")),
    )
    return sha256_json(
        {
            "data": {p.name: sha256_file(p) for p in sorted(dataset.glob("*.parquet"))},
            "contract": read_json(dataset / "contract.json"),
            "params": params.model_dump(),
            "code": {p.name: sha256_file(p) for p in code},
            "versions": _versions(),
            "init": None if init is None else sha256_file(init / "adapter_model.safetensors"),
        }
    )[:24]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole; one that a kill cut short is named and passed over.

    Raises:
        UnsafeModelError: a whole one holds what no training saves; see `check_checkpoint`.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            state = read_json(checkpoint / "trainer_state.json")
            full = (checkpoint / "model.safetensors").exists()  # of train.method full
            with safe_open(checkpoint / f"{'' if full else 'adapter_'}model.safetensors", framework="pt") as file:
                whole = len(list(file.keys())) > 0 and state["global_step"] > 0
            if whole and all((checkpoint / name).stat().st_size > 0 for name in STATES):
                check_checkpoint(checkpoint)
                return checkpoint
        except UnsafeModelError:
            raise
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError):
            pass
        print(f"train · {checkpoint} is not whole; it is passed over", flush=True)
    return None


class _Watch(TrainerCallback):
    """Progress lines, a stop at a loss that is no number, and a checkpoint when SIGTERM comes."""

    def __init__(self) -> None:
        self.interrupted = False
        self.seconds = 0.0
        self.progress: Progress | None = None

    def __enter__(self) -> None:
        self.previous = signal.signal(signal.SIGTERM, self._on_signal)
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)
        self.seconds = time.monotonic() - self.started

    def _on_signal(self, *_: object) -> None:
        self.interrupted = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress = Progress("train", state.max_steps, "steps")
        self.progress.resume_at(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        assert self.progress is not None  # on_train_begin ran
        self.progress.update(state.global_step, f"loss {losses[-1]:.3f}" if losses else "")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not loss < float("inf"):
            raise TrainError(
                f"the loss is {loss} at step {state.global_step}; lower train.learning_rate or train.max_grad_norm"
            )


def training_sequences(path: Path, params: TrainParams) -> Dataset:
    """Rows as training sequences: one each, or packed to `packed_length`; `seq_lengths` keeps packed rows apart.

    TRL's own packing would cut a row longer than the sequence; here it is a sequence of its own.
    """
    rows = Dataset(pq.read_table(path, columns=["input_ids", "labels"]))
    if not params.packing or not len(rows):
        return rows
    lengths = [len(ids) for ids in rows["input_ids"]]
    short = rows.select([i for i, n in enumerate(lengths) if n <= params.packed_length]).shuffle(seed=params.seed)
    long = rows.select([i for i, n in enumerate(lengths) if n > params.packed_length])
    alone = [[n] for n in lengths if n > params.packed_length]
    parts = [pack_dataset(short, params.packed_length, "bfd")] if len(short) else []
    parts += [long.add_column("seq_lengths", alone, feature=List(Value("int32")))] if alone else []
    return concatenate_datasets(parts)


def _arguments(params: TrainParams, folder: Path, has_validation: bool) -> SFTConfig:
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
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        # prepare has tokenised, labelled and measured the rows, and `training_sequences` has packed them.
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=params.packing,
        max_length=None,
        gradient_checkpointing=params.gradient_checkpointing,
        optim=params.optim,
        logging_steps=params.logging_steps,
        eval_strategy="epoch" if has_validation else "no",
        save_steps=params.save_steps,
        save_total_limit=2,
        seed=params.seed,
        bf16=on_gpu and compute_dtype() is torch.bfloat16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_nan_inf_filter=False,  # by default a NaN is logged as the mean of the steps before
        report_to="none",
        disable_tqdm=True,
    )


def _printer(trainer: Any) -> TrainerCallback:
    return next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")


def _adapter_norm(model: torch.nn.Module) -> float:
    return sum(float(p.detach().double().norm()) for p in model.parameters() if p.requires_grad)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")}


def _record(
    params: TrainParams, contract: dict[str, Any], trained: Trained, threads: int, init: Path | None
) -> dict[str, Any]:
    return {
        "params": params.model_dump(),
        "quantisation": {key: getattr(params, key) for key in QUANTISATION},
        "base_model": contract["model"],
        "init_adapter_sha256": None if init is None else sha256_file(init / "adapter_model.safetensors"),
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {threads} threads",
        "steps": trained.steps,
        "loss": trained.loss,
        "validation_loss": trained.validation_loss,
        "trainable_parameters": trained.trainable_parameters,
    }


def _write_curve(path: Path, history: list[dict[str, Any]]) -> None:
    columns = {
        "loss": "loss",
        "eval_loss": "validation_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
    }
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        row = steps.setdefault(entry["step"], {"step": entry["step"]})
        row.update({columns[key]: entry[key] for key in columns if key in entry})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *columns.values()])
        writer.writeheader()
        writer.writerows(row for row in steps.values() if len(row) > 1)
