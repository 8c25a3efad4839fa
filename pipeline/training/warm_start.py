"""Where an adapter starts: afresh, from the champion's, from a published version's, or from one in a folder.

`train.init_adapter` says which; what `champion` means is pinned (`pin.py`). Refused: an adapter of another base,
another method or other settings, or whose bytes are not those named.
"""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from pipeline.files import WORK_DIR, read_json, sha256_file
from pipeline.model import PROMPT, is_whole
from pipeline.params import Params
from pipeline.security.vetting import check_adapter
from pipeline.store.artifact_store import open_store
from pipeline.training.pin import PIN
from pipeline.versions.manifest import read_manifest
from pipeline.versions.verify import fetch_signed

# What must be the same for the weights to mean the same; which modules there are, their names say.
SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens", "feedforward_modules")
NAMES = {"r": "train.lora_r", "lora_alpha": "train.lora_alpha", "num_virtual_tokens": "train.num_virtual_tokens"}


class InitError(ValueError):
    """The adapter to start from cannot be used; the message says why and what to change."""


def fetch_init(params: Params, root: Path = Path(".")) -> Path | None:
    """The folder of the adapter to start from, checked; None starts afresh.

    Raises:
        InitError: it is not there, or not the one that its digest names.
        StoreError, SignatureError: the version is damaged, or publish.require_signature is on and it is not signed.
    """
    wanted: str | None = params.train.init_adapter
    if wanted == "none":
        return None
    if wanted == "champion":
        wanted = read_json(root / PIN)["version"]
        if wanted is None:
            print("train · no champion is pinned yet (`retune run` does that): the adapter starts afresh", flush=True)
            return None
    assert wanted is not None
    if "@" in wanted:
        path, digest = wanted.rsplit("@", 1)
        weights = root / path / "adapter_model.safetensors"
        if not weights.is_file():
            raise InitError(f"train.init_adapter names {path}, which holds no adapter_model.safetensors")
        if (found := sha256_file(weights)) != digest:
            raise InitError(f"{weights} is not the one that train.init_adapter names: its sha256 is {found}")
        return root / path
    store = open_store(params.publish, root)
    manifest = read_manifest(store, wanted)
    if manifest is None:
        raise InitError(
            f"train.init_adapter is version {wanted}, which is not published in {store.uri}; `retune history` lists "
            "the versions there are"
        )
    return fetch_signed(params.publish, manifest, "adapter", root / WORK_DIR / "init" / wanted, root)


def check_init(folder: Path, contract: dict[str, Any], wanted: PeftConfig) -> None:
    """Refuse an adapter that the one `wanted` cannot start from.

    Raises:
        InitError: of another base, other classes, another method, or other settings.
        UnsafeModelError: see `check_adapter`.
    """
    if is_whole(folder):
        raise InitError(
            f"{folder} holds a whole model (train.method: full) and no adapter; name it as the base instead"
        )
    check_adapter(folder)
    theirs = read_json(folder / "contract.json")
    if theirs["model"]["digest"] != contract["model"]["digest"]:
        raise InitError(
            f"the adapter in {folder} was trained on another base: {theirs['model']['name_or_path']} (digest "
            f"{theirs['model']['digest'][:12]}), not {contract['model']['name_or_path']} (digest "
            f"{contract['model']['digest'][:12]}); set train.init_adapter to none"
        )
    if theirs.get("labels") != contract.get("labels"):
        raise InitError(f"the adapter in {folder} has other classes than the dataset; set train.init_adapter to none")
    saved = PeftConfig.from_pretrained(str(folder))
    for key in SETTINGS:
        have, want = (_plain(getattr(config, key, None)) for config in (saved, wanted))
        if have != want:
            name = NAMES.get(key, "train.method")
            raise InitError(
                f"the adapter in {folder} has {key} {have}, but {name} asks for {want}; set it alike, or "
                "train.init_adapter to none"
            )


def load_init(model: Any, folder: Path) -> None:
    """Put the weights of the adapter in `folder` into the new one of `model`.

    Raises:
        InitError: they are for other modules.
    """
    loaded = model.load_adapter(str(folder), "default", is_trainable=True)
    unexpected = [key for key in loaded.unexpected_keys if key != PROMPT]
    if loaded.missing_keys or unexpected:
        first = (list(loaded.missing_keys) + unexpected)[0]
        raise InitError(
            f"the adapter in {folder} is for other modules than train.lora_target_modules asks for (first {first}); "
            "set it alike, or train.init_adapter to none"
        )


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, set | list) else value
