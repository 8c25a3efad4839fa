"""Signatures: any change of manifest, signature or file is detected, and nothing unsigned is loaded."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import with_
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from versions import parameters, promote_version, published

from pipeline import promote, publish
from pipeline.core.files import write_json
from pipeline.params import Params
from pipeline.registry import manifest as manifests
from pipeline.registry import signature
from pipeline.registry.artifact_store import FileStore, StoreError
from pipeline.registry.compare import score_on_current_split
from pipeline.registry.model import RegisteredModel
from pipeline.registry.signature import PASSWORD_VARIABLE, SignatureError, check_signature
from pipeline.registry.stores import open_store
from pipeline.registry.verify import verify

# A key on secp112r1, a curve that cryptography does not support.
UNKNOWN_CURVE = """\
-----BEGIN PUBLIC KEY-----
MDIwEAYHKoZIzj0CAQYFK4EEAAYDHgAEvGE4xhdyOuhNkTWQgSAEY7tUPHY0ekLM
ocHDtg==
-----END PUBLIC KEY-----
"""


def make_key(path: Path, password: bytes | None = None) -> Any:
    """Write a private key to `path`, and its public key next to it with the suffix .pub."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


@dataclass
class Signed:
    root: Path
    keys: Path
    params: Params
    version: str

    def __post_init__(self) -> None:
        self.manifest = self.root / "store" / manifests.manifest_key(self.version)
        self.data = self.manifest.read_bytes()
        self.sig = (self.root / "store" / signature.signature_key(self.version, self.data)).read_bytes()

    def by(self, **names: str) -> Any:
        """`publish` parameters with other key files."""
        return with_(self.params, publish={key: str(self.keys / name) for key, name in names.items()}).publish


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        make_key(folder / f"{name}.pem")
    return folder


def signing(root: Path, keys: Path, **publishing: Any) -> Params:
    return parameters(root, signing_key=str(keys / "ours.pem"), verify_key=str(keys / "ours.pub"), **publishing)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Signed:
    root = tmp_path_factory.mktemp("signed")
    params = signing(root, keys)
    return Signed(root, keys, params, published(root, params, registered=False))


def failed(params: Params, root: Path, version: str) -> list[str]:
    checks = verify(RegisteredModel(params.publish, root), version)
    return [check.name for check in checks if check.passed is False]


def test_a_signed_version_passes_every_check_and_openssl_agrees(signed: Signed, tmp_path: Path) -> None:
    assert failed(signed.params, signed.root, signed.version) == []
    (tmp_path / "manifest.json").write_bytes(signed.data)
    (tmp_path / "manifest.sig").write_bytes(signed.sig)
    command = ["openssl", "dgst", "-sha256", "-verify", str(signed.keys / "ours.pub")]
    command += ["-signature", "manifest.sig", "manifest.json"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "manifest.json").write_bytes(changed(signed.data, 99))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


def test_the_signature_is_stored_before_the_manifest_and_one_of_an_interrupted_publish_does_not_count(
    tmp_path: Path, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_(signed.params, publish={"artifact_store": (tmp_path / "store").as_uri()})
    first = manifests.encode(json.loads(signed.data) | {"created": "2026-01-01T00:00:00+00:00"})
    store = open_store(params.publish)
    store.create(signature.signature_key(signed.version, first), signature.sign(params.publish, first) or b"")
    written: list[str] = []
    create = FileStore.create
    monkeypatch.setattr(FileStore, "create", lambda self, key, data: written.append(key) or create(self, key, data))
    assert published(tmp_path, params, registered=False) == signed.version
    assert failed(params, tmp_path, signed.version) == []
    assert [key.rpartition(".")[2] for key in written if key.startswith("versions/")] == ["sig", "json"]


def test_an_encrypted_key_takes_its_password_from_the_environment(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key(signed.keys / "locked.pem", b"correct horse")
    locked = signed.by(signing_key="locked.pem", verify_key="locked.pub")
    for password in ("", "wrong"):
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
        with pytest.raises(SignatureError, match=PASSWORD_VARIABLE):
            signature.sign(locked, signed.data)
    monkeypatch.setenv(PASSWORD_VARIABLE, "correct horse")
    assert signature.verify(locked, signed.data, signature.sign(locked, signed.data) or b"")


def test_a_key_is_rotated_by_trusting_two_keys_and_no_other_key_is_trusted(signed: Signed) -> None:
    both = (signed.keys / "theirs.pub").read_bytes() + (signed.keys / "ours.pub").read_bytes()
    (signed.keys / "both.pub").write_bytes(both)
    rotated = signed.by(verify_key="both.pub", signing_key="theirs.pem")
    new = signature.sign(rotated, signed.data) or b""
    names = [signature.verify(rotated, signed.data, sig) for sig in (signed.sig, new)]
    assert names[0] != names[1]
    (signed.keys / "unknown.pub").write_text(UNKNOWN_CURVE)
    for key in ("theirs.pub", "ours.pem", "nowhere.pub", "unknown.pub"):
        with pytest.raises(SignatureError, match=key):
            signature.verify(signed.by(verify_key=key), signed.data, signed.sig)


@pytest.mark.parametrize("key", ["nowhere.pem", "ours.pub"])
def test_a_key_that_cannot_sign_leaves_no_version(tmp_path: Path, keys: Path, key: str) -> None:
    params = parameters(tmp_path, signing_key=str(keys / key))
    with pytest.raises(SignatureError, match=key):
        published(tmp_path, params, registered=False)
    assert not manifests.published_versions(open_store(params.publish))


def test_promotion_refuses_an_unsigned_or_altered_version_and_accepts_it_once_signed(
    tmp_path: Path, keys: Path
) -> None:
    params = parameters(tmp_path)
    first = published(tmp_path, params, 0.4)
    strict = with_(params, publish={"require_signature": True, "verify_key": str(keys / "ours.pub")})
    for force in (None, "I know better"):
        with pytest.raises(SignatureError, match="not signed"):
            promote_version(tmp_path, strict, first, force)
    signing = with_(strict, publish={"signing_key": str(keys / "ours.pem")})
    model = RegisteredModel(params.publish, tmp_path)
    check = check_signature(model.store, params.publish, model.manifest(first))
    assert (check.passed, check.detail) == (None, "not signed")
    assert [publish.sign(signing.publish, first, tmp_path) for _ in range(2)] == [True, False]
    check = check_signature(
        model.store, params.publish, model.manifest(first) | {"created": "2026-01-01T00:00:00+00:00"}
    )
    assert "altered" in check.detail  # the signature is of another manifest
    assert model.registry.tags(first)["signed"] == "true"
    assert promote_version(tmp_path, strict, first).decision == "promoted"
    promote_version(tmp_path, strict, published(tmp_path, signing, 0.6))
    weights = tmp_path / "store/objects" / model.manifest(first)["files"]["merged/model.safetensors"]["sha256"]
    weights.write_bytes(changed(weights.read_bytes(), 5))
    for use in (
        lambda: promote.rollback(strict, first, root=tmp_path),
        lambda: promote_version(tmp_path, strict, first, "I know better"),
    ):
        with pytest.raises(SignatureError, match="was altered"):
            use()


def test_lineage_that_contradicts_the_files_or_the_log_is_detected_even_with_a_valid_digest(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params, registered=False)
    path = tmp_path / "store" / manifests.manifest_key(version)
    manifest = json.loads(path.read_text())
    for change in (
        {"metrics": {"merged": {"rougeL": {"score": 1.0, "low": 1.0, "high": 1.0}}}},
        {"contract": {"sha256": "0" * 64}},
        {"base_model": {"digest": "0" * 64}},
        {"parity": {"token_agreement": 0.5}},
    ):
        path.write_bytes(manifests.encode(with_change(manifest, change)))
        assert failed(params, tmp_path, version) == ["lineage"], change
    lock = {"dvc_lock": {"merge": {"outs": []}, "train": {"outs": []}}}
    path.write_bytes(manifests.encode(with_change(manifest, lock)))
    assert "id" in failed(params, tmp_path, version)
    path.write_bytes(manifests.encode(manifest))
    promote_version(tmp_path, params, version)
    assert failed(params, tmp_path, version) == []
    path.write_bytes(manifests.encode(with_change(manifest, {"hardware": {"train": "another machine"}})))
    assert failed(params, tmp_path, version) == ["recorded digest"]


def with_change(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    nested = {k: with_change(tree[k], v) for k, v in change.items() if isinstance(v, dict) and k in tree}
    return tree | change | nested


def changed(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def test_a_changed_byte_in_manifest_or_signature_is_detected_at_every_position(signed: Signed) -> None:
    store = open_store(signed.params.publish)

    def check(data: bytes, sig: bytes) -> None:
        signed.manifest.write_bytes(data)
        manifest = manifests.require_manifest(store, signed.version)
        signature.verify(signed.params.publish, manifests.encode(manifest), sig)

    try:
        check(signed.data, signed.sig)
        for index in range(0, len(signed.data), 97):
            with pytest.raises((StoreError, SignatureError)):
                check(changed(signed.data, index), signed.sig)
        for index in range(len(signed.sig)):
            with pytest.raises(SignatureError):
                check(signed.data, changed(signed.sig, index))
    finally:
        signed.manifest.write_bytes(signed.data)


def test_nothing_loads_a_version_that_is_not_signed(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unsigned champion, promoted before publish.require_signature was turned on."""
    from pipeline.cli.serving import find_folder
    from pipeline.registry.init_adapter import fetch_init

    params = parameters(tmp_path)
    version = published(tmp_path, params, 0.5)
    promote_version(tmp_path, params, version)
    strict = with_(params, publish={"require_signature": True, "verify_key": str(keys / "ours.pub")})
    model = RegisteredModel(strict.publish, tmp_path)
    monkeypatch.setattr("subprocess.run", lambda *command, **options: pytest.fail("it was scored"))
    write_json(tmp_path / "artifacts" / "dataset" / "report.json", {"test_sha256": "another split"})
    for load in (
        lambda: score_on_current_split(model, model.manifest(version), "rougeL"),
        lambda: find_folder(strict, "champion", "adapter", tmp_path),
        lambda: find_folder(strict, version, "merged", tmp_path),
        lambda: fetch_init(with_(strict, train={"init_adapter": version}), tmp_path),
    ):
        with pytest.raises(SignatureError, match=f"{version}.*not signed"):
            load()
    monkeypatch.undo()
    candidate = published(tmp_path, signing(tmp_path, keys), 0.6, test_split="b")  # so the champion is scored again
    with pytest.raises(SignatureError, match=f"{version}.*not signed"):
        promote_version(tmp_path, strict, candidate)
    assert not list((tmp_path / ".retune" / "versions" / version).rglob("*.safetensors"))
