"""TRL's SFTTrainer for long jobs: the loss in chunks, batches split when memory runs out, each step watched, sealed
checkpoints, and a validation loss that is the mean over tokens.

The training loop itself, accumulation, clipping, optimiser and schedule are transformers'.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftType
from transformers import TrainerState
from trl import SFTTrainer

from pipeline.core.files import read_json, write_json
from pipeline.core.memory import OutOfMemory, Rung, free, out_of_memory
from pipeline.training.checkpoints import WATCH, problem_of, seal
from pipeline.training.gradients import checkpoint_activations
from pipeline.training.loss import add_chunked_loss, has_plain_frozen_head
from pipeline.training.packing import Batch, pieces, tokens_in
from pipeline.training.sharding import ShardedTrainer
from pipeline.training.watching import TrainError, Watch, shortened


class AdapterTrainer(ShardedTrainer):
    """SFTTrainer over the batches of `Collate`, with a `Watch`."""

    def __init__(self, *args: Any, watch: Watch, **options: Any) -> None:
        super().__init__(*args, **options, callbacks=[watch])
        self.watch = watch
        self.rungs: list[Rung] = [Rung()]
        self.window: list[Batch] = []  # the micro-batches of the step under way
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # On a GPU TRL's own fused head has kernels; on a CPU it scores every position, trained or not, and twice.
        # AdaLoRA adds its orthogonality to the loss that the model returns, which has to be the mean.
        adalora = getattr(options.get("peft_config"), "peft_type", None) == PeftType.ADALORA
        self.own_loss = not torch.cuda.is_available() and not adalora and has_plain_frozen_head(base)
        self.loss_used = "trained tokens alone, in chunks" if self.own_loss else "TRL's fused head, in chunks"
        if self.own_loss:
            add_chunked_loss(base)

        epoch = math.ceil(
            len(self.train_dataset)
            / (self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes)
        )
        watch.eval_steps = None if self.eval_dataset is None else (watch.params.eval_steps or max(epoch, 1))

    # --- loss ---

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {key: value for key, value in inputs.items() if key != "rows"}
        if not self.own_loss or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != -100).sum()
        # The count is that of all processes, whose gradients are averaged.
        return model(**inputs, chunked_loss=True).loss / num_items_in_batch * self.accelerator.num_processes

    # --- a step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.window, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.done = 0
        return self.window, items

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        self.done += 1
        return self._until_it_fits(
            inputs,
            lambda: self._micro_batch(model, inputs, num_items_in_batch),
            lambda: self._again(model, num_items_in_batch),
        )

    def _micro_batch(self, model: Any, inputs: Batch, items: Any) -> torch.Tensor:
        losses = [
            super(AdapterTrainer, self).training_step(model, p, items) for p in pieces(inputs, self.rungs[-1].pieces)
        ]
        loss = torch.stack(losses).sum()
        self.watch.add(loss, tokens_in(inputs), inputs["rows"].tolist())
        return loss

    def _again(self, model: Any, items: Any) -> torch.Tensor:
        """The step from its first micro-batch to this one; what a failed backward pass left in the gradients goes."""
        model.zero_grad()
        self.watch.begin_step()
        return [self._micro_batch(model, batch, items) for batch in self.window[: self.done]][-1]

    def _until_it_fits(self, batch: Batch, attempt: Callable[[], Any], again: Callable[[], Any]) -> Any:
        while True:
            try:
                return attempt()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._lower(batch, reason)
            attempt = again

    def _lower(self, batch: Batch, reason: str) -> None:
        step = self.state.global_step + 1
        if self.accelerator.num_processes > 1:
            raise OutOfMemory(
                f"out of memory at step {step} ({reason}), and one of several processes cannot retry alone; halve "
                "train.per_device_train_batch_size, double train.gradient_accumulation_steps, or set "
                "train.gradient_checkpointing to true"
            )
        rung, rows = self.rungs[-1], len(batch["rows"])
        if rung.pieces < rows:
            self.rungs.append(Rung(step, min(rung.pieces * 2, rows), rung.gradient_checkpointing))
            how = f"in {self.rungs[-1].pieces} pieces"
        elif rung.gradient_checkpointing or self.args.activation_checkpointing:
            longest = max(map(tokens_in, pieces(batch, rows)))
            raise OutOfMemory(
                f"out of memory at step {step} with one row of {longest} tokens and gradient checkpointing ({reason}); "
                "lower prepare.max_length or train.lora_r, set train.load_in_4bit to true, or take a machine with more "
                "memory (`retune plan` says how much)"
            )
        else:
            checkpoint_activations(self.model)
            self.rungs.append(Rung(step, rung.pieces, gradient_checkpointing=True))
            how = "with gradient checkpointing"
        print(f"train · out of memory at step {step}; retrying the same batch {how}", flush=True)
        free()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        watch, processes = self.watch, self.accelerator.num_processes
        sums = torch.tensor(
            [float(watch.step_loss) / processes, watch.step_tokens, watch.interrupted, watch.time_is_up],
            dtype=torch.float64 if self.args.device.type != "mps" else torch.float32,
            device=self.args.device,
        )
        loss, tokens, interrupted, out_of_time = self.accelerator.reduce(sums, "sum").tolist()
        value = math.nan if norm is None else float(norm)
        # In float16 an overflow skips the step and lowers the scale of the loss.
        scaled = norm is None or self.accelerator.scaler is not None
        problem = watch.problem(loss, 0.0 if scaled else value)
        if problem is not None:
            rows = gather_object(watch.step_rows) if processes > 1 else watch.step_rows
            named = shortened([watch.sources[row] for row in sorted(set(rows))], 12)
            raise TrainError(
                f"{problem} at step {self.state.global_step + 1}, whose batch is {named}; lower "
                "train.learning_rate or train.max_grad_norm, or look at these rows"
            )
        watch.finish_step(loss, value, int(tokens), interrupted > 0, out_of_time > 0)
        return norm

    # --- validation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss in nats a trained token, a mean over tokens, not over batches of different sizes."""
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        # Every process takes as many turns as the others, since sharded layers are gathered together.
        for turn in range(math.ceil(len(rows) / (size * processes))):
            start = (turn * processes + index) * size
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
        """(nats, trained tokens) of a batch; in pieces when memory runs out."""
        one = torch.tensor(1.0, device=self.args.device)

        def attempt() -> torch.Tensor:
            nats = 0.0
            for piece in pieces(batch, self.rungs[-1].pieces):
                inputs = self._prepare_inputs(piece)
                with self.compute_loss_context_manager():
                    nats += float(self.compute_loss(model, inputs, num_items_in_batch=one))
            return torch.tensor([nats / self.accelerator.num_processes, self.scored(batch)], dtype=torch.float64)

        return self._until_it_fits(batch, attempt, attempt)

    def scored(self, batch: Batch) -> int:
        """What the validation loss is a mean over: the trained tokens of a batch."""
        return int((batch["labels"][:, 1:] != -100).sum())

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's adds a model card each time
        if self.args.should_save:
            checkpoint = self._checkpoint(self.state.global_step)
            write_json(checkpoint / WATCH, self.watch.state() | {"rungs": [vars(rung) for rung in self.rungs]})
            seal(checkpoint)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: each step draws from its own seed (`Watch.on_step_begin`), and a state would be a pickle."""

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over what `Watch` knew and the last rung; weights, optimiser and data order are loaded by `train`."""
        state = read_json(checkpoint / WATCH)
        self.watch.restore(state)
        if self.is_fsdp_enabled:
            self.load_before_sharding(checkpoint)
        self.rungs = [Rung(**rung) for rung in state["rungs"]]
        if self.rungs[-1].gradient_checkpointing:
            checkpoint_activations(self.model)
        if self.watch.best is not None and self.watch.params.early_stopping_patience is not None:
            best = self._checkpoint(self.watch.best[1])
            if problem := problem_of(best):
                print(f"train · {best} is not whole ({problem}); the best step is looked for again", flush=True)
                self.watch.best, self.watch.worse = None, 0

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether the run had taken its last step at `checkpoint`; if so, its weights and state are loaded."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps and not self.watch.patience_is_spent:
            return False
        self.state = state
        if not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(checkpoint))
        return True

    def load_best(self) -> int:
        """With early stopping, put the best step's weights into the model; returns the step that these are of."""
        best, last = self.watch.best, self.state.global_step
        if self.watch.params.early_stopping_patience is None or best is None or best[1] == last:
            return last
        self._load_from_checkpoint(str(self._checkpoint(best[1])))
        return int(best[1])
