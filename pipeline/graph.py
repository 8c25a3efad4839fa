"""The stage graph of `dvc.yaml`, asked and run through DVC, so that every driver sees the others' work as done."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.files import sha256_json
from pipeline.process import python_ending_with_parent

STAGES = ("prepare", "train", "evaluate", "merge")
SHIPPED = ("artifacts/adapter", "artifacts/evaluation", "artifacts/merged", "artifacts/parity", "artifacts/exports")


class GraphError(RuntimeError):
    """DVC could not answer, or the workspace is not what dvc.lock records."""


def environment() -> dict[str, str]:
    """This process's environment with `retune` and DVC of this interpreter first on the PATH, for stage commands."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def repro_command(stage: str) -> list[str]:
    """Runs `stage` alone if its dependencies changed; dies with its parent and takes the stage's process with it."""
    return python_ending_with_parent("dvc", "repro", "--single-item", stage)


def outcome(lines: list[str], stage: str) -> str:
    """What a `dvc repro` of `stage` did, from what it printed: ran, restored (from the run cache) or cached."""
    if any(line.startswith(f"Running stage '{stage}'") for line in lines):
        return "ran"
    return "restored" if any("checking out outputs" in line for line in lines) else "cached"


def stale(root: Path = Path(".")) -> dict[str, Any]:
    """Stages and snapshots that `dvc status` finds changed, each with its reasons; empty when nothing is to be done.

    Raises:
        GraphError: `dvc status` fails.
    """
    changed: dict[str, Any] = json.loads(_dvc(root, "status", "--json"))
    return changed


def pull_data(root: Path = Path(".")) -> bool:
    """Put the snapshot that `data.dvc` names into `data/` when another or none is there; returns whether it was so.

    Raises:
        GraphError: no remote has it, or `data/` holds changes that no snapshot records.
    """
    if not (root / "data.dvc").exists():
        raise GraphError("data.dvc is missing; `git checkout data.dvc` restores it")
    reasons = json.loads(_dvc(root, "status", "--json", "data.dvc")).get("data.dvc", [])
    if not reasons:
        return False
    _dvc(root, "fetch", "--quiet", "data.dvc")
    try:
        # Without --force DVC replaces data that is a snapshot (data.dvc was changed by git), and no other.
        _dvc(root, "checkout", "--quiet", "data.dvc")
    except GraphError:
        raise GraphError(
            "data/ was changed by hand or by an ingest cut short, and no snapshot records it; `dvc checkout --force "
            "data.dvc` puts the recorded one back, and `retune ingest` then makes a new one from files elsewhere"
        ) from None
    return True


def add_data(root: Path = Path(".")) -> None:
    """Record what `data/` holds now as the snapshot that `data.dvc` names.

    Raises:
        GraphError: DVC could not.
    """
    _dvc(root, "add", "--quiet", "data")


def _dvc(root: Path, *arguments: str) -> str:
    # A `dvc add` that outlived a killed ingest would write data.dvc after it was put back.
    command = python_ending_with_parent("dvc", *arguments)
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise GraphError(f"`dvc {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def lock(root: Path = Path(".")) -> dict[str, Any]:
    """`dvc.lock` as plain data.

    Raises:
        GraphError: there is none, because no stage has run here.
    """
    path = root / "dvc.lock"
    if not path.exists():
        raise GraphError("dvc.lock is missing: no stage has run here; `retune run` or `dvc repro` runs them")
    tree: dict[str, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    return tree


def digests_of_outputs(stages: dict[str, Any]) -> dict[str, str]:
    """DVC's digest of each folder that a version consists of, from the stages of a `dvc.lock`.

    Raises:
        GraphError: a stage has not run.
    """
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    missing = [path for path in SHIPPED if path not in outs]
    if missing:
        raise GraphError(f"dvc.lock has no {', '.join(missing)}; `dvc repro` runs the missing stages")
    return {path: outs[path] for path in SHIPPED}


def id_of_digests(digests: dict[str, str]) -> str:
    """Name of the version with these digests: the same content has the same name on every machine."""
    return sha256_json(digests)[:16]


def version_id(root: Path = Path(".")) -> str:
    """Name of the version that the workspace's artifacts are."""
    return id_of_digests(digests_of_outputs(lock(root)["stages"]))
