"""The files that a version may hold: a list of names, none of which leaves its folder or runs, and their contents."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from pipeline.core.files import strict_json

PARTS = ("adapter", "evaluation", "merged", "parity")
# By suffix, what may stand before it. Letters, digits, '.', '_' and '-' only: no other spelling of a name gets past.
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
# The card, and what MLflow's own loader looks for: its description and a second name of the tokenizer's files.
_FOLDERS = "|".join((*PARTS, "components/tokenizer"))
_DEVICE = r"(?!.*/(con|prn|aux|nul|com\d|lpt\d)\.)"  # on Windows
_PATTERN = re.compile(rf"{_DEVICE}({_FOLDERS})/({_FILE})|README\.md|MLmodel")
MAX_TEXT_BYTES = 256 * 2**20  # a JSON or text file; the largest tokenizer.json in use has 33 MB
MAX_TABLE_BYTES = 4 * 2**30  # a Parquet table in memory
# A link into a content-addressed cache names its bytes by their digest: DVC's (cache.type symlink) or the Hub's.
_CACHED = re.compile(r"files/md5/[0-9a-f]{2}/[0-9a-f]{30}|blobs/([0-9a-f]{40}|[0-9a-f]{64})")


class UnsafeFileError(ValueError):
    """A file that may not be shipped or loaded; the message names it and says why."""


def check_names(names: Iterable[str]) -> None:
    """Refuse names (`part/file`) that versions do not ship.

    Raises:
        UnsafeFileError: with the first such name.
    """
    for name in names:
        if not isinstance(name, str) or not _PATTERN.fullmatch(name):
            raise UnsafeFileError(
                f"{name!r} is not a file that versions ship; the list is NAMES in pipeline/core/allowlist.py"
            )


def check_file(path: Path) -> None:
    """Refuse the file `path` unless its content is what its suffix says. Reads headers of weights and tables only.

    Raises:
        UnsafeFileError: the bytes are of another type, or too many.
    """
    check_link(path)
    try:
        match path.suffix:
            case ".safetensors":
                with safe_open(path, framework="np") as file:  # no torch for a header
                    file.keys()
            case ".json":
                strict_json(_bounded(path))
            case ".parquet":
                _check_table(path)
            case ".csv" | ".jinja" | ".md" | ".txt":
                _check_text(_bounded(path))
            case ".model":  # SentencePiece begins with its first field; tiktoken's is lines of text
                if not (data := _bounded(path)).startswith(b"\n"):
                    _check_text(data)
            case "" if path.name == "MLmodel":
                _check_mlmodel(strict_json(_bounded(path)))
            case suffix:
                raise ValueError(f"files ending in {suffix or 'nothing'} are neither shipped nor loaded")
    except (SafetensorError, pa.ArrowException, ValueError, RecursionError) as error:
        kind = path.suffix.removeprefix(".")
        raise UnsafeFileError(f"{path} is not a sound {kind} file: {str(error).splitlines()[0]}") from None


def check_link(path: Path) -> None:
    """Refuse a symbolic link, unless it leads into a cache whose files are named by their digests.

    Raises:
        UnsafeFileError: it leads to a file that nobody meant to be part of a model.
    """
    if not path.is_symlink():
        return
    target = path.resolve()
    if not _CACHED.fullmatch("/".join(target.parts[-4:])) and not _CACHED.fullmatch("/".join(target.parts[-2:])):
        raise UnsafeFileError(f"{path} is a link to {target}; put the file itself there, or remove it")


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes; at most {MAX_TEXT_BYTES:,} are read into memory")
    return path.read_bytes()


def _check_text(data: bytes) -> None:
    if b"\x00" in data:
        raise ValueError("it holds a NUL byte")
    data.decode()


def _check_mlmodel(description: Any) -> None:
    """MLflow imports the module and unpickles the files that it names: only its transformers loader may be one."""
    flavors = description.get("flavors", {}) if isinstance(description, dict) else {}
    function, model = flavors.get("python_function", {}), flavors.get("transformers", {})
    known = set(flavors) <= {"python_function", "transformers"} and set(function) <= {"loader_module", "python_version"}
    if not known or function.get("loader_module") not in (None, "mlflow.transformers") or model.get("code") is not None:
        raise ValueError("it describes more than the transformers model that Retune ships")


def _check_table(path: Path) -> None:
    try:
        file = pq.ParquetFile(path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(str(error)) from None  # how pyarrow says that it cannot make sense of the bytes
    with file:
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if size > MAX_TABLE_BYTES:
            raise ValueError(f"its table has {size:,} bytes; at most {MAX_TABLE_BYTES:,} are read into memory")
        # Extension types may name Python classes; an old pyarrow unpickled them.
        for field in file.schema_arrow:
            kind = field.type.value_type if pa.types.is_list(field.type) else field.type
            named = b"ARROW:extension:name" in (field.metadata or {})
            if named or not (pa.types.is_primitive(kind) or pa.types.is_string(kind)):
                raise ValueError(f"its column {field.name!r} is of type {field.type}; expected text, numbers, or lists")
