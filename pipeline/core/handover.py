"""Runs a stage on a worker that shares no disk: git carries code, parameters and dvc.lock, the DVC remote carries data.

The parent commits its working tree on no branch and pushes it with the stage's inputs. The worker checks that commit
out in its own clone, runs the stage, pushes outputs and run cache, and answers with a commit whose `dvc.lock` has the
stage's entry. The parent merges that entry if it is for the same inputs, and fetches the outputs.
"""

import io
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.core import git, graph
from pipeline.core.files import WORK_DIR, write_text

REQUESTS, ANSWERS = "refs/retune/requests", "refs/retune/answers"
PENDING = WORK_DIR / "request"  # the commit of an open request; a killed run leaves it behind


class HandoverError(RuntimeError):
    """Inputs or outputs could not be exchanged, or the answer does not match the request."""


def request(stage: str, remote: str, root: Path = Path(".")) -> str:
    """Push the working tree as a commit, and the stage's inputs; returns the commit for the worker."""
    inputs = [name for name in graph.STAGES[: graph.STAGES.index(stage)] if name in graph.lock(root)["stages"]]
    graph.run(root, "push", "data.dvc", *inputs)
    # Untracked files, new modules included, would not reach the worker.
    deps = graph.read_yaml(root / "dvc.yaml")["stages"][stage]["deps"]
    unknown = git.run(root, "ls-files", "--others", "--exclude-standard", "--", *deps, "pipeline").splitlines()
    if missing := [path for path in unknown if path not in git.RECORDED]:
        raise HandoverError(f"{stage} depends on {missing[0]}, which git does not track; `git add` it")
    if (root / PENDING).is_file():
        forget((root / PENDING).read_text(), remote, root)
    commit = git.commit(root, f"Inputs of {stage}", ["HEAD"], tracked=True)
    write_text(root / PENDING, commit)
    git.run(root, "push", "--quiet", remote, f"{commit}:{REQUESTS}/{commit}")
    return commit


def answer(stage: str, commit: str, remote: str, on_line: Callable[[str], None], root: Path = Path(".")) -> None:
    """Check `commit` out in the worker's clone, whose checkpoints stay, run the stage, and push its outputs."""
    if git.run(root, "config", "--default", "false", "--get", "retune.worker") != "true":
        raise HandoverError(
            f"{root.resolve()} is not marked as a worker's clone, and a worker overwrites its working tree; make a "
            "separate clone, run `git config retune.worker true` in it, and set RETUNE_ROOT to its path"
        )
    git.run(root, "fetch", "--quiet", remote, f"{REQUESTS}/{commit}")
    git.run(root, "checkout", "--quiet", "--force", "--detach", commit)
    status = graph.repro(stage, on_line, root, pull=True)
    if status != 0:
        raise HandoverError(f"stage {stage} failed on this worker with status {status}; its output is above")
    graph.run(root, "push", "--run-cache", stage)
    commit_with_outputs = git.commit(root, f"{stage} has run", ["HEAD"])
    git.run(root, "push", "--quiet", "--force", remote, f"{commit_with_outputs}:{ANSWERS}/{commit}")


def accept(stage: str, commit: str, remote: str, root: Path = Path(".")) -> None:
    """Merge the stage's entry of the answer into this `dvc.lock`, and fetch its outputs."""
    git.run(root, "fetch", "--quiet", remote, f"{ANSWERS}/{commit}")
    entry = YAML(typ="safe").load(git.run(root, "show", "FETCH_HEAD:dvc.lock"))["stages"].get(stage)
    if entry is None:
        raise HandoverError(f"the worker's dvc.lock has no entry for {stage}")
    path = root / "dvc.lock"
    before = path.read_text(encoding="utf-8")
    tree, text = YAML().load(before), io.StringIO()
    tree["stages"][stage] = entry
    YAML().dump(tree, text)
    write_text(path, text.getvalue())
    try:
        graph.run(root, "pull", stage)
        if wrong := graph.stale(root).get(stage):
            raise HandoverError(f"the worker ran {stage} on other inputs than this project has: {wrong}")
    except BaseException:
        write_text(path, before)
        raise


def forget(commit: str, remote: str, root: Path = Path(".")) -> None:
    """Delete the request's and the answer's refs in the remote, which may then drop both commits."""
    if refs := git.run(root, "ls-remote", remote, f"{REQUESTS}/{commit}", f"{ANSWERS}/{commit}").split()[1::2]:
        git.run(root, "push", "--quiet", remote, *(f":{ref}" for ref in refs))
    (root / PENDING).unlink(missing_ok=True)


def make_clone(folder: Path, remote: str, root: Path = Path(".")) -> None:
    """Make a worker's clone of the project at `folder`, which fetches from the remote that the project pushes to."""
    url = git.run(root, "remote", "get-url", remote)
    if not (folder / ".git").exists():
        git.run(
            root, "clone", "--quiet", "--no-hardlinks", "--origin", remote, str(root.resolve()), str(folder.resolve())
        )
    git.run(folder, "remote", "set-url", remote, url)
    git.run(folder, "config", "retune.worker", "true")
