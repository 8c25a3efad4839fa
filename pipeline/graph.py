"""The stage graph of `dvc.yaml`, asked and run through DVC, so that every driver sees the others' work as done."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.dvc_process import DvcError, DvcProcess
from pipeline.files import sha256_json

STAGES = ("prepare", "train", "evaluate", "merge")
SHIPPED = ("artifacts/adapter", "artifacts/evaluation", "artifacts/merged", "artifacts/parity", "artifacts/exports")


_loaded: DvcProcess | None = None


class GraphError(RuntimeError):
    """DVC could not answer, or the workspace is not what dvc.lock records."""


def load_dvc() -> None:
    """Have DVC load for the `dvc_loaded` to come."""
    global _loaded
    _loaded = _loaded or DvcProcess()
    _loaded.start()


@contextmanager
def dvc_loaded() -> Iterator[None]:
    """DVC is loaded once for everything that is asked of the graph of this folder meanwhile."""
    global _loaded
    load_dvc()
    try:
        yield
    finally:
        if _loaded is not None:
            _loaded.close()
        _loaded = None


def repro(stage: str, on_line: Callable[[str], None], root: Path = Path("."), pull: bool = False) -> int:
    """Run `stage` alone if its dependencies changed; returns the exit status of `dvc repro`.

    Args:
        on_line: gets each line that DVC and the stage print. An error in it, like a cancellation, ends them.
        pull: fetch what the stage needs and is not here.
    """
    with _dvc(root) as dvc:
        return dvc.run(["repro", "--single-item", *(["--pull"] if pull else []), stage], on_line)


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
    changed: dict[str, Any] = json.loads(ask(root, "status", "--json"))
    return changed


def pull_data(root: Path = Path(".")) -> bool:
    """Put the snapshot that `data.dvc` names into `data/` when another or none is there; returns whether it was so.

    Raises:
        GraphError: no remote has it, or `data/` holds changes that no snapshot records.
    """
    if not (root / "data.dvc").exists():
        raise GraphError("data.dvc is missing; `git checkout data.dvc` restores it")
    reasons = json.loads(ask(root, "status", "--json", "data.dvc")).get("data.dvc", [])
    if not reasons:
        return False
    ask(root, "fetch", "data.dvc")
    try:
        # Without --force DVC replaces data that is a snapshot (data.dvc was changed by git), and no other.
        ask(root, "checkout", "data.dvc")
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
    ask(root, "add", "data")


@contextmanager
def _dvc(root: Path) -> Iterator[DvcProcess]:
    """The loaded process, or one for this command alone: it ends with us, and writes nothing after a killed ingest."""
    if _loaded is not None and _loaded.root == root.resolve():
        yield _loaded
        return
    with DvcProcess(root) as dvc:
        yield dvc


def ask(root: Path, *arguments: str) -> str:
    """What a command of DVC prints.

    Raises:
        GraphError: it failed.
    """
    try:
        with _dvc(root) as dvc:
            return dvc.ask(*arguments)
    except DvcError as error:
        raise GraphError(str(error)) from None


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
