"""Builds PEFT's configuration of the adapter from `train.method` and the base; `targets.py` chooses the modules.

Before a training, it refuses an adapter to start from with other settings (`train.init_adapter`), an adapter that later
stages could not load, and frozen layers that pass no gradient.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from transformers import TrainerCallback, TrainerState

from pipeline.core.combinations import CLASSIFICATION, VIRTUAL_TOKENS
from pipeline.core.files import read_json
from pipeline.core.vetting import UnsafeModelError, check_adapter
from pipeline.params import TrainParams
from pipeline.training.packing import short_row
from pipeline.training.targets import feedforward_modules, target_modules, target_parameters
from pipeline.training.watching import TrainError, shortened
from pipeline.weights.architecture import base_config, empty_model
from pipeline.weights.loading import PROMPT, ModelError, is_whole, load_adapter

NAMES = {"r": "train.lora_r", "lora_alpha": "train.lora_alpha", "num_virtual_tokens": "train.num_virtual_tokens"}


def adapter_config(params: TrainParams, model: torch.nn.Module) -> PeftConfig | None:
    """The adapter to train on `model`; None for `full`, which trains the model itself."""
    task = TaskType.SEQ_CLS if params.task == CLASSIFICATION else TaskType.CAUSAL_LM
    new = getattr(model, "new_modules", None) or None  # untrained modules other than the head, which PEFT knows
    if params.method == "full":
        return None
    if params.method in VIRTUAL_TOKENS:
        virtual = PrefixTuningConfig if params.method == "prefix" else PromptTuningConfig
        return virtual(task_type=task, num_virtual_tokens=params.num_virtual_tokens)
    targets = target_modules(params, model)
    common: dict[str, Any] = {"task_type": task, "target_modules": targets, "modules_to_save": new}
    if params.method == "ia3":
        return IA3Config(**common, feedforward_modules=feedforward_modules(model, targets))
    lora = common | {"lora_alpha": params.lora_alpha, "lora_dropout": params.lora_dropout}
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
    text = config.get_text_config()
    if params.method == "prefix" and getattr(text, "kv_lora_rank", None):
        raise TrainError(
            f"train.method is prefix, but {config.model_type} caches compressed keys and values, which PEFT's prefixes "
            "are not; set it to prompt or lora"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if params.method in VIRTUAL_TOKENS and limit and max_length + params.num_virtual_tokens > limit:
        raise TrainError(
            f"train.num_virtual_tokens is {params.num_virtual_tokens} and rows have up to {max_length} tokens, but the "
            f"model takes {limit} in all; set prepare.max_length to at most {limit - params.num_virtual_tokens}"
        )


def require_loadable(model: Any, contract: dict[str, Any], scratch: Path) -> None:
    """Refuse an adapter on `model` that the later stages could not load, before hours are spent on it.

    PEFT may save (here in `scratch`) names of modules that it does not find again, or settings that are not allowed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), TemporaryDirectory(dir=scratch) as folder:  # rows keep the order of the seed
        model.save_pretrained(folder)
        base: Any = None
        with suppress(ModelError):  # it needs its repository's code
            base = empty_model(base_config(contract["model"], contract.get("labels")))
        try:
            check_adapter(Path(folder))
            if base is not None:
                load_adapter(base, Path(folder), empty=True)
        except (ModelError, UnsafeModelError) as error:
            reason = str(error).replace(f"{folder}: ", "").replace(f" in {folder}", "")
            raise TrainError(
                f"the adapter of this training could not be loaded again ({reason}); choose other "
                "train.lora_target_modules or another train.method"
            ) from None


def check_init(folder: Path, contract: dict[str, Any], config: PeftConfig) -> None:
    """Refuse the adapter in `folder` (`train.init_adapter`) if an adapter with `config` cannot start from it."""
    if is_whole(folder):
        raise TrainError(f"{folder} is a whole model, not an adapter; set prepare.model_name_or_path to it instead")
    check_adapter(folder)
    init_contract, saved, problems = read_json(folder / "contract.json"), PeftConfig.from_pretrained(str(folder)), []
    models = [init_contract["model"], contract["model"]]
    if models[0]["digest"] != models[1]["digest"]:
        bases = [f"{model['name_or_path']} (digest {model['digest'][:12]})" for model in models]
        problems.append(f"was trained on another base: {bases[0]}, not {bases[1]}")
    if init_contract.get("labels") != contract.get("labels"):
        problems.append("has other classes than the dataset")
    # Settings that change what the weights mean. Which modules have weights is checked when they are loaded.
    variants = [key for key in vars(config) if key.startswith("use_")]
    for key in ("peft_type", *NAMES, "feedforward_modules", *variants):
        values = [getattr(settings, key, None) for settings in (saved, config)]
        actual, expected = (sorted(v or ()) if key == "feedforward_modules" else getattr(v, "value", v) for v in values)
        if actual != expected:
            problems.append(f"has {key} {actual}, but {NAMES.get(key, 'train.method')} requires {expected}")
    if problems:
        raise TrainError(f"the adapter in {folder} {problems[0]}; change that, or set train.init_adapter to none")


def load_init(model: Any, folder: Path) -> None:
    """Load the weights of the adapter in `folder` into the new adapter of `model`."""
    loaded = model.load_adapter(str(folder), "default", is_trainable=True, autocast_adapter_dtype=False)
    if others := [*loaded.missing_keys, *(key for key in loaded.unexpected_keys if key != PROMPT)]:
        raise TrainError(
            f"the adapter in {folder} has other modules than train.lora_target_modules requires (first {others[0]}); "
            "change that, or set train.init_adapter to none"
        )


def require_gradients(trainer: Any) -> None:
    """Run one short row forward and backward, without a step; refuse a frozen layer that passes no gradient back.

    It leaves all layers below it untrained, silently; 4-bit layers on CPUs did so after an inference.
    """
    model = trainer.model.train()
    if trainer.args.activation_checkpointing:  # the trainer turns it on only when training starts
        trainer.checkpoint_activations()
    entered, reached, passed, hooks = set[str](), set[str](), set[str](), list[Any]()

    def mark(names: set[str], name: str, gradient: torch.Tensor) -> None:
        if gradient.any():
            names.add(name)

    def enter(name: str, _: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not isinstance(arguments[0], torch.Tensor) or not arguments[0].requires_grad:
            return None  # the first layers: nothing below them is trained
        view: Any = arguments[0].view_as(arguments[0])  # layers share an input, and the hook must see only its own
        view.register_hook(partial(mark, passed, name))
        entered.add(name)
        return view, *arguments[1:]

    def leave(name: str, _: Any, __: Any, output: Any) -> None:
        if name in entered and getattr(output, "requires_grad", False):
            output.register_hook(partial(mark, reached, name))

    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # not module.weight: PEFT's wrappers return that of the inner layer
        if weight is not None and weight.dim() == 2 and not weight.requires_grad:
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        batch = trainer._prepare_inputs(trainer.data_collator([short_row(trainer.train_dataset)]))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    if blocked := sorted(reached - passed):
        raise TrainError(
            f"{len(blocked)} frozen layers pass no gradient back, so the layers below them cannot learn: "
            f"{shortened(blocked)}; set train.load_in_4bit to false"
        )


class AllocateRanks(TrainerCallback):
    """AdaLoRA's schedule (10 to 70 % of the steps) and regulariser (Zhang et al. 2023), which PEFT leaves to us."""

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
        torch.autograd.backward(self.config.orth_reg_weight * torch.stack(deviations).mean())

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.adalora.update_and_allocate(state.global_step)
