"""Trains classifiers: rows are a text and the number of a class, and the loss is a mean over rows.

Everything else (checkpoints, splitting batches when memory runs out, watching) is `AdapterTrainer`'s.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from pipeline.training.packing import Batch
from pipeline.training.trainer import AdapterTrainer


def class_sequences(path: Path, labels: Sequence[str]) -> Dataset:
    """The training sequences of a split: `input_ids`, `label` (the number of the class) and `rows`."""
    table = pq.read_table(path, columns=["input_ids", "label"])
    number = {name: i for i, name in enumerate(labels)}
    label_numbers = pa.array([number[name] for name in table["label"].to_pylist()], pa.int64())
    rows = pa.array([[row] for row in range(len(table))], pa.list_(pa.int64()))
    return Dataset(pa.table({"input_ids": table["input_ids"], "label": label_numbers, "rows": rows}))


class ClassCollate:
    """`input_ids` and `attention_mask` (B, T), `labels` and `rows` (B,)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.collate = DataCollatorWithPadding(tokenizer)

    def __call__(self, sequences: list[Batch]) -> Batch:
        batch = dict(self.collate([{"input_ids": s["input_ids"], "label": s["label"]} for s in sequences]))
        batch["rows"] = torch.tensor([sequence["rows"][0] for sequence in sequences])
        return batch


class ClassTrainer(AdapterTrainer):
    """`AdapterTrainer` over the batches of `ClassCollate`."""

    loss_description = "cross-entropy of classes"

    def __init__(self, *args: Any, **options: Any) -> None:
        # Decoders read the class at the last token that is not padding.
        options["model"].config.pad_token_id = options["processing_class"].pad_token_id
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = True  # makes transformers count the rows of a whole step

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rows = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        nats = torch.nn.functional.cross_entropy(outputs.logits.float(), inputs["labels"], reduction="sum")
        loss = nats / rows * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def count_targets(self, batch: Batch) -> int:
        return len(batch["labels"])
