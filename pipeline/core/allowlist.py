"""The files that a version may hold: a list of names, and content of the type that each name promises.

No name on the list can leave its folder, pass for another or run.
"""

import re
import struct
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
    ".json": r"adapter_config|added_tokens|config|contract|evaluation|exports|general|generation_config|"
    r"judge|metrics|model\.safetensors\.index|parity|prompts|scores|special_tokens_map|tokenizer|tokenizer_config|training|vocab",
    ".jinja": r"chat_template|additional_chat_templates/[a-z0-9][a-z0-9_-]{0,63}",
    ".model": r"tokenizer|spiece|sentencepiece\.bpe",
    ".txt": "merges|vocab",
    ".parquet": r"(general|items)\.(adapter|base)|items\.merged|judge",
    ".csv": "loss|scores|tasks",
    ".md": "README|report",
}
_FILE = "|".join(f"({stems}){re.escape(suffix)}" for suffix, stems in NAMES.items())
# The card, and what MLflow's own loader looks for: its description and a second name of the tokenizer's files.
_GGUF = "exports/gguf-(f16|bf16|q8_0)"
_FOLDERS = "|".join((*PARTS, r"exports(/bnb-[48]bit)?", _GGUF, "parity/combined_adapter", "components/tokenizer"))
_PATTERN = re.compile(rf"({_FOLDERS})/({_FILE})|{_GGUF}/model\.gguf|README\.md|MLmodel")
_DEVICE = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE
)  # files of these names are devices on Windows
MAX_TEXT_BYTES = 256 * 2**20  # a JSON or text file; the largest tokenizer.json in use has 33 MB
MAX_TABLE_BYTES = 4 * 2**30  # a Parquet table in memory
# A link into a content-addressed cache names its bytes by their digest: DVC's (cache.type symlink) or the Hub's.
_CACHED = re.compile(r"files/md5/[0-9a-f]{2}/[0-9a-f]{30}|blobs/([0-9a-f]{40}|[0-9a-f]{64})")


class UnsafeFileError(ValueError):
    """A file that may not be shipped or loaded; the message names it and says why."""


def check_names(names: Iterable[str]) -> None:
    """Refuse names (`part/file`) that versions do not ship, and two that are one on some file system.

    Raises:
        UnsafeFileError: with the first such name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not _PATTERN.fullmatch(name) or _DEVICE.match(name.rpartition("/")[2]):
            raise UnsafeFileError(
                f"{name!r} is not a file that versions ship; the list is NAMES in pipeline/core/allowlist.py"
            )
        if seen.setdefault(name.casefold(), name) != name:
            raise UnsafeFileError(
                f"{name} and {seen[name.casefold()]} differ in case alone: one would replace the other"
            )


def check_file(path: Path) -> None:
    """Refuse the file `path` unless its content is what its suffix says. Reads headers of weights and tables only.

    What `safe_open` checks of safetensors: header below 100 MB and valid JSON, known types, offsets that cover the file
    without a gap or an overlap, and shapes that give the length. Nothing of it is interpreted as code.

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
            case ".gguf":
                _check_gguf(path)
            case ".csv" | ".jinja" | ".md" | ".txt":
                _check_text(_bounded(path))
            case ".model":
                data = _bounded(path)
                if not data.startswith(b"\n"):  # SentencePiece begins with its first field; tiktoken's is lines of text
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
    if not set(flavors) <= {"python_function", "transformers"} or not set(function) <= {
        "loader_module",
        "python_version",
    }:
        raise ValueError("it describes more than the transformers model that Retune ships")
    if function.get("loader_module") not in (None, "mlflow.transformers") or model.get("code") is not None:
        raise ValueError("it names code to import")


def _check_gguf(path: Path) -> None:
    """Its head; the file is shipped for llama.cpp and never loaded here."""
    with path.open("rb") as file:
        head = file.read(24)
    magic, version, tensors, entries = struct.unpack("<4sIQQ", head) if len(head) == 24 else (b"", 0, 0, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as GGUF of version 2 or 3 does")
    if (tensors + entries) * 8 > path.stat().st_size:
        raise ValueError(f"it claims {tensors:,} tensors and {entries:,} entries, more than its size has room for")


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
