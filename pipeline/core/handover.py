"""A stage run by a worker that shares no disk with us: git carries code, parameters and the lock, the DVC remote bytes.

The parent makes a commit of its working tree, on no branch, and pushes it with the stage's inputs; the worker checks it
out in a clone of its own, runs the stage, pushes outputs and run cache, and answers with a commit whose `dvc.lock` has
the stage's entry; the parent merges that entry, if it is for the same inputs, and fetches the outputs.
"""

import io
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.core import git, graph
from pipeline.core.files import WORK_DIR, write_text

ASKED, ANSWERED = "refs/retune/asked", "refs/retune/answered"
PENDING = WORK_DIR / "asked"  # the commit of a request that was not taken back; a killed run leaves it


class HandoverError(RuntimeError):
    """Inputs or outputs could not be handed over, or the answer does not belong to what was asked."""


def ask(stage: str, remote: str, root: Path = Path(".")) -> str:
    """Push the working tree as a commit, and the stage's inputs; returns the commit, which a worker is to be given."""
    inputs = [name for name in graph.STAGES[: graph.STAGES.index(stage)] if name in graph.lock(root)["stages"]]
    graph.ask(root, "push", "data.dvc", *inputs)
    # What the stage depends on, new modules included, travels by git only if git knows it.
    deps = YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    unknown = git.run(root, "ls-files", "--others", "--exclude-standard", "--", *deps, "pipeline").splitlines()
    if missing := [path for path in unknown if path not in git.RECORDED]:
        raise HandoverError(f"{stage} depends on {missing[0]}, which git does not know; `git add` it")
    if (root / PENDING).is_file():
        forget((root / PENDING).read_text(), remote, root)
    commit = git.commit(root, f"Inputs of {stage}", ["HEAD"], tracked=True)
    write_text(root / PENDING, commit)
    git.run(root, "push", "--quiet", remote, f"{commit}:{ASKED}/{commit}")
    return commit


def work(stage: str, commit: str, remote: str, on_line: Callable[[str], None], root: Path = Path(".")) -> None:
    """Run the stage as the commit has it, in a clone of the worker's own, and push what came of it.

    The clone's working tree becomes that commit's; its checkpoints and caches stay, so that a stage which a dead worker
    had begun goes on.

    Raises:
        GitError, GraphError, HandoverError: the stage failed, or something could not be fetched or pushed.
    """
    if git.run(root, "config", "--default", "false", "--get", "retune.worker") != "true":
        raise HandoverError(
            f"{root.resolve()} is not set aside for a worker, which overwrites its working tree; give the worker a "
            "clone of its own, `git config retune.worker true` in it, and its path as RETUNE_ROOT"
        )
    git.run(root, "fetch", "--quiet", remote, f"{ASKED}/{commit}")
    git.run(root, "checkout", "--quiet", "--force", "--detach", commit)
    status = graph.repro(stage, on_line, root, pull=True)
    if status != 0:
        raise HandoverError(f"stage {stage} ended with status {status} on this worker; its lines are above")
    graph.ask(root, "push", "--run-cache", stage)
    answer = git.commit(root, f"{stage} has run", ["HEAD"])
    git.run(root, "push", "--quiet", "--force", remote, f"{answer}:{ANSWERED}/{commit}")


def take(stage: str, commit: str, remote: str, root: Path = Path(".")) -> None:
    """Merge the stage's entry of the answer into our `dvc.lock`, and fetch its outputs."""
    git.run(root, "fetch", "--quiet", remote, f"{ANSWERED}/{commit}")
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
        graph.ask(root, "pull", stage)
        wrong = graph.stale(root).get(stage)
        if wrong:
            raise HandoverError(f"the worker ran {stage} on other inputs than those here: {wrong}")
    except BaseException:
        write_text(path, before)
        raise


def forget(commit: str, remote: str, root: Path = Path(".")) -> None:
    """Remove the names that the remote has for what was asked and answered; without them it may forget both commits."""
    named = git.run(root, "ls-remote", remote, f"{ASKED}/{commit}", f"{ANSWERED}/{commit}").split("\n")
    refs = [line.split("\t")[1] for line in named if line]
    if refs:
        git.run(root, "push", "--quiet", remote, *(f":{ref}" for ref in refs))
    (root / PENDING).unlink(missing_ok=True)


def make_clone(folder: Path, remote: str, root: Path = Path(".")) -> None:
    """A worker's own clone of the project at `folder`, which fetches from where the project pushes to."""
    url = git.run(root, "remote", "get-url", remote)
    if not (folder / ".git").exists():
        git.run(
            root, "clone", "--quiet", "--no-hardlinks", "--origin", remote, str(root.resolve()), str(folder.resolve())
        )
    git.run(folder, "remote", "set-url", remote, url)
    git.run(folder, "config", "retune.worker", "true")
