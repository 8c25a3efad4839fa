"""Foreign models, adapters and checkpoints, looked at before any library loads them.

Refused is what would make a loader run code, unpickle, fetch something else or read files from elsewhere. What the
loaders refuse or ignore themselves is left to them; docs/security.md says which test holds what.
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
# Settings of an adapter that import modules, fetch a tokenizer or rewrite the base; so do all that end in `_config`.
DENIED = {
    "auto_mapping", "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text", "init_weights",
    "layer_replication", "trainable_token_indices",
}  # fmt: skip
# Names of modules: PEFT takes a text, and the keys of a `…_pattern`, for regular expressions.
NAMES = (
    "target_modules", "exclude_modules", "feedforward_modules", "target_parameters", "modules_to_save",
    "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip
STATES = ("optimizer.pt", "scheduler.pt")  # pickles; the Trainer reads them with torch's weights_only alone
# training_args.bin is a whole pickle: the Trainer writes it and nothing reads it.
CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|json|jinja|md|txt|model)|optimizer(-\d+)?\.pt|scheduler\.pt|training_args\.bin"
)

_PLAIN = re.compile(r"[\w.-]+")


class UnsafeModelError(ValueError):
    """A model, adapter or checkpoint that would do more than hold weights; the message names file and key."""


def check_model(name_or_path: str, revision: str | None) -> None:
    """Refuse a base or merged model whose files ask for more than to be loaded as safetensors.

    Of a Hub model only the configurations are looked at, at the commit `revision`; `use_safetensors=True` checks its
    weights. `auto_map` is allowed: without `trust_remote_code` transformers ignores or refuses it.

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
        if (file := _find(name_or_path, name, revision)) is None:
            continue
        try:
            config = strict_json(file.read_bytes())
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
    if not isinstance(config, dict) or config.get("peft_type") not in PEFT_TYPES:
        raise UnsafeModelError(f"{where} is not of an adapter that Retune loads: {', '.join(PEFT_TYPES)}")
    if config["peft_type"].endswith("_TUNING") != bool(config.get("num_virtual_tokens")):
        raise UnsafeModelError(f"{where} has peft_type = {config['peft_type']!r}, but the settings of another method")
    for key, value in config.items():
        if value and (key in DENIED or key.endswith("_config")):
            raise UnsafeModelError(f"{where} has {key} = {value!r}; adapters are loaded only without it")
        if key in NAMES and not _are_names(value, dict if key in ("rank_pattern", "alpha_pattern") else list):
            raise UnsafeModelError(f"{where} has {key} = {value!r}; expected plain names of modules in a list")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UnsafeModelError(
            f"{where} has init_lora_weights = {config['init_lora_weights']!r}, which may change the base; expected true"
        )


def _are_names(value: Any, kind: type[list[str]] | type[dict[str, Any]]) -> bool:
    names = [value] if isinstance(value, str) else value
    plain = isinstance(value, str | kind) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in names)
    return plain or value is None


def check_checkpoint(folder: Path) -> None:
    """Refuse a training checkpoint that holds anything but what the Trainer saves.

    Raises:
        UnsafeModelError, UnsafeFileError: with the file. Delete the folder to train from the start.
    """
    for path in sorted(folder.iterdir()):
        if not CHECKPOINT_FILES.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise UnsafeModelError(f"{path} is nothing that a training saves; delete {folder} to train without it")
    try:
        if (folder / "model.safetensors").exists():
            check_model(str(folder), None)
        else:
            check_adapter(folder)
    except (UnsafeModelError, UnsafeFileError) as error:
        raise UnsafeModelError(f"{error}; delete {folder} to train without it") from None


def _find(name_or_path: str, name: str, revision: str | None) -> Path | None:
    path = cached_file(
        name_or_path,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is not None:
        return Path(path)
    known = Path(name_or_path).is_dir() or try_to_load_from_cache(name_or_path, name, revision=revision)
    if known or is_offline_mode():  # offline no loader can fetch it either
        return None
    raise UnsafeModelError(
        f"{name_or_path}: the Hub did not say whether there is a {name}, so it could not be looked at; try again when "
        "the Hub answers, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )


def _problems(name: str, config: Any) -> list[str]:
    """What in a configuration, at any depth, would have a loader do more than load."""
    if name == "model.safetensors.index.json":
        shards = config.get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        return [
            f"names the shard {shard!r}; expected .safetensors files next to it"
            for shard in names
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard
        ]
    problems = []
    for key, value in _items(config):
        if key == "quantization_config" and value is not None:
            problems.append("has a quantization_config; name the full-precision model, Retune quantises it itself")
        elif key == "transformers_weights" and value is not None:
            problems.append(f"has transformers_weights = {value!r}; weights are model.safetensors or its shards")
        elif "_implementation" in key and isinstance(value, str) and "/" in value:
            problems.append(f"has {key} = {value!r}, a kernel that would be fetched and run; remove the key")
        elif key == "fast_tokenizer_files" and any("/" in str(item) or "\\" in str(item) for item in value or []):
            problems.append(f"has {key} = {value!r}; expected names of files next to it")
    return problems


def _items(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, list):
        return [item for value in config for item in _items(value)]
    if not isinstance(config, dict):
        return []
    return [*config.items(), *(item for value in config.values() for item in _items(value))]
