"""Publishing while things break: whatever fails or dies, no torn version is seen, and the next attempt reaches the end.

A few of the faults by default; all of them, at every request and at random moments, with `make test-faults`.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep  # not the quicker one of `quick`

import pytest
from conftest import publish_params
from fault_proxy import FAULTS, KILLS, FaultProxy

from pipeline.store import transfer
from pipeline.store.artifact_store import ArtifactStore, FileStore, StoreError, open_store
from pipeline.store.s3 import S3Store
from pipeline.store.transfer import check_objects, fetch, ship


def long(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.faults(pytest.mark.timeout(3600)(test))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of 64 KiB, so that few bytes make many; a twentieth of the pauses between attempts."""
    monkeypatch.setattr(transfer, "OBJECT_SIZE", 2**16)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: sleep(seconds / 20))


@pytest.fixture
def proxy(swift_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(int(swift_server.rpartition(":")[2])) as proxy:
        yield proxy


def s3_store(proxy: FaultProxy, prefix: str) -> S3Store:
    params = publish_params(f"s3://retune/{prefix}", endpoint_url=proxy.url, addressing_style="path", max_concurrency=1)
    return S3Store(params, read_timeout_s=1)


def some_files(folder: Path, change: int) -> dict[str, Path]:
    """A small file, one twice, and a big one of which each version changes a little."""
    folder.mkdir(parents=True, exist_ok=True)
    model = bytearray(random.Random(1).randbytes(200_000))
    model[change * 9_000] ^= change
    content = {"adapter/config.json": b"{}" * change, "evaluation/a": b"same", "evaluation/b": b"same"}
    content["merged/model.safetensors"] = bytes(model)
    for name, data in content.items():
        path = folder / name.replace("/", "-")
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    return {name: folder / name.replace("/", "-") for name in content}


def publish(store: ArtifactStore, folder: Path, change: int) -> None:
    ship(store, f"v{change}", some_files(folder, change), lambda entries: json.dumps({"files": entries}).encode())


def versions(store: ArtifactStore, folder: Path) -> dict[str, bytes]:
    """The manifest of every version that can be seen; each is whole, down to the last byte."""
    found = {}
    for key in store.list("versions/"):
        text = store.read(key) or b""
        entries = json.loads(text)["files"]
        check_objects(store, entries)
        out = folder / uuid.uuid4().hex
        fetch(store, entries, out)
        files = some_files(folder / "expected" / key.split("/")[1], int(key.split("/")[1][1:]))
        assert all((out / name).read_bytes() == files[name].read_bytes() for name in files)
        found[key] = text
    return found


def in_a_child(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own; returns its id. It ends with status 0 unless it fails or is killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait_for(child: int) -> int:
    """How the child ended: 0, 1, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Calm:
    """What a publish of the second version comes to when nothing goes wrong."""

    def __init__(self, proxy: FaultProxy, folder: Path) -> None:
        proxy.plan = lambda number, line: None
        store = s3_store(proxy, uuid.uuid4().hex)
        publish(store, folder / "in", 1)
        first = len(proxy.seen)
        publish(s3_store(proxy, store.prefix), folder / "in", 2)
        self.requests = len(proxy.seen) - first
        self.versions = versions(store, folder)
        self.objects = store.list("objects/")
        assert self.requests > 12


def test_a_fault_at_some_request_of_a_publish_changes_nothing_of_its_result(proxy: FaultProxy, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    calm = Calm(proxy, tmp_path)
    publish_with(proxy, tmp_path, calm, draw.choice(FAULTS), draw.randrange(calm.requests))


@long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_request_of_a_publish_changes_nothing_of_its_result(
    proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    calm = Calm(proxy, tmp_path)
    for index in range(calm.requests):
        assert publish_with(proxy, tmp_path, calm, fault, index)


@long
@pytest.mark.parametrize("fault", ["reset", "lost", "500", "stall", "403:AccessDenied"])
def test_a_fault_that_stays_is_a_clear_error_and_the_next_attempt_reaches_the_end(
    proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    calm = Calm(proxy, tmp_path)
    for index in range(0, calm.requests - 3, 2):  # without the last two, a publish is done
        assert not publish_with(proxy, tmp_path, calm, fault, index, lasting=True)


def publish_with(proxy: FaultProxy, folder: Path, calm: Calm, fault: str, index: int, lasting: bool = False) -> bool:
    """The second version meets a fault at its request `index`, or from there on; the end is as without.

    Returns whether it came to its end at the first attempt.
    """
    proxy.plan = lambda number, line: None
    store = s3_store(proxy, uuid.uuid4().hex)
    publish(store, folder / "in", 1)
    first = len(proxy.seen)
    store = s3_store(proxy, store.prefix)  # as a new process would

    def plan(number: int, line: str) -> str | None:
        hit = number == first + index or (lasting and number > first + index)
        return fault if hit and (line.startswith("PUT") or "Conflict" not in fault) else None  # only writes conflict

    proxy.plan = plan
    error = None
    try:
        publish(store, folder / "in", 2)
    except StoreError as raised:
        error = raised
    print(fault, index, error)
    assert "\n" not in str(error)
    proxy.plan = lambda number, line: None
    seen = versions(store, folder)
    assert seen.items() <= calm.versions.items()
    if error is not None:
        publish(store, folder / "in", 2)
        seen = versions(store, folder)
    assert seen == calm.versions
    assert store.list("objects/") == calm.objects
    return error is None


@long
@pytest.mark.parametrize("how", KILLS)
def test_a_kill_at_any_request_of_a_publish_leaves_nothing_torn(proxy: FaultProxy, tmp_path: Path, how: str) -> None:
    for index in range(Calm(proxy, tmp_path).requests):
        proxy.plan = lambda number, line: None
        prefix = uuid.uuid4().hex
        publish(s3_store(proxy, prefix), tmp_path / "in", 1)
        first = len(proxy.seen)
        proxy.plan = lambda number, line, at=first + index: how if number == at else None  # type: ignore[misc]
        child = in_a_child(lambda prefix=prefix: publish(s3_store(proxy, prefix), tmp_path / "in", 2))  # type: ignore[misc]
        proxy.on_kill = lambda child=child: os.kill(child, signal.SIGKILL)  # type: ignore[misc]
        assert wait_for(child) == -signal.SIGKILL
        proxy.plan = lambda number, line: None
        store = s3_store(proxy, prefix)
        versions(store, tmp_path)
        publish(store, tmp_path / "in", 2)
        assert len(versions(store, tmp_path)) == 2


@long
def test_kills_at_random_times_of_a_publish_to_s3_leave_nothing_torn(proxy: FaultProxy, tmp_path: Path) -> None:
    kill_at_random(lambda prefix: s3_store(proxy, prefix), tmp_path, kills=60, seed=0)


@long
def test_kills_at_random_times_of_a_publish_to_a_folder_leave_nothing_torn(tmp_path: Path) -> None:
    kill_at_random(lambda prefix: FileStore(tmp_path / prefix), tmp_path, kills=1000, seed=1)


def kill_at_random(open_: Callable[[str], ArtifactStore], folder: Path, kills: int, seed: int) -> None:
    print("seed", seed)
    draw = random.Random(seed)
    longest = 0.0
    for change in (1, 2):  # the second one also reads what the first one left
        started = time.monotonic()
        assert wait_for(in_a_child(lambda: publish(open_("timing"), folder / f"in{change}", change))) == 0  # noqa: B023
        longest = max(longest, time.monotonic() - started)
    killed = finished = change = 0
    prefix = ""
    while killed < kills:
        if change % 6 == 0:
            prefix = uuid.uuid4().hex  # a new store now and then: its beginning is killed too
        change = change % 6 + 1
        some_files(folder / f"in{change}", change)
        while True:
            child = in_a_child(lambda: publish(open_(prefix), folder / f"in{change}", change))  # noqa: B023
            sleep(draw.uniform(0, 1.2 * longest))
            os.kill(child, signal.SIGKILL)
            status = wait_for(child)
            killed += status == -signal.SIGKILL
            finished += status == 0
            assert status in (0, -signal.SIGKILL)
            store = open_(prefix)
            seen = versions(store, folder)
            assert len(seen) in (change - 1, change)
            if draw.random() < 0.3:
                publish(store, folder / f"in{change}", change)
                seen = versions(store, folder)
            if len(seen) == change:
                break
    print("killed", killed, "finished first", finished)
    assert finished  # so the last moments were among those killed


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.faults)])
def test_a_kill_at_any_step_of_a_publish_to_a_folder_leaves_nothing_torn(tmp_path: Path, stride: int) -> None:
    """A step is whatever Python tells an audit hook of: files opened, linked, removed, folders made."""

    def killed_at(step: int, folder: Path) -> int:
        left = [step]

        def count(event: str, arguments: tuple[object, ...]) -> None:
            if event in ("open", "os.link", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            sys.addaudithook(count)  # of the child alone
            publish(FileStore(folder, max_concurrency=1), tmp_path / "in", 1)

        return wait_for(in_a_child(work))

    some_files(tmp_path / "in", 1)
    for step in range(0, 1000, stride):
        folder = tmp_path / f"store{step}"
        status = killed_at(step, folder)
        store = FileStore(folder)
        assert len(versions(store, tmp_path)) in ({1} if status == 0 else {0, 1})
        publish(store, tmp_path / "in", 1)
        assert len(versions(store, tmp_path)) == 1
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert 40 < step < 999


@pytest.mark.parametrize("limit", [0, 3, 1000, 2**16 - 1])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond `limit`: the kernel's answer differs from a full disk's by its number alone."""
    some_files(tmp_path / "in", 1)
    reader, writer = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            publish(FileStore(tmp_path / "store"), tmp_path / "in", 1)
        except StoreError as error:
            os.write(writer, str(error).encode())

    assert wait_for(in_a_child(work)) == 0
    assert f"written in {(tmp_path / 'store').as_uri()}: File too large" in os.read(reader, 10_000).decode()
    os.close(reader)
    os.close(writer)
    store = FileStore(tmp_path / "store")
    assert store.list("versions/") == []
    assert store.unfinished(float("inf")) == []
    publish(store, tmp_path / "in", 1)
    assert len(versions(store, tmp_path)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system of 1 MB")
def test_a_file_system_that_is_full_is_named_and_publishing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=180k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        store = FileStore(folder)
        with pytest.raises(StoreError, match=r"written in file://.*small: No space left on device"):
            publish(store, tmp_path / "in", 1)
        assert store.list("versions/") == []
        subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)
        publish(store, tmp_path / "in", 1)
        assert len(versions(store, tmp_path)) == 1
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_may_not_be_written_is_named() -> None:
    reader, writer = os.pipe()

    def work() -> None:
        os.chdir(top)
        Path("store/objects").mkdir(parents=True)
        Path("store/objects").chmod(0o555)
        if os.geteuid() == 0:  # permissions do not bind root
            os.chown("store", 65534, 65534)
            os.setgid(65534)
            os.setuid(65534)
        for use in (
            lambda: FileStore(Path("store")).create("objects/a", b"x"),
            lambda: open_store(publish_params("file://store/objects")),
        ):
            try:
                use()
            except StoreError as error:
                os.write(writer, f"{error}\n".encode())

    with tempfile.TemporaryDirectory() as top:  # those of pytest are closed to other users
        Path(top).chmod(0o755)
        assert wait_for(in_a_child(work)) == 0
    said = os.read(reader, 10_000).decode().splitlines()
    assert said == [
        f"objects/a cannot be written in {Path(top).resolve().as_uri()}/store: Permission denied",
        "the artifact store store/objects is not writable",
    ]
    os.close(reader)
    os.close(writer)


def test_clocks_that_run_backwards_change_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for change in range(1, 6):
        publish(store, tmp_path / "in", change)
        for key in store.list(""):
            if f"v{change}" in key:
                os.utime(store.folder / key, (1e9 - change, 1e9 - change))
    assert len(versions(store, tmp_path)) == 5
