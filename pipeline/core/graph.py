"""The stage graph of `dvc.yaml`, asked and run through DVC, so that every driver sees the others' work as done."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core import git
from pipeline.core.files import conflict_line, sha256_json, write_text
from pipeline.core.processes import end_group, environment, python_ending_with_parent

STAGES = ("prepare", "train", "evaluate", "merge")
SAMPLE_REMOTE = "sample"  # in .dvc/config: a folder of this git repository, for the sample's bytes and no others
SAMPLE_FOLDER = Path("infra/sample-remote")
SHIPPED = ("artifacts/adapter", "artifacts/evaluation", "artifacts/merged", "artifacts/parity")
PATIENCE = 5.0  # seconds for another DVC to be done with a path; for the whole repository DVC itself waits three


class GraphError(RuntimeError):
    """DVC could not answer, or the workspace is not what dvc.lock records."""


class SnapshotMissing(GraphError):
    """The bytes of the data snapshot are neither here nor in the DVC remote."""


def repro(stage: str, on_line: Callable[[str], None], root: Path = Path("."), pull: bool = False) -> int:
    """Run `stage` alone if its dependencies changed; returns the exit status of `dvc repro`.

    Args:
        on_line: gets each line that DVC and the stage print. An error in it, like a cancellation, ends them.
        pull: fetch what the stage needs and is not here.
    """
    with _dvc(root, "repro", "--single-item", *(["--pull"] if pull else []), stage, stderr=subprocess.STDOUT) as dvc:

        def end_leftovers() -> None:  # the next stage may need their memory, and they would keep the pipe of lines open
            dvc.wait()
            end_group(dvc, grace=5.0)

        threading.Thread(target=end_leftovers, daemon=True).start()
        assert dvc.stdout is not None
        for line in dvc.stdout:
            on_line(line.rstrip("\n"))
        return dvc.wait()


def outcome(lines: list[str], stage: str) -> str:
    """What a `dvc repro` of `stage` did, from what it printed: ran, restored (from the run cache) or cached."""
    if any(line.startswith(f"Running stage '{stage}'") for line in lines):
        return "ran"
    return "restored" if any("checking out outputs" in line for line in lines) else "cached"


def stale(root: Path = Path(".")) -> dict[str, Any]:
    """Stages and snapshots that `dvc status` finds changed, each with its reasons; empty when nothing is to be done."""
    changed: dict[str, Any] = json.loads(ask(root, "status", "--json"))
    return changed


def pull_data(root: Path = Path(".")) -> bool:
    """Put the snapshot that `data.dvc` names into `data/` when another or none is there; returns whether it was so.

    Raises:
        SnapshotMissing: neither this machine nor the DVC remote has it.
        GraphError: the remote cannot be asked, or `data/` holds changes that no snapshot records.
    """
    if not (root / "data.dvc").exists():
        raise GraphError("data.dvc is missing; `git checkout data.dvc` restores it")
    reasons = json.loads(ask(root, "status", "--json", "data.dvc")).get("data.dvc", [])
    if not reasons:
        return False
    if sharing_remote(root) is not None:
        ask(root, "fetch", "data.dvc")
    if json.loads(ask(root, "data", "status", "--json", "data")).get("not_in_cache"):
        raise SnapshotMissing(missing_snapshot(root))
    try:
        # Without --force DVC replaces data that is a snapshot (data.dvc was changed by git), and no other.
        ask(root, "checkout", "data.dvc")
    except GraphError:
        raise GraphError(
            "data/ was changed by hand or by an ingest cut short, and no snapshot records it; `dvc checkout --force "
            "data.dvc` puts the recorded one back, and `retune ingest` then makes a new one from files elsewhere"
        ) from None
    return True


def missing_snapshot(root: Path) -> str:
    """Which snapshot is lacking, where it should be, and what to do."""
    named = snapshot(root)
    size = f"{named['nfiles']} files, {named['size'] / 1e6:,.1f} MB"
    remote = sharing_remote(root)
    where = f"nor in the DVC remote {remote}" if remote else "and there is no DVC remote"
    how = "" if remote else "`dvc remote add -d team s3://BUCKET/PATH`, commits .dvc/config and runs "
    return (
        f"the data snapshot {named['md5'][:8]} of data.dvc ({size}) is not on this machine, {where}: whoever ingested "
        f"it runs {how}`dvc push data.dvc`; or `retune ingest` the rows again here"
    )


def snapshot(root: Path = Path(".")) -> dict[str, Any]:
    """What `data.dvc` says of the snapshot: md5, size in bytes, nfiles, and its remote if it has one of its own."""
    return _yaml(root / "data.dvc")["outs"][0]


def team_remote(root: Path = Path(".")) -> str | None:
    """Name of DVC's default remote, where people share what is theirs; the sample's is none."""
    default = ask(root, "config", "core.remote").strip()
    return None if default in ("", SAMPLE_REMOTE) else default


def sharing_remote(root: Path = Path(".")) -> str | None:
    """Name of the remote that has, or should have, the snapshot of `data.dvc`."""
    return snapshot(root).get("remote") or team_remote(root)


def restore_base(root: Path = Path(".")) -> str | None:
    """Put `data/base` back from the newest earlier snapshot whose bytes can be had; returns the commit that names it.

    The rows of a snapshot may be lost; the base model is the same in each until somebody changes it.
    """
    if (root / "data" / "base").exists():
        return None
    for commit in (git.ask(root, "log", "--format=%H", "-n", "20", "--", "data.dvc") or "").split():
        of_sample = f"  remote: {SAMPLE_REMOTE}" in (git.ask(root, "show", f"{commit}:data.dvc") or "").splitlines()
        url = f"url={(root / SAMPLE_FOLDER).resolve()}"  # its relative path leads nowhere from a commit
        remote = ["--remote", SAMPLE_REMOTE, "--remote-config", url] if of_sample else []
        try:
            ask(root, "get", ".", "data/base", "--rev", commit, "-o", "data/base", *remote)
            return commit
        except GraphError:
            shutil.rmtree(root / "data" / "base", ignore_errors=True)
    return None


def add_data(root: Path = Path(".")) -> None:
    """Record what `data/` holds now as the snapshot of `data.dvc`; other rows than the sample's leave its remote."""
    path = root / "data.dvc"
    before = snapshot(root) if path.exists() else {}
    ask(root, "add", "data")
    if snapshot(root)["md5"] != before.get("md5") and before.get("remote") == SAMPLE_REMOTE:
        text = path.read_text(encoding="utf-8")
        write_text(path, text.replace(f"  remote: {SAMPLE_REMOTE}\n", ""))


def ask(root: Path, *arguments: str, timeout_s: float | None = None) -> str:
    """What a command of DVC prints.

    Raises:
        GraphError: it failed, with DVC's own message, or took longer than `timeout_s`.
    """
    _refuse_conflicts(root)
    command, deadline = f"`dvc {' '.join(arguments)}`", time.monotonic() + PATIENCE
    while True:
        with _dvc(root, *arguments, stderr=subprocess.PIPE) as dvc:
            try:
                output, errors = dvc.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise GraphError(f"{command} did not answer within {timeout_s:g} s") from None
        if dvc.returncode == 0:
            return output
        if "is busy" not in errors or time.monotonic() > deadline:
            advice = "; remove .dvc/tmp/rwlock when no DVC runs here" if "RWLock-file" in errors else ""
            raise GraphError(f"{command} failed: {errors.strip() or output.strip()}{advice}")
        time.sleep(0.2)


def forget_cut_list(root: Path) -> None:
    """Remove DVC's list of who works on which path if a kill cut it short: DVC refuses to read such a list for ever."""
    path = root / ".dvc" / "tmp" / "rwlock"
    seen = None
    while path.exists() and (text := path.read_bytes()) != seen:
        try:
            json.loads(text)
            return
        except ValueError:
            seen = text
            time.sleep(0.5)  # one that a living DVC is just writing is another then
    path.unlink(missing_ok=True)


@contextmanager
def _dvc(root: Path, *arguments: str, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """A DVC process that ends with us, kill -9 included, and leaves no process of its own behind."""
    process = subprocess.Popen(
        python_ending_with_parent("dvc", *arguments),
        cwd=root,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            end_group(process, grace=30.0)


def _refuse_conflicts(root: Path) -> None:
    """Either side of a merge will do for DVC's records: a stage that it does not describe runs again."""
    for name in ("dvc.lock", "data.dvc", "dvc.yaml"):
        if line := conflict_line(root / name):
            raise GraphError(
                f"{name}, line {line}, has git's conflict markers; `git checkout --ours {name}` keeps this branch's "
                "(--theirs the other's), then `git add` it and `retune run`"
            )


def lock(root: Path = Path(".")) -> dict[str, Any]:
    """`dvc.lock` as plain data."""
    _refuse_conflicts(root)
    if not (root / "dvc.lock").exists():
        raise GraphError("dvc.lock is missing: no stage has run here; `retune run` or `dvc repro` runs them")
    return _yaml(root / "dvc.lock")


def version_id(root: Path = Path("."), stages: dict[str, Any] | None = None) -> str:
    """Name of the version that the workspace's artifacts, or those of `stages` (of a `dvc.lock`), are.

    It is made from DVC's digest of each folder that ships: the same content has the same name on every machine."""
    stages = lock(root)["stages"] if stages is None else stages
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    if missing := [path for path in SHIPPED if path not in outs]:
        raise GraphError(f"dvc.lock has no {', '.join(missing)}; `dvc repro` runs the missing stages")
    return sha256_json({path: outs[path] for path in SHIPPED})[:16]


def _yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
