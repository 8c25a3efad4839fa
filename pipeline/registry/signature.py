"""Signatures of versions: ECDSA with SHA-256 over the stored manifest, which has the digest of every file.

A signature is stored next to the manifest as `manifest.<digest>.sig`. It is valid only for exactly these bytes and if
a trusted key made it; `openssl dgst -sha256 -verify` checks the same without Retune.
"""

import hashlib
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.core.checks import Check
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.manifest import Manifest, encode, manifest_key

PASSWORD_VARIABLE = "RETUNE_SIGNING_PASSWORD"
PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)


class SignatureError(RuntimeError):
    """A version cannot be signed, or has no valid signature of a trusted key."""


def signature_key(version: str, manifest: bytes) -> str:
    """The key of this manifest's signature; its digest in the name keeps apart what a crash left of another one."""
    return manifest_key(version).removesuffix("json") + f"{hashlib.sha256(manifest).hexdigest()}.sig"


def sign(params: PublishParams, manifest: bytes) -> bytes | None:
    """Sign a manifest; None if `publish.signing_key` is null. The key's password comes from PASSWORD_VARIABLE."""
    if params.signing_key is None:
        return None
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = serialization.load_pem_private_key(
            Path(params.signing_key).read_bytes(), password.encode() if password else None
        )
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it is another kind of key")
        return key.sign(manifest, ec.ECDSA(hashes.SHA256()))
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"publish.signing_key {params.signing_key} cannot sign: {error}. Expected an elliptic-curve private key in "
            f"PEM; if it has a password, put it into the environment variable {PASSWORD_VARIABLE}"
        ) from None


def verify(params: PublishParams, manifest: bytes, signature: bytes) -> str:
    """A name of the key in `publish.verify_key` that signed `manifest`. Raises SignatureError: none of them did."""
    try:
        blocks = PUBLIC_KEY.findall(Path(params.verify_key or "").read_bytes())
        keys = [serialization.load_pem_public_key(block) for block in blocks]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"publish.verify_key {params.verify_key} cannot be used: {error}") from None
    for key in keys:
        if isinstance(key, ec.EllipticCurvePublicKey):
            try:
                key.verify(signature, manifest, ec.ECDSA(hashes.SHA256()))
            except InvalidSignature:
                continue
            der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            return f"key {hashlib.sha256(der).hexdigest()[:16]}"
    raise SignatureError(f"none of the {len(keys)} keys in publish.verify_key {params.verify_key} made this signature")


def read_signature(store: ArtifactStore, manifest: Manifest) -> bytes | None:
    return store.read(signature_key(manifest["version"], encode(manifest)))


def check_signature(store: ArtifactStore, params: PublishParams, manifest: Manifest) -> Check:
    signature = read_signature(store, manifest)
    if signature is None:
        folder = manifest_key(manifest["version"]).removesuffix("manifest.json")
        of_another = any(key.endswith(".sig") for key in store.list(folder))
        detail = "not signed, or the manifest was altered after it was signed" if of_another else "not signed"
        return Check("signature", False if params.require_signature else None, detail)
    if params.verify_key is None:
        return Check("signature", None, "not checked, because publish.verify_key is null")
    try:
        return Check("signature", True, f"by {verify(params, encode(manifest), signature)}")
    except SignatureError as error:
        return Check("signature", False, str(error))


def require_signed(store: ArtifactStore, manifest: Manifest, params: PublishParams) -> None:
    """Raise SignatureError if a signature is required and not valid; downloads check files against the manifest."""
    if params.require_signature:
        require_passed(manifest, [check_signature(store, params, manifest)])


def require_passed(manifest: Manifest, checks: list[Check]) -> None:
    for check in checks:
        if not check.passed:
            detail = f"{check.name}: {check.detail}"
            raise SignatureError(f"version {manifest['version']} is refused (publish.require_signature): {detail}")
