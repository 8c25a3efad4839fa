"""The artifact store: exclusive creation, whole objects, safe names, detected alterations."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import environment

from pipeline.files import sha256_file
from pipeline.store import ArtifactStore, FileStore, StoreError, fetch_object, open_store

RACE = """
import sys
from pathlib import Path
from pipeline.store import FileStore
store, me, how = FileStore(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
mine = Path(sys.argv[1] + "-" + me)
mine.write_text(me * 1000)
print("ready", flush=True)
sys.stdin.readline()
for number in range(150):
    key = f"race/{number}"
    if store.create(key, mine.read_bytes()) if how == "create" else store.upload(mine, key):
        print(number, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store((tmp_path / "store").as_uri())


@pytest.mark.parametrize("how", ["create", "upload"])
def test_of_eight_racing_processes_exactly_one_creates_a_key(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([*command, str(me), how], env=environment(), **pipes) for me in range(8)]  # type: ignore[call-overload]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [(int(line), me) for me, racer in enumerate(racers) for line in racer.communicate()[0].splitlines()]
    assert sorted(number for number, _ in wins) == list(range(150))
    store = FileStore(tmp_path / "store")
    for number, me in wins:
        assert store.read(f"race/{number}") == (str(me) * 1000).encode()
    assert len(list((tmp_path / "store" / "race").iterdir())) == 150


def test_an_existing_object_is_never_replaced(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"other")
    assert not store.upload(tmp_path / "other", "a/b")
    assert store.read("a/b") == b"first"


def test_a_reader_sees_a_whole_object_or_none(store: ArtifactStore) -> None:
    size = 4_000_000
    writer = threading.Thread(target=lambda: [store.create(f"big/{i}", bytes([i]) * size) for i in range(30)])
    writer.start()
    seen = 0
    while writer.is_alive():
        for key in store.list("big/"):
            data = store.read(key)
            assert data == bytes([int(key[4:])]) * size
            seen += 1
    writer.join()
    assert seen > 0
    assert len(store.list("big/")) == 30


def test_a_write_that_fails_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.upload(tmp_path / "none", "objects/x")
    assert store.read("objects/x") is None
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/x", "a//b", "", "a/", "a\\b", ".hidden", "a\nb", "a/b\n", "ключ", "a/./b"]
)
def test_a_key_that_could_leave_the_store_is_refused(store: ArtifactStore, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for use in (
        lambda: store.create(key, b"x"),
        lambda: store.upload(tmp_path / "file", key),
        lambda: store.read(key),
        lambda: store.download(key, tmp_path / "copy"),
    ):
        with pytest.raises(StoreError, match="is no name for an object"):
            use()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "store"}


def test_an_object_comes_back_as_it_went_in(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    digest = sha256_file(tmp_path / "file")
    assert store.upload(tmp_path / "file", f"objects/{digest}")
    fetch_object(store, digest, tmp_path / "new" / "folder" / "copy")
    assert (tmp_path / "new" / "folder" / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["copy"]


@pytest.mark.parametrize("damage", [b"", b"abd", b"abc "])
def test_an_altered_object_is_detected_and_not_left_lying(store: ArtifactStore, tmp_path: Path, damage: bytes) -> None:
    digest = hashlib.sha256(b"abc").hexdigest()
    store.create(f"objects/{digest}", b"abc")
    (tmp_path / "store" / "objects" / digest).write_bytes(damage)
    with pytest.raises(StoreError, match=rf"objects/{digest} in file://.* was altered"):
        fetch_object(store, digest, tmp_path / "copies" / "copy")
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_missing_object_is_named_and_leaves_an_older_file_alone(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("older")
    with pytest.raises(StoreError, match=r"^file://.*/store has no objects/abc$"):
        fetch_object(store, "abc", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "older"
    assert store.read("objects/abc") is None


def test_a_list_holds_the_keys_with_a_prefix_in_order(store: ArtifactStore) -> None:
    for key in ("log/b/2", "log/b/10", "log/bc/1", "other/1", "log/a"):
        store.create(key, b"")
    assert store.list("log/b/") == ["log/b/10", "log/b/2"]
    assert store.list("log/b") == ["log/b/10", "log/b/2", "log/bc/1"]
    assert store.list("none/") == []
    assert len(store.list("")) == 5


def test_what_a_killed_writer_left_is_not_listed(store: ArtifactStore, tmp_path: Path) -> None:
    store.create("log/1", b"")
    (tmp_path / "store" / "log" / ".2.abc.partial").write_bytes(b"half")
    assert store.list("log/") == ["log/1"]


@pytest.mark.parametrize("name", ["store", "deep/er/store", "Store_A.b", "with%20space"])
def test_a_relative_store_is_a_folder_of_the_project(tmp_path: Path, name: str) -> None:
    store = open_store(f"file://{name}", tmp_path)
    store.create("a", b"x")
    folder = tmp_path / name.replace("%20", " ")
    assert (folder / "a").read_bytes() == b"x"
    assert store.uri == folder.as_uri()


def test_an_absolute_store_is_the_same_from_every_project(tmp_path: Path) -> None:
    uri = (tmp_path / "a store").as_uri()
    open_store(uri, tmp_path / "one").create("a", b"x")
    other = open_store(uri, tmp_path / "two")
    assert other.read("a") == b"x"
    assert open_store(other.uri).read("a") == b"x"


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"the artifact store .*file.* cannot be made: "):
        open_store(f"file://{path}", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="is not writable"):
        open_store("file://store", tmp_path)


def test_only_file_uris_are_stores() -> None:
    with pytest.raises(StoreError, match=r"publish\.artifact_store is s3://bucket; expected file://"):
        open_store("s3://bucket")
