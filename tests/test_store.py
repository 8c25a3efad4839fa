"""The artifact store, as a folder and on a real S3 server: exclusive creation, uploads, and downloads with checks."""

import json
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import preloaded
import pytest
from conftest import files_up_to, publish_params

from pipeline.core.files import sha256_file
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, FileStore, StoreError
from pipeline.registry.manifest import Manifest
from pipeline.registry.stores import check_objects, fetch, open_store, publish_manifest, upload

PART_SIZE = 5 * 2**20  # the smallest that S3 servers accept
BIG = "parity/items.merged.parquet"


@pytest.fixture(params=["file", "s3"])
def params(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishParams:
    if request.param == "file":
        return publish_params((tmp_path / "store").as_uri())
    monkeypatch.setattr("pipeline.registry.s3.PART_SIZE", PART_SIZE)
    endpoint = request.getfixturevalue("s3")
    return publish_params(f"s3://retune/{uuid.uuid4().hex}", endpoint_url=endpoint, addressing_style="path")


@pytest.fixture
def store(params: PublishParams) -> ArtifactStore:
    return open_store(params)


@pytest.fixture
def folder_store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/x", "a//b", "", "a/", "a\\b", ".hidden", "a\nb", "a/b\n", "ключ"]
)
def test_a_key_that_could_leave_the_store_is_refused(store: ArtifactStore, tmp_path: Path, key: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.create(key, b"x"), lambda: store.read(key), lambda: store.delete(key),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(StoreError, match="is not a name for an object"):
            use()
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}


def test_keys_with_a_prefix_are_listed_in_order_with_sizes_and_times_by_the_stores_clock(store: ArtifactStore) -> None:
    before = store.now()
    keys = ["log/b/2", "log/b/10", "log/bc/1", "other/1", "log/a"]
    for size, key in enumerate(keys):
        store.create(key, b"x" * size)
    assert store.list("log/b") == ["log/b/10", "log/b/2", "log/bc/1"]
    assert store.list("none/") == []
    assert [key for key in store.list("") if not key.startswith("probe/")] == sorted(keys)
    assert [(stored.key, stored.size) for stored in store.scan("log/b/")] == [("log/b/10", 1), ("log/b/2", 0)]
    for stored in store.scan("log/"):
        assert before - 2 <= stored.modified <= store.now() + 2  # S3 gives whole seconds


def test_an_existing_object_is_never_replaced_and_a_deleted_one_can_be_created_again(store: ArtifactStore) -> None:
    assert [store.create("a/b", data) for data in (b"first", b"other", b"first")] == [True, False, False]
    assert store.read("a/b") == b"first"
    for _ in range(2):
        store.delete("a/b")
    assert store.read("a/b") is None
    assert store.create("a/b", b"second")


def test_repeated_probes_leave_nothing_more_and_a_store_inside_another_is_separate(params: PublishParams) -> None:
    for _ in range(3):
        open_store(params).probe()
    assert len(open_store(params).list("")) <= 2
    inner = params.model_copy(update={"artifact_store": params.artifact_store + "/inner"})
    open_store(params).create("a", b"outer")
    open_store(inner).create("a", b"inner")
    assert open_store(params).read("a") == b"outer"
    assert open_store(inner).list("")[:1] == ["a"]


@pytest.mark.parametrize("name", ["store", "deep/er/store", "with%20space"])
def test_a_relative_store_is_a_folder_of_the_project_and_an_absolute_one_the_same_from_everywhere(
    tmp_path: Path, name: str
) -> None:
    store = open_store(publish_params(f"file://{name}"), tmp_path)
    store.create("a", b"x")
    folder = tmp_path / name.replace("%20", " ")
    assert (folder / "a").read_bytes() == b"x"
    assert store.uri == folder.as_uri()
    assert open_store(publish_params(store.uri), tmp_path / "elsewhere").read("a") == b"x"


@pytest.mark.parametrize(
    "uri",
    ["file://file", "file://file/below", "s3:///prefix", "s3://Bucket/x", "s3://bucket/a/../b", "s3://bucket/a?b=c"],
)
def test_an_unusable_store_uri_is_refused(tmp_path: Path, uri: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file|artifact_store is s3|not a name"):
        open_store(publish_params(uri), tmp_path)


# --- uploads and downloads ------------------------------------------------------------------------------------------


def publish(store: ArtifactStore, version: str, files: dict[str, Path], by: str = "me") -> tuple[Manifest, int]:
    """Publish a version of `files` with a minimal manifest; returns the manifest and the number of bytes sent."""
    entries, sent = upload(store, files)
    publish_manifest(store, version, json.dumps({"files": entries, "by": by}).encode())
    return json.loads(store.read(f"versions/{version}/manifest.json") or b""), sent


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def some_files(folder: Path, big: int = 100_000) -> dict[str, Path]:
    draw = random.Random(1)
    sizes = {"merged/vocab.txt": 0, "adapter/loss.csv": 999, BIG: big}
    files = {name: write(folder / name, draw.randbytes(size)) for name, size in sizes.items()}
    return files | {"adapter/scores.csv": write(folder / "again", files["adapter/loss.csv"].read_bytes())}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_downloaded_as_they_were_uploaded_and_neither_is_repeated(
    tmp_path: Path, store: ArtifactStore
) -> None:
    files = some_files(tmp_path / "in", 2 * PART_SIZE + 4321)
    manifest, sent = publish(store, "v1", files)
    digests = {name: sha256_file(path) for name, path in files.items()}
    entries = {name: {"sha256": digests[name], "size": path.stat().st_size} for name, path in files.items()}
    assert manifest["files"] == entries
    assert store.list("objects/") == sorted(f"objects/{digest}" for digest in set(digests.values()))
    assert sent == 2 * PART_SIZE + 4321 + 999
    assert publish(store, "v2", files) == (manifest, 0)
    for objects in (set(store.list("objects/")), set()):  # the second download needs no object
        fetch(store, manifest, files, tmp_path / "out")
        assert files_in(tmp_path / "out") == {name: path.read_bytes() for name, path in files.items()}
        for key in objects:
            store.delete(key)


class WatchedStore(FileStore):
    """Calls `before` with each key before it is written; if that returns False, the write is skipped."""

    before: Callable[[str], bool] = staticmethod(lambda key: True)

    def _create(self, key: str, write: Callable[[Path], object]) -> bool:
        return super()._create(key, write) if self.before(key) else True


@pytest.mark.parametrize("what", ["an object", "the manifest", "the file changed"])
def test_an_incomplete_version_never_becomes_visible(tmp_path: Path, what: str) -> None:
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


def test_of_two_publishers_of_a_version_the_firsts_manifest_stays(tmp_path: Path, folder_store: FileStore) -> None:
    for publisher in ("first", "second"):
        publish(folder_store, "v1", {"f": write(tmp_path / "f", b"content")}, publisher)
    assert json.loads(folder_store.read("versions/v1/manifest.json") or b"")["by"] == "first"


@pytest.mark.parametrize("how", ["missing", "shorter", "one bit"])
def test_a_damaged_object_is_detected_and_replaces_no_file(tmp_path: Path, folder_store: FileStore, how: str) -> None:
    files = some_files(tmp_path / "in")
    manifest, _ = publish(folder_store, "v1", files)
    path = tmp_path / "store/objects" / manifest["files"][BIG]["sha256"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        os.truncate(path, len(data) - 1)
    else:
        path.write_bytes(data)
    write(tmp_path / "out" / BIG, b"older")
    with pytest.raises(StoreError, match=rf"objects/\w{{64}}|{BIG}"):
        fetch(folder_store, manifest, files, tmp_path / "out")
    downloaded = files_in(tmp_path / "out")
    assert downloaded[BIG] == b"older" and downloaded.keys() <= files.keys()
    if how != "one bit":  # `check_objects` does not read the content
        with pytest.raises(StoreError, match=path.name):
            check_objects(folder_store, manifest["files"])
    if how == "shorter":  # an existing object is never replaced
        with pytest.raises(StoreError, match=path.name):
            publish(folder_store, "v2", files)
        assert folder_store.list("versions/") == ["versions/v1/manifest.json"]


# --- a full disk ----------------------------------------------------------------------------------------------------


def publish_in_small_files(folder: str, limit: int) -> str:
    """The error of a publish if no file may be larger than `limit` bytes."""
    with files_up_to(limit):
        try:
            publish(FileStore(Path(folder) / "store"), "v1", {"f": Path(folder) / "f"})
            return ""
        except StoreError as error:
            return str(error)


@pytest.mark.parametrize("limit", [0, 199_999])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, folder_store: FileStore, limit: int) -> None:
    files = {"f": write(tmp_path / "f", bytes(200_000))}
    error = preloaded.call(publish_in_small_files, tmp_path, limit).answer
    assert f"written in {folder_store.uri}: File too large" in error
    assert (folder_store.list("versions/"), folder_store.unfinished(float("inf"))) == ([], 0)
    publish(folder_store, "v1", files)


def test_a_full_disk_that_is_downloaded_to_is_blamed_itself(tmp_path: Path, store: ArtifactStore) -> None:
    files = some_files(tmp_path / "in", 2_000_000)
    manifest, _ = publish(store, "v1", files)
    with files_up_to(10**6), pytest.raises(StoreError, match=str(tmp_path / "out")) as error:
        fetch(store, manifest, files, tmp_path / "out")
    assert store.uri not in str(error.value) and not files_in(tmp_path / "out")
