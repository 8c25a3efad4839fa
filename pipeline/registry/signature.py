"""Signatures of versions: ECDSA with SHA-256 over the stored manifest, which names every file by its digest.

`manifest.<digest>.sig` lies next to the manifest. A signature counts only if a trusted key made it for exactly these
bytes; `openssl dgst -sha256 -verify` checks the same without Retune.
"""

import hashlib
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pipeline.core.checks import Check
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.manifest import Manifest, encode, key_of

PASSWORD_VARIABLE = "RETUNE_SIGNING_PASSWORD"
PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)


class SignatureError(RuntimeError):
    """A version cannot be signed, or its signature is not one of a trusted key for what is stored."""


def signature_key(version: str, manifest: bytes) -> str:
    """Where the signature of this very manifest lies: one that a crash left next to another manifest never counts."""
    return key_of(version).removesuffix("json") + f"{hashlib.sha256(manifest).hexdigest()}.sig"


def sign(params: PublishParams, manifest: bytes) -> bytes | None:
    """The signature of a manifest, None when `publish.signing_key` is null; its password comes from the environment."""
    if params.signing_key is None:
        return None
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = load_pem_private_key(Path(params.signing_key).read_bytes(), password.encode() if password else None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it is of another kind")
        return key.sign(manifest, ec.ECDSA(hashes.SHA256()))
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"publish.signing_key {params.signing_key} cannot sign: {error}. Expected an elliptic-curve private key in "
            f"PEM, its password, if it has one, in {PASSWORD_VARIABLE}"
        ) from None


def verify(params: PublishParams, manifest: bytes, signature: bytes) -> str:
    """Check `signature` of `manifest` against `publish.verify_key`; answers whose it is.

    Raises:
        SignatureError: no trusted key made it for these bytes, or there is no key to check it with.
    """
    try:
        blocks = PUBLIC_KEY.findall(Path(params.verify_key or "").read_bytes())
        keys = [load_pem_public_key(block) for block in blocks]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"publish.verify_key {params.verify_key} cannot be used: {error}") from None
    for key in keys:
        if isinstance(key, ec.EllipticCurvePublicKey):
            try:
                key.verify(signature, manifest, ec.ECDSA(hashes.SHA256()))
            except InvalidSignature:
                continue
            spelled = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return f"key {hashlib.sha256(spelled).hexdigest()[:16]}"
    raise SignatureError(f"it is by none of the {len(keys)} public keys in {params.verify_key} (publish.verify_key)")


def read_signature(store: ArtifactStore, manifest: Manifest) -> bytes | None:
    return store.read(signature_key(manifest["version"], encode(manifest)))


def check_signature(store: ArtifactStore, params: PublishParams, manifest: Manifest) -> Check:
    signed = read_signature(store, manifest)
    if signed is None:
        passed = False if params.require_signature else None
        return Check("signature", passed, "the version is not signed, or its manifest was altered afterwards")
    if params.verify_key is None:
        return Check("signature", None, "there is one, but publish.verify_key names no key to check it with")
    try:
        return Check("signature", True, f"by {verify(params, encode(manifest), signed)}")
    except SignatureError as error:
        return Check("signature", False, str(error))


def require_signed(store: ArtifactStore, manifest: Manifest, params: PublishParams) -> None:
    """Where `publish.require_signature` is on: refuse a version without a signature of a trusted key (SignatureError).
    Enough before a download, which checks each file against the manifest.
    """
    if params.require_signature:
        refuse_failed(manifest, [check_signature(store, params, manifest)])


def refuse_failed(manifest: Manifest, checks: list[Check]) -> None:
    for check in checks:
        if not check.passed:
            raise SignatureError(
                f"version {manifest['version']} may not serve (publish.require_signature): {check.name}: {check.detail}"
            )
