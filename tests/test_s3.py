"""The S3 store where it differs from a folder: what a server must keep, what goes wrong, what is said of it."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import publish_params
from fault_proxy import FaultProxy
from s3_sink import Sink

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, StoreError, open_store
from pipeline.registry.s3 import S3Store
from pipeline.registry.transfer import upload

SECRET = "testing"


@pytest.fixture
def proxy(swift_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(int(swift_server.rpartition(":")[2])) as proxy:
        yield proxy


def store_at(endpoint: str, uri: str | None = None, **values: object) -> S3Store:
    return S3Store(params_at(endpoint, uri, **values), read_timeout_s=2)


def params_at(endpoint: str, uri: str | None = None, **values: object) -> PublishParams:
    values = {"endpoint_url": endpoint, "addressing_style": "path"} | values
    return publish_params(uri or f"s3://retune/{uuid.uuid4().hex}", **values)


@pytest.fixture
def store(proxy: FaultProxy) -> S3Store:
    store = store_at(proxy.url)
    store.probe()
    proxy.seen.clear()
    return store


def once(proxy: FaultProxy, fault: str, method: str = "") -> None:
    """The next request (of `method`) meets `fault`, later ones none."""
    left = [fault]
    proxy.plan = lambda number, line: left.pop() if left and line.startswith(method) else None


def test_a_server_that_lets_two_racing_writes_both_win_is_refused(swift_server: str) -> None:
    """Swift, as it is, does."""
    for _ in range(3):
        with pytest.raises(StoreError, match="two conditional writes"):
            store_at(swift_server).create("promotions/model/00000001.json", b"mine")


@pytest.mark.parametrize("at_first", [True, False])
def test_a_server_that_ignores_conditions_is_refused_at_first_or_from_then_on(at_first: bool) -> None:
    sink = Sink(honours_conditions=not at_first)
    with sink.running() as endpoint:
        if not at_first:
            store_at(endpoint, "s3://retune/x").probe()
            sink.honours_conditions = False
        for _ in range(2):
            with pytest.raises(StoreError, match="two conditional writes" if at_first else "ignores"):
                store_at(endpoint, "s3://retune/x").create("a", b"")


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", ["reset", "lost", "500", "503", "stall", "cut", "twice", "409:ConditionalRequestConflict"]
)
def test_a_write_that_meets_a_fault_is_done_once_and_known_as_ones_own(
    proxy: FaultProxy, store: S3Store, fault: str
) -> None:
    once(proxy, fault, "PUT")
    assert store.create("a/b", b"mine" * 1000)
    proxy.plan = lambda number, line: None
    assert store.read("a/b") == b"mine" * 1000
    assert not store.create("a/b", b"mine" * 1000)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_another_writers_object_is_never_taken_for_ones_own(proxy: FaultProxy, store: S3Store, fault: str) -> None:
    store.create("a/b", b"the same bytes")
    once(proxy, fault, "PUT")
    assert not store.create("a/b", b"the same bytes")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["reset", "lost", "500", "503", "stall", "cut"])
def test_a_read_or_listing_that_meets_a_fault_is_whole(proxy: FaultProxy, store: S3Store, fault: str) -> None:
    data = bytes(range(256)) * 1000
    store.create("a/b", data)
    for use in (lambda: store.read("a/b") == data, lambda: store.list("a/") == ["a/b"]):
        once(proxy, fault, "GET")
        assert use()


@pytest.mark.faults
def test_racing_threads_over_a_broken_line_have_one_winner(proxy: FaultProxy, store: S3Store) -> None:
    proxy.plan = lambda number, line: ["lost", "twice", None, "reset", None][number % 5]
    with ThreadPoolExecutor(6) as pool:
        for race in range(3):
            assert sum(pool.map(lambda racer, key=f"race/{race}": store.create(key, b"same"), range(6))) == 1


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("403:AccessDenied", r"\(AccessDenied\); docs/operations.md"),
        ("403:InvalidAccessKeyId", "credentials .*InvalidAccessKeyId"),
        ("400:ExpiredToken", "credentials .*ExpiredToken"),
        ("403:RequestTimeTooSkewed", "clock"),
        ("404:NoSuchBucket", r"no bucket retune at http://127.0.0.1:\d+"),
        ("400:AuthorizationHeaderMalformed", "publish.region_name"),
        ("501:NotImplemented", "put object .*NotImplemented.* another server"),
        ("500:InternalError", "5 times in a row .*500 InternalError"),
        ("400:BadDigest", "put object .*400 BadDigest"),
        ("409:ConditionalRequestConflict", "409 ConditionalRequestConflict"),
        ("reset", "broke, 5 times in a row"),
    ],
)
@pytest.mark.parametrize("how", ["create", "upload"])
def test_what_the_server_refuses_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, word: str, how: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between attempts
    (tmp_path / "f").write_bytes(b"x")
    with Sink().running() as endpoint, FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        store = store_at(proxy.url)
        store.probe()
        proxy.plan = lambda number, line: fault if line.startswith("PUT") else None
        with pytest.raises(StoreError, match=word) as error:
            store.create("a", b"x") if how == "create" else upload(store, {"f": tmp_path / "f"})
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_a_missing_bucket_is_named(s3: str) -> None:
    for use in (lambda store: store.probe(), lambda store: store.read("a"), lambda store: store.list("")):
        with pytest.raises(StoreError, match=r"there is no bucket nowhere at http://127\.0\.0\.1:\d+"):
            use(store_at(s3, "s3://nowhere/x"))


def test_a_server_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StoreError, match=r"s3://retune/.* at http://127\.0\.0\.1:9$"):
        store_at("http://127.0.0.1:9").read("a")


@pytest.mark.parametrize(
    ("keys", "profile", "word"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-planted"}, None, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, None, "no credentials for s3://retune/"),
        ({}, "nobody", r"publish\.profile_name: .*nobody"),
    ],
)
def test_wrong_or_missing_keys_are_named_without_being_shown(
    s3: str, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], profile: str | None, word: str
) -> None:
    for name, value in keys.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=word) as error:
        store_at(s3, profile_name=profile).read("a")
    assert "planted" not in str(error.value) and "test:tester" not in str(error.value)


def test_a_profile_brings_its_own_keys(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "keys").write_text("[shipping]\naws_access_key_id = test:tester\naws_secret_access_key = testing\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    assert store_at(s3, profile_name="shipping").create("a", b"")


@pytest.mark.parametrize("values", [{"endpoint_url": "http://a b"}, {"endpoint_url": "http://h", "region_name": "a b"}])
def test_parameters_that_boto3_cannot_use_are_named(values: dict[str, str]) -> None:
    with pytest.raises(StoreError, match=r"boto3 cannot use s3://retune/x \(\w+\); correct publish\.endpoint_url"):
        store_at("http://h", "s3://retune/x", **values).read("a")


@pytest.mark.parametrize("uri", ["s3:///prefix", "s3://Bucket/x", "s3://b", "s3://bucket/a/../b", "s3://bucket/a?b=c"])
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/prefix|is not a name"):
        open_store(publish_params(uri))


def test_a_store_may_be_the_whole_bucket(s3: str) -> None:
    store: ArtifactStore = store_at(s3, "s3://retune")
    key = f"whole/{uuid.uuid4().hex}"
    assert store.create(key, b"x")
    assert store.list("whole/") == [key]


@pytest.mark.parametrize("size", [1, 5 * 2**20 + 1])
def test_encryption_checksum_and_condition_are_asked_for_with_every_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    """Swift knows no KMS, and AWS is far: what is sent is looked at, not what comes of it."""
    monkeypatch.setattr("pipeline.registry.s3.PART_SIZE", 5 * 2**20)
    (tmp_path / "f").write_bytes(bytes(size))
    with Sink().running() as endpoint, FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        store = store_at(proxy.url, server_side_encryption="aws:kms", sse_kms_key_id="alias/models")
        store.create("a", b"")
        upload(store, {"f": tmp_path / "f"})
        heads = [head.lower() for head in proxy.heads if head.startswith((b"PUT", b"POST"))]
    assert len(heads) == (6 if size == 1 else 9)
    for head in heads:
        part, begins, ends = (
            b"partnumber=" in head,
            b"?uploads " in head,
            head.startswith(b"post") and b"uploadid" in head,
        )
        assert part or ends or b"aws-kms-key-id: alias/models\r\n" in head
        assert begins or ends or b"x-amz-checksum-" in head
        assert part or begins or b"if-none-match: *\r\n" in head


def test_an_object_that_is_not_what_its_name_says_is_refused_by_the_server(store: S3Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"other bytes")
    with pytest.raises(StoreError, match="BadDigest"):
        store.upload([(f"objects/{'0' * 64}", tmp_path / "f")], lambda size: None)
    assert store.list("objects/") == []


@pytest.mark.parametrize(("number", "requests"), [(0, 1), (1000, 1), (1001, 2), (2500, 3)])
def test_a_listing_is_whole_and_asks_once_for_each_thousand_keys(number: int, requests: int) -> None:
    sink = Sink()
    keys = [f"many/{each:04}" for each in range(number)]
    sink.sizes = {f"x/{key}": 7 for key in keys} | {"x/many2": 0}
    with sink.running() as endpoint:
        assert store_at(endpoint, "s3://retune/x").list("many/") == keys
    assert len(sink.requests) == requests


@pytest.mark.parametrize("prefix", ["", "team-a"])
def test_an_objects_upload_that_nobody_completed_is_aborted_and_those_of_others_are_not(s3: str, prefix: str) -> None:
    store = store_at(s3, f"s3://retune/{prefix}".rstrip("/"))
    ours, theirs = f"objects/{'1' * 64}", ("backup/a", "objects/report")
    made = {
        key: store._client.create_multipart_upload(Bucket="retune", Key=store._name(key))["UploadId"]
        for key in (ours, *theirs)
    }
    assert store.unfinished(store.now() - 60, delete=True) == []
    assert [each.key for each in store.unfinished(store.now() + 60, delete=True)] == [ours]
    assert store.unfinished(store.now() + 60) == []
    for key in theirs:  # they are still there
        store._client.abort_multipart_upload(Bucket="retune", Key=store._name(key), UploadId=made[key])
