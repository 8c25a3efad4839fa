"""The artifact store, as a folder and on a real S3 server: exclusive creation, whole objects, safe names."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import publish_params

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, StoreError, open_store


@pytest.fixture(params=["file", "s3"])
def params(request: pytest.FixtureRequest, tmp_path: Path) -> PublishParams:
    """Parameters of an empty store of each kind."""
    if request.param == "file":
        return publish_params((tmp_path / "store").as_uri())
    endpoint = request.getfixturevalue("s3")
    return publish_params(f"s3://retune/{uuid.uuid4().hex}", endpoint_url=endpoint, addressing_style="path")


@pytest.fixture
def store(params: PublishParams) -> ArtifactStore:
    return open_store(params)


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/x", "a//b", "", "a/", "a\\b", ".hidden", "a\nb", "a/b\n", "ключ", "a/./b"]
)
def test_a_key_that_could_leave_the_store_is_refused(store: ArtifactStore, tmp_path: Path, key: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.create(key, b"x"),
        lambda: store.read(key),
        lambda: store.delete(key),
    ]
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
        assert before - 2 <= stored.modified <= store.now() + 2  # S3 tells whole seconds


def test_an_existing_object_is_never_replaced_and_a_deleted_ones_name_is_free(store: ArtifactStore) -> None:
    assert [store.create("a/b", data) for data in (b"first", b"other", b"first")] == [True, False, False]
    assert store.read("a/b") == b"first"
    for _ in range(2):
        store.delete("a/b")
    assert store.read("a/b") is None
    assert store.create("a/b", b"second")


def test_what_probing_leaves_does_not_grow_and_two_stores_in_one_place_do_not_meet(params: PublishParams) -> None:
    for _ in range(3):
        open_store(params).probe()
    assert len(open_store(params).list("")) <= 2
    inner = params.model_copy(update={"artifact_store": params.artifact_store + "/inner"})
    open_store(params).create("a", b"outer")
    open_store(inner).create("a", b"inner")
    assert open_store(params).read("a") == b"outer"
    assert open_store(inner).list("")[:1] == ["a"]


@pytest.mark.parametrize("name", ["store", "deep/er/store", "Store_A.b", "with%20space"])
def test_a_relative_store_is_a_folder_of_the_project_and_an_absolute_one_the_same_from_everywhere(
    tmp_path: Path, name: str
) -> None:
    store = open_store(publish_params(f"file://{name}"), tmp_path)
    store.create("a", b"x")
    folder = tmp_path / name.replace("%20", " ")
    assert (folder / "a").read_bytes() == b"x"
    assert store.uri == folder.as_uri()
    assert open_store(publish_params(store.uri), tmp_path / "elsewhere").read("a") == b"x"


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        open_store(publish_params(f"file://{path}"), tmp_path)
