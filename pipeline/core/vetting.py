"""Checks foreign models, adapters and checkpoints before any library loads them.

Refused is whatever makes a loader run code, unpickle, download something else or read files from elsewhere. What the
loaders refuse or ignore themselves is not checked here; docs/security.md names the tests for it.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, try_to_load_from_cache
from transformers.utils.hub import cached_file

from pipeline.core.allowlist import UnsafeFileError, check_file, check_link
from pipeline.core.combinations import PEFT_TYPES
from pipeline.core.files import strict_json

CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json")
# Settings of an adapter that import modules, download a tokenizer or change the base; also all that end in `_config`.
DENIED = {
    "auto_mapping", "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text", "init_weights",
    "layer_replication", "trainable_token_indices",
}  # fmt: skip
STATES = ("optimizer.pt", "scheduler.pt")  # pickles, which the Trainer reads only with torch's weights_only
# training_args.bin is an unrestricted pickle: the Trainer writes it, and nothing reads it.
CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|json|jinja|md|txt|model)|optimizer(-\d+)?\.pt|scheduler\.pt|training_args\.bin"
)

SHARD = re.compile(r"[\w.-]+\.safetensors")


class UnsafeModelError(ValueError):
    """A model, adapter or checkpoint that would do more than hold weights; the message names file and key."""


def check_model(name_or_path: str, revision: str | None) -> None:
    """Refuse a base or merged model whose files ask for more than to be loaded as safetensors.

    Of a Hub model only the configurations at the commit `revision` are checked, because `use_safetensors=True` checks
    the weights. `auto_map` is allowed: without `trust_remote_code` transformers ignores or refuses it.

    Raises UnsafeModelError, UnsafeFileError: with the file, the key and what to do.
    """
    folder = Path(name_or_path)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        check_link(path)
        if path.suffix == ".safetensors":
            check_file(path)
        elif path.name == "adapter_config.json":
            raise UnsafeModelError(f"{folder} is an adapter, not a base model; merge it into its base first")
    for name in CONFIGS:
        if (file := _find(name_or_path, name, revision)) is not None:
            try:
                config = strict_json(file.read_bytes())
                problem = _problem(config) if isinstance(config, dict) else "is not a JSON object"
            except ValueError as error:
                problem = f"is not valid JSON: {error}"
            if problem:
                raise UnsafeModelError(f"{name_or_path}: {name} {problem}")


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that is not safetensors and plain settings. Raises UnsafeModelError, UnsafeFileError."""
    check_file(folder / "adapter_model.safetensors")
    check_file(folder / "adapter_config.json")
    check_settings(strict_json((folder / "adapter_config.json").read_bytes()), f"{folder}: adapter_config.json")


def check_settings(config: Any, where: str) -> None:
    """Refuse settings (adapter_config.json) that would do more than add weights; `train` calls this for its own, too.

    Raises UnsafeModelError: with the key, its value and what is expected.
    """
    if not isinstance(config, dict) or config.get("peft_type") not in PEFT_TYPES:
        raise UnsafeModelError(f"{where} has no peft_type that Retune loads; expected one of {', '.join(PEFT_TYPES)}")
    for key, value in config.items():
        changes_base = key == "init_lora_weights" and value not in (True, False, None, "gaussian")
        if changes_base or (value and (key in DENIED or key.endswith("_config"))):
            raise UnsafeModelError(f"{where} has {key} = {value!r}; Retune loads only adapters without it")


def check_checkpoint(folder: Path) -> None:
    """Refuse a training checkpoint with anything that the Trainer does not save. Raises UnsafeModelError."""
    try:
        for path in folder.iterdir():
            if not CHECKPOINT_FILES.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                raise UnsafeModelError(f"{path} is not a file that a training saves")
        if (folder / "model.safetensors").exists():
            check_model(str(folder), None)
        else:
            check_adapter(folder)
    except (UnsafeModelError, UnsafeFileError) as error:
        raise UnsafeModelError(f"{error}; delete {folder} to train without it") from None


def _find(name_or_path: str, name: str, revision: str | None) -> Path | None:
    quiet = {f"_raise_exceptions_for_{why}": False for why in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(name_or_path, name, revision=revision, **quiet)
    if path is not None:
        return Path(path)
    known = Path(name_or_path).is_dir() or try_to_load_from_cache(name_or_path, name, revision=revision)
    if known or is_offline_mode():  # offline no loader can fetch it either
        return None
    raise UnsafeModelError(
        f"{name_or_path}: the Hub did not say whether there is a {name}, so it could not be checked; try again when "
        "the Hub answers, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )


def _problem(config: Any) -> str | None:
    """What in a configuration or an index of shards, at any depth, would make a loader do more than load weights."""
    if isinstance(config, list):
        return next(filter(None, map(_problem, config)), None)
    if not isinstance(config, dict):
        return None
    for key, value in config.items():
        if key == "weight_map":
            shards = value.values() if isinstance(value, dict) else [value]
            if foreign := [shard for shard in shards if not SHARD.fullmatch(str(shard))]:
                return f"names the shard {foreign[0]!r}; expected .safetensors files next to it"
        elif key == "quantization_config" and value is not None:
            return "has a quantization_config; name the full-precision model, Retune quantises it itself"
        elif key == "transformers_weights" and value is not None:
            return f"has transformers_weights = {value!r}; weights are model.safetensors or its shards"
        elif "_implementation" in key and "/" in str(value):
            return f"has {key} = {value!r}, a kernel that would be downloaded and run; remove the key"
        elif problem := _problem(value):
            return problem
    return None
