"""The methods of `train.method` as PEFT has them: parameters and a base model in, the adapter's configuration out.

Which modules are trained is found by looking at the model; a name that matches none is refused with those there are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as ADALORA_MODULES,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_MODULES,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from pipeline.files import read_json, write_json
from pipeline.model import HEADS
from pipeline.params import TrainParams
from pipeline.training.combinations import CLASSIFICATION, VIRTUAL_TOKENS


class MethodError(ValueError):
    """The method cannot be used on this model; the message says what the model has."""


def adapter_config(params: TrainParams, model: torch.nn.Module) -> PeftConfig | None:
    """The adapter to train on `model`; None trains the model itself.

    Raises:
        MethodError: `lora_target_modules` matches nothing in the model, or not on this family.
    """
    task = TaskType.SEQ_CLS if params.task == CLASSIFICATION else TaskType.CAUSAL_LM
    new = getattr(model, "new_modules", None) or None  # beside the head, which PEFT knows
    match params.method:
        case "full":
            return None
        case "prefix":
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=params.num_virtual_tokens)
        case "prompt":
            return PromptTuningConfig(task_type=task, num_virtual_tokens=params.num_virtual_tokens)
        case "ia3":
            targets = target_modules(params, model)
            return IA3Config(
                task_type=task,
                target_modules=targets,
                feedforward_modules=_feedforward(model, targets),
                modules_to_save=new,
            )
    lora: dict[str, Any] = {
        "task_type": task,
        "target_modules": target_modules(params, model),
        "lora_alpha": params.lora_alpha,
        "lora_dropout": params.lora_dropout,
        "modules_to_save": new,
    }
    if params.method == "adalora":
        # It begins with half as much again and ends at lora_r in the mean; `AllocateRanks` fits it to the steps.
        return AdaLoraConfig(**lora, target_r=params.lora_r, init_r=-(-params.lora_r * 3 // 2), total_step=1 << 30)
    return LoraConfig(**lora, r=params.lora_r, use_dora=params.method == "dora", use_rslora=params.method == "rslora")


def require_context(params: TrainParams, config: Any, max_length: int) -> None:
    """Refuse virtual tokens that leave the longest rows no place in the model's context.

    Raises:
        MethodError: with what would fit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if params.method in VIRTUAL_TOKENS and limit and max_length + params.num_virtual_tokens > limit:
        raise MethodError(
            f"train.num_virtual_tokens is {params.num_virtual_tokens} and rows have up to {max_length} tokens, more "
            f"than the model's {limit}; set prepare.max_length to {limit - params.num_virtual_tokens} at most"
        )


def target_modules(params: TrainParams, model: torch.nn.Module) -> str | list[str]:
    """`all-linear` for PEFT to resolve, or names of which each matches a module of `model`, sorted.

    Raises:
        MethodError: a name matches nothing, or `auto` is asked of a family that PEFT has no choice for.
    """
    wanted = params.lora_target_modules
    linear = dict(linear_modules(model))
    if wanted == "all-linear":
        # PEFT knows the shorthand for LoRA alone, and with IA3 the feed-forward modules must be told apart.
        return "all-linear" if params.method != "ia3" else sorted({_short(name, linear) for name in linear})
    if wanted == "attention":
        return sorted({_short(name, linear) for name in linear if _in_attention(name)})
    if wanted == "auto":
        family = str(getattr(getattr(model, "config", None), "model_type", ""))
        known = {"ia3": IA3_MODULES, "adalora": ADALORA_MODULES}.get(params.method, LORA_MODULES).get(family)
        if not isinstance(known, list):  # one family has a pattern, which is loaded from nowhere else
            return sorted({_short(name, linear) for name in linear if _in_attention(name)})
        wanted = known
    for name in wanted:
        if not any(f".{path}".endswith(f".{name}") for path in linear):
            raise MethodError(
                f"train.lora_target_modules names {name}, which the base model does not have; "
                f"its linear layers are {', '.join(sorted({_short(path, linear) for path in linear}))}"
            )
    return sorted(wanted)


def linear_modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every linear layer by its path, the output layer and the classification head left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        outside = name.split(".")[0] in HEADS or name in getattr(model, "new_modules", ())
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not outside:
            yield name, module


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _short(name: str, linear: dict[str, torch.nn.Module]) -> str:
    """The end of a path that tells its module from those of other parts: `q_proj`, but `attention.output.dense`."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        same = [other for other in linear if f".{other}".endswith(f".{end}")]
        if end.split(".")[0].isdigit() or all(_in_attention(other) == _in_attention(name) for other in same):
            return end
    return name


def _feedforward(model: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """Those of IA3's targets that (also) lie outside attention: their inputs are scaled, of the others the outputs."""
    outside = [f".{name}" for name, _ in linear_modules(model) if not _in_attention(name)]
    return [target for target in targets if any(name.endswith(f".{target}") for name in outside)]


def sort_sets(path: Path) -> None:
    """Give an adapter_config.json one order of its module names: PEFT writes sets, which change it from run to run."""
    config = read_json(path)
    names = {key: config.get(key) for key in ("target_modules", "feedforward_modules", "modules_to_save")}
    write_json(path, config | {key: sorted(value) for key, value in names.items() if isinstance(value, list)})


class AllocateRanks(TrainerCallback):
    """AdaLoRA's schedule and regulariser, which PEFT leaves to the training loop (Zhang et al. 2023, algorithm 1).

    Rank is cut from the first tenth of the steps on, for a little more than half of them; the rest trains what is left.
    """

    def __init__(self, adalora: Any) -> None:
        self.adalora = adalora  # peft.AdaLoraModel
        self.config = adalora.peft_config[adalora.trainable_adapter_name]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        total = state.max_steps
        self.config.total_step, self.config.tinit, self.config.tfinal = total, total // 10, total * 3 // 10
        self.config.deltaT = max(1, total // 100)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the gradient of what keeps A and B orthogonal: TRL's loss is not the one that PEFT adds it to."""
        unlike = []
        for name, p in self.adalora.model.named_parameters():
            if p.requires_grad and ("lora_A" in name or "lora_B" in name):
                product = p @ p.T if "lora_A" in name else p.T @ p
                unlike.append(torch.linalg.norm(product - torch.eye(len(product), device=p.device)))
        regulariser: torch.Tensor = self.config.orth_reg_weight * torch.stack(unlike).mean()
        torch.autograd.backward(regulariser)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.adalora.update_and_allocate(state.global_step)
