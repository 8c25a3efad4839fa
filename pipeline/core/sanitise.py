"""Removes code references (`auto_map`), local paths and user names from what leaves the machine."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pipeline.core.files import read_json, write_json

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
# Keys that name code to download and run, or the folder where the files were saved, which transformers and PEFT set
# again when they load the files.
_DROPPED = (
    "auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "is_local", "local_files_only", "_commit_hash"
)  # fmt: skip
_PATH_KEY = re.compile(r"(path|file|dir|folder|_key|_store|_uri|chat_template)$")


def clean_folder(folder: Path) -> None:
    """Rewrite the configurations in `folder` for shipping, and remove the card that PEFT fills with placeholders."""
    for name in CONFIGS:
        if (folder / name).is_file():
            write_json(folder / name, portable(_without_code(read_json(folder / name))))
    (folder / "README.md").unlink(missing_ok=True)  # its only facts are this machine's paths


def portable(value: Any) -> Any:
    """`value` (of JSON) with this machine's paths, under keys for paths or URIs, replaced by portable names."""
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: portable_name(item) if _PATH_KEY.search(key) and isinstance(item, str) else portable(item)
        for key, item in value.items()
    }


def portable_name(name: str) -> str:
    """A path as other machines may see it: Hub names and paths in the project stay, others lose their folders."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    scheme, mark, path = name.partition("://")
    if mark and scheme in ("file", "sqlite"):
        return f"{scheme}://…/{last}" if path.startswith("/") and path.count("/") > 1 else name
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    is_template = "\n" in name or "{" in name
    return last if (absolute or name.startswith(("~", ".."))) and not is_template else name


def _without_code(config: Any) -> Any:
    if isinstance(config, list):
        return [_without_code(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {key: _without_code(item) for key, item in config.items() if key not in _DROPPED}
