"""A promoted run is a commit on a separate branch; the checked-out files do not change."""

from pathlib import Path

import pytest
from conftest import git

from pipeline.core.git import GitError, record_version


@pytest.fixture
def root(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    for name in ("data.dvc", "dvc.lock", "params.yaml"):
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "start")
    return tmp_path


def test_each_version_is_a_commit_and_a_tag_and_the_checkout_stays(root: Path) -> None:
    head = git(root, "rev-parse", "HEAD")
    (root / "dvc.lock").write_text("second\n")
    first = record_version("retune/champions", "model", "abc", "1", root)
    assert git(root, "show", "model/v1:dvc.lock") == "second"
    assert (git(root, "rev-parse", "HEAD"), git(root, "branch", "--show-current")) == (head, "main")
    assert git(root, "status", "--porcelain").split() == ["M", "dvc.lock"]
    assert record_version("retune/champions", "model", "abc", "1", root) == first
    git(root, "commit", "-qam", "by hand")
    (root / "dvc.lock").write_text("third\n")
    second = record_version("retune/champions", "model", "def", "2", root)
    assert git(root, "rev-parse", "retune/champions") == second
    ancestors = git(root, "rev-list", second).split()
    assert {first, git(root, "rev-parse", "HEAD")} < set(ancestors)


def test_a_dirty_tree_or_the_checked_out_branch_is_refused(root: Path) -> None:
    with pytest.raises(GitError, match="which is checked out"):
        record_version("main", "model", "abc", "1", root)
    (root / "dvc.yaml").write_text("changed\n")
    with pytest.raises(GitError, match=r"dvc\.yaml differ from HEAD"):
        record_version("retune/champions", "model", "abc", "1", root)
    assert git(root, "tag") == ""
    assert git(root, "branch", "--format=%(refname:short)") == "main"


def test_the_runs_parameters_are_in_the_commit(root: Path) -> None:
    (root / "params.yaml").write_text("changed\n")
    record_version("retune/champions", "model", "abc", "1", root)
    assert git(root, "show", "model/v1:params.yaml") == "changed"
