"""Foreign models, adapters and checkpoints, looked at before any library loads them.

Refused is what would make a loader run code, unpickle, fetch something else or read files from elsewhere. What the
loaders refuse or ignore themselves is left to them; docs/security.md says which test holds what.
"""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from transformers.utils.hub import cached_file

from pipeline.core.allowlist import check_file, check_link
from pipeline.core.files import strict_json

CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json")
METHODS = ("LORA", "IA3", "ADALORA", "PREFIX_TUNING", "PROMPT_TUNING")
# Settings of an adapter that import modules, fetch a tokenizer or rewrite the base; so do all that end in `_config`.
DENIED = (
    "auto_mapping",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prompt_tuning_init_text",
    "init_weights",
    "layer_replication",
    "trainable_token_indices",
)
# Names of modules: PEFT takes a text, and the keys of a `…_pattern`, for regular expressions.
NAMES = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "target_parameters",
    "modules_to_save",
    "layers_pattern",
)
PATTERNS = ("rank_pattern", "alpha_pattern")
STATES = ("optimizer.pt", "scheduler.pt")  # written by torch.save, so pickles
# training_args.bin is a whole pickle: the Trainer writes it and nothing reads it.
CHECKPOINT_SUFFIXES = {".safetensors", ".json", ".jinja", ".md", ".txt", ".model"}
_PLAIN = re.compile(r"[\w.]+")


class UnsafeModelError(ValueError):
    """A model, adapter or checkpoint that would do more than hold weights; the message names file and key."""


def check_model(name_or_path: str, revision: str | None) -> None:
    """Refuse a base or merged model whose files ask for more than to be loaded as safetensors.

    Of a Hub model only the configurations are looked at, at the commit `revision`; its weights are checked by
    `use_safetensors=True` and the library itself. `auto_map` is allowed: without `trust_remote_code` it is ignored for
    architectures that transformers has, and refused by transformers for others.

    Raises:
        UnsafeModelError, UnsafeFileError: with file, key and way out.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise UnsafeModelError(
                f"{folder} holds an adapter_config.json; a base model is whole: merge the adapter first"
            )
        for path in sorted(folder.iterdir()):
            check_link(path)
            if path.suffix == ".safetensors":
                check_file(path)
    for name in CONFIGS:
        found = _find(name_or_path, name, revision)
        if found is None:
            continue
        try:
            config = strict_json(found.read_bytes())
        except ValueError as error:
            raise UnsafeModelError(f"{name_or_path}: {name} is not sound JSON: {error}") from None
        if not isinstance(config, dict):
            raise UnsafeModelError(f"{name_or_path}: {name} holds a {type(config).__name__}; expected an object")
        for problem in _problems(name, config):
            raise UnsafeModelError(f"{name_or_path}: {name} {problem}")


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that is not safetensors and plain settings.

    Raises:
        UnsafeModelError, UnsafeFileError: with file, key and way out.
    """
    check_file(folder / "adapter_model.safetensors")
    check_file(folder / "adapter_config.json")
    check_settings(strict_json((folder / "adapter_config.json").read_bytes()), f"{folder}: adapter_config.json")


def check_settings(config: Any, where: str) -> None:
    """Refuse an adapter's settings (an adapter_config.json) that would do more than place weights; `train` asks it too.

    Raises:
        UnsafeModelError: with the key, its value and what is expected.
    """
    if not isinstance(config, dict) or config.get("peft_type") not in METHODS:
        raise UnsafeModelError(f"{where} is not of an adapter that Retune loads: {', '.join(METHODS)}")
    if config["peft_type"].endswith("_TUNING") != bool(config.get("num_virtual_tokens")):
        raise UnsafeModelError(f"{where} has peft_type = {config['peft_type']!r}, but the settings of another method")
    for key in (*DENIED, *(key for key in config if key.endswith("_config"))):
        if config.get(key):
            raise UnsafeModelError(f"{where} has {key} = {config[key]!r}; adapters are loaded only without it")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UnsafeModelError(
            f"{where} has init_lora_weights = {config['init_lora_weights']!r}, which may change the base; expected true"
        )
    for key in (*NAMES, *PATTERNS):
        value = config.get(key)
        expected = list if key in NAMES else dict
        plain = isinstance(value, expected) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in value)
        if not (plain or value is None or (key, value) == ("target_modules", "all-linear")):
            raise UnsafeModelError(f"{where} has {key} = {value!r}; expected plain names of modules in a list")


def check_checkpoint(folder: Path) -> None:
    """Refuse a training checkpoint that holds anything but what the Trainer saves of an adapter.

    The states are pickles; they are read here as the Trainer reads them, with torch's restricted unpickler, which knows
    tensors, numbers and containers and calls nothing else.

    Raises:
        UnsafeModelError: there is more in it. Delete the folder to train from the start.
        UnsafeFileError, OSError, RuntimeError, EOFError: a file is cut short, as after a kill.
    """
    for path in sorted(folder.iterdir()):
        known = path.suffix in CHECKPOINT_SUFFIXES or path.name in (*STATES, "training_args.bin")
        if not known or path.is_symlink() or not path.is_file():
            raise UnsafeModelError(f"{path} is nothing that a training saves; delete {folder} to train without it")
    try:
        if (folder / "model.safetensors").exists():
            check_model(str(folder), None)
        else:
            check_adapter(folder)
    except UnsafeModelError as error:
        raise UnsafeModelError(f"{error}; delete {folder} to train without it") from None
    for name in STATES:
        try:
            torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":  # its module may not be imported here
                raise
            raise UnsafeModelError(
                f"{folder / name} holds more than tensors and numbers, so this training did not write it; delete "
                f"{folder} to train without it"
            ) from None


def _find(name_or_path: str, name: str, revision: str | None) -> Path | None:
    found = cached_file(
        name_or_path,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        return Path(found)
    known = Path(name_or_path).is_dir() or try_to_load_from_cache(name_or_path, name, revision=revision)
    if not known and not is_offline_mode():  # offline no loader can fetch it either
        raise UnsafeModelError(
            f"{name_or_path}: the Hub did not say whether there is a {name}, so it could not be looked at; try again "
            "when the Hub answers, or set HF_HUB_OFFLINE=1 to use what is in the cache"
        )
    return None


def _problems(name: str, config: Any) -> list[str]:
    """What in a configuration, at any depth, would have a loader do more than load."""
    found = []
    if name == "model.safetensors.index.json":
        shards = config.get("weight_map")
        for shard in set(shards.values()) if isinstance(shards, dict) else {None}:
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
                found.append(f"names the shard {shard!r}; expected .safetensors files beside it")
        return found
    for key, value in _items(config):
        if key == "quantization_config" and not _is_own_export(value):
            found.append("has a quantization_config; name the full-precision model, Retune quantises it itself")
        elif key == "transformers_weights" and value is not None:
            found.append(f"has transformers_weights = {value!r}; weights are model.safetensors or its shards")
        elif "_implementation" in key and isinstance(value, str) and "/" in value:
            found.append(f"has {key} = {value!r}, a kernel that would be fetched and run; remove the key")
        elif key == "fast_tokenizer_files" and any("/" in str(item) or "\\" in str(item) for item in value or []):
            found.append(f"has {key} = {value!r}; expected names of files beside it")
    return found


def _items(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, list):
        return [item for value in config for item in _items(value)]
    if not isinstance(config, dict):
        return []
    return [*config.items(), *(item for value in config.values() for item in _items(value))]


def _is_own_export(value: Any) -> bool:
    """Whether weights are stored as `merge.export` stores them; nothing else is read as quantised."""
    return value is None or (isinstance(value, dict) and value.get("quant_method") == "bitsandbytes")
