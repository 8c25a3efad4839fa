"""`make bench-train`: tokens a second of `train` beside `trl sft` with its defaults: same rows, model, loss, adapter.

Both read the tokenised rows of the last `prepare` (loss on the same labels), take learning rate, schedule and epochs
from `params.yaml` and see every row as often. TRL keeps what it chooses for speed (8 padded rows a batch, gradient
checkpointing, bfloat16). Speed is real tokens over the time of the training loop as each reports it; quality is the
validation loss of each adapter, computed by the same code.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipeline.core.files import read_json
from pipeline.params import TrainParams
from pipeline.settings import load_params
from pipeline.train import quantisation_of, train
from pipeline.training.packing import Collate, training_sequences
from pipeline.weights.loading import load_adapter, load_base

ROWS = 1200
EPOCHS = 2
ROUNDS = 2  # in turns; the better one of each counts, the other was disturbed more
TRL_BATCH = 8  # rows


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        dataset = _subset(Path("artifacts/dataset"), Path(folder) / "dataset", rows)
        lengths = list(map(len, pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()))
        tokens = EPOCHS * sum(lengths)
        # As many tokens a step as TRL's batch has on average, so both take as many steps; rows longer than that whole.
        settings = {
            "packed_length": TRL_BATCH * sum(lengths) // rows,
            "num_train_epochs": EPOCHS,
            "num_threads": "auto",
        }
        params = load_params().train.model_copy(update=settings)
        # The loop alone, as TRL's number has it: without validation.
        (dataset / "validation.parquet").rename(dataset / "later.parquet")
        _empty_like(dataset / "later.parquet", dataset / "validation.parquet")
        trl = own = 0.0
        for _ in range(ROUNDS):
            trl = max(trl, tokens / _with_trl(params, dataset, Path(folder) / "trl"))
            done = train(params, dataset, Path(folder) / "own", Path(folder) / "checkpoints")
            own = max(own, done.tokens_per_second)
        losses = {name: _validation_loss(params, dataset, Path(folder) / name) for name in ("trl", "own")}
    print(f"{rows} rows, {tokens:,} tokens in {EPOCHS} epochs, {os.cpu_count()} cores")
    print(f"trl sft, its defaults: {trl:8,.0f} real tokens/s, validation loss {losses['trl']:.4f}")
    print(f"retune:                {own:8,.0f} real tokens/s, validation loss {losses['own']:.4f}")
    print(f"{own / trl:.2f} times as fast (wanted: 2.3)")
    if own < 2.3 * trl or losses["own"] > losses["trl"] * 1.05:
        sys.exit("bench-train: slower than 2.3 times TRL's defaults, or a validation loss more than 5 % above its")


def _subset(source: Path, target: Path, rows: int) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    pq.write_table(pq.read_table(source / "train.parquet").slice(0, rows), target / "train.parquet")
    return target


def _empty_like(source: Path, target: Path) -> None:
    pq.write_table(pq.read_table(source).slice(0, 0), target)


def _with_trl(params: TrainParams, dataset: Path, output: Path) -> float:
    """Seconds of the training loop of `trl sft`."""
    rows = output.parent / "rows"
    rows.mkdir(exist_ok=True)
    pq.write_table(pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]), rows / "train.parquet")
    command: list[Any] = [Path(sys.executable).parent / "trl", "sft", "--dataset_name", rows, "--output_dir", output]
    command += ["--model_name_or_path", read_json(dataset / "contract.json")["model"]["name_or_path"]]
    command += ["--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "--lora_target_modules", "all-linear"]
    command += ["--lora_r", params.lora_r, "--lora_alpha", params.lora_alpha, "--lora_dropout", params.lora_dropout]
    command += ["--learning_rate", params.learning_rate, "--lr_scheduler_type", params.lr_scheduler_type]
    command += ["--warmup_steps", params.warmup_ratio, "--num_train_epochs", EPOCHS, "--seed", params.seed]
    command += ["--report_to", "none", "--save_strategy", "no"]
    command += [] if torch.cuda.is_available() else ["--use_cpu"]  # without it, bf16 (its default) finds no GPU
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(rows)}
    environment.pop("OMP_NUM_THREADS", None)  # its default is all cores
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    seconds = re.search(r"'train_runtime': '?([\d.]+)", done.stdout + done.stderr)
    if done.returncode or seconds is None:
        sys.exit(f"trl sft failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return float(seconds[1])


@torch.no_grad()
def _validation_loss(params: TrainParams, dataset: Path, adapter: Path) -> float:
    """Nats a trained token, row by row, in float32."""
    model = load_adapter(load_base(read_json(dataset / "contract.json")["model"], quantisation_of(params)), adapter)
    rows = training_sequences(dataset / "later.parquet", params.model_copy(update={"packing": False}))
    nats, tokens = 0.0, 0
    for row in rows:
        batch = Collate(0, packed=False)([row])
        count = int((batch["labels"][:, 1:] != -100).sum())
        nats += count * float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        tokens += count
    return nats / tokens


if __name__ == "__main__":
    main()
