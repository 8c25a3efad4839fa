"""A promoted run as a commit: the files of `RECORDED` on a branch of their own, with a tag that names the version.

The checked-out branch, the index and the working tree stay as they are. Refused: a tree with other changes, whose
commit would not be what the version was made from.
"""

import os
import subprocess
import tempfile
from pathlib import Path

RECORDED = ("data.dvc", "dvc.lock", "init_adapter.json", "params.yaml")  # params.yaml: of a run with `changes`


class GitRecordError(RuntimeError):
    """The tree is dirty or git refuses; nothing was committed."""


def record_version(branch: str, model: str, version: str, number: str | None, root: Path = Path(".")) -> str:
    """Commit on `branch` (made from HEAD if it is not there) and tag; returns the commit, also when it was there.

    Raises:
        GitRecordError: files other than those recorded differ from HEAD, or the branch is checked out.
    """
    changed = [line[3:] for line in _git(root, "status", "--porcelain").splitlines()]
    others = [path for path in changed if path not in RECORDED]
    if others:
        shown = ", ".join(others[:3]) + " and more" * (len(others) > 3)
        raise GitRecordError(
            f"{shown} differ from the commit, so a tag would not name what {version} was made from; commit them, then "
            "`retune run`"
        )
    if _git(root, "rev-parse", "--abbrev-ref", "HEAD") == branch:
        raise GitRecordError(f"operations.git_branch is {branch}, which is checked out; name a branch of its own")
    tag = f"{model}/{f'v{number}' if number else version}"
    if known := _try(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}"):
        return known
    ref = f"refs/heads/{branch}"
    tip = _try(root, "rev-parse", "--verify", "--quiet", ref)
    head = _git(root, "rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git(root, "read-tree", "HEAD", **index)
        _git(root, "add", "--force", *(path for path in RECORDED if (root / path).exists()), **index)
        tree = _git(root, "write-tree", **index)
    parents = ["-p", tip or head, *(["-p", head] if tip and not _contains(root, tip, head) else [])]
    message = f"{tag} is champion\n\nVersion {version}."
    who = {
        f"GIT_{role}_{key}": _try(root, "config", f"user.{key.lower()}") or default
        for role in ("AUTHOR", "COMMITTER")
        for key, default in (("NAME", "retune"), ("EMAIL", "retune@localhost"))
    }
    commit = _git(root, "commit-tree", tree, *parents, "-m", message, **who)
    # Compare and swap: another run's commit is not lost.
    _git(root, "update-ref", ref, commit, tip or "0" * len(commit))
    _git(root, "tag", tag, commit)
    return commit


def _contains(root: Path, tip: str, head: str) -> bool:
    return subprocess.run(["git", "merge-base", "--is-ancestor", head, tip], cwd=root).returncode == 0


def _try(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()


def _git(root: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise GitRecordError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.rstrip()
