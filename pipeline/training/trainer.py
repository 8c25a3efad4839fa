"""Extends TRL's SFTTrainer for long jobs: retries when memory runs out, checks of each step, sealed checkpoints.

The training loop, accumulation, clipping, optimiser and schedule are transformers'.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerState
from trl import SFTTrainer
from trl.trainer import add_fused_lm_head

from pipeline.core.files import read_json, write_json
from pipeline.core.memory import Fallback, OutOfMemory, free, out_of_memory
from pipeline.training.checkpoints import WATCH, find_problem, seal
from pipeline.training.packing import Batch, count_tokens, short_row, split_batch
from pipeline.training.sharding import ShardedTrainer
from pipeline.training.watching import TrainError, Watch, say, shortened


class AdapterTrainer(ShardedTrainer):
    """Trains on the batches of `Collate`, with a `Watch`."""

    def __init__(self, *args: Any, watch: Watch, **options: Any) -> None:
        super().__init__(*args, **options, callbacks=[watch])
        self.watch = watch
        self.fallbacks: list[Fallback] = [Fallback()]  # the last one applies
        self.micro_batches: list[Batch] = []  # of the current step
        self.uses_fused_head = False
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        epoch_steps = math.ceil(len(self.train_dataset) / rows)
        watch.eval_steps = None if self.eval_dataset is None else (watch.params.eval_steps or max(epoch_steps, 1))

    # --- loss ---

    @property
    def loss_description(self) -> str:
        return "TRL's fused head, in chunks" if self.uses_fused_head else "the model's own"

    def use_fused_head(self) -> None:
        """Let TRL's fused head compute the loss, if its probabilities are the model's own (ModernBERT's are not)."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_fused_lm_head(model)
        batch = self._prepare_inputs(self.data_collator([short_row(self.train_dataset)]))
        ids = batch["labels"] = batch["input_ids"]
        inputs = {key: value for key, value in batch.items() if key != "rows"}
        was_training = model.training
        # AttributeError: it does not find Llama 4's layers.
        with torch.no_grad(), self.compute_loss_context_manager(), suppress(AttributeError):
            fused = model.eval()(**inputs, fused_lm_head=True).log_probs
            logits = model(**{key: inputs[key] for key in inputs if key != "labels"}, use_cache=False).logits[:, :-1]
            expected = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            differs = (fused - expected).abs().mean() > 0.1 * expected.std()  # rounding is far below that
            self.uses_fused_head = not differs
        model.train(was_training)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the trained tokens of a step, from TRL's fused head, which never holds all logits.

        TRL's own method also measures entropy and accuracy, which nothing reads, and waits for the GPU to get them.
        """
        inputs = {key: value for key, value in inputs.items() if key != "rows"}
        if not self.uses_fused_head:
            return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        # `num_items_in_batch` counts the tokens of all processes, but their gradients are averaged.
        loss = -outputs.log_probs.sum() / tokens * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # nothing reads the sum, and counting visits every module for each micro-batch

    # --- a step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.micro_batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.started = 0  # micro-batches of this step
        return self.micro_batches, items

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        self.started += 1
        attempt = partial(self._train_micro_batch, model, inputs, num_items_in_batch)
        return self._retry_until_it_fits(inputs, attempt, partial(self._repeat_step, model, num_items_in_batch))

    def _train_micro_batch(self, model: Any, inputs: Batch, items: Any) -> torch.Tensor:
        train, pieces = super().training_step, split_batch(inputs, self.fallbacks[-1].pieces)
        loss = torch.stack([train(model, piece, items) for piece in pieces]).sum()
        self.watch.add(loss, count_tokens(inputs), inputs["rows"])
        return loss

    def _repeat_step(self, model: Any, items: Any) -> torch.Tensor:
        """Repeat the step up to this micro-batch, because a failed backward pass leaves partial gradients."""
        model.zero_grad()
        self.watch.begin_step()
        return [self._train_micro_batch(model, batch, items) for batch in self.micro_batches[: self.started]][-1]

    def _retry_until_it_fits(self, batch: Batch, attempt: Callable[[], Any], retry: Callable[[], Any]) -> Any:
        while True:
            try:
                return attempt()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._fall_back(batch, reason)
            attempt = retry

    def _fall_back(self, batch: Batch, reason: str) -> None:
        """Split batches into more pieces or turn on gradient checkpointing; raise OutOfMemory if neither is left."""
        step = self.state.global_step + 1
        if self.accelerator.num_processes > 1:
            raise OutOfMemory(
                f"out of memory at step {step} ({reason}); one of several processes cannot retry alone, so halve "
                "train.per_device_train_batch_size, double train.gradient_accumulation_steps, or set "
                "train.gradient_checkpointing to true"
            )
        current, rows = self.fallbacks[-1], len(batch["rows"])
        if current.pieces < rows:
            pieces = min(current.pieces * 2, rows)
            self.fallbacks.append(Fallback(step, pieces, current.gradient_checkpointing))
            how = f"in {pieces} pieces"
        elif current.gradient_checkpointing or self.args.activation_checkpointing:
            longest = max(map(count_tokens, split_batch(batch, rows)))
            raise OutOfMemory(
                f"out of memory at step {step} with one row of {longest} tokens and gradient checkpointing ({reason}); "
                "lower prepare.max_length or train.lora_r, set train.load_in_4bit to true, or use a machine with more "
                "memory (`retune plan` says how much)"
            )
        else:
            self.checkpoint_activations()
            self.fallbacks.append(Fallback(step, current.pieces, gradient_checkpointing=True))
            how = "with gradient checkpointing"
        say(f"out of memory at step {step}; retrying the same batch {how}")
        free()

    def checkpoint_activations(self) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        watch, processes = self.watch, self.accelerator.num_processes
        own = [float(watch.step_loss) / processes, watch.step_tokens, watch.interrupted, watch.time_is_up]
        sums = torch.tensor(own, dtype=torch.float64, device=self.args.device)
        loss, tokens, interrupted, out_of_time = self.accelerator.reduce(sums, "sum").tolist()
        norm_value = math.nan if norm is None else float(norm)
        # In float16 an infinite norm is normal: the step is skipped and the scale of the loss lowered.
        ignores_norm = norm is None or self.accelerator.scaler is not None
        if problem := watch.find_problem(loss, 0.0 if ignores_norm else norm_value):
            rows = torch.cat(watch.step_rows).tolist()
            rows = gather_object(rows) if processes > 1 else rows
            sources = shortened([watch.sources[row] for row in sorted(set(rows))], 12)
            raise TrainError(
                f"{problem} at step {self.state.global_step + 1}, whose batch is {sources}; lower "
                "train.learning_rate or train.max_grad_norm, or check these rows"
            )
        watch.finish_step(loss, norm_value, int(tokens), interrupted > 0, out_of_time > 0)
        return norm

    # --- validation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss in nats per trained token: a mean over tokens, not over batches."""
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        # All processes compute the same number of batches, because sharded layers are gathered by all together.
        for batch in range(math.ceil(len(rows) / (size * processes))):
            start = (batch * processes + index) * size
            first = start if start < len(rows) else 0
            loss = self._loss_sum(model, self.data_collator([rows[i] for i in range(first, len(rows))[:size]]))
            if start < len(rows):
                sums += loss
        model.train()
        nats, tokens = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": nats / max(tokens, 1)}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """(nats, trained tokens) of a batch."""
        one = torch.tensor(1.0, device=self.args.device)

        def attempt() -> torch.Tensor:
            nats = 0.0
            for piece in split_batch(batch, self.fallbacks[-1].pieces):
                inputs = self._prepare_inputs(piece)
                with self.compute_loss_context_manager():
                    nats += float(self.compute_loss(model, inputs, num_items_in_batch=one))
            return torch.tensor([nats / self.accelerator.num_processes, self.count_targets(batch)], dtype=torch.float64)

        return self._retry_until_it_fits(batch, attempt, attempt)

    def count_targets(self, batch: Batch) -> int:
        """Trained tokens of a batch, over which the validation loss is a mean."""
        return int((batch["labels"][:, 1:] != -100).sum())

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's method also writes a model card
        if self.args.should_save:
            checkpoint = self._checkpoint(self.state.global_step)
            write_json(checkpoint / WATCH, self.watch.state() | {"fallbacks": list(map(vars, self.fallbacks))})
            seal(checkpoint)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_rng_state(self, output_dir: str) -> None:
        """Do nothing: each step has its own seed (`Watch.on_step_begin`), and a saved state would be a pickle."""

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Keep the type of trained weights: on a GPU TRL trains QLoRA's in bfloat16, and PEFT loads them as float32."""
        trained = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = parameter.data.to(trained[name])

    def restore(self, checkpoint: Path) -> None:
        """Restore `Watch` and the fallbacks; `train` itself loads weights, optimiser and data order."""
        state = read_json(checkpoint / WATCH)
        self.watch.restore(state)
        if self.is_fsdp_enabled:
            self.load_before_sharding(checkpoint)
        self.fallbacks = [Fallback(**fallback) for fallback in state["fallbacks"]]
        if self.fallbacks[-1].gradient_checkpointing:
            self.checkpoint_activations()
        if self.watch.best is not None and self.watch.params.early_stopping_patience is not None:
            best = self._checkpoint(self.watch.best[1])
            if problem := find_problem(best):
                say(f"skipping {best}, the best checkpoint: {problem}")
                self.watch.best, self.watch.worse = None, 0

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether `checkpoint` is of the run's last step; if so, loads its weights and state."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps and not self.watch.patience_is_spent:
            return False
        self.state = state
        if not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(checkpoint))
        return True

    def load_best(self) -> int:
        """With early stopping, load the best step's weights; returns the step of the model's weights."""
        best, last = self.watch.best, self.state.global_step
        if self.watch.params.early_stopping_patience is None or best is None or best[1] == last:
            return last
        self._load_from_checkpoint(str(self._checkpoint(best[1])))
        return int(best[1])


class ClassTrainer(AdapterTrainer):
    """Trains classifiers on the batches of `ClassCollate`; the loss is a mean over rows."""

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
