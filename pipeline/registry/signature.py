"""Signatures of versions, by OpenSSF's model_signing: an in-toto statement over file digests, in a sigstore bundle.

`manifest.<digest>.sig` lies beside the manifest, which is itself one of the signed files, so lineage and metrics are
covered too. A signature counts only if a trusted key made it for exactly these digests, byte for byte.
"""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.params import PublishParams
from pipeline.registry.artifact_store import ArtifactStore
from pipeline.registry.manifest import key_of

PASSWORD_VARIABLE = "RETUNE_SIGNING_PASSWORD"
PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\n?", re.DOTALL)


class SignatureError(RuntimeError):
    """A version cannot be signed, or its signature is not one of a trusted key for what is stored."""


def signature_key(version: str, manifest: bytes) -> str:
    """Where the signature of this very manifest lies: one that a crash left beside another manifest never counts."""
    return key_of(version).removesuffix("json") + f"{hashlib.sha256(manifest).hexdigest()}.sig"


def sign(params: PublishParams, manifest: bytes) -> bytes | None:
    """The signature of a version, or None when `publish.signing_key` is null. Its password comes from the environment.

    Raises:
        SignatureError: key or certificate cannot be used.
    """
    if params.signing_key is None:
        return None
    from model_signing import signing

    password = os.environ.get(PASSWORD_VARIABLE)
    key = Path(params.signing_key)
    try:
        # model_signing hands the password to cryptography, which wants bytes.
        secret: Any = password.encode() if password else None
        config = signing.Config().set_hashing_config(_digests(manifest))
        if params.signing_certificate is None:
            config.use_elliptic_key_signer(private_key=key, password=secret)
        else:
            certificates = _blocks(Path(params.signing_certificate), "CERTIFICATE")
            with tempfile.TemporaryDirectory() as folder:
                own, *others = _write_each(Path(folder), certificates)
                # An empty chain is a PEM error there; the certificate once more changes nothing.
                config.use_certificate_signer(
                    private_key=key, signing_certificate=own, certificate_chain=others or [own]
                )
        with tempfile.TemporaryDirectory() as folder:
            config.sign(json.loads(manifest)["version"], Path(folder) / "sig")
            return (Path(folder) / "sig").read_bytes()
    except SignatureError:
        raise
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
        except Exception as error:
            raise SignatureError(f"the signature is damaged: {_first_line(error)}") from None
        for number, trusted in enumerate(_trusted(path, "x509CertificateChain" in material, Path(folder)), start=1):
            config = verifying.Config().set_hashing_config(_digests(manifest))
            try:
                if "x509CertificateChain" in material:
                    config.use_certificate_verifier(certificate_chain=trusted)
                else:
                    config.use_elliptic_key_verifier(public_key=trusted[0])
                config.verify(Path("version"), stored)
            except Exception as error:
                failures.append(f"{path}, number {number}: {_first_line(error)}")
                continue
            return _signer(material)
    raise SignatureError(
        "; ".join(failures) or f"{path} holds nothing that a signature of this kind can be checked with"
    )


def read_signature(store: ArtifactStore, version: str, manifest: bytes) -> bytes | None:
    return store.read(signature_key(version, manifest))


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


def _trusted(path: Path, certificates: bool, folder: Path) -> list[list[Path]]:
    """What to try in turn: each public key of the file alone, or all its certificates as roots at once."""
    if certificates:
        roots = _write_each(folder, _blocks(path, "CERTIFICATE"))
        return [roots] if roots else []
    return [[key] for key in _write_each(folder, _blocks(path, "PUBLIC KEY"))]


def _blocks(path: Path, label: str) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}") from None
    found = list(PEM.finditer(data))
    if not found:
        raise SignatureError(f"{path} holds no PEM block; expected -----BEGIN {label}-----")
    return [block.group(0) for block in found if block.group(1).decode() == label]


def _write_each(folder: Path, blocks: list[bytes]) -> list[Path]:
    paths = [folder / f"{number}.pem" for number in range(len(blocks))]
    for path, block in zip(paths, blocks, strict=True):
        path.write_bytes(block)
    return paths


def _signer(material: dict[str, Any]) -> str:
    if "publicKey" in material:
        return f"key {material['publicKey']['hint'][:16]}"
    import base64

    from cryptography import x509

    certificate = x509.load_der_x509_certificate(
        base64.b64decode(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
    )
    return f"certificate {certificate.subject.rfc4514_string()}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
