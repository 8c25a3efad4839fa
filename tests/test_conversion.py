"""Many rows by many processes: the same rows, in the same order, as one at a time."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest

from pipeline.core.workers import WorkerError
from pipeline.data.conversion import ALONE, read_batches
from pipeline.data.formats import read_rows
from pipeline.data.json_text import FormatError
from pipeline.data.records import Rejected, Row


def many(path: Path, megabytes: int, *last: str) -> Path:
    """Alpaca rows, every hundredth one broken, ended by the lines `last`."""
    rows = ({"instruction": f"{i} 问题 " + "word " * 150, "output": "A" if i % 100 else ""} for i in range(10**9))
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes << 20:
            file.write(json.dumps(next(rows), ensure_ascii=False) + "\n")
        file.writelines(f"{line}\n" for line in last)
    return path


@pytest.mark.parametrize("megabytes", [1, 8])
def test_batches_hold_what_reading_row_by_row_gives(tmp_path: Path, megabytes: int) -> None:
    assert (megabytes > ALONE) == (megabytes == 8)  # one of them is done by other processes
    path = many(tmp_path / "rows.jsonl", megabytes, '{"instruction": "Q", "output": "A", "task": "t", "group": "g"}')
    one_by_one = list(read_rows(path))
    rows, rejected = [], []
    for batch in read_batches(path):
        for record in batch.table.drop(["content"]).to_pylist():
            rows.append(Row(**record | {"messages": json.loads(record["messages"])}))
        rejected += batch.rejected
    assert rows == [row for row in one_by_one if isinstance(row, Row)]
    assert rejected == [row for row in one_by_one if isinstance(row, Rejected)]
    assert len(rejected) > 5


def test_a_fault_found_by_another_process_is_the_same_sentence(tmp_path: Path) -> None:
    path = many(tmp_path / "rows.jsonl", 8, "{", "[]")
    lines = path.read_text().count("\n")
    with pytest.raises(FormatError, match=rf"rows.jsonl, line {lines - 1}, column 2: not JSON: .*correct or remove"):
        list(read_batches(path))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("after_s", [0, 0.002, 0.01])  # while the processes are being started
def test_a_process_killed_at_its_start_is_an_error_and_no_hang(tmp_path: Path, after_s: float) -> None:
    path = many(tmp_path / "rows.jsonl", 64)
    before = {child.pid for child in psutil.Process().children()}

    def kill() -> None:
        while True:
            for child in psutil.Process().children():
                with suppress(psutil.Error, ProcessLookupError):  # one that has just ended
                    if child.pid not in before and "spawn_main" in " ".join(child.cmdline()):
                        time.sleep(after_s)
                        os.kill(child.pid, signal.SIGKILL)
                        return

    killer = Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(WorkerError, match="ended from outside"):
        list(read_batches(path))
    killer.join()


def test_a_process_killed_at_work_is_an_error_and_no_hang(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    batches = read_batches(many(tmp_path / "rows.jsonl", 64))
    next(batches)
    workers = [
        child
        for child in psutil.Process().children()
        if child.pid not in before and "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].kill()
    with pytest.raises(WorkerError, match="ended from outside"):
        list(batches)
