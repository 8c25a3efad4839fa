"""Signatures of versions, by OpenSSF's model_signing: an in-toto statement over file digests, in a sigstore bundle.

`manifest.<digest>.sig` lies next to the manifest, which is itself one of the signed files, so lineage and metrics are
covered too. A signature counts only if a trusted key made it for exactly these digests, byte for byte.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.core.checks import Check
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.manifest import Manifest, encode, key_of

PASSWORD_VARIABLE = "RETUNE_SIGNING_PASSWORD"
PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\n?", re.DOTALL)


class SignatureError(RuntimeError):
    """A version cannot be signed, or its signature is not one of a trusted key for what is stored."""


def signature_key(version: str, manifest: bytes) -> str:
    """Where the signature of this very manifest lies: one that a crash left next to another manifest never counts."""
    return key_of(version).removesuffix("json") + f"{hashlib.sha256(manifest).hexdigest()}.sig"


def sign(params: PublishParams, manifest: bytes) -> bytes | None:
    """The signature of a version, or None when `publish.signing_key` is null. Its password comes from the environment.

    Raises:
        SignatureError: key or certificate cannot be used.
    """
    if params.signing_key is None:
        return None
    from model_signing import signing

    key, password = Path(params.signing_key), os.environ.get(PASSWORD_VARIABLE)
    try:
        config = signing.Config().set_hashing_config(_digests(manifest))
        with tempfile.TemporaryDirectory() as folder:
            if params.signing_certificate is None:
                # model_signing hands the password to cryptography, which wants bytes.
                secret: Any = password.encode() if password else None
                config.use_elliptic_key_signer(private_key=key, password=secret)
            else:
                first, *others = _blocks(Path(params.signing_certificate), "CERTIFICATE", Path(folder))
                # An empty chain is a PEM error there; the certificate once more changes nothing.
                config.use_certificate_signer(
                    private_key=key, signing_certificate=first, certificate_chain=others or [first]
                )
            config.sign(json.loads(manifest)["version"], Path(folder) / "sig")
            return (Path(folder) / "sig").read_bytes()
    except Exception as error:  # the libraries raise a dozen kinds
        raise SignatureError(
            f"publish.signing_key {key} cannot sign: {_first_line(error)}. Expected an elliptic-curve private key in "
            f"PEM (P-256, P-384 or P-521), its password, if it has one, in {PASSWORD_VARIABLE}"
        ) from None


def verify(params: PublishParams, manifest: bytes, signature: bytes) -> str:
    """Check `signature` of `manifest` against `publish.verify_key`; answers whose it is.

    Raises:
        SignatureError: no trusted key made it for these digests, or there is no key to check it with.
    """
    if params.verify_key is None:
        raise SignatureError("publish.verify_key is null, so no signature can be checked; name the signer's public key")
    from model_signing import verifying
    from sigstore_models.bundle.v1 import Bundle

    path = Path(params.verify_key)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "sig"
        stored.write_bytes(signature)
        try:
            # JSON and base64 have several spellings of one content; only the one that is written counts.
            if Bundle.from_json(signature).to_json().encode() != signature:
                raise ValueError("its bytes are not the ones that model_signing writes")
            material = json.loads(signature)["verificationMaterial"]
            certified = "x509CertificateChain" in material
            trusted = _blocks(path, "CERTIFICATE" if certified else "PUBLIC KEY", Path(folder))
        except Exception as error:
            raise SignatureError(f"the signature cannot be checked: {_first_line(error)}") from None
        # All certificates of the file are roots at once; its public keys are tried in turn.
        for number, keys in enumerate([trusted] if certified else [[key] for key in trusted], start=1):
            config = verifying.Config().set_hashing_config(_digests(manifest))
            try:
                if certified:
                    config.use_certificate_verifier(certificate_chain=keys)
                else:
                    config.use_elliptic_key_verifier(public_key=keys[0])
                config.verify(Path("version"), stored)
                return _signer(material)
            except Exception as error:
                failures.append(f"{path}, number {number}: {_first_line(error)}")
    raise SignatureError("; ".join(failures))


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
    """Where `publish.require_signature` is on: refuse a version without a signature of a trusted key. Enough before a
    download, which checks each file against the manifest.

    Raises:
        SignatureError: why the version may not serve.
    """
    if params.require_signature:
        refuse_failed(manifest, [check_signature(store, params, manifest)])


def refuse_failed(manifest: Manifest, checks: list[Check]) -> None:
    for check in checks:
        if not check.passed:
            raise SignatureError(
                f"version {manifest['version']} may not serve (publish.require_signature): {check.name}: {check.detail}"
            )


def _digests(manifest: bytes) -> Any:
    """The digests to sign, as a hashing configuration: model_signing would hash a folder, here they are known."""
    from model_signing import hashing
    from model_signing._hashing.hashing import Digest
    from model_signing.manifest import FileManifestItem, Manifest, SerializationType

    content = json.loads(manifest)
    digests = {name: entry["sha256"] for name, entry in content["files"].items()}
    digests["manifest.json"] = hashlib.sha256(manifest).hexdigest()
    kind = SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
    items = [
        FileManifestItem(path=Path(name), digest=Digest("sha256", bytes.fromhex(sha256)))
        for name, sha256 in digests.items()
    ]

    class KnownDigests(hashing.Config):
        def hash(self, *_: Any, **__: Any) -> Manifest:
            return Manifest(content["version"], items, kind)

    return KnownDigests()


def _blocks(path: Path, label: str, folder: Path) -> list[Path]:
    """Every PEM block `label` of the file `path`, each in a file of its own in `folder`; ValueError without any."""
    blocks = [block[0] for block in PEM.finditer(path.read_bytes()) if block[1].decode() == label]
    if not blocks:
        raise ValueError(f"{path} holds no {label.lower()} in PEM")
    paths = [folder / f"{number}.pem" for number in range(len(blocks))]
    for target, block in zip(paths, blocks, strict=True):
        target.write_bytes(block)
    return paths


def _signer(material: dict[str, Any]) -> str:
    if "publicKey" in material:
        return f"key {material['publicKey']['hint'][:16]}"
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(
        base64.b64decode(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
    )
    return f"certificate {certificate.subject.rfc4514_string()}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
