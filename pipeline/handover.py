"""A stage run by a worker that shares no disk with us: git carries code, parameters and the lock, the DVC remote bytes.

The parent makes a commit of its working tree, on no branch, and pushes it with the stage's inputs; the worker checks it
out in a clone of its own, runs the stage, pushes outputs and run cache, and answers with a commit whose `dvc.lock` has
the stage's entry; the parent merges that entry and fetches the outputs. Refused: an answer for other inputs than ours.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline import graph
from pipeline.files import write_text
from pipeline.git_record import RECORDED
from pipeline.security.redact import redact

ASKED, ANSWERED = "refs/retune/asked", "refs/retune/answered"


class HandoverError(RuntimeError):
    """Inputs or outputs could not be handed over, or the answer does not belong to what was asked."""


def ask(stage: str, remote: str, root: Path = Path(".")) -> str:
    """Push the working tree as a commit, and the stage's inputs; returns the commit, which a worker is to be given.

    Raises:
        HandoverError: git or DVC could not push; the message is theirs.
    """
    inputs = [name for name in graph.STAGES[: graph.STAGES.index(stage)] if name in graph.lock(root)["stages"]]
    _dvc(root, "push", "data.dvc", *inputs)
    _refuse_untracked(stage, root)
    commit = _commit(root, f"Inputs of {stage}", changes=True)
    _git(root, "push", "--quiet", remote, f"{commit}:{ASKED}/{commit}")
    return commit


def work(stage: str, commit: str, remote: str, on_line: Callable[[str], None], root: Path = Path(".")) -> None:
    """Run the stage as the commit has it, in a clone of the worker's own, and push what came of it.

    The clone's working tree becomes that commit's; its checkpoints and caches stay, so that a stage which a dead worker
    had begun goes on.

    Raises:
        HandoverError: the stage failed, or something could not be fetched or pushed.
    """
    if _git(root, "config", "--default", "false", "--get", "retune.worker") != "true":
        raise HandoverError(
            f"{root.resolve()} is not set aside for a worker, which overwrites its working tree; give the worker a "
            "clone of its own, `git config retune.worker true` in it, and its path as RETUNE_ROOT"
        )
    _git(root, "fetch", "--quiet", remote, f"{ASKED}/{commit}")
    _git(root, "checkout", "--quiet", "--force", "--detach", commit)
    status = graph.repro(stage, on_line, root, pull=True)
    if status != 0:
        raise HandoverError(f"stage {stage} ended with status {status} on this worker; its lines are above")
    _dvc(root, "push", "--run-cache", stage)
    answer = _commit(root, f"{stage} has run", changes=False)
    _git(root, "push", "--quiet", "--force", remote, f"{answer}:{ANSWERED}/{commit}")


def take(stage: str, commit: str, remote: str, root: Path = Path(".")) -> None:
    """Merge the stage's entry of the answer into our `dvc.lock`, and fetch its outputs.

    Raises:
        HandoverError: there is no answer, or it was made from other inputs than ours.
    """
    _git(root, "fetch", "--quiet", remote, f"{ANSWERED}/{commit}")
    yaml = YAML(typ="safe")
    entry = yaml.load(_git(root, "show", "FETCH_HEAD:dvc.lock"))["stages"].get(stage)
    if entry is None:
        raise HandoverError(f"the worker's dvc.lock has no entry for {stage}")
    path = root / "dvc.lock"
    before = path.read_text(encoding="utf-8")
    _write_entry(path, stage, entry)
    try:
        _dvc(root, "pull", stage)
        wrong = graph.stale(root).get(stage)
        if wrong:
            raise HandoverError(f"the worker ran {stage} on other inputs than those here: {wrong}")
    except BaseException:
        write_text(path, before)
        raise


def forget(commit: str, remote: str, root: Path = Path(".")) -> None:
    """Remove the names that the remote has for what was asked and answered; without them it may forget both commits."""
    named = _git(root, "ls-remote", remote, f"{ASKED}/{commit}", f"{ANSWERED}/{commit}").split("\n")
    refs = [line.split("\t")[1] for line in named if line]
    if refs:
        _git(root, "push", "--quiet", remote, *(f":{ref}" for ref in refs))


def make_clone(folder: Path, remote: str, root: Path = Path(".")) -> None:
    """A worker's own clone of the project at `folder`, which fetches from where the project pushes to.

    Raises:
        HandoverError: git could not clone, or the project has no remote of that name.
    """
    url = _git(root, "remote", "get-url", remote)
    if not (folder / ".git").exists():
        _git(root, "clone", "--quiet", "--no-hardlinks", "--origin", remote, str(root.resolve()), str(folder.resolve()))
    _git(folder, "remote", "set-url", remote, url)
    _git(folder, "config", "retune.worker", "true")


def _write_entry(path: Path, stage: str, entry: dict[str, object]) -> None:
    yaml = YAML()
    tree = yaml.load(path.read_text(encoding="utf-8"))
    tree["stages"][stage] = entry
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as file:
        yaml.dump(tree, file)
        file.seek(0)
        write_text(path, file.read())


def _refuse_untracked(stage: str, root: Path) -> None:
    """Files that the stage depends on travel by git only if git knows them."""
    deps = YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "--", *deps).splitlines()
    lost = [path for path in unknown if path not in RECORDED]
    if lost:
        raise HandoverError(
            f"{stage} depends on {lost[0]}, which git does not know, so a worker lacks it; `git add` it"
        )


def _commit(root: Path, message: str, changes: bool) -> str:
    """A commit, on top of HEAD, of what runs write; with `changes` also of every other file that git knows.

    Index, branch and working tree stay. Files that git does not know are nobody else's business.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git(root, "read-tree", "HEAD", **index)
        if changes:
            _git(root, "add", "--update", **index)
        _git(root, "add", "--", *(name for name in RECORDED if (root / name).exists()), **index)
        tree = _git(root, "write-tree", **index)
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER")
           for key, value in (("NAME", "retune"), ("EMAIL", "retune@localhost"))}  # fmt: skip
    return _git(root, "commit-tree", tree, "-p", "HEAD", "-m", message, **who)


def _git(root: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise HandoverError(redact(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}"))
    return done.stdout.strip()


def _dvc(root: Path, *arguments: str) -> None:
    try:
        graph.ask(root, *arguments)
    except graph.GraphError as error:
        raise HandoverError(redact(str(error))) from None
