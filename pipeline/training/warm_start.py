"""Starts training from an existing adapter (`train.init_adapter`): the champion's, a version's, or one in a folder.

An adapter with another base, method or other settings is refused.
"""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from pipeline.core.files import read_json
from pipeline.core.vetting import check_adapter
from pipeline.weights.loading import PROMPT, is_whole

NAMES = {"r": "train.lora_r", "lora_alpha": "train.lora_alpha", "num_virtual_tokens": "train.num_virtual_tokens"}


class InitError(ValueError):
    """The adapter to start from cannot be used; the message says what to change."""


def check_init(folder: Path, contract: dict[str, Any], config: PeftConfig) -> None:
    """Refuse the adapter in `folder` if an adapter with `config` cannot start from it."""
    if is_whole(folder):
        raise InitError(f"{folder} is a whole model, not an adapter; set prepare.model_name_or_path to it instead")
    check_adapter(folder)
    init_contract = read_json(folder / "contract.json")
    models = (init_contract["model"], contract["model"])
    if models[0]["digest"] != models[1]["digest"]:
        init_base, base = (f"{model['name_or_path']} (digest {model['digest'][:12]})" for model in models)
        raise InitError(
            f"the adapter in {folder} was trained on another base: {init_base}, not {base}; set train.init_adapter to "
            "none"
        )
    if init_contract.get("labels") != contract.get("labels"):
        raise InitError(f"the adapter in {folder} has other classes than the dataset; set train.init_adapter to none")
    saved = PeftConfig.from_pretrained(str(folder))
    # Settings that change what the weights mean. Which modules have weights is checked when they are loaded.
    variants = [key for key in vars(config) if key.startswith("use_")]
    for key in ("peft_type", *NAMES, "feedforward_modules", *variants):
        values = [getattr(settings, key, None) for settings in (saved, config)]
        if key == "feedforward_modules":
            values = [sorted(value or ()) for value in values]
        if values[0] != values[1]:
            name = NAMES.get(key, "train.method")
            actual, expected = (getattr(value, "value", value) for value in values)
            raise InitError(
                f"the adapter in {folder} has {key} {actual}, but {name} requires {expected}; change {name}, or set "
                "train.init_adapter to none"
            )


def load_init(model: Any, folder: Path) -> None:
    """Load the weights of the adapter in `folder` into the new adapter of `model`."""
    loaded = model.load_adapter(str(folder), "default", is_trainable=True, autocast_adapter_dtype=False)
    unexpected = [key for key in loaded.unexpected_keys if key != PROMPT]
    if loaded.missing_keys or unexpected:
        first = (list(loaded.missing_keys) + unexpected)[0]
        raise InitError(
            f"the adapter in {folder} has other modules than train.lora_target_modules requires (first {first}); "
            "change that, or set train.init_adapter to none"
        )
