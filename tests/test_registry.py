"""Versions in MLflow, read with MLflow's own client: numbers, tags, runs, files, and aliases that follow the log."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, with_
from local_servers import answers, free_port, wait_until
from mlflow.exceptions import MlflowException
from test_signature import make_key
from versions import parameters, promote_version, published, registry_lost

from pipeline.registry.manifest import published_versions
from pipeline.registry.mlflow import ModelRegistry, RegistryError
from pipeline.registry.model import RegisteredModel
from pipeline.registry.retention import collect, delete
from pipeline.registry.verify import verify

VERSION: dict[str, Any] = {
    "version_id": "abc",
    "source": "retune-file:///store/versions/abc",
    "tags": {"git_commit": "123"},
    "params": {"lora_r": 8},
    "metrics": [("bleu", 1.5, 0)],
    "reports": {"report.md": "# Evaluation"},
}
NEXT = VERSION | {"version_id": "def"}


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return parameters(tmp_path_factory.mktemp("mlflow")).publish.tracking_uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        parameters(folder).publish.tracking_uri,
        "--artifacts-destination",
        f"{folder}/a",
    ]
    environ = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"), 120)
            assert process.poll() is None, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait(20)


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRegistry:
    uri = request.getfixturevalue(request.param)
    return ModelRegistry(uri, request.node.originalname[:60], tmp_path)


def aliases(registry: ModelRegistry) -> dict[str, str]:
    named = registry.client.get_registered_model(registry.name).aliases
    return {alias: str(number) for alias, number in named.items()}


def test_a_registered_version_shows_its_run_with_curve_and_report(registry: ModelRegistry, tmp_path: Path) -> None:
    curve = [("loss", 1 / step, step) for step in range(1, 2501)]  # more than MLflow accepts at once
    number = registry.register(**VERSION | {"metrics": [*VERSION["metrics"], *curve]})
    entry = registry.client.get_model_version(registry.name, number)
    assert (entry.source, entry.tags) == (VERSION["source"], {"git_commit": "123", "version_id": "abc"})
    run = registry.client.get_run(entry.run_id)
    assert (run.data.params, run.data.metrics) == ({"lora_r": "8"}, {"bleu": 1.5, "loss": 1 / 2500})
    assert len(registry.client.get_metric_history(entry.run_id, "loss")) == 2500
    assert run.info.status == "FINISHED"
    report = registry.client.download_artifacts(entry.run_id, "report.md", str(tmp_path))
    assert Path(report).read_text() == "# Evaluation"


def test_numbers_map_to_ids_and_of_two_entries_of_a_version_the_first_counts(registry: ModelRegistry) -> None:
    assert [registry.register(**version) for version in (VERSION, NEXT, VERSION)] == ["1", "2", "1"]
    assert [registry.id_of(number) for number in ("1", "v2", "3")] == ["abc", "def", "abc"]
    assert registry.numbers() == {"abc": "1", "def": "2"}
    assert [registry.cached_name(id) for id in ("abc", "ghi")] == ["v1 (abc…)", "ghi"]
    assert ModelRegistry(registry.uri, "other", registry.root).cached_name("abc") == "abc"
    with pytest.raises(RegistryError, match="has no version 4; it has v1, v2, v3"):
        registry.id_of("4")
    registry.delete("abc")
    assert registry.numbers() == {"def": "2"}


def test_a_registry_that_refuses_a_new_model_says_why_and_gets_no_run(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise MlflowException("not allowed")

    monkeypatch.setattr(registry.client, "create_registered_model", refuse)
    with pytest.raises(RegistryError, match="not allowed"):
        registry.register(**VERSION)
    assert registry.client.get_experiment_by_name(registry.name) is None


def test_wrong_aliases_are_corrected(registry: ModelRegistry) -> None:
    registry.set_aliases("abc")  # not an error if the registry does not know the model
    for version in (VERSION, NEXT):
        registry.register(**version)
    registry.client.set_registered_model_alias(registry.name, "champion", "2")
    for champion, expected in (
        ("abc", {"champion": "1", "challenger": "2"}),
        ("def", {"champion": "2"}),
        ("abc", {"champion": "1"}),
        ("unknown", {}),
        (None, {}),
    ):
        registry.set_aliases(champion)
        assert aliases(registry) == expected


@pytest.fixture
def mlflow_at() -> Iterator[Any]:
    """A function that returns MLflow, connected to a registry. MLflow's addresses are global; they are reset."""
    import mlflow

    def connect(uri: str) -> Any:
        mlflow.set_registry_uri(uri)
        mlflow.set_tracking_uri(uri)
        return mlflow

    yield lambda params: connect(params.publish.tracking_uri)
    connect("")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_mlflows_client_downloads_the_champion_with_digests_checked(
    request: pytest.FixtureRequest, tmp_path: Path, mlflow_at: Any, where: str
) -> None:
    params = with_(parameters(tmp_path), publish={"registered_model_name": f"download-{where}"})
    if where == "server":
        params = with_(params, publish={"tracking_uri": request.getfixturevalue("server")})
    version = published(tmp_path, params)
    promote_version(tmp_path, params, version)
    download = mlflow_at(params).artifacts.download_artifacts
    uri = f"models:/{params.publish.registered_model_name}@champion"
    whole = Path(download(uri, dst_path=str(tmp_path / "whole")))
    for folder in ("merged", "adapter"):
        for path in (tmp_path / "artifacts" / folder).iterdir():
            assert (whole / folder / path.name).read_bytes() == path.read_bytes()
    manifest = tmp_path / "store/versions" / version / "manifest.json"
    assert (whole / "manifest.json").read_bytes() == manifest.read_bytes()
    part = Path(download(f"{uri}/merged", dst_path=str(tmp_path / "part")))
    assert {path.name for path in part.iterdir()} == {path.name for path in (tmp_path / "artifacts/merged").iterdir()}
    files = RegisteredModel(params.publish, tmp_path).manifest(version)["files"]
    stored = tmp_path / "store/objects" / files["merged/model.safetensors"]["sha256"]
    data = bytearray(stored.read_bytes())
    data[7] ^= 1
    stored.write_bytes(data)
    with pytest.raises(Exception, match="was altered"):
        download(f"{uri}/merged", dst_path=str(tmp_path / "again"))


def test_mlflow_loads_the_champion_as_a_pipeline(tmp_path: Path, base: Path, mlflow_at: Any) -> None:
    params = parameters(tmp_path)
    promote_version(tmp_path, params, published(tmp_path, params, model=base))
    mlflow = mlflow_at(params)
    loaded = mlflow.transformers.load_model("models:/retune-sample@champion")
    question = [{"role": "user", "content": "Name the colour of box 1: red"}]
    answer = loaded(question, max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    served = mlflow.pyfunc.load_model("models:/retune-sample@champion")
    [prediction] = served.predict({"messages": question, "max_tokens": 4, "do_sample": False})
    assert prediction["choices"][0]["message"]["content"] == answer[0]["generated_text"][-1]["content"]


def test_a_lost_registry_is_filled_again_from_the_store_with_the_same_numbers(tmp_path: Path) -> None:
    params = parameters(tmp_path)
    versions = []
    for quality in (0.4, 0.5, 0.6):
        versions.append(published(tmp_path, params, quality))
        promote_version(tmp_path, params)
    shutil.rmtree(tmp_path / "artifacts")
    other = registry_lost(tmp_path, params).publish
    model = RegisteredModel(other, tmp_path)
    assert not model.sync_registry(versions[-1])[1]  # registers the champion, and the versions decided on before it
    registry = model.registry
    assert registry.numbers() == {version: str(number) for number, version in enumerate(versions, 1)}
    assert aliases(registry) == {"champion": "3"}
    expected = {"base_model", "data", "git_commit", "manifest_sha256", "rougeL", "signed", "test_sha256"}
    assert expected <= set(registry.tags(versions[0]))


def test_a_version_in_s3_is_signed_verified_and_loaded_through_mlflow(tmp_path: Path, s3: str, mlflow_at: Any) -> None:
    """All commands on a real S3 server: publish, sign, verify, promote, download, gc and delete."""
    make_key(tmp_path / "key.pem")
    store = {"artifact_store": "s3://retune/registry", "endpoint_url": s3, "region_name": "us-east-1"}
    keys = {"signing_key": str(tmp_path / "key.pem"), "verify_key": str(tmp_path / "key.pub")}
    params = parameters(tmp_path, **store, **keys, addressing_style="path", require_signature=True)
    model = RegisteredModel(params.publish, tmp_path)
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    assert [promote_version(tmp_path, params, version).decision for version in (first, second)] == ["promoted"] * 2
    assert [check.name for check in verify(model, second) if check.passed is False] == []
    download = mlflow_at(params).artifacts.download_artifacts
    merged = Path(download("models:/retune-sample@champion/merged", dst_path=str(tmp_path / "all")))
    assert (merged / "config.json").read_bytes() == (tmp_path / "artifacts/merged/config.json").read_bytes()
    collect(model.store, delete=False)  # reads every manifest and signature, and the log
    delete(params.publish, first, "not needed", tmp_path)
    assert published_versions(model.store) == [second]
