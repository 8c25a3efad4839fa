"""The artifact store in an S3 bucket, on AWS or any server with atomic conditional writes, through boto3.

Credentials come only from boto3's own chain. A server that ignores `If-None-Match: *` is refused, because two writers
could both believe that they were first. Errors contain no secrets.
"""

import base64
import hashlib
import io
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlparse

import boto3
from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ReadTimeoutError
from botocore.exceptions import ResponseStreamingError as StreamError
from s3transfer.exceptions import RetriesExceededError

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import OBJECT, ArtifactStore, Files, Progress, Stored, StoreError, check_key

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 5  # per request, with growing pauses; also for a download whose body is cut off
CONFLICTS = 8  # attempts while S3 answers that another conditional write of the same key is in progress
PART_SIZE = 32 * 2**20  # bytes; larger files are transferred in parts of this size
PROBE = b"Retune creates this object twice, to test that the server refuses the second write (If-None-Match: *).\n"
PROBE_HOLD_S = 2.0  # how long one write of the probe waits for the other
BROKEN_BODY = (IncompleteReadError, StreamError, ReadTimeoutError)
ADVICE = (
    "check the connection, publish.artifact_store, endpoint_url, region_name and profile_name, the credentials that "
    "boto3 finds (environment, ~/.aws, this machine's role), and the permissions listed in docs/operations.md"
)


class S3Store(ArtifactStore):
    """A store under `s3://bucket/prefix`; thread-safe."""

    def __init__(self, params: PublishParams, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        parsed = urlparse(params.artifact_store)
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", self.bucket) or parsed.query or parsed.fragment:
            raise StoreError(f"publish.artifact_store is {params.artifact_store}; expected s3://bucket/prefix")
        if self.prefix:
            check_key(self.prefix)
        self.uri = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.server = params.endpoint_url or "AWS"
        self._transfers = TransferConfig(
            multipart_threshold=PART_SIZE,
            multipart_chunksize=PART_SIZE,
            max_concurrency=params.max_concurrency,
            preferred_transfer_client="classic",  # the other one, awscrt, would write without `If-None-Match`
        )
        encryption = {"ServerSideEncryption": params.server_side_encryption, "SSEKMSKeyId": params.sse_kms_key_id}
        self._encryption = {name: value for name, value in encryption.items() if value is not None}
        self._probed = False
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=max(10, params.max_concurrency + 1),
            tcp_keepalive=True,
            s3={"addressing_style": params.addressing_style, "payload_signing_enabled": False},
        )
        with self._store_errors():
            session = boto3.Session(profile_name=params.profile_name, region_name=params.region_name)
            self._client = session.client("s3", endpoint_url=params.endpoint_url, config=config)
        for operation in ("PutObject", "CompleteMultipartUpload"):
            self._client.meta.events.register(f"provide-client-params.s3.{operation}", _only_create)
            self._client.meta.events.register(f"needs-retry.s3.{operation}", _pause_at_conflict)

    def probe(self) -> None:
        """Check that conditional writes exclude each other: by a race at a store's first use, later by one write."""
        if self._probed:
            return
        with self._store_errors():
            first = self.read("probe/done") is None
            safe = not first or self._race(f"probe/{uuid.uuid4().hex}")
            if first and safe:
                self._put("probe/done", PROBE)
            self._probed = safe and not self._put("probe/done", PROBE)
        if not self._probed:
            raise StoreError(
                f"the S3 server of {self.uri} lets two conditional writes (If-None-Match) of one key both succeed, so "
                "two promotions could both succeed; use AWS S3 or another server with atomic conditional writes"
            )

    def _race(self, key: str) -> bool:
        """Whether one of two overlapping writes fails. Swift lets both succeed: it checks when a write begins."""
        body = _HeldBody(PROBE)
        with ThreadPoolExecutor(1) as other:
            first = other.submit(self._put, key, PROBE, body=body)
            body.begun.wait(PROBE_HOLD_S)
            second = self._put(key, PROBE)
            body.released.set()
            return not (first.result() and second)

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        self.probe()
        token = uuid.uuid4().hex
        with self._store_errors():
            if self._put(key, data, creation=token):
                return True
            # The object may be from this very call: boto3 sends a write again if the answer to it was lost.
            head = self._client.head_object(Bucket=self.bucket, Key=self._full_key(key))
            return bool(head["Metadata"].get("creation") == token)

    def upload(self, files: Files, progress: Progress) -> None:
        with self._store_errors(), create_transfer_manager(self._client, self._transfers) as manager:
            subscribers, transfers = [ProgressCallbackInvoker(progress)], []
            for key, path in files:
                # The server checks the content against the name, or for a file in parts, each part's CRC.
                whole = path.stat().st_size < PART_SIZE
                extra = self._encryption | ({"ChecksumSHA256": _base64(bytes.fromhex(key[8:]))} if whole else {})
                transfers.append(manager.upload(str(path), self.bucket, self._full_key(key), extra, subscribers))
            for transfer in transfers:
                try:
                    transfer.result()
                except ClientError as error:
                    if _status(error) != 412:  # another publisher has just created it
                        raise

    def read(self, key: str) -> bytes | None:
        with self._store_errors():
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._full_key(check_key(key)))
                    return bytes(answer["Body"].read())
                except self._client.exceptions.NoSuchKey:
                    break
                except (*BROKEN_BODY, ClientError) as error:
                    # botocore repeats failed requests, but not for a body that is cut off; a 404 then has no code.
                    if attempt == ATTEMPTS or (isinstance(error, ClientError) and _code(error) != "404"):
                        raise
                    time.sleep(0.1 * 2**attempt)
        return None

    def download(self, files: Files, progress: Progress) -> None:
        with self._store_errors(), create_transfer_manager(self._client, self._transfers) as manager:
            subscribers = [ProgressCallbackInvoker(progress)]
            transfers = {
                key: manager.download(self.bucket, self._full_key(check_key(key)), str(path), None, subscribers)
                for key, path in files
            }
            for key, transfer in transfers.items():
                try:
                    transfer.result()
                except ClientError as error:
                    if _status(error) == 404:
                        raise StoreError(f"{self.uri} has no {key}") from None
                    raise

    def scan(self, prefix: str) -> Sequence[Stored]:
        objects = self._list_all("list_objects_v2", "Contents", prefix)
        return sorted(Stored(key, entry["Size"], entry["LastModified"].timestamp()) for key, entry in objects)

    def delete(self, key: str) -> None:
        with self._store_errors():
            self._client.delete_object(Bucket=self.bucket, Key=self._full_key(check_key(key)))

    def now(self) -> float:
        with self._store_errors():
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._full_key("probe"), MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def unfinished(self, before: float, delete: bool = False) -> int:
        """Count multipart uploads of objects that were never completed; the bucket's owner pays for their parts."""
        uploads = self._list_all("list_multipart_uploads", "Uploads", "objects/")
        old = [entry for key, entry in uploads if OBJECT.fullmatch(key) and entry["Initiated"].timestamp() < before]
        with self._store_errors():
            for entry in old if delete else ():
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=entry["Key"], UploadId=entry["UploadId"])
        return len(old)

    def _list_all(self, operation: str, field: str, prefix: str) -> Sequence[tuple[str, dict[str, Any]]]:
        """All entries of a listing, with their keys."""
        with self._store_errors():
            pages = self._client.get_paginator(operation).paginate(Bucket=self.bucket, Prefix=self._full_key(prefix))
            return [(entry["Key"][len(self._full_key("")) :], entry) for page in pages for entry in page.get(field, [])]

    def _full_key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _put(self, key: str, data: bytes, body: "_HeldBody | None" = None, **metadata: str) -> bool:
        """Create the object; False if the key exists. `body` sends `data` at its own pace."""
        options = {"ChecksumSHA256": _base64(hashlib.sha256(data).digest()), "Metadata": metadata} | self._encryption
        try:
            self._client.put_object(Bucket=self.bucket, Key=self._full_key(key), Body=body or data, **options)
        except ClientError as error:
            if _status(error) != 412:
                raise
            return False
        return True

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            # boto3's operation name in plain words: PutObject is "put object".
            action = re.sub(r"(?<!^)(?=[A-Z])", " ", error.operation_name).lower().replace(" v2", "")
            problem = f"refused to {action}: {_status(error)} {_code(error)}"
        except (RetriesExceededError, BotoCoreError, ValueError) as error:
            # Only the error's name, because boto3's message may quote a credential.
            cause = error.last_exception if isinstance(error, RetriesExceededError) else error
            problem = f"cannot be used: {type(cause).__name__}, after up to {ATTEMPTS} attempts"
        else:
            return
        raise StoreError(f"the S3 server of {self.uri} ({self.server}) {problem}; {ADVICE}") from None


class _HeldBody(io.BytesIO):
    """A body whose second half waits for `released`, at most PROBE_HOLD_S: a server may make the second writer wait."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.begun, self.released = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() == 0:
            return super().read(len(PROBE) // 2)
        self.begun.set()
        self.released.wait(PROBE_HOLD_S)
        return super().read(size)


def _only_create(params: dict[str, Any], **_: object) -> None:
    params["IfNoneMatch"] = "*"  # of every write of the client, boto3's transfers included


def _pause_at_conflict(response: Any, attempts: int, **_: object) -> float | None:
    """Seconds until the next attempt if another conditional write of the key is in progress, else None."""
    conflict = response is not None and response[0].status_code == 409
    return 0.05 * 2**attempts if conflict and attempts < CONFLICTS else None


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
