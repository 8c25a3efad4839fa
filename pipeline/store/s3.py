"""The artifact store in an S3 bucket, on AWS or any server that honours conditional writes, through boto3.

Credentials come from boto3's own chain alone. Refused: a server that ignores `If-None-Match: *`, on which two writers
could both believe that they were first. What fails is said in a sentence that holds no secret.
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
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)

from pipeline.params import PublishParams
from pipeline.store.artifact_store import FOLDERS, Stored, StoreError, check_key

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 5  # of every request, with growing pauses; also of a download whose body breaks off
CONFLICTS = 8  # attempts while S3 answers that another conditional write of the same key is under way
PROBE = b"Retune writes this on condition that it is not there, to see that the server heeds the condition.\n"
PROBE_HOLD_S = 2.0  # how long one write of the probe waits for the other
BROKEN_BODY = (IncompleteReadError, ResponseStreamingError, ReadTimeoutError)


class S3Store:
    """A store under `s3://bucket/prefix`. Safe for threads."""

    def __init__(self, params: PublishParams, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        parsed = urlparse(params.artifact_store)
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", self.bucket) or parsed.query or parsed.fragment:
            raise StoreError(f"publish.artifact_store is {params.artifact_store}; expected s3://bucket/prefix")
        if self.prefix:
            check_key(self.prefix)
        self.uri = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.endpoint = params.endpoint_url
        self.max_concurrency = params.max_concurrency
        self._encryption = {
            name: value
            for name, value in (
                ("ServerSideEncryption", params.server_side_encryption),
                ("SSEKMSKeyId", params.sse_kms_key_id),
            )
            if value is not None
        }
        self._probing = threading.Lock()
        self._probed = False
        with self._explained():
            session = boto3.Session(profile_name=params.profile_name, region_name=params.region_name)
            self._client = session.client(
                "s3",
                endpoint_url=params.endpoint_url,
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=read_timeout_s,
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                    max_pool_connections=params.max_concurrency + 1,
                    tcp_keepalive=True,
                    # Every write names its SHA-256 in a signed header; hashing the body once more would add nothing.
                    request_checksum_calculation="when_required",
                    s3={"addressing_style": params.addressing_style, "payload_signing_enabled": False},
                ),
            )

    def probe(self) -> None:
        """See that the server keeps conditional writes apart: at the first use of a store a race, later one refusal.

        The verdict is kept in the store, so that later probes cost two requests and nothing accumulates.
        """
        with self._probing, self._explained():
            if self._probed:
                return
            if self.read("probe/done") is None:
                self._race(f"probe/{uuid.uuid4().hex}")
                self._won("probe/done", PROBE)
            if self._won("probe/done", PROBE):
                raise StoreError(
                    f"the S3 server of {self.uri} ignores the condition If-None-Match, so that two promoters could "
                    "both win; use AWS S3 or another server that has conditional writes"
                )
            self._probed = True

    def _race(self, key: str) -> None:
        """Two writes of one key, the second while the first is under way. A server that asks whether the key exists
        when a write begins, and not when it ends, lets both succeed: OpenStack Swift does."""
        body = _HeldBody(PROBE)
        with ThreadPoolExecutor(1) as other:
            first = other.submit(self._won, key, body)
            body.begun.wait(PROBE_HOLD_S)
            second = self._won(key, PROBE)
            body.released.set()
            if first.result() and second:
                raise StoreError(
                    f"the S3 server of {self.uri} lets two conditional writes (If-None-Match) of one key both succeed, "
                    "so that two promoters could both win; use AWS S3 or another server that lets one win"
                )

    def _won(self, key: str, body: "bytes | _HeldBody") -> bool:
        try:
            self._put(key, body, hashlib.sha256(PROBE).digest(), {})
        except _Exists:
            return False
        return True

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        self.probe()
        token = uuid.uuid4().hex
        with self._explained():
            try:
                # An object's name is its digest: the server itself checks that the content is what the name says.
                named = re.fullmatch(r"objects/[0-9a-f]{64}", key)
                digest = bytes.fromhex(key[8:]) if named else hashlib.sha256(data).digest()
                self._put(key, data, digest, {"creation": token})
            except _Exists:
                # Maybe this very write: its acknowledgement was lost and it was sent again, or delivered twice.
                head = self._client.head_object(Bucket=self.bucket, Key=self._name(key))
                return head["Metadata"].get("creation") == token
        return True

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes | None:
        whole = start == 0 and size is None
        span = {} if whole else {"Range": f"bytes={start}-{'' if size is None else start + size - 1}"}
        with self._explained():
            attempt = 1
            while True:
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._name(check_key(key)), **span)
                except ClientError as error:
                    if _status(error) == 404 and _code(error) != "NoSuchBucket":
                        return None
                    if _status(error) == 416:
                        return b""
                    raise
                try:
                    return answer["Body"].read()
                except BROKEN_BODY:  # botocore sends a request again, but not for a body that breaks off
                    if attempt == ATTEMPTS:
                        raise
                    attempt += 1
                    time.sleep(0.05 * 2**attempt)

    def list(self, prefix: str) -> list[str]:
        return [stored.key for stored in self.scan(prefix)]

    def scan(self, prefix: str) -> Sequence[Stored]:
        cut = len(self._name(""))
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._name(prefix)
            )
            found = [
                Stored(each["Key"][cut:], each["Size"], each["LastModified"].timestamp())
                for page in pages
                for each in page.get("Contents", [])
            ]
        return sorted(found, key=lambda stored: stored.key)

    def delete(self, key: str) -> None:
        with self._explained():
            self._client.delete_object(Bucket=self.bucket, Key=self._name(check_key(key)))

    def now(self) -> float:
        with self._explained():
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._name("probe"), MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def unfinished(self, before: float, delete: bool = False) -> Sequence[Stored]:
        """Multipart uploads that nobody completed. Retune makes none; those of other tools cost money unseen."""
        found, cut = [], len(self._name(""))
        with self._explained():
            for page in self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._name("")
            ):
                for each in page.get("Uploads", []):
                    # Without a prefix the bucket may be shared with other programs, whose uploads are theirs.
                    ours = self.prefix or each["Key"].startswith(FOLDERS)
                    if not ours or each["Initiated"].timestamp() >= before:
                        continue
                    found.append(Stored(each["Key"][cut:], 0, each["Initiated"].timestamp()))
                    if delete:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=each["Key"], UploadId=each["UploadId"]
                        )
        return found

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _put(self, key: str, data: "bytes | _HeldBody", digest: bytes, metadata: dict[str, str]) -> None:
        """Create the object, or raise _Exists."""
        for attempt in range(1, CONFLICTS + 1):
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._name(key),
                    Body=data,
                    IfNoneMatch="*",
                    ChecksumSHA256=base64.b64encode(digest).decode(),
                    Metadata=metadata,
                    **self._encryption,
                )
                return
            except ClientError as error:
                if _status(error) == 412:
                    raise _Exists from None
                if _status(error) != 409 or attempt == CONFLICTS:
                    raise
                time.sleep(0.05 * 2**attempt)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise StoreError(self._sentence(error)) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise StoreError(
                f"there are no credentials for {self.uri}; boto3 looks in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "in ~/.aws (publish.profile_name), and at the machine's role"
            ) from None
        except ProfileNotFound as error:
            raise StoreError(f"publish.profile_name: {error}; ~/.aws/config lists the profiles") from None
        except (EndpointConnectionError, ConnectTimeoutError) as error:
            raise StoreError(f"no S3 server answers for {self.uri} at {self._server(error)}") from None
        except (HTTPClientError, IncompleteReadError) as error:
            raise StoreError(
                f"the connection to the S3 server of {self.uri} broke, {ATTEMPTS} times in a row "
                f"({type(error).__name__}); the same command goes on from here"
            ) from None
        except (BotoCoreError, ValueError) as error:  # what boto3 says itself may quote a credential
            raise StoreError(
                f"boto3 cannot use {self.uri} ({type(error).__name__}); correct publish.endpoint_url, "
                "publish.region_name or publish.profile_name, or what ~/.aws/config says"
            ) from None

    def _server(self, error: Any) -> str:
        return self.endpoint or str(error.kwargs.get("endpoint_url", "AWS"))

    def _sentence(self, error: ClientError) -> str:
        code, status, doing = _code(error), _status(error), _words(error.operation_name)
        if code == "NoSuchBucket":
            return (
                f"there is no bucket {self.bucket} at {self.endpoint or 'AWS'}; "
                "make it, or correct publish.artifact_store"
            )
        if code in (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "InvalidToken",
            "TokenRefreshRequired",
        ):
            return f"the S3 server of {self.uri} does not accept the credentials ({code}); renew them, or choose others"
        if code == "RequestTimeTooSkewed":
            return f"this machine's clock is too far off for the S3 server of {self.uri}; set it right"
        if (
            code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
            or status == 301
        ):
            region = error.response.get("Error", {}).get("Region")
            return (
                f"bucket {self.bucket} is in another region" + (f", {region}" if region else "") + "; "
                "set publish.region_name to it"
            )
        if status == 403:
            return f"the credentials may not {doing} in {self.uri} ({code}); docs/operations.md lists what is needed"
        if code in ("NotImplemented", "MethodNotAllowed"):
            return f"the S3 server of {self.uri} cannot {doing} the way Retune needs it ({code}); use another server"
        if status >= 500:
            return (
                f"the S3 server of {self.uri} failed to {doing}, {ATTEMPTS} times in a row ({status} {code}); "
                "the same command goes on from here"
            )
        return f"the S3 server of {self.uri} refused to {doing} ({status} {code})"


class _HeldBody(io.BytesIO):
    """A request's body whose second half is sent when `released` is set, or after PROBE_HOLD_S at the latest: a server
    may also let the second writer wait until the first is done."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.begun, self.released = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() == 0:
            return super().read(len(PROBE) // 2)
        self.begun.set()
        self.released.wait(PROBE_HOLD_S)
        return super().read(size)


class _Exists(Exception):
    """The key of a conditional creation exists."""


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _words(operation: str) -> str:
    """boto3's operation name in plain words: PutObject is "put object"."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", operation).lower().replace(" v2", "")
