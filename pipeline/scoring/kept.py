"""Answers kept as they are made, so that a killed evaluation goes on where it was.

One file for each set of answers, named after all that they depend on, so that no other run takes it by mistake. Those
of the last run stay after the stage: another metric or page scores the same answers again without asking for them
again.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

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


class KeptAnswers:
    """Answers by the number of their prompt (tokens, or what else JSON holds): those in `path`, and those added."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.answers: dict[int, Any] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> "KeptAnswers":
        if self.path is not None:
            whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0] if self.path.exists() else ""
            for line in whole.splitlines():  # a line that a kill cut short has no end
                number, ids = json.loads(line)
                self.answers[number] = ids
            write_text(self.path, f"{whole}\n" if whole else "")
            self._file = self.path.open("a", encoding="utf-8")
        return self

    def add(self, number: int, answer: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps([number, answer]) + "\n")
            self._file.flush()  # to the kernel: enough for a kill, and quick

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
