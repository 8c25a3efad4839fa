"""The names of files that a version may contain, and checks of contents that decide what a loader does."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.core.files import strict_json

PARTS = ("adapter", "evaluation", "merged", "parity")
# Suffix → names without it. Only letters, digits, '.', '_' and '-' occur, so a name has only one spelling.
NAMES = {
    ".safetensors": r"(adapter_)?model(-\d{5}-of-\d{5})?",
    ".json": r"adapter_config|added_tokens|config|contract|evaluation|general|generation_config|"
    r"metrics|model\.safetensors\.index|parity|prompts|scores|special_tokens_map|tokenizer|tokenizer_config|training|vocab",
    ".jinja": r"chat_template|additional_chat_templates/[a-z0-9][a-z0-9_-]{0,63}",
    ".model": r"tokenizer|spiece|sentencepiece\.bpe",
    ".txt": "merges|vocab",
    ".parquet": r"(general|items)\.(adapter|base)|items\.merged",
    ".csv": "loss|scores|tasks",
    ".md": "README|report",
}
_FILE = "|".join(f"({stems}){re.escape(suffix)}" for suffix, stems in NAMES.items())
# Also the model card, and for MLflow's loader `MLmodel` and the tokenizer's files under a second name.
_FOLDERS = "|".join((*PARTS, "components/tokenizer"))
_DEVICE = r"(?!.*/(con|prn|aux|nul|com\d|lpt\d)\.)"  # device names on Windows
_PATTERN = re.compile(rf"{_DEVICE}({_FOLDERS})/({_FILE})|README\.md|MLmodel")
# Paths in content-addressed caches, where a file's name is its digest: DVC's (cache.type symlink) and the Hub's.
_CACHED = re.compile(r"files/md5/[0-9a-f]{2}/[0-9a-f]{30}|blobs/([0-9a-f]{40}|[0-9a-f]{64})")


class UnsafeFileError(ValueError):
    """A file that may not be shipped or loaded; the message names it and says why."""


def check_names(names: Iterable[str]) -> None:
    """Refuse names (`part/file`) that versions do not ship. Raises UnsafeFileError: with the first such name."""
    for name in names:
        if not isinstance(name, str) or not _PATTERN.fullmatch(name):
            raise UnsafeFileError(f"{name!r} is not a file that versions ship (NAMES in pipeline/core/allowlist.py)")


def check_file(path: Path) -> None:
    """Raises UnsafeFileError: a link, weights that are not safetensors, ambiguous JSON, or another kind of MLmodel."""
    check_link(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:  # reads only the header, without torch
                file.keys()
        elif path.suffix == ".json":
            strict_json(path.read_bytes())
        elif path.name == "MLmodel":
            _check_mlmodel(strict_json(path.read_bytes()))
    except (SafetensorError, ValueError) as error:
        raise UnsafeFileError(f"{path} may not be loaded: {str(error).splitlines()[0]}") from None


def check_link(path: Path) -> None:
    """Refuse a symbolic link (UnsafeFileError), unless into a cache whose files are named by their digests."""
    if not path.is_symlink():
        return
    target = path.resolve()
    if not _CACHED.fullmatch("/".join(target.parts[-4:])) and not _CACHED.fullmatch("/".join(target.parts[-2:])):
        raise UnsafeFileError(f"{path} is a link to {target}; put the file itself there, or remove it")


def _check_mlmodel(description: Any) -> None:
    """Allow only MLflow's transformers loader: MLflow imports the module and unpickles the files named in MLmodel."""
    flavors = description.get("flavors", {}) if isinstance(description, dict) else {}
    function, model = flavors.get("python_function", {}), flavors.get("transformers", {})
    known = set(flavors) <= {"python_function", "transformers"} and set(function) <= {"loader_module", "python_version"}
    if not known or function.get("loader_module") not in (None, "mlflow.transformers") or model.get("code") is not None:
        raise ValueError("it asks for more than a transformers model")
