"""`make bench-train`: tokens a second of `train` next to `trl sft` with its defaults: same rows, model, loss, adapter.

Both read the tokenised rows of the last `prepare`, take learning rate, schedule and epochs from `params.yaml` and see
every row as often. TRL keeps what it chooses for speed (8 padded rows a batch, gradient checkpointing, bfloat16).
Quality is the validation loss of each adapter, computed by the same code.
"""

import json
import os
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
from tests.bench.measuring import TRL_LORA, header, row

EPOCHS = 2
ROUNDS = 2  # in turns; the better one of each counts, the other was disturbed more
TRL_BATCH = 8  # rows


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        dataset, validation = _subset(Path("artifacts/dataset"), Path(folder), rows)
        tokens = sum(map(len, pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()))
        # As many tokens a step as TRL's batch has on average, so both take as many steps; rows longer than that whole.
        line = TRL_BATCH * tokens // rows
        settings = {"packed_length": line, "tokens_per_step": line, "num_train_epochs": EPOCHS, "num_threads": "auto"}
        params = load_params().train.model_copy(update=settings)
        speeds = {"trl": 0.0, "retune": 0.0}
        for _ in range(ROUNDS):
            speeds["trl"] = max(speeds["trl"], EPOCHS * tokens / _with_trl(params, dataset, Path(folder)))
            done = train(params, dataset, Path(folder) / "retune", Path(folder) / "checkpoints")
            speeds["retune"] = max(speeds["retune"], done.tokens_per_second)
        losses = {name: _loss(params, dataset, validation, Path(folder) / name) for name in speeds}
    header(f"{rows} rows, {EPOCHS} epochs, {os.cpu_count()} cores", "real tokens/s", "validation loss")
    row("`trl sft`, its defaults", f"{speeds['trl']:,.0f}", f"{losses['trl']:.4f}")
    row("Retune", f"{speeds['retune']:,.0f}", f"{losses['retune']:.4f}")
    print(f"\n{speeds['retune'] / speeds['trl']:.2f} times as fast (bar: 2.3)")


def _subset(source: Path, folder: Path, rows: int) -> tuple[Path, Path]:
    """The first `rows` of the dataset without validation, which TRL's speed does not have either; and its file."""
    dataset, validation = folder / "dataset", folder / "validation.parquet"
    dataset.mkdir()
    (dataset / "contract.json").write_bytes((source / "contract.json").read_bytes())
    pq.write_table(pq.read_table(source / "train.parquet").slice(0, rows), dataset / "train.parquet")
    pq.write_table(pq.read_table(source / "validation.parquet"), validation)
    pq.write_table(pq.read_table(validation).slice(0, 0), dataset / "validation.parquet")
    return dataset, validation


def _with_trl(params: TrainParams, dataset: Path, folder: Path) -> float:
    """Seconds of its training loop."""
    rows, result = folder / "rows", folder / "result.json"
    rows.mkdir(exist_ok=True)
    pq.write_table(pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]), rows / "train.parquet")
    command: list[Any] = [sys.executable, "-m", "tests.bench.measuring", result, "--dataset_name", rows, *TRL_LORA]
    command += ["--model_name_or_path", read_json(dataset / "contract.json")["model"]["name_or_path"]]
    command += ["--lora_r", params.lora_r, "--lora_alpha", params.lora_alpha, "--lora_dropout", params.lora_dropout]
    command += ["--learning_rate", params.learning_rate, "--lr_scheduler_type", params.lr_scheduler_type]
    command += ["--warmup_steps", params.warmup_ratio, "--num_train_epochs", EPOCHS, "--seed", params.seed]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(rows)}
    environment.pop("OMP_NUM_THREADS", None)  # its default is all cores
    subprocess.run([*map(str, command), "--output_dir", str(folder / "trl")], env=environment, check=True)
    return float(json.loads(result.read_text())["seconds"])


@torch.no_grad()
def _loss(params: TrainParams, dataset: Path, validation: Path, adapter: Path) -> float:
    """Nats a trained token, row by row, in float32."""
    model = load_adapter(load_base(read_json(dataset / "contract.json")["model"], quantisation_of(params)), adapter)
    nats, tokens = 0.0, 0
    for sequence in training_sequences(validation, params.model_copy(update={"packing": False})):
        batch = Collate(0, packed=False)([sequence])
        count = int((batch["labels"][:, 1:] != -100).sum())
        nats += count * float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        tokens += count
    return nats / tokens


if __name__ == "__main__":
    main()
