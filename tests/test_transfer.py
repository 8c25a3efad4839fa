"""Files to objects and back: nothing is sent twice, changed blocks alone, nothing unchecked is ever used."""

import hashlib
import json
import os
import random
import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import publish_params
from s3_sink import Sink

from pipeline.files import sha256_file
from pipeline.store import transfer
from pipeline.store.artifact_store import ArtifactStore, FileStore, StoreError
from pipeline.store.s3 import S3Store
from pipeline.store.transfer import Entry, block_size, check_objects, fetch, ship, upload

REAL_OBJECT_SIZE = transfer.OBJECT_SIZE
OBJECT_SIZE = 2**20


@pytest.fixture(autouse=True)
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is about 16 MiB is about 1 MiB here, for speed."""
    monkeypatch.setattr(transfer, "OBJECT_SIZE", OBJECT_SIZE)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def manifest(entries: dict[str, Entry]) -> bytes:
    return json.dumps({"files": entries}).encode()


def publish(store: ArtifactStore, version: str, files: dict[str, Path]) -> tuple[dict[str, Entry], int]:
    sent = ship(store, version, files, manifest)
    return json.loads(store.read(f"versions/{version}/manifest.json") or b"")["files"], sent


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def some_files(folder: Path) -> dict[str, Path]:
    """One of each kind: empty, small, exactly one object, one byte more, and one of three objects."""
    draw = random.Random(1)
    sizes = {"a/empty.txt": 0, "a/small.json": 999, "m/one.bin": OBJECT_SIZE, "m/two.bin": OBJECT_SIZE + 1}
    sizes["m/big.safetensors"] = 2 * OBJECT_SIZE + 4321
    return {name: write(folder / name, draw.randbytes(size)) for name, size in sizes.items()}


def same(folder: Path, files: dict[str, Path]) -> bool:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found == set(files) and all((folder / name).read_bytes() == files[name].read_bytes() for name in files)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_files_come_back_as_they_went_in(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    store: ArtifactStore = FileStore(tmp_path / "store")
    if kind == "s3":
        at = {"endpoint_url": request.getfixturevalue("s3"), "addressing_style": "path"}
        store = S3Store(publish_params(f"s3://retune/{uuid.uuid4().hex}", **at))
    files = some_files(tmp_path / "in")
    entries, sent = publish(store, "v1", files)
    assert {name: (entry["sha256"], entry["size"]) for name, entry in entries.items()} == {
        name: (sha256_file(path), path.stat().st_size) for name, path in files.items()
    }
    total = sum(path.stat().st_size for path in files.values())
    assert total <= sent <= total * 1.15  # the digests of blocks, which are small here
    fetch(store, entries, tmp_path / "out")
    assert same(tmp_path / "out", files)


def test_what_is_there_is_neither_sent_nor_fetched_again(tmp_path: Path, store: FileStore) -> None:
    files = some_files(tmp_path / "in")
    entries, _ = publish(store, "v1", files)
    assert publish(store, "v2", files) == (entries, 0)
    fetch(store, entries, tmp_path / "out")
    for path in (tmp_path / "store" / "objects").iterdir():
        path.unlink()
    fetch(store, entries, tmp_path / "out")
    assert same(tmp_path / "out", files)


def test_an_unchanged_upload_asks_one_listing_for_each_thousand_objects_and_sends_nothing(tmp_path: Path) -> None:
    sink = Sink()
    files = {f"f/{number:04}.json": write(tmp_path / f"{number}", str(number).encode()) for number in range(300)}
    with sink.running() as endpoint:
        store = S3Store(publish_params("s3://retune/x", endpoint_url=endpoint, addressing_style="path"))
        for number in range(2000):  # as if an earlier version had left them
            sink.sizes[f"x/objects/{number:064}"] = 1
        upload(store, files)
        sink.requests.clear()
        assert upload(store, files)[1] == 0
    assert [length for _, _, length in sink.requests] == [0] * len(sink.requests)
    assert sum("objects" in what for method, what, _ in sink.requests) == 3
    assert len(sink.requests) == 4  # and one for the newest version


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 12))])
def test_a_change_of_one_percent_sends_at_most_1_05_percent(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    print("seed", seed)
    monkeypatch.setattr(transfer, "OBJECT_SIZE", REAL_OBJECT_SIZE)
    draw = random.Random(seed)
    size = draw.randrange(REAL_OBJECT_SIZE + 1, (2 if seed == 0 else 8) * REAL_OBJECT_SIZE)
    data = bytearray(draw.randbytes(size))
    path = write(tmp_path / "model.safetensors", data)
    publish(store, "v1", {"m": path})
    changed = size // 100
    start = draw.randrange(size - changed)
    data[start : start + changed] = draw.randbytes(changed)
    path.write_bytes(data)
    entries, sent = publish(store, "v2", {"m": path})
    assert changed <= sent <= 0.0105 * size
    fetch(store, entries, tmp_path / "out")
    assert (tmp_path / "out" / "m").read_bytes() == data


def test_a_chain_of_small_changes_is_read_back_right(tmp_path: Path, store: FileStore) -> None:
    draw = random.Random(3)
    data = bytearray(draw.randbytes(OBJECT_SIZE) + bytes(OBJECT_SIZE))  # half of it zeros: blocks that are all alike
    path = tmp_path / "model.safetensors"
    versions = []
    for number in range(5):
        write(path, data)
        versions.append((publish(store, f"v{number}", {"m": path}), bytes(data)))
        for _ in range(3):
            start, length = draw.randrange(len(data)), draw.randrange(1, 50_000)
            data[start : start + length] = draw.randbytes(len(data[start : start + length]))
    for number, ((entries, sent), content) in enumerate(versions):
        assert sent < 200_000 or number == 0
        fetch(store, entries, tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / "m").read_bytes() == content


@pytest.mark.parametrize("how", ["mostly new", "scattered", "another length", "index lost"])
def test_a_file_that_shares_too_little_is_sent_whole(tmp_path: Path, store: FileStore, how: str) -> None:
    size = 2 * OBJECT_SIZE
    data = bytearray(random.Random(4).randbytes(size))
    path = write(tmp_path / "m", data)
    entries, _ = publish(store, "v1", {"m": path})
    if how == "mostly new":
        data[: size * 6 // 10] = random.Random(5).randbytes(size * 6 // 10)
    elif how == "scattered":
        block = block_size(size)
        for number in range(0, size // block, 4):
            data[number * block] ^= 1
    elif how == "another length":
        data += random.Random(6).randbytes(size)  # its blocks are twice as long
    else:
        data[0] ^= 1
        for chunk in entries["m"]["chunks"]:
            (tmp_path / "store" / "objects" / chunk["blocks"]).write_bytes(b"")
            store.delete(f"objects/{chunk['blocks']}")
    path.write_bytes(data)
    entries, sent = publish(store, "v2", {"m": path})
    unchanged = {"mostly new": 0, "scattered": 0, "another length": size, "index lost": OBJECT_SIZE}[how]
    assert sent >= len(data) - unchanged - OBJECT_SIZE  # whole objects that are the same are not sent again
    assert all(chunk["offset"] == 0 for chunk in entries["m"]["chunks"])
    fetch(store, entries, tmp_path / "out")
    assert (tmp_path / "out" / "m").read_bytes() == data


def test_the_same_file_becomes_the_same_objects_everywhere(tmp_path: Path) -> None:
    files = some_files(tmp_path / "in")
    one, other = (publish(FileStore(tmp_path / name, workers), "v", files)[0] for name, workers in (("1", 1), ("2", 7)))
    assert one == other
    assert FileStore(tmp_path / "1").list("objects/") == FileStore(tmp_path / "2").list("objects/")


@pytest.mark.parametrize("size", [REAL_OBJECT_SIZE + 1, 10**8, 2**30, 14 * 2**30, 2**36])
def test_blocks_are_small_enough_for_a_change_of_one_percent(size: int) -> None:
    assert 2 * block_size(size) <= size * 0.00025
    assert REAL_OBJECT_SIZE % block_size(size) == 0


class FailingStore(FileStore):
    """Fails at the n-th creation, counted from 0."""

    left = 0

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith(("objects/", "versions/")):
            self.left -= 1
            if self.left < 0:
                raise StoreError("the line broke")
        return super().create(key, data)


def test_an_upload_that_broke_off_shows_no_version_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    files = some_files(tmp_path / "in")
    total = sum(path.stat().st_size for path in files.values())
    store = FailingStore(tmp_path / "store", max_concurrency=1)
    sent_before = 0
    for left in range(30):
        store.left = left
        try:
            _, sent = publish(store, "v1", files)
            break
        except StoreError:
            pass
        assert store.list("versions/") == []
        there = sum(stored.size for stored in store.scan("objects/"))
        assert there >= sent_before
        sent_before = there
    assert left > 3
    assert sent_before + sent <= total * 1.15
    fetch(store, publish(store, "v1", files)[0], tmp_path / "out")
    assert same(tmp_path / "out", files)


class LosingStore(FileStore):
    """Says that it stored an object, and has not."""

    lost = ""

    def create(self, key: str, data: bytes) -> bool:
        return True if key == self.lost else super().create(key, data)


def test_a_version_whose_object_did_not_arrive_never_appears(tmp_path: Path) -> None:
    store = LosingStore(tmp_path / "store")
    path = write(tmp_path / "f", b"content")
    store.lost = f"objects/{sha256_file(path)}"
    with pytest.raises(StoreError, match=r"has lost objects/[0-9a-f]{64}, a part of f"):
        publish(store, "v1", {"f": path})
    assert store.list("versions/") == []
    store.lost = "versions/v1/manifest.json"
    with pytest.raises(StoreError, match=r"versions/v1/manifest.json was written to file://.*, but reads otherwise"):
        publish(store, "v1", {"f": path})


def test_of_two_publishers_of_a_version_the_firsts_manifest_stands(tmp_path: Path, store: FileStore) -> None:
    path = write(tmp_path / "f", b"content")
    ship(store, "v1", {"f": path}, lambda entries: json.dumps({"files": entries, "by": "first"}).encode())
    ship(store, "v1", {"f": path}, lambda entries: json.dumps({"files": entries, "by": "second"}).encode())
    assert json.loads(store.read("versions/v1/manifest.json") or b"")["by"] == "first"


def test_a_file_that_changes_while_it_is_uploaded_is_refused(tmp_path: Path, store: FileStore) -> None:
    path = write(tmp_path / "f", b"content")

    class Writer(FileStore):
        def create(self, key: str, data: bytes) -> bool:
            path.write_bytes(b"other")
            return super().create(key, data)

    with pytest.raises(StoreError, match=r"/f changed while it was uploaded"):
        publish(Writer(tmp_path / "store"), "v1", {"f": path})
    assert store.list("versions/") == []


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    else:
        with path.open("rb+") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("name", ["a/small.json", "m/big.safetensors"])
@pytest.mark.parametrize("how", ["missing", "shorter", "one bit"])
def test_a_damaged_object_is_noticed_and_nothing_of_it_appears(
    tmp_path: Path, store: FileStore, name: str, how: str
) -> None:
    files = some_files(tmp_path / "in")
    entries, _ = publish(store, "v1", files)
    digest = entries[name].get("chunks", [entries[name]])[-1]["sha256"]
    damage(tmp_path / "store" / "objects" / digest, how)
    with pytest.raises(StoreError, match=r"was altered|has no objects/"):
        fetch(store, entries, tmp_path / "out")
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= set(files) - {name}
    if how != "one bit":  # that needs the content to be read
        with pytest.raises(StoreError, match="has lost objects/|has .* bytes; expected"):
            check_objects(store, entries)


def test_a_damaged_file_does_not_replace_an_older_one(tmp_path: Path, store: FileStore) -> None:
    entries, _ = publish(store, "v1", {"f": write(tmp_path / "f", b"content")})
    damage(tmp_path / "store" / "objects" / entries["f"]["sha256"], "one bit")
    write(tmp_path / "out" / "f", b"older")
    with pytest.raises(StoreError, match="f in file://.* was altered: its content has digest"):
        fetch(store, entries, tmp_path / "out")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("f", b"older")]


@pytest.mark.parametrize("name", ["../f", "a/../../f", "/tmp/retune-escaped", "a/../../out-beside/f"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, store: FileStore, name: str) -> None:
    entries, _ = publish(store, "v1", {"f": write(tmp_path / "in" / "f", b"content")})
    with pytest.raises(StoreError, match="which would lie outside of"):
        fetch(store, {name: entries["f"]}, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "store", "out"}
    assert not Path("/tmp/retune-escaped").exists()


def test_an_object_of_the_wrong_size_is_not_built_on(tmp_path: Path, store: FileStore) -> None:
    store.create(f"objects/{hashlib.sha256(b'content').hexdigest()}", b"conten")
    with pytest.raises(StoreError, match=r"is damaged: it has 6 bytes, expected 7"):
        publish(store, "v1", {"f": write(tmp_path / "f", b"content")})
    assert store.list("versions/") == []


BAD_INDEX = (
    b'{"files": {"m": {"block_size": 128, "chunks": [{"sha256": "x", "blocks": "../x", "offset": 0, "size": 9}]}}}'
)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"files": 3}', b'{"files": {"m": {"block_size": 128}}}', BAD_INDEX]
)
def test_a_damaged_earlier_manifest_does_not_stop_an_upload(tmp_path: Path, store: FileStore, text: bytes) -> None:
    store.create("versions/v0/manifest.json", text)
    entries, _ = publish(store, "v1", {"m": write(tmp_path / "m", random.Random(7).randbytes(OBJECT_SIZE + 1))})
    fetch(store, entries, tmp_path / "out")
    assert sha256_file(tmp_path / "out" / "m") == sha256_file(tmp_path / "m")


def test_what_is_under_way_is_said_with_rate_and_time_left(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline import progress

    clock: list[float] = [0.0]

    def monotonic() -> float:
        clock[0] += 3
        return clock[0]

    monkeypatch.setattr(progress.time, "monotonic", monotonic)
    upload(store, some_files(tmp_path / "in"))
    lines: list[Any] = capsys.readouterr().err.splitlines()
    assert lines
    for line in lines:
        assert progress.LINE.match(line)
        assert " MB · " in line and " MB/s · ETA " in line
