"""The stage graph of `dvc.yaml`, queried and run through DVC, so that flow and `dvc repro` see each other's work."""

import json
import re
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
from pipeline.core.processes import end_group, environment, identity, python_ending_with_parent

STAGES = ("prepare", "train", "evaluate", "merge")
RUN = "RETUNE_RUN"  # in the environment of DVC and its stages: `identity` of the process that started DVC
SAMPLE_REMOTE = "sample"  # in .dvc/config: a folder of this git repository, for the sample's bytes and no others
SAMPLE_FOLDER = Path("infra/sample-remote")
SHIPPED = ("artifacts/adapter", "artifacts/evaluation", "artifacts/merged", "artifacts/parity")
# DVC's line for a file that it could not copy into its cache or a remote; often its exit status is 0 nevertheless.
NOT_COPIED = re.compile(
    r"(?m)^ERROR: failed to transfer '.+' - (?:\[Errno \d+\] )?(?P<why>.*?)(?:: '.*' -> '(?P<target>.*)/files/md5/.*)?$"
)
CHATTER = re.compile(r"(?m)^ERROR: (unexpected error - )?(\[Errno \d+\] )?|\s*^Having any troubles\?.*")
FULL = re.compile("(?i)no space left|is full|quota exceeded")
PATIENCE = 5.0  # seconds to wait for a path that another DVC has locked; DVC itself waits 3 s for the repository's lock


class GraphError(RuntimeError):
    """DVC failed, or the workspace does not match dvc.lock."""


class SnapshotMissing(GraphError):
    """Neither this machine nor the DVC remote has the data snapshot."""


class NotCopied(GraphError):
    """DVC could not copy a file into its cache or a remote, perhaps because the disk is full."""


def repro(stage: str, on_line: Callable[[str], None], root: Path = Path("."), pull: bool = False) -> int:
    """Run `stage` alone if its dependencies changed; returns the exit status of `dvc repro`.

    `on_line` gets each line that DVC and the stage print; if it raises (on cancellation), both are ended. `pull`: fetch
    missing dependencies from the remote. Raises NotCopied: DVC could not store the outputs; `store_results` does later.
    """
    not_copied = ""
    with _dvc(root, "repro", "--single-item", *(["--pull"] if pull else []), stage, stderr=subprocess.STDOUT) as dvc:

        def end_leftovers() -> None:  # child processes that use memory and would keep the pipe open
            dvc.wait()
            end_group(dvc, grace=5.0)

        threading.Thread(target=end_leftovers, daemon=True).start()
        assert dvc.stdout is not None
        for line in dvc.stdout:
            not_copied = not_copied or (line if NOT_COPIED.match(line) else "")
            on_line(line.rstrip("\n"))
        status = dvc.wait()
    _refuse_not_copied(not_copied, f"`dvc repro {stage}`")
    return status


def outcome(lines: list[str], stage: str) -> str:
    """What `dvc repro` did with `stage`, read from its output: ran, restored (from the run cache) or cached."""
    if any(line.startswith(f"Running stage '{stage}'") for line in lines):
        return "ran"
    return "restored" if any("checking out outputs" in line for line in lines) else "cached"


def stale(root: Path = Path(".")) -> dict[str, Any]:
    """Stages and snapshots that `dvc status` reports as changed, with its reasons; empty when all is up to date."""
    return json.loads(run(root, "status", "--json"))


def store_results(root: Path = Path(".")) -> dict[str, Any]:
    """Store what is as recorded, but had no space in DVC's full cache; returns what is `stale`. Raises NotCopied."""
    changed = stale(root)
    for name, reasons in list(changed.items()):
        if "not in cache" not in str(reasons) or "changed deps" in str(reasons):
            continue
        try:
            run(root, "commit", name)  # without --force DVC refuses if the working tree differs from its record
            del changed[name]
        except NotCopied:
            raise
        except GraphError:
            continue
    return changed


def pull_data(root: Path = Path(".")) -> bool:
    """Check out the snapshot of `data.dvc` unless `data/` already has it; returns whether anything changed.

    Data and results that are only in the working tree are stored first. Raises NotCopied, SnapshotMissing, and
    GraphError: the remote does not answer, or `data/` has changes that no snapshot records.
    """
    if not (root / "data.dvc").exists():
        raise GraphError("data.dvc is missing; `git checkout data.dvc` restores it")
    if "data.dvc" not in store_results(root):
        return False
    if sharing_remote(root) is not None:
        run(root, "fetch", "data.dvc")
    if json.loads(run(root, "data", "status", "--json", "data")).get("not_in_cache"):
        raise SnapshotMissing(missing_snapshot(root))
    try:
        # Without --force DVC overwrites only data that is some snapshot (git changed data.dvc).
        run(root, "checkout", "data.dvc")
    except GraphError:
        raise GraphError(
            "data/ has changes that no snapshot records (edited by hand, or by an interrupted ingest); `dvc checkout "
            "--force data.dvc` restores the snapshot, `retune ingest` makes a new one from files outside of data/"
        ) from None
    return True


def missing_snapshot(root: Path) -> str:
    """A sentence: which snapshot is missing, where it should be, and what to do."""
    data = snapshot(root)
    size = f"{data['nfiles']} files, {data['size'] / 1e6:,.1f} MB"
    remote = sharing_remote(root)
    where = f"and not in the DVC remote {remote}" if remote else "and there is no DVC remote"
    setup = "" if remote else "`dvc remote add -d team s3://BUCKET/PATH`, commit .dvc/config and run "
    return (
        f"the data snapshot {data['md5'][:8]} of data.dvc ({size}) is not on this machine, {where}: ask whoever "
        f"ingested it to run {setup}`dvc push data.dvc`, or ingest the rows again here with `retune ingest`"
    )


def snapshot(root: Path = Path(".")) -> dict[str, Any]:
    """The snapshot's entry in `data.dvc`: md5, size in bytes, nfiles, and perhaps its remote."""
    return read_yaml(root / "data.dvc")["outs"][0]


def team_remote(root: Path = Path(".")) -> str | None:
    """Name of DVC's default remote, where a team shares its data; None if that is the sample's or missing."""
    default = run(root, "config", "core.remote").strip()
    return None if default in ("", SAMPLE_REMOTE) else default


def sharing_remote(root: Path = Path(".")) -> str | None:
    """Name of the remote that has, or should have, the snapshot of `data.dvc`."""
    return snapshot(root).get("remote") or team_remote(root)


def restore_base(root: Path = Path(".")) -> str | None:
    """Restore `data/base` from the newest earlier snapshot that can be fetched; returns that snapshot's commit."""
    if (root / "data" / "base").exists():
        return None
    for commit in (git.run_or_none(root, "log", "--format=%H", "-n", "20", "--", "data.dvc") or "").split():
        of_sample = (
            f"  remote: {SAMPLE_REMOTE}" in (git.run_or_none(root, "show", f"{commit}:data.dvc") or "").splitlines()
        )
        url = f"url={(root / SAMPLE_FOLDER).resolve()}"  # DVC cannot resolve the relative path for an older commit
        remote = ["--remote", SAMPLE_REMOTE, "--remote-config", url] if of_sample else []
        try:
            run(root, "get", ".", "data/base", "--rev", commit, "-o", "data/base", *remote)
            return commit
        except GraphError:
            shutil.rmtree(root / "data" / "base", ignore_errors=True)
    return None


def add_data(root: Path = Path(".")) -> None:
    """Record `data/` as the new snapshot of `data.dvc`; only the sample itself stays in the sample's remote."""
    path = root / "data.dvc"
    before = snapshot(root) if path.exists() else {}
    run(root, "add", "data")
    if snapshot(root)["md5"] != before.get("md5") and before.get("remote") == SAMPLE_REMOTE:
        text = path.read_text(encoding="utf-8")
        write_text(path, text.replace(f"  remote: {SAMPLE_REMOTE}\n", ""))


def run(root: Path, *arguments: str, timeout_s: float | None = None) -> str:
    """The output of a DVC command. Raises GraphError (with DVC's own message, or after `timeout_s`) and NotCopied."""
    _refuse_conflicts(root)
    command, deadline = f"`dvc {' '.join(arguments)}`", time.monotonic() + PATIENCE
    while True:
        with _dvc(root, *arguments, stderr=subprocess.PIPE) as dvc:
            try:
                output, errors = dvc.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise GraphError(f"{command} did not answer within {timeout_s:g} s") from None
        _refuse_not_copied(errors, command)
        if dvc.returncode == 0:
            return output
        if "is busy" not in errors or time.monotonic() > deadline:
            reason = CHATTER.sub("", errors).strip() or output.strip()
            raise GraphError(f"{command} failed: {reason}{_advice(errors)}")
        time.sleep(0.2)


def _refuse_not_copied(output: str, command: str) -> None:
    """Raises NotCopied: `output` has DVC's line for a file that it could not copy."""
    if failed := NOT_COPIED.search(output):
        target = f" to {failed['target']}" if failed["target"] else ""
        raise NotCopied(f"{command} could not copy every file{target}: {failed['why']}{_advice(failed['why'])}")


def _advice(reason: str) -> str:
    """What to do about `reason`, if it is known."""
    if "RWLock-file" in reason:
        return "; if no DVC is running here, remove .dvc/tmp/rwlock"
    return "; free space (docs/operations.md, The disk is full), then try again" if FULL.search(reason) else ""


def remove_truncated_locks(root: Path) -> None:
    """Remove DVC's list of path locks if a kill truncated it; otherwise every later DVC command would fail."""
    path = root / ".dvc" / "tmp" / "rwlock"
    previous = None
    while path.exists() and (text := path.read_bytes()) != previous:
        try:
            json.loads(text)
            return
        except ValueError:
            previous = text
            time.sleep(0.5)  # if a running DVC is writing it, it changes in this time
    path.unlink(missing_ok=True)


@contextmanager
def _dvc(root: Path, *arguments: str, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """A DVC process that ends with this one, kill -9 included, and leaves no child processes behind."""
    process = subprocess.Popen(
        python_ending_with_parent("dvc", *arguments), cwd=root, env=environment() | {RUN: identity()},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            end_group(process, grace=30.0)


def _refuse_conflicts(root: Path) -> None:
    """Raises GraphError: a file has merge conflicts. Either side is fine, because DVC reruns stages that changed."""
    for name in ("dvc.lock", "data.dvc", "dvc.yaml"):
        if line := conflict_line(root / name):
            raise GraphError(
                f"{name}, line {line}, has git's conflict markers; `git checkout --ours {name}` keeps this branch's "
                "version (--theirs the other's), then `git add` it and `retune run`"
            )


def lock(root: Path = Path(".")) -> dict[str, Any]:
    """`dvc.lock` as plain data."""
    _refuse_conflicts(root)
    if not (root / "dvc.lock").exists():
        raise GraphError("dvc.lock is missing: no stage has run here; start with `retune run` or `dvc repro`")
    return read_yaml(root / "dvc.lock")


def version_id(root: Path = Path("."), stages: dict[str, Any] | None = None) -> str:
    """Id of the version that the workspace's artifacts make up, or those of `stages` (from a `dvc.lock`).

    It is a hash of DVC's digests of the folders that ship, so equal content has the same id on every machine.
    """
    stages = lock(root)["stages"] if stages is None else stages
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    if missing := [path for path in SHIPPED if path not in outs]:
        raise GraphError(f"dvc.lock has no {', '.join(missing)}; `dvc repro` runs the missing stages")
    return sha256_json({path: outs[path] for path in SHIPPED})[:16]


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
