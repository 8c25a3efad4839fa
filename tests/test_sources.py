"""Sources of every kind, from real files, HTTP and S3 servers; a source that is not pinned or not safe is refused."""

import hashlib
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from s3_sink import serving

from pipeline.data import sources
from pipeline.data.readers import FormatError
from pipeline.data.sources import SourceError, fetch, without_secrets
from pipeline.params import IngestParams
from pipeline.settings import load_params

ROWS = b'{"instruction": "Q", "output": "A"}\n' * 3
SHA256 = hashlib.sha256(ROWS).hexdigest()
REVISION = "0123456789abcdef0123456789abcdef01234567"
PARAMS = load_params(ROOT / "params.yaml").ingest


def params(**values: Any) -> IngestParams:
    return PARAMS.model_copy(update=values)


# Local


def tree(folder: Path) -> Path:
    for name in ("a/one.jsonl", "a/b/two.jsonl", "a/b/readme.md", "outside/three.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(ROWS)
    return folder


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("a", ["b/two.jsonl", "one.jsonl"]),
        ("a/*.jsonl", ["one.jsonl"]),
        ("a/**/*", ["b/two.jsonl", "one.jsonl"]),
        ("a/b/two.jsonl", ["two.jsonl"]),
        ("outside/../a/*.jsonl", ["one.jsonl"]),
    ],
)
def test_a_path_or_glob_gives_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, names: list[str]
) -> None:
    monkeypatch.chdir(tree(tmp_path))
    for path_or_glob in (uri, str(tmp_path / uri)):
        source = fetch(path_or_glob, PARAMS, tmp_path / "scratch")
        assert [name for _, name in source.files] == names
        assert all(path.read_bytes() == ROWS for path, _ in source.files)


@pytest.mark.parametrize("uri", ["a", "a/*", "a/**/*.jsonl"])
def test_a_link_out_of_the_root_is_refused_unless_the_source_is_the_link_itself(tmp_path: Path, uri: str) -> None:
    target = tree(tmp_path) / "outside"
    (tmp_path / "a" / "linked").symlink_to(target)
    if uri != "a/**/*.jsonl":  # linked folders are not searched
        assert "three.jsonl" not in str(fetch(str(tmp_path / uri), PARAMS, tmp_path / "scratch").files)
    (tmp_path / "a" / "link.jsonl").symlink_to(target / "three.jsonl")
    with pytest.raises(FormatError, match=r"link\.jsonl .*three\.jsonl"):
        fetch(str(tmp_path / uri), PARAMS, tmp_path / "scratch")
    assert len(fetch(str(tmp_path / "a" / "link.jsonl"), PARAMS, tmp_path / "scratch").files) == 1


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("nowhere.jsonl", "does not exist"),
        ("*.jsonl", "matches no file"),
        ("ftp://x/y", "expected a path"),
        ("a/*/../../outside/*.jsonl", "after a wildcard"),
        ("*/../a/one.jsonl", "after a wildcard"),  # would match once for each folder
    ],
)
def test_a_source_that_does_not_exist_or_leaves_its_root_is_refused(tmp_path: Path, uri: str, what: str) -> None:
    with pytest.raises((FormatError, SourceError), match=what):
        fetch(uri if "://" in uri else str(tree(tmp_path) / uri), PARAMS, tmp_path / "scratch")


def test_credentials_are_removed_from_a_uri() -> None:
    uri = "https://user:secret@host/rows.jsonl?token=secret#sha256=ab"
    assert without_secrets(uri) == "https://host/rows.jsonl#sha256=ab"
    assert without_secrets("data/rows?.jsonl") == "data/rows?.jsonl"


# HTTP and the Hub


class Server(BaseHTTPRequestHandler):
    """Serves `files` by path, redirects /moved, and implements the part of the Hub's API that a download needs."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/moved"):
            self.answer(302, b"", Location=path.removeprefix("/moved"))
        elif path in (f"/api/datasets/own/set/revision/{name}" for name in ("main", REVISION)):
            files = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            self.answer(200, json.dumps({"id": "own/set", "sha": REVISION, "siblings": files}).encode())
        elif path.startswith(f"/datasets/own/set/resolve/{REVISION}/"):
            data = self.files[path.split(f"{REVISION}/")[1]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, **{"X-Repo-Commit": REVISION})
        elif path in self.files:
            self.answer(200, self.files[path])
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def web() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {"/rows.jsonl": ROWS, "/rows": ROWS}
    with serving(type("Own", (Server,), {"files": files})) as url:
        yield url, files


def test_a_file_with_the_right_checksum_is_downloaded(tmp_path: Path, web: tuple[str, dict[str, bytes]]) -> None:
    for path in ("/rows.jsonl", "/moved/rows.jsonl"):
        source = fetch(f"{web[0]}{path}?key=secret#sha256={SHA256}", PARAMS, tmp_path / path.replace("/", "-"))
        [(file, name)] = source.files
        assert (file.read_bytes(), name, source.pinned) == (ROWS, "rows.jsonl", {"sha256": SHA256})
        assert "secret" not in source.uri


@pytest.mark.parametrize(
    ("address", "gib", "what"),
    [
        ("/rows.jsonl", 1, "no checksum"),
        ("/rows.jsonl#sha256=123", 1, "no checksum"),
        (f"/rows.jsonl#sha256={'0' * 64}", 1, SHA256),
        (f"/rows.jsonl#sha256={SHA256}", 1e-8, "ingest.max_download_gib is"),
        (f"/none.jsonl#sha256={SHA256}", 1, "404"),
        (f"/rows#sha256={SHA256}", 1, "no known file type"),
        (f"http://127.0.0.1:9/rows.jsonl#sha256={SHA256}", 1, "could not be read"),
    ],
)
def test_a_download_that_is_not_pinned_too_large_or_another_file_is_refused(
    tmp_path: Path, web: tuple[str, dict[str, bytes]], address: str, gib: float, what: str
) -> None:
    address = address if "://" in address else web[0] + address
    with pytest.raises(SourceError, match=what):
        fetch(address, params(max_download_gib=gib), tmp_path / "scratch")


@pytest.fixture
def hub(web: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", web[0])
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", web[0] + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", web[0])
    web[1].clear()
    return web[1]


@pytest.mark.parametrize(
    ("uri", "names", "pinned"),
    [
        (f"@{REVISION}", ["data/test.jsonl", "data/train.jsonl"], {}),
        (f"@{REVISION}/data/tr*.jsonl", ["data/train.jsonl"], {}),
        ("@main/data", ["data/test.jsonl", "data/train.jsonl"], {"branch": "main"}),  # the newest commit
    ],
)
def test_a_hub_dataset_gives_its_data_files_at_a_commit(
    tmp_path: Path, hub: dict[str, bytes], uri: str, names: list[str], pinned: dict[str, str]
) -> None:
    hub |= {"data/train.jsonl": ROWS, "data/test.jsonl": ROWS, "README.md": b"#", "dataset_infos.json": b"{}"}
    source = fetch(f"hf://datasets/own/set{uri}", PARAMS, tmp_path / "scratch")
    assert [(path.read_bytes(), name) for path, name in source.files] == [(ROWS, name) for name in names]
    assert source.pinned == {"revision": REVISION} | pinned


@pytest.mark.parametrize(
    ("uri", "files", "what"),
    [
        (f"own/set@{REVISION}", {"set.py": b"import os"}, "no file that ends in"),
        (f"own/set@{REVISION}", {"../../evil.jsonl": ROWS}, "leads out of its folder"),
        ("own/set", {"rows.jsonl": ROWS}, "no revision"),
        ("own/set@lost", {"rows.jsonl": ROWS}, "hf://datasets/own/set@lost could not be read: .*404"),
    ],
)
def test_a_hub_dataset_that_is_not_safe_or_not_pinned_is_refused(
    tmp_path: Path, hub: dict[str, bytes], uri: str, files: dict[str, bytes], what: str
) -> None:
    hub |= files
    with pytest.raises(SourceError, match=what):
        fetch(f"hf://datasets/{uri}", PARAMS, tmp_path / "a" / "b")
    assert not [*tmp_path.rglob("*.py"), *tmp_path.rglob("evil*")]


def test_a_hub_source_is_refused_offline(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        fetch(f"hf://datasets/own/set@{REVISION}", PARAMS, tmp_path / "scratch")


# S3, on a real server


@pytest.fixture
def bucket(swift_server: str, tmp_path: Path) -> Any:
    import boto3

    client = boto3.client("s3", endpoint_url=swift_server, region_name="us-east-1")
    client.prefix = f"{tmp_path.name}/"
    for key in ("rows.jsonl", "sub/more.jsonl", "readme.md"):
        client.put_object(Bucket="retune", Key=client.prefix + key, Body=ROWS)
    return client


def test_a_prefix_and_a_key_are_read_with_their_etags(tmp_path: Path, swift_server: str, bucket: Any) -> None:
    settings = params(s3_endpoint_url=swift_server)
    source = fetch(f"s3://retune/{bucket.prefix}", settings, tmp_path / "prefix")
    assert [name for _, name in source.files] == ["rows.jsonl", "sub/more.jsonl"]
    assert all(path.read_bytes() == ROWS for path, _ in source.files)
    assert source.pinned["objects"][f"{bucket.prefix}rows.jsonl"] == {"etag": hashlib.md5(ROWS).hexdigest()}
    one = fetch(f"s3://retune/{bucket.prefix}sub/more.jsonl", settings, tmp_path / "key")
    assert [name for _, name in one.files] == ["more.jsonl"]


@pytest.mark.parametrize(("change", "what"), [("delete", "NoSuchKey"), ("put", "PreconditionFailed|412")])
def test_an_object_that_is_deleted_or_replaced_after_the_listing_is_refused(
    tmp_path: Path, swift_server: str, bucket: Any, monkeypatch: pytest.MonkeyPatch, change: str, what: str
) -> None:
    list_objects = sources._s3_objects

    def list_then_change(*arguments: Any) -> Any:
        objects = list_objects(*arguments)
        key = {"Bucket": "retune", "Key": f"{bucket.prefix}sub/more.jsonl"}
        _ = bucket.delete_object(**key) if change == "delete" else bucket.put_object(**key, Body=ROWS + ROWS)
        return objects

    monkeypatch.setattr(sources, "_s3_objects", list_then_change)
    with pytest.raises(SourceError, match=rf"s3://retune/.*sub/more\.jsonl could not be read: .*({what})"):
        fetch(f"s3://retune/{bucket.prefix}", params(s3_endpoint_url=swift_server), tmp_path / "scratch")


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("s3://retune/nothing/", "no object that ends in"),
        ("s3://no-such-bucket/a/", "NoSuchBucket"),
        ("s3:///a", "no bucket"),
    ],
)
def test_a_missing_object_or_bucket_is_an_error(
    tmp_path: Path, swift_server: str, bucket: Any, uri: str, what: str
) -> None:
    with pytest.raises(SourceError, match=what):
        fetch(uri, params(s3_endpoint_url=swift_server), tmp_path / "scratch")
