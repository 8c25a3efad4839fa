"""`whole_directory` replaces a folder completely or not at all, with other writers and readers and after kills."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import environment, files_up_to

from pipeline.core.files import whole_directory, write_text

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
    """A process that has started to write `target` and finishes after a line of input."""
    command = [sys.executable, "-c", WRITER, str(target), name]
    child = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    return child


@pytest.mark.parametrize("exists", [False, True])
def test_two_processes_can_write_one_folder_and_the_last_one_wins(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "made" / "folder"
    if exists:
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


def test_leftovers_of_a_killed_writer_are_removed_and_the_folder_is_unchanged(tmp_path: Path) -> None:
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


def test_an_error_names_the_target_not_the_temporary_file_next_to_it(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250)  # a temporary name is longer, so that it cannot be created
    with pytest.raises(OSError, match=f"'{target}'$"):
        write_text(target, "")
    with pytest.raises(OSError, match=f"'{target}'$"), whole_directory(target):
        pass
    with files_up_to(10**6), pytest.raises(OSError, match=f"'{tmp_path}/full'$"):
        write_text(tmp_path / "full", "x" * 10**7)
    with pytest.raises(OSError, match=f"'{tmp_path}/folder/no/file'$"), whole_directory(tmp_path / "folder") as folder:
        (folder / "no" / "file").touch()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need two renames")
def test_the_folder_exists_at_every_moment_of_a_replacement(tmp_path: Path) -> None:
    target, missing, finished = tmp_path / "folder", 0, threading.Event()
    target.mkdir()

    def rewrite() -> None:
        for _ in range(300):
            with whole_directory(target):
                pass
        finished.set()

    thread = threading.Thread(target=rewrite)
    thread.start()
    while not finished.is_set():
        missing += not target.exists()
    thread.join()
    assert missing == 0
