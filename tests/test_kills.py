"""Promotions that are killed or race: no decision is lost or made twice, and no one has to repair anything by hand."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, publish_params
from forked import Forker
from versions import parameters, published

from pipeline import promote as gate
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.mlflow import ModelRegistry

NAME = "retune-sample"
SEED = int(os.environ.get("RETUNE_TEST_SEED", "0")) or random.SystemRandom().randrange(2**32)
RACER = """
import json, sys, time
from pipeline.registry.decisions import Record, append, champion, read_log
from pipeline.params import PublishParams
from pipeline.registry.artifact_store import open_store
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
    """Let `racers` processes promote themselves as often as they can, and check the history that they make.

    Returns: every process's attempts.
    """
    command = [sys.executable, "-c", RACER, params.model_dump_json()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(me), str(rounds)], env=environment(), **pipes) for me in range(racers)]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"  # type: ignore[union-attr]
        for child in children:
            child.stdin.write("go\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
        attempts = {str(me): json.loads(child.communicate()[0]) for me, child in enumerate(children)}
    finally:
        for child in children:
            child.kill()
    log = read_log(open_store(params), "model")
    assert [record.number for record in log] == list(range(1, rounds + 1))
    for before, record in zip([None, *log], log, strict=False):
        assert record.previous == (before.version if before else None)  # decided knowing the champion that it replaced
    wins = {seen + 1: who for who, events in attempts.items() for _, _, seen, _, _, won in events if won}
    assert wins == {record.number: record.version for record in log}  # nobody believes in a promotion that is not there
    lost = sum(not event[5] for events in attempts.values() for event in events)
    print(f"{rounds} promotions, {lost} attempts lost to another process")
    assert lost > 0
    return attempts


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("racers", "rounds"), [(6, 30), pytest.param(64, 200, marks=pytest.mark.faults)])
def test_racing_promoters_make_one_linear_history(tmp_path: Path, racers: int, rounds: int) -> None:
    attempts = race(publish_params((tmp_path / "store").as_uri()), racers, rounds)
    # Linearisable: a read sees every record whose creation had returned when it began, and none that was not begun.
    returned = sorted(event[4] for events in attempts.values() for event in events if event[5])
    begun = sorted(event[3] for events in attempts.values() for event in events if event[5])
    for events in attempts.values():
        for start, end, seen, *_ in events:
            assert sum(time < start for time in returned) <= seen <= sum(time < end for time in begun)


class Copies:
    """Copies of one prepared project to let a forked process promote in."""

    def __init__(self, template: Path, scratch: Path) -> None:
        self.template, self.scratch, self.count = template, scratch, 0
        self.forker = Forker()

    def fresh(self) -> Path:
        self.count += 1
        root = self.scratch / str(self.count)
        shutil.copytree(self.template, root)
        return root

    def promote(self, root: Path, step: int | None = None, seconds: float | None = None) -> dict[str, Any]:
        places = {"artifact_store": (root / "store").as_uri(), "tracking_uri": f"sqlite:///{root}/mlflow.db"}
        return self.forker.promote(root, places, step, seconds)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copies]:
    """A champion, and a better version that the registry has not heard of, in a project to copy."""
    template = tmp_path_factory.mktemp("template")
    params = parameters(template)
    first = published(template, params, 0.4)
    gate.promote(params.publish, params.promote, first, template)
    published(template, params, 0.6, registered=False)
    made = Copies(template, tmp_path_factory.mktemp("killed"))
    yield made
    made.forker.end()


def check_repaired(copies: Copies, root: Path) -> bool:
    """Whether the killed promotion had taken effect; the next command must leave everything right, once."""
    store = open_store(publish_params((root / "store").as_uri()))
    before = read_log(store, NAME)  # readable at once: no torn record
    done = "promoted" if len(before) == 1 else "unchanged"
    answer = copies.promote(root)
    assert (answer.get("decision"), answer.get("warnings")) == (done, []), answer
    log = read_log(store, NAME)
    assert [record.decision for record in log] == ["promoted", "promoted"]
    assert log[: len(before)] == before
    client = ModelRegistry(f"sqlite:///{root}/mlflow.db", NAME).client
    aliases = client.get_registered_model(NAME).aliases
    assert client.get_model_version(NAME, aliases["champion"]).tags["version_id"] == champion(log) == log[1].version
    shutil.rmtree(root)
    return len(before) == 2


def test_a_promotion_killed_beside_its_record_is_repaired_by_the_next_command(copies: Copies) -> None:
    root = copies.fresh()
    whole = copies.promote(root)
    assert whole["decision"] == "promoted", whole
    steps = whole["steps"]
    print(f"{steps} steps")
    # Where the log's record comes into being, and a few beside.
    effects = []
    for step in [1, steps // 4, steps // 2, 3 * steps // 4, steps]:
        root = copies.fresh()
        assert copies.promote(root, step=step)["killed"]
        effects.append(check_repaired(copies, root))
    assert effects == sorted(effects)  # from some step on it has taken effect
    assert not effects[0]
    assert effects[-1]


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_promotion_killed_at_any_step_is_lost_or_made_once(copies: Copies) -> None:
    steps = copies.promote(copies.fresh())["steps"]
    effects = []
    for step in range(1, steps + 1):
        root = copies.fresh()
        assert copies.promote(root, step=step)["killed"], step
        effects.append(check_repaired(copies, root))
    print(f"killed at each of {steps} steps: {effects.count(False)} before, {effects.count(True)} after the record")
    assert effects == sorted(effects)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_promotion_killed_at_any_time_is_lost_or_made_once(copies: Copies) -> None:
    print(f"RETUNE_TEST_SEED={SEED}")
    draw = random.Random(SEED)
    duration = max(copies.promote(copies.fresh())["seconds"] for _ in range(3))
    effects = []
    for _ in range(200):
        root = copies.fresh()
        copies.promote(root, seconds=draw.uniform(0, duration * 1.2))
        effects.append(check_repaired(copies, root))
    print(f"200 kills within {duration:.2f} s: {effects.count(False)} before, {effects.count(True)} after the record")
    assert 0 < effects.count(True) < 200
