"""Publishing while things break: whatever fails or dies, no torn version is seen, and the next attempt reaches the end.

A few of the faults by default; all of them, at every request and at random moments, with `make test-faults`.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from time import sleep  # not the quicker one of `quick`

import pytest
from conftest import publish_params
from fault_proxy import FAULTS, KILLS, FaultProxy

from pipeline.registry.artifact_store import ArtifactStore, FileStore, StoreError, open_store
from pipeline.registry.s3 import S3Store
from pipeline.registry.transfer import check_objects, fetch, ship

PART_SIZE, SIZE = 5 * 2**20, 200_000
LONG = [pytest.mark.faults, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the least size that S3 takes; a twentieth of the pauses between attempts."""
    monkeypatch.setattr("pipeline.registry.s3.PART_SIZE", PART_SIZE)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: sleep(seconds / 20))


def s3_store(proxy: FaultProxy, prefix: str) -> S3Store:
    params = publish_params(f"s3://retune/{prefix}", endpoint_url=proxy.url, addressing_style="path", max_concurrency=1)
    return S3Store(params, read_timeout_s=1)


def some_files(folder: Path, change: int, size: int = SIZE) -> dict[str, Path]:
    """A small file, one twice, and a bigger one of `size`; each version has another one of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"adapter/config.json": b"{}" * change, "evaluation/a": b"same", "evaluation/b": b"same"}
    content["merged/model.safetensors"] = random.Random(change).randbytes(size)
    for name, data in content.items():
        path = folder / name.replace("/", "-")
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    return {name: folder / name.replace("/", "-") for name in content}


def publish(store: ArtifactStore, folder: Path, change: int, size: int = SIZE) -> None:
    ship(store, f"v{change}", some_files(folder, change, size), lambda entries: json.dumps({"files": entries}).encode())


def versions(store: ArtifactStore, folder: Path, size: int = SIZE) -> dict[str, bytes]:
    """The manifest of every version that can be seen; each is whole, down to the last byte."""
    found = {}
    for key in store.list("versions/"):
        text = store.read(key) or b""
        entries = json.loads(text)["files"]
        check_objects(store, entries)
        out = folder / uuid.uuid4().hex
        fetch(store, entries, out)
        files = some_files(folder / "expected" / key.split("/")[1], int(key.split("/")[1][1:]), size)
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

    def __init__(self, proxy: FaultProxy, folder: Path, size: int = SIZE) -> None:
        self.proxy, self.folder, self.size = proxy, folder, size
        store, before = self.second_version()
        publish(store, folder / "in", 2, size)
        self.requests = len(proxy.seen) - before
        self.versions = versions(store, folder, size)
        self.objects = store.list("objects/")
        assert self.requests > 8

    def second_version(self) -> tuple[S3Store, int]:
        """A store with the first version, as a new process opens it; the number of requests so far."""
        self.proxy.plan = lambda number, line: None
        store = s3_store(self.proxy, uuid.uuid4().hex)
        publish(store, self.folder / "in", 1, self.size)
        return s3_store(self.proxy, store.prefix), len(self.proxy.seen)


def publish_with(calm: Calm, fault: str, index: int, lasting: bool = False) -> bool:
    """The second version meets a fault at its request `index`, or from there on; the end is as without.

    Returns whether it came to its end at the first attempt.
    """
    store, first = calm.second_version()

    def plan(number: int, line: str) -> str | None:
        hit = number == first + index or (lasting and number > first + index)
        return fault if hit and (line.startswith("PUT") or "Conflict" not in fault) else None  # only writes conflict

    calm.proxy.plan = plan
    error = None
    try:
        publish(store, calm.folder / "in", 2, calm.size)
    except StoreError as raised:
        error = raised
    print(fault, index, error)
    calm.proxy.plan = lambda number, line: None
    assert versions(store, calm.folder, calm.size).items() <= calm.versions.items()
    if error is not None:
        publish(store, calm.folder / "in", 2, calm.size)
    assert versions(store, calm.folder, calm.size) == calm.versions
    assert store.list("objects/") == calm.objects
    return error is None


@pytest.mark.parametrize(
    ("fault", "size"),
    [(None, SIZE), *(pytest.param(fault, size, marks=LONG) for fault in FAULTS for size in (SIZE, PART_SIZE + 1))],
)
def test_a_fault_at_any_request_of_a_publish_changes_nothing_of_its_result(
    proxy: FaultProxy, tmp_path: Path, fault: str | None, size: int
) -> None:
    """None: one that is drawn, at a request that is drawn."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    calm = Calm(proxy, tmp_path, size)
    indices = range(calm.requests) if fault else [draw.randrange(calm.requests)]
    failed = [index for index in indices if not publish_with(calm, fault or draw.choice(FAULTS), index)]
    print("not at the first attempt:", failed)
    assert len(failed) <= (size > PART_SIZE)  # the completion of an upload in parts, as its server repeats it or not


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["reset", "lost", "500", "stall", "403:AccessDenied"])
def test_a_fault_that_stays_is_a_clear_error_and_the_next_attempt_reaches_the_end(
    proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    calm = Calm(proxy, tmp_path)
    for index in range(0, calm.requests - 3, 2):  # without the last two, a publish is done
        assert not publish_with(calm, fault, index, lasting=True)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [SIZE, PART_SIZE + 1])
@pytest.mark.parametrize("how", KILLS)
def test_a_kill_at_any_request_of_a_publish_leaves_nothing_torn(
    proxy: FaultProxy, tmp_path: Path, how: str, size: int
) -> None:
    calm = Calm(proxy, tmp_path, size)
    for index in range(calm.requests):
        store, first = calm.second_version()
        proxy.plan = lambda number, line, at=first + index: how if number == at else None  # type: ignore[misc]
        child = in_a_child(lambda prefix=store.prefix: publish(s3_store(proxy, prefix), tmp_path / "in", 2, size))  # type: ignore[misc]
        proxy.on_kill = lambda child=child: os.kill(child, signal.SIGKILL)  # type: ignore[misc]
        assert wait_for(child) == -signal.SIGKILL
        proxy.plan = lambda number, line: None
        versions(store, tmp_path, size)
        publish(store, tmp_path / "in", 2, size)
        assert versions(store, tmp_path, size) == calm.versions


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
            publish(FileStore(folder), tmp_path / "in", 1)

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
    assert 25 < step < 999


def said_by_a_child(work: Callable[[], object]) -> str:
    """The StoreError that `work` ends with in a process of its own."""
    reader, writer = os.pipe()

    def report() -> None:
        try:
            work()
        except StoreError as error:
            os.write(writer, str(error).encode())

    assert wait_for(in_a_child(report)) == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return pipe.read()


@pytest.mark.parametrize("limit", [0, 3, 199_999])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond `limit`: the kernel's answer differs from a full disk's by its number alone."""
    some_files(tmp_path / "in", 1)
    store = FileStore(tmp_path / "store")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        publish(store, tmp_path / "in", 1)

    assert f"written in {store.uri}: File too large" in said_by_a_child(work)
    assert (store.list("versions/"), store.unfinished(float("inf"))) == ([], 0)
    publish(store, tmp_path / "in", 1)
    assert len(versions(store, tmp_path)) == 1


def test_a_folder_that_may_not_be_written_is_named() -> None:
    def forbidden(use: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            os.chdir(top)
            Path("store/objects").mkdir(parents=True, exist_ok=True)
            Path("store/objects").chmod(0o555)
            if os.geteuid() == 0:  # permissions do not bind root
                os.chown("store", 65534, 65534)
                os.setgid(65534)
                os.setuid(65534)
            use()

        return work

    with tempfile.TemporaryDirectory() as top:  # those of pytest are closed to other users
        Path(top).chmod(0o755)
        create = said_by_a_child(forbidden(lambda: FileStore(Path("store")).create("objects/a", b"x")))
        opened = said_by_a_child(forbidden(lambda: open_store(publish_params("file://store/objects"))))
    assert "objects/a" in create and "Permission denied" in create
    assert "store/objects is not writable" in opened
