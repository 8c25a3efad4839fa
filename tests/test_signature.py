"""Only what was signed passes: any change of manifest, signature or file is found, by retune and by OpenSSF's tool."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import with_
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from versions import make_workspace, parameters, published, write_lock

from pipeline import promote as gate
from pipeline import publish
from pipeline.core import graph
from pipeline.core.files import write_json
from pipeline.params import Params
from pipeline.registry import manifest as manifests
from pipeline.registry import signature
from pipeline.registry.artifact_store import FileStore, StoreError, open_store
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.rescore import score_again, score_today
from pipeline.registry.signature import PASSWORD_VARIABLE, SignatureError
from pipeline.registry.verify import verify

SEED = int(os.environ.get("RETUNE_TEST_SEED", "0")) or random.SystemRandom().randrange(2**32)


def make_key(path: Path, curve: ec.EllipticCurve | None = None, password: bytes | None = None) -> Any:
    """A private key at `path` and its public one beside it, as .pub."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


def make_certificate(path: Path, name: str, key: Any, issuer: Any = None, issuer_key: Any = None) -> Any:
    """A certificate at `path`; without an issuer its own root."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, issuer is None, issuer is None, False, False), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((issuer_key or key).public_key()), critical=False
        )
    )
    certificate = builder.sign(issuer_key or key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        make_key(folder / f"{name}.pem")
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> tuple[Path, Params, str]:
    root = tmp_path_factory.mktemp("signed")
    params = parameters(root, signing_key=str(keys / "ours.pem"), verify_key=str(keys / "ours.pub"))
    return root, params, published(root, params, registered=False)


def stored(root: Path, version: str) -> tuple[bytes, bytes]:
    data = (root / "store" / manifests.key_of(version)).read_bytes()
    return data, (root / "store" / signature.signature_key(version, data)).read_bytes()


def failed(params: Params, root: Path, version: str) -> list[str]:
    store = open_store(params.publish)
    return [check.name for check in verify(params.publish, store, version, None, root) if check.passed is False]


def test_a_signed_version_passes_every_check(signed: tuple[Path, Params, str]) -> None:
    root, params, version = signed
    assert failed(params, root, version) == []
    data, sig = stored(root, version)
    assert signature.verify(params.publish, data, sig).startswith("key ")


def test_a_version_of_an_earlier_release_with_its_scores_in_metrics_json_passes_every_check(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    make_workspace(tmp_path, params)
    for folder in ("evaluation", "parity"):
        (tmp_path / "artifacts" / folder / "scores.json").rename(tmp_path / "artifacts" / folder / "metrics.json")
    write_lock(tmp_path, params.model_dump())
    version = graph.version_id(tmp_path)
    manifest, _ = publish._upload(params.publish, open_store(params.publish, tmp_path), version, tmp_path)
    assert {"evaluation/metrics.json", "parity/metrics.json"} <= set(manifest["files"])
    assert failed(params, tmp_path, version) == []


def test_openssfs_own_tool_verifies_a_downloaded_version(
    signed: tuple[Path, Params, str], keys: Path, tmp_path: Path
) -> None:
    root, params, version = signed
    store = open_store(params.publish)
    manifest = manifests.read_manifest(store, version)
    assert manifest is not None
    folder = tmp_path / "version"
    for name, entry in manifest["files"].items():
        publish.fetch_file(store, entry, folder / name)
    data, sig = stored(root, version)
    (folder / "manifest.json").write_bytes(data)
    (tmp_path / "manifest.sig").write_bytes(sig)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(tmp_path / "manifest.sig"), "--public_key", str(keys / "ours.pub")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "merged" / "config.json").write_text("{}")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_a_visible_version_has_its_signature_already(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(tmp_path, signing_key=str(keys / "ours.pem"), verify_key=str(keys / "ours.pub"))
    written: list[str] = []
    from pipeline.registry.artifact_store import FileStore

    create = FileStore.create
    monkeypatch.setattr(FileStore, "create", lambda self, key, data: written.append(key) or create(self, key, data))
    published(tmp_path, params, registered=False)
    assert [key.rpartition(".")[2] for key in written if key.startswith("versions/")] == ["sig", "json"]


def test_the_signature_of_a_publish_that_was_cut_short_does_not_stand_in_the_way(
    tmp_path: Path, signed: tuple[Path, Params, str]
) -> None:
    root, params, version = signed
    params = with_(params, publish={"artifact_store": (tmp_path / "store").as_uri()})
    data, _ = stored(root, version)
    first = manifests.encode(json.loads(data) | {"created": "2026-01-01T00:00:00+00:00"})
    store = open_store(params.publish)
    store.create(signature.signature_key(version, first), signature.sign(params.publish, first) or b"")
    assert published(tmp_path, params, registered=False) == version
    assert failed(params, tmp_path, version) == []


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_an_encrypted_key_takes_its_password_from_the_environment(
    tmp_path: Path, signed: tuple[Path, Params, str], monkeypatch: pytest.MonkeyPatch, curve: ec.EllipticCurve
) -> None:
    root, params, version = signed
    data, _ = stored(root, version)
    make_key(tmp_path / "locked.pem", curve, b"correct horse")
    locked = with_(
        params, publish={"signing_key": str(tmp_path / "locked.pem"), "verify_key": str(tmp_path / "locked.pub")}
    )
    for password in (None, "wrong"):
        monkeypatch.setenv(PASSWORD_VARIABLE, password or "")
        with pytest.raises(SignatureError, match=f"cannot sign: .*{PASSWORD_VARIABLE}"):
            signature.sign(locked.publish, data)
    monkeypatch.setenv(PASSWORD_VARIABLE, "correct horse")
    assert signature.verify(locked.publish, data, signature.sign(locked.publish, data) or b"")


def test_a_certificate_signs_and_its_root_verifies(tmp_path: Path, signed: tuple[Path, Params, str]) -> None:
    root, params, version = signed
    data, _ = stored(root, version)
    root_key, leaf_key = make_key(tmp_path / "root.pem"), make_key(tmp_path / "leaf.pem")
    authority = make_certificate(tmp_path / "root.crt", "our root", root_key)
    make_certificate(tmp_path / "leaf.crt", "the release team", leaf_key, authority, root_key)
    make_certificate(tmp_path / "other.crt", "another root", make_key(tmp_path / "other.pem"))
    certified = with_(
        params,
        publish={
            "signing_key": str(tmp_path / "leaf.pem"),
            "signing_certificate": str(tmp_path / "leaf.crt"),
            "verify_key": str(tmp_path / "root.crt"),
        },
    )
    sig = signature.sign(certified.publish, data) or b""
    assert signature.verify(certified.publish, data, sig) == "certificate CN=the release team"
    for wrong in ("other.crt", "root.pub"):
        with pytest.raises(SignatureError):
            signature.verify(with_(certified, publish={"verify_key": str(tmp_path / wrong)}).publish, data, sig)
    with pytest.raises(SignatureError):
        signature.verify(certified.publish, data.replace(b"retune-sample", b"retune-simple"), sig)


def test_a_key_is_rotated_by_trusting_both_for_a_while(
    tmp_path: Path, signed: tuple[Path, Params, str], keys: Path
) -> None:
    root, params, version = signed
    data, sig = stored(root, version)
    both = tmp_path / "both.pub"
    both.write_bytes((keys / "theirs.pub").read_bytes() + (keys / "ours.pub").read_bytes())
    rotated = with_(params, publish={"verify_key": str(both), "signing_key": str(keys / "theirs.pem")}).publish
    assert signature.verify(rotated, data, sig) != signature.verify(rotated, data, signature.sign(rotated, data) or b"")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"verify_key": "theirs.pub"}, "Key mismatch"),
        ({"verify_key": "ours.pem"}, "nothing that a signature"),
        ({"verify_key": "nowhere.pub"}, "cannot be read"),
    ],
)
def test_another_key_is_not_trusted(
    signed: tuple[Path, Params, str], keys: Path, change: dict[str, str], sentence: str
) -> None:
    root, params, version = signed
    data, sig = stored(root, version)
    other = with_(params, publish={key: str(keys / value) for key, value in change.items()})
    with pytest.raises(SignatureError, match=sentence):
        signature.verify(other.publish, data, sig)


@pytest.mark.parametrize("key", ["nowhere.pem", "ours.pub"])
def test_a_key_that_cannot_sign_leaves_no_version(tmp_path: Path, keys: Path, key: str) -> None:
    params = parameters(tmp_path, signing_key=str(keys / key))
    with pytest.raises(SignatureError, match="publish.signing_key .* cannot sign"):
        published(tmp_path, params, registered=False)
    assert not manifests.published_versions(open_store(params.publish))


def test_promotion_refuses_an_unsigned_version_and_takes_it_once_it_is_signed(tmp_path: Path, keys: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    strict = with_(params, publish={"require_signature": True, "verify_key": str(keys / "ours.pub")})
    for force in (None, "I know better"):
        with pytest.raises(SignatureError, match="may not serve .*not signed"):
            gate.promote(strict.publish, strict.promote, version, tmp_path, force)
    signing = with_(strict, publish={"signing_key": str(keys / "ours.pem")})
    assert publish.sign(signing.publish, version, tmp_path)
    assert not publish.sign(signing.publish, version, tmp_path)
    assert (ModelRegistry(params.publish.tracking_uri, "retune-sample").tags(version) or {})["signed"] == "true"
    assert gate.promote(strict.publish, strict.promote, version, tmp_path).decision == "promoted"


def test_promotion_and_rollback_refuse_an_altered_version(tmp_path: Path, keys: Path) -> None:
    params = parameters(
        tmp_path, signing_key=str(keys / "ours.pem"), verify_key=str(keys / "ours.pub"), require_signature=True
    )
    first = published(tmp_path, params, 0.4)
    gate.promote(params.publish, params.promote, first, tmp_path)
    second = published(tmp_path, params, 0.6)
    gate.promote(params.publish, params.promote, second, tmp_path)
    manifest = manifests.read_manifest(open_store(params.publish), first)
    assert manifest is not None
    flip(tmp_path / "store" / "objects" / manifest["files"]["merged/model.safetensors"]["sha256"], 5, 1)
    with pytest.raises(SignatureError, match="may not serve .*was altered"):
        gate.rollback(params.publish, params.promote, first, root=tmp_path)
    with pytest.raises(SignatureError, match="may not serve"):
        gate.promote(params.publish, params.promote, first, tmp_path, "I know better")


def test_an_unsigned_version_that_was_altered_is_not_what_the_log_noted(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    gate.promote(params.publish, params.promote, version, tmp_path)
    assert failed(params, tmp_path, version) == []
    path = tmp_path / "store" / manifests.key_of(version)
    path.write_bytes(path.read_bytes().replace(b"cpu, 1 threads", b"cpu, 2 threads"))
    assert failed(params, tmp_path, version) == ["recorded digest"]


def test_lineage_that_contradicts_the_files_is_found_though_its_digest_is_right(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params, registered=False)
    path = tmp_path / "store" / manifests.key_of(version)
    manifest = json.loads(path.read_text())
    for change in (
        {"metrics": {"merged": {"rougeL": {"score": 1.0, "low": 1.0, "high": 1.0}}}},
        {"contract": {"sha256": "0" * 64}},
        {"base_model": {"digest": "0" * 64}},
        {"parity": {"token_agreement": 0.5}},
    ):
        path.write_bytes(manifests.encode(merged(manifest, change)))
        assert failed(params, tmp_path, version) == ["lineage"], change
    path.write_bytes(manifests.encode(merged(manifest, {"dvc_lock": {"merge": {"outs": []}, "train": {"outs": []}}})))
    assert "id" in failed(params, tmp_path, version)


def merged(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(tree)
    for key, value in change.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def flip(path: Path, place: int, value: int) -> bytes:
    data = path.read_bytes()
    changed = bytearray(data)
    changed[place % len(data)] ^= value
    path.write_bytes(bytes(changed))
    return data


def caught(params: Params, version: str, data: bytes, sig: bytes) -> bool:
    """Whether manifest bytes and signature bytes are refused, as `verify` and `promote` read them."""
    store = open_store(params.publish)
    key = manifests.key_of(version)
    folder = Path(store.folder)  # type: ignore[attr-defined]
    (folder / key).write_bytes(data)
    try:
        found = manifests.read_manifest(store, version)
        assert found is not None
        signature.verify(params.publish, manifests.encode(found), sig)
    except (StoreError, SignatureError):
        return True
    return False


def test_changed_bytes_of_manifest_and_signature_are_caught_at_every_place(signed: tuple[Path, Params, str]) -> None:
    print(f"RETUNE_TEST_SEED={SEED}")
    draw = random.Random(SEED)
    root, params, version = signed
    data, sig = stored(root, version)
    assert not caught(params, version, data, sig)
    try:
        for place in draw.sample(range(len(data)), 150):
            changed = bytearray(data)
            changed[place] ^= draw.randrange(1, 256)
            assert caught(params, version, bytes(changed), sig), (place, changed[place])
        for place in [*draw.sample(range(len(sig)), 250), *range(len(sig) - 130, len(sig))]:
            changed = bytearray(sig)
            changed[place] ^= draw.randrange(1, 256)
            assert caught(params, version, data, bytes(changed)), (place, changed[place])
    finally:
        (root / "store" / manifests.key_of(version)).write_bytes(data)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_every_change_of_one_byte_of_manifest_and_signature_is_caught(signed: tuple[Path, Params, str]) -> None:
    root, params, version = signed
    data, sig = stored(root, version)
    missed = []
    try:
        for place in range(len(data)):
            for bit in range(8):
                changed = bytearray(data)
                changed[place] ^= 1 << bit
                if not caught(params, version, bytes(changed), sig):
                    missed.append(("manifest", place, bit))
        for place in range(len(sig)):
            # The last characters of the signature's base64 have bits that no decoder reads: all values there.
            for value in range(256) if place > len(sig) - 130 else (sig[place] ^ 1 << bit for bit in range(8)):
                changed = bytearray(sig)
                changed[place] = value
                if value != sig[place] and not caught(params, version, data, bytes(changed)):
                    missed.append(("signature", place, value))
    finally:
        (root / "store" / manifests.key_of(version)).write_bytes(data)
    print(f"{len(data)} bytes of manifest, {len(sig)} of signature")
    assert not missed


def test_a_changed_byte_of_any_object_is_caught(signed: tuple[Path, Params, str]) -> None:
    print(f"RETUNE_TEST_SEED={SEED}")
    draw = random.Random(SEED)
    root, params, version = signed
    objects = sorted((root / "store" / "objects").iterdir())
    assert len(objects) > 10
    for path in objects:
        before = flip(path, draw.randrange(2**20), draw.randrange(1, 256))
        assert "digests" in failed(params, root, version), path
        path.write_bytes(before)
    for path in objects[:3]:
        before = path.read_bytes()
        path.unlink()
        assert "digests" in failed(params, root, version)
        path.write_bytes(before + b"\n")
        assert "digests" in failed(params, root, version)
        path.write_bytes(before)


@pytest.fixture
def unsigned(tmp_path: Path, keys: Path) -> tuple[Params, manifests.Manifest]:
    """A champion from before publish.require_signature was turned on, and what asks for a signature now."""
    params = parameters(tmp_path)
    version = published(tmp_path, params, 0.5)
    gate.promote(params.publish, params.promote, version, tmp_path)
    manifest = manifests.read_manifest(open_store(params.publish), version)
    assert manifest is not None
    return with_(params, publish={"require_signature": True, "verify_key": str(keys / "ours.pub")}), manifest


def test_no_command_loads_a_version_that_is_not_signed(
    tmp_path: Path, unsigned: tuple[Params, manifests.Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli.serving import adapter_folder, merged_folder
    from pipeline.registry.init_adapter import fetch_init

    strict, manifest = unsigned
    version = manifest["version"]
    started: list[Any] = []
    monkeypatch.setattr("pipeline.registry.rescore._retune", lambda *command: started.append(command))
    write_json(tmp_path / "artifacts" / "dataset" / "report.json", {"test_sha256": "another split"})
    warm = with_(strict, train={"init_adapter": version})
    for load in (
        lambda: score_today(strict.publish, manifest, "rougeL", tmp_path),
        lambda: score_again(strict.publish, manifest, manifest["evaluation"], tmp_path / "scored", tmp_path),
        lambda: adapter_folder(strict, "champion", tmp_path),
        lambda: merged_folder(strict, version, tmp_path),
        lambda: fetch_init(warm, tmp_path),
    ):
        with pytest.raises(SignatureError, match=f"{version}.*not signed"):
            load()
    assert started == []
    assert not list((tmp_path / ".retune").rglob("*.safetensors"))


def test_the_gate_does_not_load_a_champion_that_is_not_signed_to_score_it_again(
    tmp_path: Path, unsigned: tuple[Params, manifests.Manifest], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict, manifest = unsigned
    started: list[Any] = []
    monkeypatch.setattr("pipeline.registry.rescore._retune", lambda *command: started.append(command))
    strict = with_(strict, publish={"signing_key": str(keys / "ours.pem")})
    candidate = published(tmp_path, strict, 0.6, test_split="b")
    with pytest.raises(SignatureError, match=f"{manifest['version']}.*not signed"):
        gate.promote(strict.publish, strict.promote, candidate, tmp_path)
    assert started == []


def test_a_version_that_has_to_be_signed_is_read_once(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli.serving import merged_folder

    params = parameters(
        tmp_path, signing_key=str(keys / "ours.pem"), verify_key=str(keys / "ours.pub"), require_signature=True
    )
    version = published(tmp_path, params)
    manifest = manifests.read_manifest(open_store(params.publish), version)
    assert manifest is not None
    read: list[str] = []
    own = FileStore.download

    def counting(store: FileStore, files: Sequence[tuple[str, Path]], progress: Callable[[int], object]) -> None:
        read.extend(key.removeprefix("objects/") for key, _ in files)
        own(store, files, progress)

    monkeypatch.setattr(FileStore, "download", counting)
    merged_folder(params, version, tmp_path)
    wanted = {e["sha256"] for name, e in manifest["files"].items() if name.startswith("merged/")}
    assert sorted(read) == sorted(wanted)
    flip(tmp_path / "store" / "objects" / manifest["files"]["merged/model.safetensors"]["sha256"], 5, 1)
    shutil.rmtree(tmp_path / ".retune")
    with pytest.raises(StoreError, match="was altered"):
        merged_folder(params, version, tmp_path)
