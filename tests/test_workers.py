"""Processes that work for another: their answers and faults come back, and their end is never waited for in vain."""

import os
import signal
import time
from concurrent.futures import wait
from pathlib import Path

import psutil
import pytest

from pipeline.core.workers import WorkerError, Workers

READY = "RETUNE_TEST_READY"


def prepare() -> None:
    os.environ[READY] = "yes"


def square(number: int) -> int:
    assert os.environ[READY] == "yes"
    return number * number


def fail(path: Path) -> None:
    raise ValueError(f"{path}: cannot be read")


class KillsItsProcess:
    """An answer whose process ends while it is being sent: more than a pipe holds is under way by then."""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return bytes, (b"",)


def die_before_answering() -> KillsItsProcess:
    return KillsItsProcess()


def answer_with_what_cannot_be_sent() -> object:
    return lambda: None


def answer_long() -> bytes:
    return bytes(1 << 24)


def test_every_call_is_answered_in_a_prepared_process() -> None:
    with Workers(prepare, 2) as workers:
        calls = [workers.submit(square, number) for number in range(50)]
        assert [call.result() for call in calls] == [number * number for number in range(50)]
        assert workers.submit(os.getpid).result() != os.getpid()


def test_what_a_call_raises_comes_back_and_the_process_goes_on() -> None:
    with Workers(prepare, 1) as workers:
        with pytest.raises(ValueError, match="^rows.jsonl: cannot be read") as raised:
            workers.submit(fail, Path("rows.jsonl")).result()
        assert "in fail" in raised.value.__notes__[0]
        assert workers.submit(square, 3).result() == 9


def test_an_answer_that_cannot_be_sent_is_an_error_and_no_death() -> None:
    with Workers(prepare, 1) as workers:
        with pytest.raises(WorkerError, match="answer_with_what_cannot_be_sent answered what cannot be sent: "):
            workers.submit(answer_with_what_cannot_be_sent).result(timeout=30)
        assert workers.submit(square, 3).result() == 9


def test_a_process_that_dies_before_or_half_way_through_its_answer_is_an_error_at_once() -> None:
    with Workers(prepare, 1) as workers, pytest.raises(WorkerError):
        workers.submit(die_before_answering).result(timeout=30)
    with Workers(prepare, 1) as workers:
        (process,) = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers.submit(square, 1).result()
        connection = workers._idle.get()  # nobody reads: the answer fills the pipe and is stuck half-way
        connection.send((answer_long, (), {}))
        assert connection.poll(30)
        process.kill()
        workers._idle.put(connection)
        call = workers.submit(square, 1)
        with pytest.raises(WorkerError):
            call.result(timeout=30)


def test_leaving_ends_calls_under_way_and_leaves_no_process() -> None:
    start = time.monotonic()
    with Workers(prepare, 2) as workers:
        calls = [workers.submit(time.sleep, 600) for _ in range(4)]
        time.sleep(0.5)
    assert time.monotonic() - start < 60
    assert not wait(calls, timeout=10).not_done
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
