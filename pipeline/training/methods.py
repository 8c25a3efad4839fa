"""Builds PEFT's configuration of the adapter from `train.method` and the base; `targets.py` chooses the modules."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from transformers import TrainerCallback, TrainerState

from pipeline.core.combinations import CLASSIFICATION, VIRTUAL_TOKENS
from pipeline.core.vetting import UnsafeModelError, check_adapter
from pipeline.params import TrainParams
from pipeline.training.targets import MethodError, feedforward_modules, target_modules, target_parameters
from pipeline.weights.architecture import base_config, empty_model
from pipeline.weights.loading import ModelError, load_adapter


def adapter_config(params: TrainParams, model: torch.nn.Module) -> PeftConfig | None:
    """The adapter to train on `model`; None for `full`, which trains the model itself."""
    task = TaskType.SEQ_CLS if params.task == CLASSIFICATION else TaskType.CAUSAL_LM
    new = getattr(model, "new_modules", None) or None  # untrained modules other than the head, which PEFT knows
    match params.method:
        case "full":
            return None
        case "prefix":
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=params.num_virtual_tokens)
        case "prompt":
            return PromptTuningConfig(task_type=task, num_virtual_tokens=params.num_virtual_tokens)
        case "ia3":
            targets = target_modules(params, model)
            feedforward = feedforward_modules(model, targets)
            return IA3Config(
                task_type=task, target_modules=targets, feedforward_modules=feedforward, modules_to_save=new
            )
    lora: dict[str, Any] = {
        "task_type": task,
        "target_modules": target_modules(params, model),
        "lora_alpha": params.lora_alpha,
        "lora_dropout": params.lora_dropout,
        "modules_to_save": new,
    }
    if params.method == "adalora":
        # The rank starts at 1.5 × lora_r and ends at lora_r on average; `AllocateRanks` sets the steps.
        return AdaLoraConfig(**lora, target_r=params.lora_r, init_r=-(-params.lora_r * 3 // 2), total_step=1 << 30)
    return LoraConfig(
        **lora,
        r=params.lora_r,
        use_dora=params.method == "dora",
        use_rslora=params.method == "rslora",
        target_parameters=target_parameters(params, model) or None,
    )


def require_room_for_virtual_tokens(params: TrainParams, config: Any, max_length: int) -> None:
    """Refuse virtual tokens that the model cannot take, or not together with the longest rows."""
    if params.method == "prefix" and getattr(config.get_text_config(), "kv_lora_rank", None):
        raise MethodError(
            f"train.method is prefix, but {config.model_type} caches compressed keys and values, which PEFT's prefixes "
            "are not; set it to prompt or lora"
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if params.method in VIRTUAL_TOKENS and limit and max_length + params.num_virtual_tokens > limit:
        raise MethodError(
            f"train.num_virtual_tokens is {params.num_virtual_tokens} and rows have up to {max_length} tokens, but the "
            f"model takes {limit} in all; set prepare.max_length to at most {limit - params.num_virtual_tokens}"
        )


def require_loadable(model: Any, contract: dict[str, Any], scratch: Path) -> None:
    """Refuse an adapter on `model` that the later stages could not load, before hours are spent on it.

    It is saved in `scratch`. PEFT may save names of modules that it does not find again, or settings that
    `check_adapter` refuses.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), TemporaryDirectory(dir=scratch) as folder:  # rows keep the order of the seed
        model.save_pretrained(folder)
        try:
            base: Any = empty_model(base_config(contract["model"], contract.get("labels")))
        except ModelError:  # it needs its repository's code
            base = None
        try:
            check_adapter(Path(folder))
            if base is not None:
                load_adapter(base, Path(folder), empty=True)
        except (ModelError, UnsafeModelError) as error:
            reason = str(error).replace(f"{folder}: ", "").replace(f" in {folder}", "")
            raise MethodError(
                f"the adapter of this training could not be loaded again ({reason}); choose other "
                "train.lora_target_modules or another train.method"
            ) from None


class AllocateRanks(TrainerCallback):
    """AdaLoRA's schedule and regulariser, which PEFT leaves to the training loop (Zhang et al. 2023, algorithm 1).

    Ranks are cut between 10 % and 70 % of the steps.
    """

    def __init__(self, adalora: Any) -> None:
        self.adalora = adalora  # peft.AdaLoraModel
        self.config = adalora.peft_config[adalora.trainable_adapter_name]

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        total = state.max_steps
        self.config.total_step, self.config.tinit, self.config.tfinal = total, total // 10, total * 3 // 10
        self.config.deltaT = max(1, total // 100)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Add the gradient of the regulariser that keeps A and B orthogonal, which PEFT adds only to its own loss."""
        deviations = []
        for name, p in self.adalora.model.named_parameters():
            if p.requires_grad and ("lora_A" in name or "lora_B" in name):
                product = p @ p.T if "lora_A" in name else p.T @ p
                deviations.append(torch.linalg.norm(product - torch.eye(len(product), device=p.device)))
        regulariser: torch.Tensor = self.config.orth_reg_weight * torch.stack(deviations).mean()
        torch.autograd.backward(regulariser)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.adalora.update_and_allocate(state.global_step)
