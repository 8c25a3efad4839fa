"""What MLflow's own client sees of the versions: numbers, tags, runs, files, and aliases that follow the log."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import environment, with_
from versions import parameters, published, registry_lost

from pipeline import promote as gate
from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.garbage import collect
from pipeline.registry.manifest import published_versions, read_manifest
from pipeline.registry.mlflow import ModelRegistry, Registration, RegistryError
from pipeline.registry.registration import register
from pipeline.registry.retention import delete
from pipeline.registry.verify import verify

VERSION = Registration(
    version="abc",
    source="retune-file:///store/versions/abc",
    tags={"git_commit": "123"},
    params={"lora_r": 8},
    metrics={"bleu": 1.5},
    curve=[("loss", 2.0, 1), ("loss", 1.0, 2)],
    reports={"report.md": "# Evaluation"},
)
NEXT = replace(VERSION, version="def")


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return parameters(tmp_path_factory.mktemp("mlflow")).publish.tracking_uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, with storage for artifacts of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    places = [
        "--backend-store-uri",
        parameters(folder).publish.tracking_uri,
        "--artifacts-destination",
        str(folder / "a"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command + places,
            env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait(20)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRegistry:
    uri = request.getfixturevalue(request.param)
    return ModelRegistry(uri, request.node.originalname[:60], tmp_path)


def aliases(registry: ModelRegistry) -> dict[str, str]:
    found = registry.client.get_registered_model(registry.name).aliases
    return {alias: str(number) for alias, number in found.items()}


def test_a_registered_version_shows_its_run_with_curve_and_report(registry: ModelRegistry, tmp_path: Path) -> None:
    number = registry.register(VERSION)
    made = registry.client.get_model_version(registry.name, number)
    assert (made.source, made.tags) == (VERSION.source, {"git_commit": "123", "version_id": "abc"})
    run = registry.client.get_run(made.run_id)
    assert (run.data.params, run.data.metrics) == ({"lora_r": "8"}, {"bleu": 1.5, "loss": 1.0})
    assert [(m.step, m.value) for m in registry.client.get_metric_history(made.run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert run.info.status == "FINISHED"
    report = registry.client.download_artifacts(made.run_id, "report.md", str(tmp_path))
    assert Path(report).read_text() == "# Evaluation"


def test_a_curve_of_thousands_of_steps_is_kept_whole(sqlite: str) -> None:
    registry = ModelRegistry(sqlite, "long")
    number = registry.register(replace(VERSION, curve=[("loss", 1 / step, step) for step in range(1, 2501)]))
    run_id = registry.client.get_model_version("long", number).run_id
    assert len(registry.client.get_metric_history(run_id, "loss")) == 2500


def test_numbers_and_ids_name_the_same_version(registry: ModelRegistry) -> None:
    numbers = [registry.register(version) for version in (VERSION, NEXT)]
    assert numbers == ["1", "2"]
    assert [registry.id_of(number) for number in ("1", "v2")] == ["abc", "def"]
    assert [registry.version_of(id) for id in ("abc", "def", "ghi")] == [*numbers, None]
    assert registry.numbers() == {"abc": "1", "def": "2"}
    assert [registry.label(id) for id in ("abc", "ghi")] == ["v1 (abc…)", "ghi"]
    with pytest.raises(RegistryError, match="has no version 3; it has v1, v2"):
        registry.id_of("3")


def test_two_entries_of_one_version_count_as_the_first(registry: ModelRegistry) -> None:
    assert [registry.register(VERSION), registry.register(VERSION)] == ["1", "1"]
    assert registry.numbers() == {"abc": "1"}
    registry.forget("abc")
    assert registry.numbers() == {}


def test_an_alias_that_strayed_from_the_log_is_put_right(registry: ModelRegistry) -> None:
    for version in (VERSION, NEXT):
        registry.register(version)
    assert aliases(registry) == {"challenger": "2"}
    registry.project("abc")
    assert aliases(registry) == {"champion": "1", "challenger": "2"}
    registry.client.set_registered_model_alias(registry.name, "champion", "2")
    registry.project("abc")
    assert aliases(registry) == {"champion": "1", "challenger": "2"}
    registry.project("def")
    assert aliases(registry) == {"champion": "2"}
    registry.project(None)
    assert aliases(registry) == {}


def test_a_champion_that_the_registry_does_not_know_gets_no_alias(registry: ModelRegistry) -> None:
    registry.register(VERSION)
    registry.project("abc")
    registry.project("unknown")
    assert "champion" not in aliases(registry)


def test_a_registry_that_lost_its_model_is_no_reason_to_fail(sqlite: str) -> None:
    registry = ModelRegistry(sqlite, "lost")
    registry.project("abc")
    assert registry.version_of("abc") is None
    with pytest.raises(RegistryError, match="has no version 1; it has none"):
        registry.id_of("1")


def test_a_server_that_is_down_is_one_sentence_without_its_address_book(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        RegistryError, match=r"the registry http://127\.0\.0\.1 \(publish\.tracking_uri\) could not"
    ) as found:
        ModelRegistry("http://127.0.0.1:9", "any").numbers()
    assert "\n" not in str(found.value)


@pytest.fixture
def mlflow_free() -> Iterator[None]:
    """MLflow keeps its addresses in the process: they are put back."""
    import mlflow

    yield
    mlflow.set_registry_uri("")
    mlflow.set_tracking_uri("")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


@pytest.fixture(params=["sqlite", "server"])
def shipped(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Params]:
    params = parameters(tmp_path)
    if request.param == "server":
        params = with_(params, publish={"tracking_uri": request.getfixturevalue("server")})
    return tmp_path, with_(params, publish={"registered_model_name": request.node.originalname[:60]})


def test_mlflows_client_downloads_the_champion_with_digests_checked(
    shipped: tuple[Path, Params], mlflow_free: None
) -> None:
    import mlflow

    root, params = shipped
    version = published(root, params)
    gate.promote(params.publish, params.promote, version, root)
    mlflow.set_registry_uri(params.publish.tracking_uri)
    mlflow.set_tracking_uri(params.publish.tracking_uri)
    uri = f"models:/{params.publish.registered_model_name}@champion"
    whole = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(root / "whole")))
    for folder in ("merged", "adapter"):
        for path in (root / "artifacts" / folder).iterdir():
            assert (whole / folder / path.name).read_bytes() == path.read_bytes()
    assert (whole / "manifest.json").read_bytes() == (root / "store/versions" / version / "manifest.json").read_bytes()
    part = Path(mlflow.artifacts.download_artifacts(f"{uri}/merged", dst_path=str(root / "part")))
    assert {path.name for path in part.iterdir()} == {path.name for path in (root / "artifacts/merged").iterdir()}
    damaged = read_manifest(open_store(params.publish), version)["files"]["merged/model.safetensors"]
    stored = root / "store/objects" / damaged["sha256"]
    data = bytearray(stored.read_bytes())
    data[7] ^= 1
    stored.write_bytes(data)
    with pytest.raises(Exception, match="was altered"):
        mlflow.artifacts.download_artifacts(f"{uri}/merged", dst_path=str(root / "again"))


def test_mlflow_loads_the_champion_as_a_pipeline(tmp_path: Path, base: Path, mlflow_free: None) -> None:
    import mlflow

    params = parameters(tmp_path)
    version = published(tmp_path, params, model=base)
    gate.promote(params.publish, params.promote, version, tmp_path)
    mlflow.set_registry_uri(params.publish.tracking_uri)
    mlflow.set_tracking_uri(params.publish.tracking_uri)
    loaded = mlflow.transformers.load_model("models:/retune-sample@champion")
    question = [{"role": "user", "content": "Name the colour of box 1: red"}]
    answer = loaded(question, max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    served = mlflow.pyfunc.load_model("models:/retune-sample@champion")
    [told] = served.predict({"messages": question, "max_tokens": 4, "do_sample": False})
    assert told["choices"][0]["message"]["content"] == answer[0]["generated_text"][-1]["content"]


def test_a_lost_registry_is_filled_again_from_the_store(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    gate.promote(params.publish, params.promote, version, tmp_path)
    params = registry_lost(tmp_path, params)
    shutil.rmtree(tmp_path / "artifacts")
    _, warnings = gate.history(params.publish, tmp_path)
    assert not warnings
    registry = ModelRegistry(params.publish.tracking_uri, "retune-sample")
    assert aliases(registry)["champion"] == registry.version_of(version) == "1"
    tags = registry.tags(version)
    assert tags is not None
    assert {"base_model", "data", "git_commit", "manifest_sha256", "rougeL", "signed", "test_sha256"} <= set(tags)
    found = read_manifest(open_store(params.publish), version)
    assert register(open_store(params.publish), registry, found) == "1"


def test_a_second_registry_of_one_store_numbers_the_versions_as_the_first(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    versions = []
    for quality in (0.4, 0.5, 0.6):
        versions.append(published(tmp_path, params, quality))
        gate.promote(params.publish, params.promote, versions[-1], tmp_path)
    other = registry_lost(tmp_path, params).publish
    assert not gate.history(other, tmp_path)[1]  # asks for the champion, the last of them, alone
    registry = ModelRegistry(other.tracking_uri, "retune-sample", tmp_path)
    assert registry.numbers() == {version: str(number) for number, version in enumerate(versions, 1)}
    assert aliases(registry) == {"champion": "3"}


def test_a_version_is_called_by_its_number_without_asking_the_registry(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    asked = ModelRegistry(params.publish.tracking_uri, "retune-sample", tmp_path)
    assert asked.remembered(version) == version
    gate.promote(params.publish, params.promote, version, tmp_path)
    called = [ModelRegistry(asked.uri, name, tmp_path).remembered(version) for name in ("retune-sample", "other")]
    assert called == [f"v1 ({version[:6]}…)", version]


def test_a_version_in_s3_is_signed_verified_and_loaded_through_mlflow(
    tmp_path: Path, s3: str, mlflow_free: None
) -> None:
    """One pass over a real S3 server: publish, sign, verify, promote, download, delete, and what gc leaves."""
    import mlflow
    from test_signature import make_key

    make_key(tmp_path / "key.pem")
    params = parameters(
        tmp_path,
        artifact_store="s3://retune/registry",
        endpoint_url=s3,
        region_name="us-east-1",
        addressing_style="path",
        signing_key=str(tmp_path / "key.pem"),
        verify_key=str(tmp_path / "key.pub"),
        require_signature=True,
    )
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    store = open_store(params.publish)
    for version in (first, second):
        assert gate.promote(params.publish, params.promote, version, tmp_path).decision == "promoted"
        assert [c.name for c in verify(params.publish, store, version, None, tmp_path) if c.passed is False] == []
    mlflow.set_registry_uri(params.publish.tracking_uri)
    mlflow.set_tracking_uri(params.publish.tracking_uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/retune-sample@champion", dst_path=str(tmp_path / "all")))
    assert (folder / "merged/config.json").read_bytes() == (tmp_path / "artifacts/merged/config.json").read_bytes()
    assert (folder / "manifest.sig").is_file()
    collect(store, delete=False)  # reads every manifest and signature, and the log
    delete(params.publish, first, "room", tmp_path)
    assert published_versions(store) == [second]
