"""Saves each answer as soon as it is generated, so that a killed evaluation continues where it stopped.

Each set of answers has a file, whose name is a digest of everything that they depend on. The files of the last run stay
after the stage, so another metric or report scores the same answers without generating them again.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.core.dependencies import code_digests
from pipeline.core.files import sha256_json, write_text


def kept_file(
    folder: Path, model: dict[str, Any], prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int]
) -> Path:
    """The file in `folder` for the answers of a model, which `model` identifies (digests of base and adapter, …)."""
    name = sha256_json(
        {
            "model": model,
            "prompts": prompts,
            "max_new_tokens": max_new_tokens,
            "stop_ids": sorted(stop_ids),
            "code": code_digests("pipeline.scoring.generation"),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        }
    )
    return folder / f"{name}.jsonl"


class KeptAnswers(dict[int, Any]):
    """Answers (tokens, or any JSON) by the number of their prompt, read from `path`; a new one is appended there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            lines = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
            self.update(map(json.loads, lines.splitlines()))  # without a last line that a kill cut short
            write_text(path, f"{lines}\n" if lines else "")

    def __setitem__(self, number: int, answer: Any) -> None:
        super().__setitem__(number, answer)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, answer]) + "\n")
