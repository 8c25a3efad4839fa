"""Answers kept as they are made, so that a killed evaluation goes on where it was.

One file for each set of answers, named after all that they depend on, so that no other run takes it by mistake. Those
of the last run stay after the stage: another metric or page scores the same answers again without asking for them
again.
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
    """Where in `folder` the answers of `model` are kept (what identifies it: digests of base and adapter, …)."""
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
    """Answers by the number of their prompt (tokens, or what else JSON holds): those in `path`, and those added, of
    which each is a line there at once."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
            self.update(map(json.loads, whole.splitlines()))  # a line that a kill cut short has no end
            write_text(path, f"{whole}\n" if whole else "")

    def __setitem__(self, number: int, answer: Any) -> None:
        super().__setitem__(number, answer)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, answer]) + "\n")
