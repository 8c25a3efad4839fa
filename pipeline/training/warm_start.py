"""Where an adapter starts: afresh, from the champion's, from a published version's, or from one in a folder.

`train.init_adapter` says which; what `champion` means is pinned. An adapter of another base, another method or other
settings is refused.
"""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from pipeline.core.files import read_json
from pipeline.core.vetting import check_adapter
from pipeline.weights.loading import PROMPT, is_whole

NAMES = {"r": "train.lora_r", "lora_alpha": "train.lora_alpha", "num_virtual_tokens": "train.num_virtual_tokens"}


class InitError(ValueError):
    """The adapter to start from cannot be used; the message says why and what to change."""


def check_init(folder: Path, contract: dict[str, Any], config: PeftConfig) -> None:
    """Refuse an adapter that the one of `config` cannot start from."""
    if is_whole(folder):
        raise InitError(f"{folder} holds a whole model and no adapter; name it as the base instead")
    check_adapter(folder)
    theirs = read_json(folder / "contract.json")
    if theirs["model"]["digest"] != contract["model"]["digest"]:
        base, own = (f"{m['name_or_path']} (digest {m['digest'][:12]})" for m in (theirs["model"], contract["model"]))
        raise InitError(
            f"the adapter in {folder} was trained on another base: {base}, not {own}; set train.init_adapter to none"
        )
    if theirs.get("labels") != contract.get("labels"):
        raise InitError(f"the adapter in {folder} has other classes than the dataset; set train.init_adapter to none")
    saved = PeftConfig.from_pretrained(str(folder))
    # What must be the same for the weights to mean the same; which modules there are, their names say.
    variants = [key for key in vars(config) if key.startswith("use_")]
    for key in ("peft_type", *NAMES, "feedforward_modules", *variants):
        have, want = getattr(saved, key, None), getattr(config, key, None)
        if (set(have or ()) != set(want or ())) if key == "feedforward_modules" else have != want:
            name = NAMES.get(key, "train.method")
            have, want = (getattr(value, "value", value) for value in (have, want))
            raise InitError(
                f"the adapter in {folder} has {key} {have}, but {name} asks for {want}; set it alike, or "
                "train.init_adapter to none"
            )


def load_init(model: Any, folder: Path) -> None:
    """Put the weights of the adapter in `folder` into the new one of `model`."""
    loaded = model.load_adapter(str(folder), "default", is_trainable=True)
    unexpected = [key for key in loaded.unexpected_keys if key != PROMPT]
    if loaded.missing_keys or unexpected:
        first = (list(loaded.missing_keys) + unexpected)[0]
        raise InitError(
            f"the adapter in {folder} is for other modules than train.lora_target_modules asks for (first {first}); "
            "set it alike, or train.init_adapter to none"
        )
