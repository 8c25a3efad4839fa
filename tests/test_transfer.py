"""Files to objects and back: nothing is sent twice, nothing unchecked is ever used."""

import hashlib
import json
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import publish_params
from s3_sink import Sink

from pipeline.core import progress
from pipeline.core.files import sha256_file
from pipeline.registry import s3 as s3_module
from pipeline.registry.artifact_store import ArtifactStore, FileStore, StoreError
from pipeline.registry.s3 import S3Store
from pipeline.registry.transfer import Entry, check_objects, fetch, ship, upload

PART_SIZE = 5 * 2**20  # the least that S3 servers take


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def publish(store: ArtifactStore, version: str, files: dict[str, Path], by: str = "me") -> tuple[dict[str, Entry], int]:
    sent = ship(store, version, files, lambda entries: json.dumps({"files": entries, "by": by}).encode())
    return json.loads(store.read(f"versions/{version}/manifest.json") or b"")["files"], sent


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def some_files(folder: Path, big: int = 100_000) -> dict[str, Path]:
    draw = random.Random(1)
    sizes = {"a/empty.txt": 0, "a/small.json": 999, "m/big.safetensors": big}
    files = {name: write(folder / name, draw.randbytes(size)) for name, size in sizes.items()}
    return files | {"a/same.json": write(folder / "a/same.json", files["a/small.json"].read_bytes())}


def same(folder: Path, files: dict[str, Path]) -> bool:
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return there == set(files) and all((folder / name).read_bytes() == files[name].read_bytes() for name in files)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_files_come_back_as_they_went_in_and_are_neither_sent_nor_fetched_again(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(s3_module, "PART_SIZE", PART_SIZE)
    store: ArtifactStore = FileStore(tmp_path / "store")
    if kind == "s3":
        at = {"endpoint_url": request.getfixturevalue("s3"), "addressing_style": "path"}
        store = S3Store(publish_params(f"s3://retune/{uuid.uuid4().hex}", **at))
    files = some_files(tmp_path / "in", 2 * PART_SIZE + 4321)
    entries, sent = publish(store, "v1", files)
    digests = {name: sha256_file(path) for name, path in files.items()}
    assert entries == {name: {"sha256": digests[name], "size": path.stat().st_size} for name, path in files.items()}
    assert store.list("objects/") == sorted(f"objects/{digest}" for digest in set(digests.values()))
    assert sent == 2 * PART_SIZE + 4321 + 999
    assert publish(store, "v2", files) == (entries, 0)
    fetch(store, entries, tmp_path / "out")
    assert same(tmp_path / "out", files)
    for key in store.list("objects/"):
        store.delete(key)
    fetch(store, entries, tmp_path / "out")
    assert same(tmp_path / "out", files)


def test_an_unchanged_upload_asks_one_listing_for_each_thousand_objects_and_sends_nothing(tmp_path: Path) -> None:
    sink = Sink()
    files = {f"f/{number:04}.json": write(tmp_path / f"{number}", str(number).encode()) for number in range(300)}
    with sink.running() as endpoint:
        store = S3Store(publish_params("s3://retune/x", endpoint_url=endpoint, addressing_style="path"))
        sink.sizes |= {f"x/objects/{number:064}": 1 for number in range(2000)}  # as if an earlier version had left them
        upload(store, files)
        sink.requests.clear()
        assert upload(store, files)[1] == 0
    assert [(method, length) for method, _, length in sink.requests] == [("GET", 0)] * 3


def test_a_version_in_chunks_as_published_before_is_read_and_one_that_lost_an_object_is_not(
    tmp_path: Path, store: FileStore
) -> None:
    first, second = b"0123456789", b"abcdef"
    keys = [hashlib.sha256(data).hexdigest() for data in (first, second)]
    content = first[2:7] + second + first[:2]
    chunks = [{"sha256": keys[0], "offset": 2, "size": 5}, {"sha256": keys[1], "offset": 0, "size": 6}]
    chunks = [each | {"blocks": "0" * 64} for each in [*chunks, {"sha256": keys[0], "offset": 0, "size": 2}]]
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "block_size": 4, "chunks": chunks}
    for key, data in zip(keys, (first, second), strict=True):
        store.create(f"objects/{key}", data)
    check_objects(store, {"m/model": entry})
    fetch(store, {"m/model": entry}, tmp_path / "out")
    assert (tmp_path / "out/m/model").read_bytes() == content
    store.delete(f"objects/{keys[1]}")
    for use in (lambda: check_objects(store, {"m": entry}), lambda: fetch(store, {"m": entry}, tmp_path / "other")):
        with pytest.raises(StoreError, match=keys[1]):
            use()


class WatchedStore(FileStore):
    """Calls `before` with each key that is to be written; the write is left out when it returns False."""

    before: Callable[[str], bool] = staticmethod(lambda key: True)

    def _create(self, key: str, write: Callable[[Path], object]) -> bool:
        return super()._create(key, write) if self.before(key) else True


@pytest.mark.parametrize("what", ["an object", "the manifest", "the file changed"])
def test_a_version_of_which_something_did_not_arrive_never_appears(tmp_path: Path, what: str) -> None:
    path = write(tmp_path / "f", b"content")
    lost = "versions/v1/manifest.json" if what == "the manifest" else f"objects/{sha256_file(path)}"

    def before(key: str) -> bool:
        if what == "the file changed":
            path.write_bytes(b"other")
        return what == "the file changed" or key != lost

    store = WatchedStore(tmp_path / "store")
    store.before = before
    with pytest.raises(StoreError, match=str(path) if what == "the file changed" else lost):
        publish(store, "v1", {"f": path})
    assert store.list("versions/") == []


def test_of_two_publishers_of_a_version_the_firsts_manifest_stands(tmp_path: Path, store: FileStore) -> None:
    for who in ("first", "second"):
        publish(store, "v1", {"f": write(tmp_path / "f", b"content")}, who)
    assert json.loads(store.read("versions/v1/manifest.json") or b"")["by"] == "first"


@pytest.mark.parametrize("how", ["missing", "shorter", "one bit"])
def test_a_damaged_object_is_noticed_and_replaces_nothing(tmp_path: Path, store: FileStore, how: str) -> None:
    files = some_files(tmp_path / "in")
    entries, _ = publish(store, "v1", files)
    path = tmp_path / "store/objects" / entries["m/big.safetensors"]["sha256"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        os.truncate(path, len(data) - 1)
    else:
        path.write_bytes(data)
    write(tmp_path / "out/m/big.safetensors", b"older")
    with pytest.raises(StoreError, match=r"objects/\w{64}|big\.safetensors"):
        fetch(store, entries, tmp_path / "out")
    assert (tmp_path / "out/m/big.safetensors").read_bytes() == b"older"
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= set(files)
    if how != "one bit":  # that needs the content to be read
        with pytest.raises(StoreError, match=path.name):
            check_objects(store, entries)
    if how == "shorter":  # it cannot be replaced
        with pytest.raises(StoreError, match=path.name):
            publish(store, "v2", files)
        assert store.list("versions/") == ["versions/v1/manifest.json"]


@pytest.mark.parametrize("name", ["../f", "a/../../f", "/tmp/retune-escaped", "a/../../out-beside/f"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, store: FileStore, name: str) -> None:
    entries, _ = publish(store, "v1", {"f": write(tmp_path / "in" / "f", b"content")})
    with pytest.raises(StoreError, match=name):
        fetch(store, {name: entries["f"]}, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "store", "out"}
    assert not Path("/tmp/retune-escaped").exists()


def test_progress_is_told_with_rate_and_time_left(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    upload(store, some_files(tmp_path / "in"))
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(progress.LINE.match(line) and " MB · " in line and " MB/s · ETA " in line for line in lines)
