"""Checkpoints of one run: kept under a hash of all that shapes its result, sealed with digests, checked before a load.

A checkpoint without a seal, or with a file that its seal does not know as it is, is passed over for the one before.
Checkpoints of another run are never continued.
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

SEAL = "digests.json"  # {file: sha256}, written last: a checkpoint that a kill cut short has none
WATCH = "watch.json"  # what `Watch` has to know of the steps before
KEPT_DAYS = 30
# They change when and where a run stops, not what comes out of it: a stopped run goes on with other values.
WITHOUT_EFFECT = {"max_hours", "num_threads"}
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
Identity = dict[str, dict[str, Any]]


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def identity(params: TrainParams, dataset: Path, init: Path | None = None) -> Identity:
    """All that shapes a training's result, by kind: data, base and template, parameters, first weights, code."""
    return {
        "data": {path.name: sha256_file(path) for path in sorted(dataset.glob("*.parquet"))},
        "base model or template": read_json(dataset / "contract.json"),
        "parameters": params.model_dump(exclude=WITHOUT_EFFECT),
        "first weights": {} if init is None else {"adapter": sha256_file(init / "adapter_model.safetensors")},
        "code": code_digests("pipeline.train"),
        "libraries": versions(),
    }


def open_run(params: TrainParams, dataset: Path, checkpoints: Path, init: Path | None = None) -> Path:
    """The folder of this run's checkpoints; says so when there are only those of a run that differs."""
    current = identity(params, dataset, init)
    folder = checkpoints / sha256_json(current)[:24]
    if not folder.exists():
        others = sorted(checkpoints.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
        if others:
            before = read_json(others[-1])
            names = [f"train.{key}" for key in current["parameters"]
                     if before["parameters"].get(key) != current["parameters"][key]]  # fmt: skip
            changed = [kind for kind in current if before.get(kind) != current[kind] and kind != "parameters"]
            what = ", ".join([*changed, *names])
            print(f"train · the last checkpoints are of a run with other {what}; this one starts afresh", flush=True)
        write_json(folder / "run.json", current)
    for path in [file.parent for file in checkpoints.glob("*/run.json")]:
        last_change = max(each.stat().st_mtime for each in [path, *path.iterdir()])
        if path != folder and time.time() - last_change > KEPT_DAYS * 86400:
            print(f"train · {path} was not touched for {KEPT_DAYS} days and is removed", flush=True)
            shutil.rmtree(path, ignore_errors=True)
    return folder


def seal(checkpoint: Path) -> None:
    """Write the digests of all files of a checkpoint that was just saved; from here on it counts."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): sha256_file(path) for path in files})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is sealed and whole; each that is not is named and passed over."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for checkpoint in newest_first:
        problem = problem_of(checkpoint)
        if problem is None:
            check_checkpoint(checkpoint)
            return checkpoint
        print(f"train · {checkpoint} is not whole ({problem}); it is passed over", flush=True)
    return None


def problem_of(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being used: no seal, no trainer's state, or a file that is not as it was saved."""
    try:
        digests = read_json(checkpoint / SEAL)
        changed = [name for name, digest in digests.items() if sha256_file(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"it was not saved to its end: {error}"
    if "trainer_state.json" not in digests:
        return f"{SEAL} does not name trainer_state.json"
    return f"{changed[0]} is not as it was saved" if changed else None
