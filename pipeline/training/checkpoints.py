"""Checkpoints: stored under a hash of everything that shapes the result, sealed with digests, checked before loading.

A run continues only its own checkpoints, and skips one that is unsealed or altered for the one before.
"""

import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core.dependencies import code_digests
from pipeline.core.files import read_json, sha256_file, sha256_json, write_json
from pipeline.core.vetting import check_checkpoint
from pipeline.params import TrainParams
from pipeline.training.watching import say

SEAL = "digests.json"  # {file: sha256}, written last, so an incomplete checkpoint has none
WATCH = "watch.json"  # the state of `Watch`
KEPT_DAYS = 30
WITHOUT_EFFECT = {"max_hours", "num_threads"}  # parameters that do not change the result: a run continues with others
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
Identity = dict[str, dict[str, Any]]


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def identity(params: TrainParams, dataset: Path, init: Path | None = None) -> Identity:
    """Everything that shapes a training's result, by kind."""
    return {
        "data": {path.name: sha256_file(path) for path in sorted(dataset.glob("*.parquet"))},
        "base model or template": read_json(dataset / "contract.json"),
        "parameters": params.model_dump(exclude=WITHOUT_EFFECT),
        "first weights": {} if init is None else {"adapter": sha256_file(init / "adapter_model.safetensors")},
        "code": code_digests("pipeline.train"),
        "libraries": versions(),
    }


def open_run(params: TrainParams, dataset: Path, checkpoints: Path, init: Path | None = None) -> Path:
    """The folder of this run's checkpoints; prints what differs if there are only other runs, deletes unused ones."""
    current = identity(params, dataset, init)
    folder = checkpoints / sha256_json(current)[:24]
    if not folder.exists():
        runs = sorted(checkpoints.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
        if runs:
            last, parameters = read_json(runs[-1]), current["parameters"]
            changed = [kind for kind in current if last.get(kind) != current[kind] and kind != "parameters"]
            changed += [f"train.{key}" for key in parameters if last["parameters"].get(key) != parameters[key]]
            say(f"the last checkpoints are from a run with different {', '.join(changed)}; starting from step 0")
        write_json(folder / "run.json", current)
    for run in [file.parent for file in checkpoints.glob("*/run.json")]:
        last_change = max(path.stat().st_mtime for path in [run, *run.iterdir()])
        if run != folder and time.time() - last_change > KEPT_DAYS * 86400:
            say(f"deleting {run}, which was unused for {KEPT_DAYS} days")
            shutil.rmtree(run, ignore_errors=True)
    return folder


def seal(checkpoint: Path) -> None:
    """Write the digests of a saved checkpoint's files, which makes it valid."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): sha256_file(path) for path in files})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest valid checkpoint in `folder`; prints why it skips others."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for checkpoint in newest_first:
        if not (problem := find_problem(checkpoint)):
            check_checkpoint(checkpoint)
            return checkpoint
        say(f"skipping {checkpoint}: {problem}")
    return None


def find_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used: it is incomplete or a file was altered; None if it can."""
    try:
        digests = read_json(checkpoint / SEAL)
        changed = [name for name, digest in digests.items() if sha256_file(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"it is incomplete: {error}"
    if "trainer_state.json" not in digests:
        return f"{SEAL} does not list trainer_state.json"
    return f"{changed[0]} was altered" if changed else None
