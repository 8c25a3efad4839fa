"""Opens the artifact store that `publish.artifact_store` names."""

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore, FileStore, StoreError


def open_store(params: PublishParams, root: Path = Path(".")) -> ArtifactStore:
    """The store at `artifact_store`: `s3://bucket/prefix`, `file://store` (a folder of the project) or an absolute one.

    Nothing is asked of an S3 server yet; `probe` does that, and every first write.

    Raises:
        StoreError: the folder cannot be created or written, or the URI names no bucket.
    """
    parsed = urlparse(params.artifact_store)
    if parsed.scheme == "s3":
        from pipeline.registry.s3 import S3Store  # a store in a folder needs no boto3, which takes a third of a second

        return S3Store(params)
    folder = Path(unquote(parsed.path)) if not parsed.netloc else root / unquote(parsed.netloc + parsed.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the artifact store {folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise StoreError(f"the artifact store {folder} is not writable")
    return FileStore(folder)
