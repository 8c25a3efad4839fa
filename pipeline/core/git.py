"""All uses of git. Commits made here have only tracked files and files of runs, and move neither index nor branch."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core.redaction import redact

CODE = ("pipeline/", "flows/", "dvc.yaml", "params.yaml")  # untracked files here count as changes
# Files that runs write; params.yaml by a run with `changes`.
RECORDED = ("data.dvc", "dvc.lock", ".dvc/init_adapter.json", "params.yaml")


class GitError(RuntimeError):
    """git failed, or the commit would not describe the version; nothing was committed."""


def run(root: Path, *arguments: str, **environment: str) -> str:
    """The output of a git command, without the final newline."""
    command = ["git", *arguments]
    git = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    if git.returncode != 0:
        raise GitError(redact(f"`git {' '.join(arguments)}` failed: {git.stderr.strip()}"))
    return git.stdout.rstrip()


def run_or_none(root: Path, *arguments: str) -> str | None:
    """The output of a git command, or None if it fails, as it does outside of a repository."""
    try:
        return run(root, *arguments)
    except GitError:
        return None


def state(root: Path, ignored: tuple[str, ...]) -> dict[str, Any]:
    """HEAD's id ("" outside of a repository), and whether files other than the `ignored` ones differ from it."""
    return {"commit": run_or_none(root, "rev-parse", "HEAD") or "", "dirty": bool(changes(root, ignored))}


def changes(root: Path, ignored: tuple[str, ...]) -> list[str]:
    """Files that differ from HEAD, except `ignored` ones, and untracked code or files that a parameter names."""
    excluded = [f":(exclude){name}" for name in ignored]
    tracked = (run_or_none(root, "diff", "--name-only", "HEAD", "--", ":/", *excluded) or "").splitlines()
    untracked = (run_or_none(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    params = YAML(typ="safe").load(root / "params.yaml") if untracked and (root / "params.yaml").exists() else {}
    named = {os.path.normpath(text) for text in _texts(params)}
    return tracked + [path for path in untracked if path.startswith(CODE) or path in named]


def _texts(tree: Any) -> list[str]:
    """Every string in a tree of YAML."""
    if isinstance(tree, dict | list):
        values = tree.values() if isinstance(tree, dict) else tree
        return [text for value in values for text in _texts(value)]
    return [tree] if isinstance(tree, str) else []


def commit(root: Path, message: str, parents: list[str], tracked: bool = False) -> str:
    """Make a commit on no branch: HEAD with the current `RECORDED` files and, if `tracked`, all tracked files."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run(root, "read-tree", "HEAD", **index)
        if tracked:
            run(root, "add", "--update", **index)
        run(root, "add", "--force", "--", *(name for name in RECORDED if (root / name).exists()), **index)
        tree = run(root, "write-tree", **index)
    author = {
        f"GIT_{role}_{key}": run_or_none(root, "config", f"user.{key.lower()}") or default
        for role in ("AUTHOR", "COMMITTER")
        for key, default in (("NAME", "retune"), ("EMAIL", "retune@localhost"))
    }
    return run(root, "commit-tree", tree, *(f"-p{parent}" for parent in parents), "-m", message, **author)


def record_version(branch: str, model: str, version: str, number: str | None, root: Path = Path(".")) -> str:
    """Commit a promoted run on `branch` (created from HEAD if missing) and tag it; returns the tag's commit.

    Raises GitError: files other than `RECORDED` differ from HEAD, so the commit would not be what the version was made
    from; or the branch is checked out.
    """
    if others := changes(root, RECORDED):
        names = ", ".join(others[:3]) + " and more" * (len(others) > 3)
        raise GitError(f"{names} differ from HEAD, so {version} was not made from it; commit them, then `retune run`")
    if run(root, "rev-parse", "--abbrev-ref", "HEAD") == branch:
        raise GitError(f"operations.git_branch is {branch}, which is checked out; name a separate branch")
    tag = f"{model}/{f'v{number}' if number else version}"
    if existing := run_or_none(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}"):
        return existing
    ref, head = f"refs/heads/{branch}", run(root, "rev-parse", "HEAD")
    tip = run_or_none(root, "rev-parse", "--verify", "--quiet", ref)
    contained = tip is not None and run_or_none(root, "merge-base", "--is-ancestor", head, tip) is not None
    parents = [head] if tip is None else [tip] if contained else [tip, head]
    new = commit(root, f"{tag} is champion\n\nVersion {version}.", parents)
    # Fails if another run has moved the branch, so that its commit is not lost.
    run(root, "update-ref", ref, new, tip or "0" * len(new))
    run(root, "tag", tag, new)
    return new
