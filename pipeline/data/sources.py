"""Where data comes from: files, folders and globs, Hub datasets, S3 and HTTP, as local files with a pinned identity.

The identity is the commit, digests or ETags that say which bytes they were. Refused is a source that names no revision
or checksum, leaves its own root, changes while it is read, or needs code to be read.
"""

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.core.progress import Progress
from pipeline.data.containers import KNOWN, split_name
from pipeline.data.formats import find_files
from pipeline.data.json_text import FormatError
from pipeline.params import IngestParams

HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w.-]+)(?:/(?P<pattern>.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NOTES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte


class SourceError(RuntimeError):
    """A source cannot be had, or not as it was named; the message names it and the way out."""


@dataclass(frozen=True)
class Source:
    """Files on this machine, each with its name in messages, and what pins a remote source to these bytes."""

    uri: str  # as given, without credentials
    files: list[tuple[Path, str]]
    pinned: dict[str, Any] = field(default_factory=dict)


def fetch(uri: str, params: IngestParams, folder: Path) -> Source:
    """The files that `uri` names; remote ones are downloaded into the empty `folder`.

    Raises:
        FormatError: a local path holds no data files, or leads out of its root.
        SourceError: a remote source is not pinned, not there, too large, or changed while it was read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = int(params.max_download_gib * 2**30)
    scheme = uri.split("://")[0].lower() if "://" in uri else ""
    match scheme:
        case "":
            return _local(uri)
        case "hf":
            return _hub(uri, folder, limit)
        case "s3":
            return _s3(uri, params.s3_endpoint_url, folder, limit)
        case "http" | "https":
            return _http(uri, folder, limit)
    raise SourceError(
        f"{public(uri)} begins with {scheme}://; expected a path, hf://datasets/, s3://, https:// or http://"
    )


def public(uri: str) -> str:
    """`uri` without the parts that can hold a secret: user, password and query."""
    parts = urlsplit(uri)
    if not parts.scheme or parts.scheme == "hf" or "://" not in uri:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", parts.fragment))


def _local(uri: str) -> Source:
    path = Path(uri)
    if path.exists() or not glob.has_magic(uri):
        root = path if path.is_dir() else path.parent
        found = find_files(path)
    else:
        fixed = [*_until_magic(path.parts)]
        root = Path(*fixed) if fixed else Path(".")
        if ".." in path.parts[len(fixed) :]:
            raise FormatError(f"{uri} leaves the folder {root} by `..` behind a wildcard; name the other folder itself")
        names = [Path(name) for name in sorted(glob.glob(uri, recursive=True))]
        found = [name for name in names if name.is_file() and split_name(name)[1]]
        if not found:
            raise FormatError(f"{uri} matches no file that ends in {KNOWN}")
    inside = root.resolve()
    for file in found:
        if path != file and not file.resolve().is_relative_to(inside):
            raise FormatError(
                f"{file} is a link out of {root} (to {file.resolve()}); name that file itself if it is meant"
            )
    return Source(uri, [(file, file.name if file == path else file.relative_to(root).as_posix()) for file in found])


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _http(uri: str, folder: Path, limit: int) -> Source:
    import httpx

    shown = public(uri)
    address, _, fragment = uri.partition("#")
    wanted = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise SourceError(
            f"{shown} has no checksum; write {public(address)}#sha256= and the file's SHA-256 in 64 hex digits"
        )
    name = unquote(PurePosixPath(urlsplit(address).path).name)
    if not split_name(Path(name))[1]:
        raise SourceError(f"{shown} names the file {name!r}; expected one that ends in {KNOWN}")
    digest, done = hashlib.sha256(), 0
    try:
        with httpx.stream(
            "GET", address, follow_redirects=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}
        ) as response:
            if response.status_code != 200:
                raise SourceError(f"{shown} answers {response.status_code} {response.reason_phrase}; expected the file")
            size = int(response.headers.get("Content-Length", 0))
            _refuse_large(shown, size, limit)
            progress = _progress(size)
            with (folder / "download").open("wb") as file:
                for chunk in response.iter_raw(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    _refuse_large(shown, done, limit)
                    if size:
                        progress.update(done >> 20, shown)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{shown} could not be read: {str(error) or type(error).__name__}") from None
    if digest.hexdigest() != wanted:
        raise SourceError(f"{shown} has the SHA-256 {digest.hexdigest()}; it is not the file that was named")
    target = folder / f"file{''.join(split_name(Path(name))[1:])}"
    (folder / "download").rename(target)
    return Source(shown, [(target, name)], {"sha256": wanted})


def _s3(uri: str, endpoint: str | None, folder: Path, limit: int) -> Source:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    shown = public(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket:
        raise SourceError(f"{shown} names no bucket; expected s3://BUCKET/KEY, or s3://BUCKET/PREFIX/ for all below it")
    config = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"mode": "standard"})
    doing = shown
    try:
        client = boto3.client("s3", endpoint_url=endpoint, config=config)
        objects = _s3_objects(client, bucket, key)
        if not objects:
            raise SourceError(f"{shown} holds no object that ends in {KNOWN}")
        total = sum(each["Size"] for each in objects)
        _refuse_large(shown, total, limit)
        progress, done = _progress(total), 0
        files: list[tuple[Path, str]] = []
        pinned = {}
        for number, each in enumerate(objects):
            doing = f"s3://{bucket}/{each['Key']}"
            name = each["Key"] if each["Key"] == key else each["Key"].removeprefix(key).lstrip("/")
            target = folder / f"{number:06}{''.join(split_name(Path(name))[1:])}"
            # The ETag was listed: another object under the same key is refused, by the server.
            answer = client.get_object(Bucket=bucket, Key=each["Key"], IfMatch=each["ETag"])
            with target.open("wb") as file:
                for chunk in answer["Body"].iter_chunks(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    progress.update(done >> 20, doing)
            if target.stat().st_size != each["Size"]:
                raise SourceError(
                    f"{doing} was cut off after {target.stat().st_size:,} of {each['Size']:,} bytes; try again"
                )
            files.append((target, PurePosixPath(name).name if name == key else name))
            pinned[each["Key"]] = {"etag": each["ETag"].strip('"')} | (
                {"version_id": answer["VersionId"]} if answer.get("VersionId", "null") != "null" else {}
            )
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        what = {
            "NoSuchKey": "vanished while it was read: the bucket is being changed; try again when that is done",
            "404": "is not there",
            "NoSuchBucket": "names a bucket that is not there",
            "PreconditionFailed": "changed while it was read; try again when nobody writes to it",
            "412": "changed while it was read; try again when nobody writes to it",
            "AccessDenied": "may not be read with these credentials",
            "403": "may not be read with these credentials",
        }.get(code, f"could not be read: {error}")
        raise SourceError(f"{doing} {what}") from None
    except (BotoCoreError, OSError) as error:
        raise SourceError(f"{doing} could not be read: {error}") from None
    return Source(shown, files, {"objects": pinned})


def _s3_objects(client: Any, bucket: str, key: str) -> list[dict[str, Any]]:
    """Size and ETag of the object `key`, or of every data file below the prefix `key/`."""
    from botocore.exceptions import ClientError

    if key and not key.endswith("/") and split_name(Path(key))[1]:
        try:
            head = client.head_object(Bucket=bucket, Key=key)
            return [{"Key": key, "Size": head["ContentLength"], "ETag": head["ETag"]}]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") not in ("404", "NoSuchKey"):
                raise
    prefix = f"{key.rstrip('/')}/" if key else ""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    listed = [each for page in pages for each in page.get("Contents", [])]
    return [each for each in listed if split_name(Path(each["Key"]))[1]]


def _hub(uri: str, folder: Path, limit: int) -> Source:
    import httpx
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    named = HUB.fullmatch(uri)
    if named is None:
        raise SourceError(
            f"{uri} names no revision of a dataset; expected hf://datasets/OWNER/NAME@COMMIT, optionally with /PATH or "
            "a glob; COMMIT has 40 hex digits and stands on the dataset's page under Files, History. @BRANCH follows "
            "a branch: each ingest takes its newest commit"
        )
    repo, revision, pattern = named["repo"], named["revision"], named["pattern"]
    pinned = {"revision": revision}
    try:
        if not COMMIT.fullmatch(revision):
            # All files are then read at one commit, whatever is pushed meanwhile.
            pinned = {"branch": revision, "revision": _commit_of(repo, revision)}
            revision = pinned["revision"]
        tree = HfApi().list_repo_tree(repo, revision=revision, repo_type="dataset", recursive=True)
        sizes = {each.path: each.size for each in tree if isinstance(each, RepoFile)}
        wanted = [
            path
            for path in sorted(sizes)
            if split_name(Path(path))[1]
            and PurePosixPath(path).name not in HUB_NOTES
            and (pattern is None or fnmatch(path, pattern) or path.startswith(f"{pattern.rstrip('/')}/"))
        ]
        if not wanted:
            scripts = [path for path in sizes if path.endswith(".py")]
            if scripts and pattern is None:
                raise SourceError(
                    f"{uri} needs code to be read ({', '.join(scripts)}), which Retune does not run: export its rows "
                    "to a file with `datasets` where you trust that code, and ingest the file"
                )
            raise SourceError(
                f"{uri} holds no file that ends in {KNOWN}; it holds {', '.join(sorted(sizes)[:10]) or 'none'}"
            )
        _refuse_large(uri, sum(sizes[path] for path in wanted), limit)
        progress, done = _progress(sum(sizes[path] for path in wanted)), 0
        files = []
        for path in wanted:
            if ".." in PurePosixPath(path).parts or path.startswith("/"):
                raise SourceError(f"{uri} holds a file named {path!r}, which leads out of its folder")
            local = hf_hub_download(repo, path, repo_type="dataset", revision=revision, local_dir=folder)
            files.append((Path(local), path))
            done += sizes[path]
            progress.update(done >> 20, path)
    except OfflineModeIsEnabled:
        raise SourceError(f"{uri} is on the Hub, and HF_HUB_OFFLINE forbids to ask it; unset it") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise SourceError(f"{uri} could not be read: {str(error).splitlines()[0]}") from None
    return Source(uri, files, pinned)


def _commit_of(repo: str, branch: str) -> str:
    """The newest commit of a branch of a Hub dataset, or that of a tag."""
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(repo, revision=branch).sha or ""
    if not COMMIT.fullmatch(found):
        raise SourceError(f"the Hub names no commit for {branch} of {repo}; name one yourself, in 40 hex digits")
    return found


def _refuse_large(shown: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(
            f"{shown} has {size / 2**30:,.1f} GiB or more; ingest.max_download_gib is {limit / 2**30:g}: "
            "raise it if it is meant"
        )


def _progress(size: int) -> Progress:
    return Progress("ingest", max(size >> 20, 1), "MiB", every=2.0)
