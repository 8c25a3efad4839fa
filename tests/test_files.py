"""Folders that appear whole or not at all, whoever else writes or reads them, and whoever is killed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import environment

from pipeline.core.files import whole_directory

WRITER = """
import sys
from pathlib import Path
from pipeline.core.files import whole_directory
with whole_directory(Path(sys.argv[1])) as folder:
    (folder / "who").write_text(sys.argv[2])
    print("begun", flush=True)
    sys.stdin.readline()
"""


def writer(target: Path, name: str) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `target`, and ends when it is told to."""
    command = [sys.executable, "-c", WRITER, str(target), name]
    child = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    return child


@pytest.mark.parametrize("there", [False, True])
def test_two_processes_that_write_one_folder_do_not_disturb_each_other(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "made" / "folder"
    if there:
        target.mkdir(parents=True)
        (target / "old").touch()
    other = writer(target, "other")
    with whole_directory(target) as folder:
        (folder / "who").write_text("me")
    assert [path.name for path in target.iterdir()] == ["who"]
    assert (target / "who").read_text() == "me"
    other.communicate("go\n")
    assert other.returncode == 0
    assert (target / "who").read_text() == "other"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_what_a_killed_writer_left_is_removed_and_the_folder_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    child = writer(target, "killed")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (target / "old").exists()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="no"), whole_directory(target):
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "old").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two renames are needed")
def test_a_reader_finds_the_folder_at_every_moment(tmp_path: Path) -> None:
    target, missing, over = tmp_path / "folder", 0, threading.Event()
    target.mkdir()

    def rewrite() -> None:
        for _ in range(300):
            with whole_directory(target):
                pass
        over.set()

    thread = threading.Thread(target=rewrite)
    thread.start()
    while not over.is_set():
        missing += not target.exists()
    thread.join()
    assert missing == 0
