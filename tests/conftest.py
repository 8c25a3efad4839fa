"""A tiny real base model and data that the tests make themselves; no network, none of the user's caches."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before any library reads them. One folder for all workers of a run, which the first process makes and removes.
if "RETUNE_TESTS_CACHE" not in os.environ:
    os.environ.update(
        RETUNE_TESTS_CACHE=tempfile.mkdtemp(prefix="retune-tests-"),
        RETUNE_TESTS_OWNER=str(os.getpid()),
        RETUNE_TESTS_PYTHON=sys.executable,
    )
CACHE = os.environ["RETUNE_TESTS_CACHE"]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=f"{CACHE}/datasets",
    HF_EVALUATE_CACHE=f"{CACHE}/evaluate",
    HF_METRICS_CACHE=f"{CACHE}/metrics",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_MODULES_CACHE=f"{CACHE}/modules",
    DVC_SITE_CACHE_DIR=f"{CACHE}/dvc",
    PREFECT_HOME=f"{CACHE}/prefect",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="true",
    DVC_NO_ANALYTICS="1",  # a process that asks for the network after every command
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # session fixtures train before `one_thread`; two threads beside a busy process stand still
    TRANSFORMERS_VERBOSITY="error",
    # No test may find the user's own keys; these are the test server's.
    AWS_ACCESS_KEY_ID="test:tester",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_CONFIG_FILE=f"{CACHE}/aws-config",
    AWS_SHARED_CREDENTIALS_FILE=f"{CACHE}/aws-credentials",
    AWS_EC2_METADATA_DISABLED="true",
)

import preloaded
import pytest
from ruamel.yaml import YAML
from tiny_model import CHATML as CHATML
from tiny_model import COLOURS as COLOURS
from tiny_model import STEPS as STEPS
from tiny_model import byte_level as byte_level
from tiny_model import make_base as make_base
from tiny_model import sample_rows as sample_rows

from pipeline.core.files import sha256_json
from pipeline.params import Params, PublishParams
from pipeline.settings import load_params

ROOT = Path(__file__).parent.parent
REAL = bool(os.environ.get("RETUNE_TESTS_REAL"))
PYTHON = os.environ["RETUNE_TESTS_PYTHON"]  # next to which `retune` is a program that starts Python
if not REAL:
    preloaded.make_interpreter()
    sys.executable = str(preloaded.INTERPRETER)  # next to which it is a fork


def pytest_unconfigure() -> None:
    if os.environ["RETUNE_TESTS_OWNER"] == str(os.getpid()):
        shutil.rmtree(CACHE, ignore_errors=True)
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch  # not at the top: xdist's own process, which runs no test, reads this file too

    torch.set_num_threads(1)  # two that wait for each other beside a busy process take minutes for seconds of work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process waits for one of them at the end."""
    longest = ("flow", "flow_runs", "methods", "promote", "kills", "formats", "ingest", "registry", "stack", "train")
    order = {f"test_{name}.py": number for number, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection() -> None:
    gc.disable()  # while PyTorch and its like load; no collection looks at them again, a third of a second each time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all workers of a test run; tests only read it."""
    folder, done = Path(CACHE) / name, Path(CACHE) / f"{name}.done"
    with preloaded.locked(Path(CACHE) / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def base() -> Path:
    return once("base", lambda folder: make_base(folder, steps=STEPS))


@pytest.fixture(scope="session")
def data() -> Path:
    return once("data", lambda folder: (folder / "rows.json").write_text(json.dumps(sample_rows(300))))


@pytest.fixture(scope="session")
def params(base: Path) -> Params:
    """The project's own params.yaml, cut down to what a tiny model needs."""
    return tiny(load_params(ROOT / "params.yaml"), base)


def tiny(params: Params, base: Path) -> Params:
    return with_(
        params,
        prepare={"model_name_or_path": str(base), "max_length": 128, "test_fraction": 0.25},
        train={
            "lora_r": 8,
            "packed_length": 256,
            "tokens_per_step": 256,
            "num_train_epochs": 6.0,
            "learning_rate": 0.005,
            "save_steps": 10,
        },
        evaluate={"max_new_tokens": 8, "bootstrap_samples": 200},
        merge={"min_agreement": 0.5},
        operations={"services": []},
    )


def with_(params: Params, **sections: dict[str, Any]) -> Params:
    """`params` with some values replaced, checked again."""
    tree = params.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Params.model_validate(tree)


def publish_params(artifact_store: str, **values: Any) -> PublishParams:
    """The project's own `publish` section with another store."""
    own = load_params(ROOT / "params.yaml").publish.model_dump()
    return PublishParams.model_validate(own | {"artifact_store": artifact_store} | values)


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("swift", reason="OpenStack Swift is installed on Linux only")
    import swift_server

    with swift_server.start(tmp_path_factory.mktemp("swift")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3(swift_server: str) -> Iterator[str]:
    """The same behind a proxy that lets one of several racing writes win, as AWS does and Swift does not."""
    from fault_proxy import FaultProxy

    with FaultProxy(int(swift_server.rpartition(":")[2])) as proxy, pytest.MonkeyPatch.context() as patch:
        # The proxy lets the probe's second write wait for the first.
        patch.setattr("pipeline.registry.s3.PROBE_HOLD_S", 0.2)
        yield proxy.url


@pytest.fixture
def project(tmp_path: Path, base: Path, params: Params) -> Iterator[Path]:
    """A whole project in a folder of its own: git, DVC, a data snapshot, tiny parameters."""
    root = make_project(tmp_path / "project", base, params)
    yield root
    retune(root, "down")


def make_project(root: Path, base: Path, params: Params) -> Path:
    """A copy of one that is made once: DVC takes seconds for it."""

    def make(folder: Path) -> None:
        for name in ("pipeline", "flows"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(base, folder / "data" / "base")
        (folder / "data" / "instructions").mkdir()
        (folder / "data" / "instructions" / "rows.json").write_text(json.dumps(sample_rows(300)))
        git(folder, "init", "-q")
        dvc(folder, "init", "-q")
        shutil.copy(ROOT / ".dvc" / "init_adapter.json", folder / ".dvc")
        dvc(folder, "config", "core.analytics", "false")
        dvc(folder, "add", "-q", "data")

    template = once(f"project-{sha256_json(str(base))[:8]}", make)
    shutil.copytree(template, root, symlinks=True)
    write_params(root, with_(params, prepare={"model_name_or_path": "data/base"}))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root


def git(root: Path, *arguments: str) -> str:
    """What git prints, in the name of somebody."""
    who = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *arguments], cwd=root, env=os.environ | who, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def dvc(root: Path, *arguments: str) -> str:
    done = _run("dvc", root, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def retune(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return _run("retune", root, arguments)


def _run(program: str, root: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    if not REAL:
        return preloaded.run(program, arguments, root, environment())
    command = [sys.executable, "-m", {"retune": "pipeline"}.get(program, program), *arguments]
    return subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    """For child processes: this interpreter's programs first, this checkout's code importable from any folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file may be larger than `limit` bytes, also in child processes; a full disk only has another error number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write_params(root: Path, params: Params) -> None:
    with (root / "params.yaml").open("w") as file:
        YAML().dump(params.model_dump(), file)


def change_params(root: Path, **sections: dict[str, Any]) -> None:
    write_params(root, with_(load_params(root / "params.yaml"), **sections))


@pytest.fixture(scope="session")
def dataset(params: Params, data: Path) -> Path:
    from pipeline.prepare import prepare

    return once("prepared", lambda folder: prepare(params.prepare, data, folder / "dataset")) / "dataset"


@pytest.fixture(scope="session")
def adapter(params: Params, dataset: Path) -> Path:
    from pipeline.train import train

    trained = once("trained", lambda folder: train(params.train, dataset, folder / "adapter", folder / "checkpoints"))
    return trained / "adapter"


@pytest.fixture(scope="session")
def evaluation(params: Params, dataset: Path, adapter: Path) -> Path:
    from pipeline.evaluate import evaluate

    evaluated = once("evaluated", lambda folder: evaluate(params.evaluate, dataset, adapter, folder / "evaluation"))
    return evaluated / "evaluation"
