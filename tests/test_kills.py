"""Work that is killed at any step, or races: no snapshot, version, decision or adapter is damaged, lost or doubled."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preloaded
import pytest
from conftest import environment, make_project, publish_params, sample_rows, with_
from versions import parameters, published

from pipeline import ingest as ingestion
from pipeline import promote as gate
from pipeline import publish as shipping
from pipeline.core import graph
from pipeline.core.files import sha256_file
from pipeline.data.snapshot import recover
from pipeline.params import Params, PublishParams
from pipeline.registry.artifact_store import FileStore
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.stores import check_objects, open_store
from pipeline.settings import load_params
from pipeline.train import train

NAME = "retune-sample"


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in root.rglob("*") if path.is_file()}


# These functions run in a fork, each in its own folder.


def ingest(root: str) -> None:
    params, source = load_params(Path(root) / "params.yaml"), (Path(root) / "source").read_text()
    ingestion.ingest(params.ingest, [source], Path(root))


def ingest_whose_dvc_is_cut_short(root: str) -> None:
    def add_data(folder: Path) -> None:
        (folder / "data.dvc").write_text((folder / "data.dvc").read_text()[:40])
        os.kill(os.getpid(), signal.SIGKILL)

    graph.add_data = add_data
    ingest(root)


def publish(root: str) -> None:
    graph.stale = lambda folder: {}  # DVC does not know the test's artifacts
    shipping.publish(parameters(Path(root)).publish, Path(root))


def promote(root: str) -> list[Any]:
    params = parameters(Path(root))
    decision = gate.promote(params, None, Path(root))
    return [decision.decision, decision.warnings]


def training(root: str) -> int:
    folder, order = Path(root), json.loads((Path(root) / "order.json").read_text())
    outputs = (folder / name for name in ("adapter", "checkpoints"))
    params = Params.model_validate(order["params"]).train
    return train(params, Path(order["dataset"]), *outputs, tables=folder / "tables").resumed_from_step


@dataclass(frozen=True)
class Work:
    """Something to kill, and checks of the state after that."""

    run: Callable[[str], Any]
    template: Path  # the folder that each run starts from
    events: int  # of a complete run
    took_effect: Callable[[Path], bool]  # fails if something is damaged
    check_repaired: Callable[[Path], None]  # fails unless everything is right after the next complete run

    def fresh(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(self.template, folder, symlinks=True)

    def killed(self, folder: Path, *kills: int) -> tuple[bool, Any]:
        """Kill it at each of these events, then run it; returns whether it took effect before that, and its answer."""
        root = self.fresh(folder)
        for kill_at in kills:
            assert preloaded.call(self.run, root, kill_at=kill_at).killed
        effect = self.took_effect(root)
        answer = preloaded.call(self.run, root).answer
        assert self.took_effect(root)
        self.check_repaired(root)
        return effect, answer


def ingest_work(template: Path, scratch: Path, base: Path, params: Params) -> Work:
    make_project(template, base, params)
    source = template.with_name("new.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in sample_rows(200)))
    (template / "source").write_text(str(source))
    old = files(template / "data")
    whole = preloaded.call(ingest, shutil.copytree(template, scratch, symlinks=True))
    new = files(scratch / "data")
    assert old != new

    def took_effect(root: Path) -> bool:
        recover(root)
        assert files(root / "data") in (old, new)
        assert not list(root.glob(".retune/ingest*"))
        return files(root / "data") == new

    def check_repaired(root: Path) -> None:
        assert graph.stale(root).get("data.dvc") is None  # the data are those of data.dvc

    return Work(ingest, template, whole.events, took_effect, check_repaired)


def publish_work(template: Path, scratch: Path) -> Work:
    published(template, parameters(template), registered=False)
    shutil.rmtree(template / "store")

    def took_effect(root: Path) -> bool:
        store = FileStore(root / "store")
        keys = store.list("versions/")
        for key in keys:
            check_objects(store, json.loads(store.read(key) or b"")["files"])
        return len(keys) == 1

    def check_repaired(root: Path) -> None:
        [version] = ModelRegistry(f"sqlite:///{root}/mlflow.db", NAME).numbers()
        assert version == graph.version_id(root)

    whole = preloaded.call(publish, shutil.copytree(template, scratch))
    return Work(publish, template, whole.events, took_effect, check_repaired)


def promote_work(template: Path, scratch: Path) -> Work:
    params = parameters(template)
    first = published(template, params, 0.4)
    gate.promote(params, first, template)
    published(template, params, 0.6, registered=False)

    def took_effect(root: Path) -> bool:
        return len(read_log(FileStore(root / "store"), NAME)) == 2

    def check_repaired(root: Path) -> None:
        log = read_log(FileStore(root / "store"), NAME)
        assert [record.decision for record in log] == ["promoted", "promoted"]
        client = ModelRegistry(f"sqlite:///{root}/mlflow.db", NAME).client
        alias = client.get_registered_model(NAME).aliases["champion"]
        assert client.get_model_version(NAME, alias).tags["version_id"] == champion(log) == log[1].version

    whole = preloaded.call(promote, shutil.copytree(template, scratch))
    assert whole.answer == ["promoted", []]
    return Work(promote, template, whole.events, took_effect, check_repaired)


def train_work(template: Path, scratch: Path, params: Params, dataset: Path) -> Work:
    # Dropout, two micro-batches per step, and checkpoints and validations at different steps.
    short = with_(
        params,
        train={"lora_dropout": 0.1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
               "tokens_per_step": None, "max_steps": 12, "save_steps": 3, "eval_steps": 4, "logging_steps": 4,
               "early_stopping_patience": 10},
    )  # fmt: skip
    (template / "order.json").write_text(json.dumps({"params": short.model_dump(), "dataset": str(dataset)}))
    whole = preloaded.call(training, shutil.copytree(template, scratch))
    assert whole.answer == 0
    adapter = files(scratch / "adapter")

    def took_effect(root: Path) -> bool:
        assert not (root / "adapter").exists() or files(root / "adapter") == adapter
        return (root / "adapter").exists()

    def check_repaired(root: Path) -> None:
        assert not list((root / "checkpoints").iterdir())

    return Work(training, template, whole.events, took_effect, check_repaired)


@pytest.fixture(scope="module", params=["ingest", "publish", "promote", "train"])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Work:
    folder = tmp_path_factory.mktemp("work")
    template, scratch = folder / "template", folder / "scratch"
    if request.param == "ingest":
        return ingest_work(template, scratch, base, params)
    template.mkdir()
    if request.param == "train":
        return train_work(template, scratch, params, request.getfixturevalue("dataset"))
    return {"publish": publish_work, "promote": promote_work}[request.param](template, scratch)


def test_work_killed_again_and_again_is_lost_or_done_once(work: Work, tmp_path: Path) -> None:
    print(f"{work.events} events")
    # A training is killed within an epoch, between two checkpoints.
    _, answer = work.killed(tmp_path / "killed", int(0.4 * work.events), int(0.3 * work.events))
    assert work.run is not training or answer > 3  # the step that it resumed from
    assert work.killed(tmp_path / "killed", work.events)[0]


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_work_killed_at_any_step_is_lost_or_done_once(work: Work, tmp_path: Path) -> None:
    effects = [work.killed(tmp_path / "killed", number)[0] for number in range(1, work.events + 1)]
    before, after = effects.count(False), effects.count(True)
    print(f"killed at each of {work.events} events: {before} before, {after} after the effect")
    assert effects == sorted(effects)  # from some event on, it took effect


@pytest.mark.parametrize("work", ["ingest"], indirect=True)
def test_an_ingest_killed_while_dvc_writes_its_file_is_undone(work: Work, tmp_path: Path) -> None:
    root = work.fresh(tmp_path / "killed")
    assert preloaded.call(ingest_whose_dvc_is_cut_short, root).killed
    assert not work.took_effect(root)
    work.check_repaired(root)


RACER = """
import json, sys, time
from pipeline.registry.decisions import Record, append, champion, read_log
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import FileStore
from pipeline.registry.stores import open_store
store, me, rounds = open_store(PublishParams.model_validate_json(sys.argv[1])), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
events = []
while True:
    begun = time.monotonic_ns()
    log = read_log(store, "model")
    seen = time.monotonic_ns()
    if len(log) >= rounds:
        break
    record = Record(len(log) + 1, "promoted", me, me, champion(log), "", actor=me)
    tried = time.monotonic_ns()
    made = append(store, "model", record)
    events.append([begun, seen, len(log), tried, time.monotonic_ns(), made is not None])
print(json.dumps(events), flush=True)
"""


def race(params: PublishParams, racers: int, rounds: int) -> dict[str, list[list[int]]]:
    """Let `racers` processes promote themselves as often as they can, and check the log; returns their attempts."""
    command = [sys.executable, "-c", RACER, params.model_dump_json()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(me), str(rounds)], env=environment(), **pipes) for me in range(racers)]
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * racers  # type: ignore[union-attr]
        for child in children:
            print("go", file=child.stdin, flush=True)
        attempts = {str(me): json.loads(child.communicate()[0]) for me, child in enumerate(children)}
    finally:
        for child in children:
            child.kill()
    log = read_log(open_store(params), "model")
    assert [record.number for record in log] == list(range(1, rounds + 1))
    for before, record in zip([None, *log], log, strict=False):
        assert record.previous == (before.version if before else None)  # it knew the champion that it replaced
    wins = {seen + 1: who for who, events in attempts.items() for _, _, seen, _, _, won in events if won}
    # No process believes in a promotion that is not in the log.
    assert wins == {record.number: record.version for record in log}
    lost = sum(not event[5] for events in attempts.values() for event in events)
    print(f"{rounds} promotions, {lost} attempts lost to another process")
    assert lost > 0
    return attempts


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("racers", "rounds"), [(4, 20), pytest.param(64, 200, marks=pytest.mark.faults)])
def test_racing_promoters_make_one_linear_history(tmp_path: Path, racers: int, rounds: int) -> None:
    attempts = race(publish_params((tmp_path / "store").as_uri()), racers, rounds)
    # Linearisable: a read sees every record that was created before it began, and none whose creation began after it.
    returned = sorted(event[4] for events in attempts.values() for event in events if event[5])
    begun = sorted(event[3] for events in attempts.values() for event in events if event[5])
    for events in attempts.values():
        for start, end, seen, *_ in events:
            assert sum(time < start for time in returned) <= seen <= sum(time < end for time in begun)
