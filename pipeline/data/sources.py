"""Fetches data sources: files, folders and globs, Hub datasets, S3 and HTTP.

A source without revision or checksum, outside its own root, or that changes while it is read is refused.
"""

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.core.progress import Progress
from pipeline.data.formats import find_files
from pipeline.data.readers import KNOWN, FormatError, split_name
from pipeline.params import IngestParams

HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w.-]+)(?:/(?P<pattern>.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without data


class SourceError(RuntimeError):
    """A source cannot be read, or is not what its URI says."""


@dataclass(frozen=True)
class Source:
    uri: str  # without credentials
    files: list[tuple[Path, str]]  # on this machine, each with its name for messages
    pinned: dict[str, Any] = field(default_factory=dict)  # identifies the bytes of a remote source


class _Download:
    """Prints the progress of a download and refuses more than `ingest.max_download_gib`."""

    def __init__(self, uri: str, expected: int, limit_gib: float) -> None:
        self.uri, self.expected, self.limit_gib, self.done = uri, expected, limit_gib, 0
        self.progress = Progress("ingest", max(expected >> 20, 1), "MiB", every=2.0)
        self.add(0)

    def add(self, size: int) -> None:
        self.done += size
        if (known_size := max(self.done, self.expected)) > self.limit_gib * 2**30:
            raise SourceError(
                f"{self.uri} has at least {known_size / 2**30:,.1f} GiB; ingest.max_download_gib is "
                f"{self.limit_gib:g}: raise it to download this much"
            )
        self.progress.update(self.done >> 20, self.uri)

    def write(self, target: Path, chunks: Iterable[bytes]) -> str:
        """Write `chunks` to `target`; returns their SHA-256."""
        digest = hashlib.sha256()
        with target.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                self.add(len(chunk))
        return digest.hexdigest()


def fetch(uri: str, params: IngestParams, folder: Path) -> Source:
    """The files of `uri`; remote ones are downloaded into the empty `folder`. Raises FormatError or SourceError."""
    folder.mkdir(parents=True, exist_ok=True)
    match uri.partition("://")[0].lower() if "://" in uri else "":
        case "":
            return _local(uri)
        case "hf":
            return _hub(uri, folder, params.max_download_gib)
        case "s3":
            return _s3(uri, params.s3_endpoint_url, folder, params.max_download_gib)
        case "http" | "https":
            return _http(uri, folder, params.max_download_gib)
    raise SourceError(f"{without_secrets(uri)}: expected a path, hf://datasets/, s3://, https:// or http://")


def without_secrets(uri: str) -> str:
    """`uri` without user, password and query."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "hf") or "://" not in uri:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", parts.fragment))


@contextmanager
def _reading(uri: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a client's errors into a SourceError with their first line, which never contains the URI's query."""
    try:
        yield
    except errors as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SourceError(f"{without_secrets(uri)} could not be read: {reason}") from None


def _local(uri: str) -> Source:
    path = Path(uri)
    if path.exists() or not glob.has_magic(uri):
        root, files = path if path.is_dir() else path.parent, find_files(path)
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches = map(Path, sorted(glob.glob(uri, recursive=True)))
        files = [file for file in matches if file.is_file() and split_name(file)[1]]
        if not files:
            raise FormatError(f"{uri} matches no file that ends in {KNOWN}")
    for file in files:
        if ".." in file.relative_to(root).parts[:-1]:  # a file would be found once for each folder before the `..`
            raise FormatError(f"{uri} has `..` after a wildcard; name the other folder directly")
        if path != file and not file.resolve().is_relative_to(root.resolve()):
            raise FormatError(f"{file} links to {file.resolve()}, outside {root}; to read that file, name it directly")
    return Source(uri, [(file, file.name if file == path else file.relative_to(root).as_posix()) for file in files])


def _http(uri: str, folder: Path, limit_gib: float) -> Source:
    import httpx

    address, _, fragment = uri.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    name = unquote(PurePosixPath(urlsplit(address).path).name)
    suffixes = split_name(Path(name))[1:]
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not suffixes[0]:
        raise SourceError(
            f"{without_secrets(uri)} has no checksum or no known file type; expected "
            f"{without_secrets(address)}#sha256=…, with 64 hex digits, and a file that ends in {KNOWN}"
        )
    target, shown = folder / f"file{''.join(suffixes)}", without_secrets(uri)
    options: dict[str, Any] = {"follow_redirects": True, "timeout": TIMEOUT, "headers": {"Accept-Encoding": "identity"}}
    with _reading(uri, httpx.HTTPError, httpx.InvalidURL), httpx.stream("GET", address, **options) as response:
        if response.status_code != 200:
            raise SourceError(f"{shown} answers with status {response.status_code}; expected 200")
        download = _Download(shown, int(response.headers.get("Content-Length", 0)), limit_gib)
        digest = download.write(target, response.iter_raw(CHUNK))
    if digest != sha256:
        raise SourceError(f"{shown}: the file has the SHA-256 {digest}; check the file, or correct the URI")
    return Source(shown, [(target, name)], {"sha256": sha256})


def _s3(uri: str, endpoint: str | None, folder: Path, limit_gib: float) -> Source:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket:
        raise SourceError(f"{without_secrets(uri)} has no bucket; expected s3://BUCKET/KEY, or s3://BUCKET/PREFIX/")
    config = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"mode": "standard"})
    files: list[tuple[Path, str]] = []
    pinned = {}
    with _reading(uri, ClientError, BotoCoreError, OSError):
        client = boto3.client("s3", endpoint_url=endpoint, config=config)
        objects = _s3_objects(client, bucket, key)
        if not objects:
            raise SourceError(f"{without_secrets(uri)} has no object that ends in {KNOWN}")
        download = _Download(without_secrets(uri), sum(entry["Size"] for entry in objects), limit_gib)
        for number, entry in enumerate(objects):
            object_key, etag = entry["Key"], entry["ETag"]
            name = PurePosixPath(key).name if object_key == key else object_key.removeprefix(key).lstrip("/")
            target = folder / f"{number:06}{''.join(split_name(Path(name))[1:])}"
            with _reading(f"s3://{bucket}/{object_key}", ClientError):
                # With the listed ETag, the server refuses an object that was replaced since.
                answer = client.get_object(Bucket=bucket, Key=object_key, IfMatch=etag)
            download.write(target, answer["Body"].iter_chunks(CHUNK))
            files.append((target, name))
            version = answer.get("VersionId", "null")
            pinned[object_key] = {"etag": etag.strip('"')} | ({"version_id": version} if version != "null" else {})
    return Source(without_secrets(uri), files, {"objects": pinned})


def _s3_objects(client: Any, bucket: str, key: str) -> list[dict[str, Any]]:
    """Key, size and ETag of the object `key`, or of every data file under the prefix `key/`."""
    prefix = key if not key or key.endswith("/") or split_name(Path(key))[1] else f"{key}/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    entries = [entry for page in pages for entry in page.get("Contents", []) if split_name(Path(entry["Key"]))[1]]
    return [entry for entry in entries if entry["Key"] == key] or [
        entry for entry in entries if entry["Key"].startswith(f"{key.rstrip('/')}/" if key else "")
    ]


def _hub(uri: str, folder: Path, limit_gib: float) -> Source:
    import httpx
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    parts = HUB.fullmatch(uri)
    if parts is None:
        raise SourceError(
            f"{uri} has no revision; expected hf://datasets/OWNER/NAME@COMMIT, optionally with /PATH or a glob. COMMIT "
            "has 40 hex digits and is on the dataset's page under Files, History; @BRANCH takes the newest commit of a "
            "branch at each ingest"
        )
    repo, revision, pattern = parts["repo"], parts["revision"], parts["pattern"]
    files = []
    with _reading(uri, HfHubHTTPError, httpx.HTTPError, OSError):
        # All files come from the commit that the revision has now, even if somebody pushes during the download.
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
            raise SourceError(f"the Hub names no commit for {revision} of {repo}; give the commit, 40 hex digits")
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        data = [path for path in sorted(sizes) if split_name(Path(path))[1] and Path(path).name not in HUB_METADATA]
        if pattern is not None:
            data = [path for path in data if fnmatch(path, pattern) or path.startswith(f"{pattern.rstrip('/')}/")]
        if not data:
            raise SourceError(f"{uri} has no file that ends in {KNOWN}")
        download = _Download(uri, sum(sizes[path] for path in data), limit_gib)
        for path in data:
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                raise SourceError(f"{uri} has a file named {path!r}, which leads out of its folder")
            local = hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=folder)
            files.append((Path(local), path))
            download.add(Path(local).stat().st_size)
    return Source(uri, files, {"revision": commit} | ({"branch": revision} if revision != commit else {}))
