"""Watches a training: prints progress, decides when to validate, and stops on divergence, a signal or no progress.

It collects the tables `loss.csv` (identical in equal runs) and `speed.csv`. Its state is saved with each checkpoint, so
the tables of a resumed run are complete.
"""

import csv
import math
import random
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from pipeline.core.files import sha256_json
from pipeline.core.progress import Progress
from pipeline.params import TrainParams

LOSS = ("step", "loss", "validation_loss", "learning_rate", "grad_norm", "weight_change")
SPEED = ("step", "tokens_per_second", "memory_gib", "seconds")
STATE = ("loss_rows", "speed_rows", "recent", "unlogged", "best", "worse")
WINDOW = 50  # steps over whose median loss a rise is measured
MIN_WINDOW = 10  # steps before a rise is measured
SAMPLE = 2**16  # values of a parameter that are compared to measure its change
MOVED_BY = 10  # steps after the warmup within which every module's weights must have changed


class TrainError(ValueError):
    """Training cannot start or did not finish; the message says why and what to change."""


class Interrupted(RuntimeError):
    """A signal or `max_hours` stopped the run, and a checkpoint was saved; the same command continues from it."""


class Watch(TrainerCallback):
    """Callback of one training; `sources` are the sources of the train split's rows, for messages."""

    def __init__(self, params: TrainParams, sources: list[str]) -> None:
        self.params, self.sources = params, sources
        self.eval_steps: int | None = None  # set by the trainer, which knows how long an epoch is
        self.loss_rows: list[dict[str, Any]] = []
        self.speed_rows: list[dict[str, Any]] = []
        self.recent: list[float] = []  # losses of the last WINDOW steps
        self.unlogged: list[float] = []  # losses since the last row of loss.csv
        self.tokens = 0  # without padding, since this process started
        self.best: Sequence[Any] | None = None  # validation loss, step
        self.worse = 0  # number of validations since the best one
        self.interrupted = self.out_of_time = False
        self.seconds = 0.0  # of this process
        self.earlier_seconds = 0.0  # of earlier processes, up to the checkpoint
        self.grad_norm = math.nan
        self._logged_at, self._logged_tokens = 0.0, 0
        self._start: dict[str, torch.Tensor] = {}
        self._warned = False
        self.begin_step()

    def __enter__(self) -> "Watch":
        def interrupt(*_: object) -> None:
            self.interrupted = True

        self.previous = signal.signal(signal.SIGTERM, interrupt)
        self.started = self._logged_at = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)
        self.seconds = time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, for JSON."""
        seconds = self.earlier_seconds + time.monotonic() - self.started
        return {name: getattr(self, name) for name in STATE} | {"seconds": seconds}

    def restore(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self.earlier_seconds = state["seconds"]

    def row(self, step: int) -> dict[str, Any]:
        """The row of loss.csv for a logged `step`."""
        return next(row for row in reversed(self.loss_rows) if row["step"] == step)

    def remember_start(self, model: torch.nn.Module) -> None:
        """Keep a sample of the initial weights to measure changes; a resumed run starts with the same ones."""
        self._start = {name: _sample(p).clone() for name, p in _trainable(model)}

    def changes(self, model: torch.nn.Module) -> dict[str, float]:
        """Euclidean norm of the change of each module's weights since the start, estimated from the sample."""
        scales: list[tuple[str, float]] = []
        norms: list[torch.Tensor] = []
        for name, parameter in _trainable(model):
            now, before = _sample(parameter), self._start.get(name)
            # A process of a sharded model may hold another part now, or none.
            if before is not None and now.shape == before.shape and now.numel():
                scales.append((_module(name), parameter.numel() / now.numel()))
                norms.append((now - before).norm())
        squares: dict[str, float] = {}
        # Copy all norms from the GPU at once, because each copy waits for the GPU.
        for (module, scale), norm in zip(scales, torch.stack(norms).tolist() if norms else [], strict=True):
            squares[module] = squares.get(module, 0.0) + norm**2 * scale
        return {module: math.sqrt(square) for module, square in squares.items()}

    # --- called by the trainer ---

    def begin_step(self) -> None:
        """Begin a step, or repeat it."""
        self.step_loss, self.step_rows, self.step_tokens = torch.zeros(()), list[torch.Tensor](), 0

    def add(self, loss: torch.Tensor, tokens: int, rows: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss, its tokens and its rows."""
        self.step_loss = self.step_loss.to(loss.device) + loss
        self.step_tokens += tokens
        self.step_rows.append(rows)  # on its device: reading it would wait for the GPU

    @property
    def time_is_up(self) -> bool:
        hours = self.params.max_hours
        return hours is not None and time.monotonic() - self.started > hours * 3600

    def find_problem(self, loss: float, grad_norm: float) -> str | None:
        """Why the optimiser must not take this step, or None; `loss` is that of all processes."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        limit, median = self.params.max_loss_rise, statistics.median(self.recent or [math.inf])
        if limit is not None and len(self.recent) >= MIN_WINDOW and loss > median + limit:
            return f"the loss is {loss:.2f} after a median of {median:.2f}, a rise above train.max_loss_rise ({limit})"
        return None

    def finish_step(self, loss: float, grad_norm: float, tokens: int, interrupted: bool, out_of_time: bool) -> None:
        """Take the step's sums over all processes; called before `on_step_end`."""
        self.recent = [*self.recent, loss][-WINDOW:]
        self.unlogged.append(loss)
        self.grad_norm = grad_norm
        self.tokens += tokens
        self.interrupted, self.out_of_time = interrupted, out_of_time

    # --- callbacks ---

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        if not self.changes(model):
            self.remember_start(model)  # the model may be sharded now, and a process watches its own part
        interval = 5.0 if state.is_world_process_zero else math.inf
        self.progress = Progress("train", state.max_steps, "steps", interval)
        self.progress.resume_at(state.global_step)
        self.warmup_steps = args.get_warmup_steps(state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # Each step has its own seed, so a resumed run is bit-identical without saved states of generators.
        seed = int(sha256_json([self.params.seed, state.global_step, args.process_index])[:8], 16)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.begin_step()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.learning_rate = lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        step, last = state.global_step, state.global_step == state.max_steps
        control.should_evaluate = self.eval_steps is not None and (step % self.eval_steps == 0 or last)
        if step % self.params.logging_steps == 0 or last or control.should_evaluate:
            self._log(step, model)
        if self.interrupted or self.out_of_time:
            control.should_save = control.should_training_stop = True
        speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
        figures = [f"loss {statistics.fmean(self.recent[-self.params.logging_steps :]):.3f}"]
        validation = next((row for row in reversed(self.loss_rows) if "validation_loss" in row), None)
        if validation is not None:
            figures.append(f"validation {validation['validation_loss']:.3f} at step {validation['step']}")
        figures += [f"gradient {self.grad_norm:.2f}", f"{speed:,.0f} tokens/s", f"{memory_gib():.1f} GiB"]
        self.progress.update(step, " · ".join(figures))

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **_: Any) -> None:
        loss = metrics["eval_loss"]
        self.row(state.global_step)["validation_loss"] = loss
        if not math.isfinite(loss):
            raise TrainError(f"the validation loss is {loss} at step {state.global_step}; lower train.learning_rate")
        if self.best is None or loss < self.best[0]:
            self.best, self.worse = (loss, state.global_step), 0
            if self.params.early_stopping_patience is not None:  # transformers keeps the best step's checkpoint
                state.best_global_step, control.should_save = state.global_step, True
        else:
            self.worse += 1
        if self.patience_is_spent and state.global_step < state.max_steps:
            control.should_training_stop = True
            say(
                f"the validation loss has not fallen below {self.best[0]:.4f} (step {self.best[1]}) in {self.worse} "
                f"validations; training stops at step {state.global_step}"
            )

    @property
    def patience_is_spent(self) -> bool:
        patience = self.params.early_stopping_patience
        return patience is not None and self.worse >= patience

    def _log(self, step: int, model: torch.nn.Module) -> None:
        changes, now = self.changes(model), time.monotonic()
        row = {"step": step, "loss": statistics.fmean(self.unlogged), "learning_rate": self.learning_rate}
        total_change = math.sqrt(sum(change**2 for change in changes.values()))
        self.loss_rows.append(row | {"grad_norm": self.grad_norm, "weight_change": total_change})
        speed = (self.tokens - self._logged_tokens) / max(now - self._logged_at, 1e-9)
        figures = (step, round(speed, 1), round(memory_gib(), 3), round(now - self.started, 2))
        self.speed_rows.append(dict(zip(SPEED, figures, strict=True)))
        self.unlogged, self._logged_at, self._logged_tokens = [], now, self.tokens
        unchanged = [name for name, change in changes.items() if change == 0]
        if unchanged and not self._warned and step >= self.warmup_steps + MOVED_BY:
            self._warned = True
            say(
                f"warning: the weights of {shortened(unchanged)} have not changed after {step} steps; if the model "
                "does not use these layers, merge will refuse the adapter: leave them out of train.lora_target_modules"
            )


def say(line: str) -> None:
    print(f"train · {line}", flush=True)


def write_table(path: Path, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def memory_gib() -> float:
    """Peak memory of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Up to 2^16 of its values, evenly spread, in float32 on its device."""
    step = -(-parameter.numel() // SAMPLE) or 1
    return parameter.detach().flatten()[::step].float()


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (name.removeprefix("module.").replace("_fsdp_wrapped_module.", "").replace("_flat_param", "weight"), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _module(name: str) -> str:
    """The module of a weight: `base_model.model.layers.0.q_proj.lora_A.default.weight` → `layers.0.q_proj`."""
    for suffix in (".lora_", ".ia3_", ".modules_to_save"):
        name = name.split(suffix)[0]
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".bias")
