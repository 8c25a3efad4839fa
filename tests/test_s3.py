"""The S3 store where it differs from a folder: what it needs from a server, its errors, and its requests."""

import uuid
from pathlib import Path

import pytest
from conftest import publish_params
from fault_proxy import FaultProxy
from s3_sink import Sink

from pipeline.registry.artifact_store import StoreError
from pipeline.registry.s3 import S3Store
from pipeline.registry.stores import upload


def store_at(endpoint: str, uri: str | None = None, **values: object) -> S3Store:
    values = {"endpoint_url": endpoint, "addressing_style": "path"} | values
    return S3Store(publish_params(uri or f"s3://retune/{uuid.uuid4().hex}", **values), read_timeout_s=2)


def test_a_server_that_lets_two_racing_writes_both_win_is_refused(
    swift_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain Swift lets both win."""
    monkeypatch.setattr("pipeline.registry.s3.PROBE_HOLD_S", 2.0)
    for _ in range(3):
        with pytest.raises(StoreError, match="two conditional writes"):
            store_at(swift_server).create("promotions/model/00000001.json", b"mine")


@pytest.mark.parametrize("at_first", [True, False])
def test_a_server_that_ignores_conditions_from_the_start_or_later_is_refused(at_first: bool) -> None:
    sink = Sink(honours_conditions=not at_first)
    with sink.running() as endpoint:
        if not at_first:
            store_at(endpoint, "s3://retune/x").probe()
            sink.honours_conditions = False
        for _ in range(2):
            with pytest.raises(StoreError, match="two conditional writes"):
                store_at(endpoint, "s3://retune/x").create("a", b"")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403:AccessDenied", "refused to put object: 403 AccessDenied; .*docs/operations.md"),
        ("404:NoSuchBucket", "404 NoSuchBucket; .*publish.artifact_store"),
        ("500:InternalError", "500 InternalError"),
        ("409:ConditionalRequestConflict", "409 ConditionalRequestConflict"),
        ("reset", "ConnectionClosedError"),
    ],
)
@pytest.mark.parametrize("how", ["create", "upload"])
def test_a_servers_refusal_is_one_sentence_without_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, words: str, how: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between attempts
    (tmp_path / "f").write_bytes(b"x")
    with Sink().running() as endpoint, FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        store = store_at(proxy.url)
        store.probe()
        proxy.plan = lambda number, line: fault if line.startswith("PUT") else None
        with pytest.raises(StoreError, match=words) as error:
            store.create("a", b"x") if how == "create" else upload(store, {"f": tmp_path / "f"})
    assert "\n" not in str(error.value)
    assert f"({proxy.url})" in str(error.value) and "testing" not in str(error.value)  # the secret key


@pytest.mark.parametrize(
    ("environment", "values", "word"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-planted"}, {}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, {}, "NoCredentialsError"),
        ({}, {"profile_name": "nobody"}, "ProfileNotFound"),
        ({}, {"endpoint_url": "http://a b"}, "ValueError.* endpoint_url"),
        ({}, {"region_name": "a b"}, "region_name"),
        ({}, {"endpoint_url": "http://127.0.0.1:9"}, "EndpointConnectionError"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_credentials_and_parameters_are_named_without_secrets(
    s3: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], values: dict[str, str], word: str
) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=word) as error:
        store_at(s3, **values).read("a")
    assert "planted" not in str(error.value) and "test:tester" not in str(error.value)


@pytest.mark.parametrize("size", [1, 5 * 2**20 + 1])
def test_every_write_asks_for_encryption_checksum_and_condition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    """Only the requests are checked, because Swift has no KMS."""
    monkeypatch.setattr("pipeline.registry.s3.PART_SIZE", 5 * 2**20)
    (tmp_path / "f").write_bytes(bytes(size))
    with Sink().running() as endpoint, FaultProxy(int(endpoint.rpartition(":")[2])) as proxy:
        store = store_at(proxy.url, server_side_encryption="aws:kms", sse_kms_key_id="alias/models")
        store.create("a", b"")
        upload(store, {"f": tmp_path / "f"})
        heads = [head.lower() for head in proxy.heads if head.startswith((b"PUT", b"POST"))]
    assert len(heads) == (6 if size == 1 else 9)
    for head in heads:
        part, begins = b"partnumber=" in head, b"?uploads " in head
        ends = head.startswith(b"post") and b"uploadid" in head
        assert part or ends or b"aws-kms-key-id: alias/models\r\n" in head
        assert begins or ends or b"x-amz-checksum-" in head
        assert part or begins or b"if-none-match: *\r\n" in head


def test_the_server_refuses_an_object_with_another_digest_than_its_name(s3: str, tmp_path: Path) -> None:
    store = store_at(s3)
    (tmp_path / "f").write_bytes(b"other bytes")
    with pytest.raises(StoreError, match="BadDigest"):
        store.upload([(f"objects/{'0' * 64}", tmp_path / "f")], lambda size: None)
    assert store.list("objects/") == []


def test_a_long_listing_is_complete_and_an_unchanged_upload_is_one_request(tmp_path: Path) -> None:
    sink, keys = Sink(), [f"many/{number:04}" for number in range(2500)]
    sink.sizes = {f"x/{key}": 7 for key in keys} | {"x/many2": 0}
    (tmp_path / "f").write_text("f")
    with sink.running() as endpoint:
        store = store_at(endpoint, "s3://retune/x")
        assert store.list("many/") == keys
        upload(store, {"f": tmp_path / "f"})
        sink.requests.clear()
        assert upload(store, {"f": tmp_path / "f"})[1] == 0
    assert [(method, length) for method, _, length in sink.requests] == [("GET", 0)]


@pytest.mark.parametrize("prefix", ["", "team-a"])
def test_unfinished_uploads_of_objects_are_aborted_and_other_uploads_are_not(s3: str, prefix: str) -> None:
    store = store_at(s3, f"s3://retune/{prefix}".rstrip("/"))
    object_key, other_keys = f"objects/{'1' * 64}", ("backup/a", "objects/report")
    uploads = {
        key: store._client.create_multipart_upload(Bucket="retune", Key=store._full_key(key))["UploadId"]
        for key in (object_key, *other_keys)
    }
    assert store.unfinished(store.now() - 60, delete=True) == 0
    assert [store.unfinished(store.now() + 60, delete=True) for _ in range(2)] == [1, 0]
    for key in other_keys:  # fails unless the upload still exists
        store._client.abort_multipart_upload(Bucket="retune", Key=store._full_key(key), UploadId=uploads[key])
