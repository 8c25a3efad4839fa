"""Promotions in an S3 store while requests fail, promoters die or race: no decision is lost or made twice.

As `test_kills.py` for a folder. The server is Swift behind a proxy that keeps conditional writes apart, as AWS does.
"""

import random
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest
from conftest import publish_params, with_
from fault_proxy import FAULTS, KILLS, FaultProxy
from test_kills import race
from versions import parameters, published

from pipeline import promote as gate
from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.s3 import S3Store

LONG = [pytest.mark.faults, pytest.mark.timeout(3000)]


class Arena:
    """A store with two versions, and as many models as are asked for of which the first is champion."""

    def __init__(self, proxy: FaultProxy, root: Path) -> None:
        self.proxy, self.root = proxy, root
        at = {"endpoint_url": proxy.url, "addressing_style": "path", "max_concurrency": 1}
        self.params = parameters(root, artifact_store=f"s3://retune/{uuid.uuid4().hex}", **at)
        self.first = published(root, self.params, 0.4, registered=False)
        self.second = published(root, self.params, 0.6, registered=False)
        calm = self.champion_of_a_new_model()
        before = len(proxy.seen)
        assert self.promote(calm).decision == "promoted"
        self.requests = len(proxy.seen) - before

    def champion_of_a_new_model(self) -> Params:
        self.proxy.plan = lambda number, line: None
        shutil.rmtree(self.root / ".retune" / "versions", ignore_errors=True)  # it is to be fetched each time
        params = with_(self.params, publish={"registered_model_name": f"m{uuid.uuid4().hex[:8]}"})
        assert gate.promote(params.publish, params.promote, self.first, self.root).decision == "promoted"
        return params

    def promote(self, params: Params) -> gate.Decision:
        return gate.promote(params.publish, params.promote, self.second, self.root)

    def fault_at(self, index: int, fault: str) -> None:
        first = len(self.proxy.seen)
        # Only writes conflict.
        self.proxy.plan = lambda number, line: (
            fault if number == first + index and (line.startswith("PUT") or "Conflict" not in fault) else None
        )

    def check(self, params: Params, before: list[str]) -> None:
        """After the next command, which found the log at `before`, everything is right, once."""
        self.proxy.plan = lambda number, line: None
        decision = self.promote(params)
        assert decision.warnings == []
        assert decision.decision == ("unchanged" if before == [self.first, self.second] else "promoted")
        name = params.publish.registered_model_name
        log = read_log(open_store(params.publish), name)
        assert [(record.decision, record.version) for record in log] == [
            ("promoted", self.first),
            ("promoted", self.second),
        ]
        client = ModelRegistry(params.publish.tracking_uri, name).client
        alias = client.get_registered_model(name).aliases["champion"]
        assert client.get_model_version(name, alias).tags["version_id"] == champion(log) == self.second

    def log(self, params: Params) -> list[str]:
        """The versions of the log's records; each can be read: none is torn."""
        self.proxy.plan = lambda number, line: None
        return [each.version for each in read_log(open_store(params.publish), params.publish.registered_model_name)]


@pytest.fixture(scope="module")
def arena(swift_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with FaultProxy(int(swift_server.rpartition(":")[2])) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Store.__init__, "__defaults__", (1.0,))  # seconds until a stalled answer is given up
        yield Arena(proxy, tmp_path_factory.mktemp("arena"))


def promote_in_a_fork(root: str, publish: dict[str, Any], version: str) -> None:
    S3Store.__init__.__defaults__ = (1.0,)
    params = with_(parameters(Path(root)), publish=publish)
    gate.promote(params.publish, params.promote, version, Path(root))


@pytest.mark.parametrize("fault", [None, *(pytest.param(fault, marks=LONG) for fault in FAULTS)])
def test_a_fault_at_any_request_of_a_promotion_changes_nothing_of_its_result(arena: Arena, fault: str | None) -> None:
    """None: one that is drawn, at a request that is drawn."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for index in range(arena.requests) if fault else [draw.randrange(arena.requests)]:
        params = arena.champion_of_a_new_model()
        arena.fault_at(index, fault or draw.choice(FAULTS))
        decision = arena.promote(params)
        assert (decision.decision, decision.warnings) == ("promoted", []), (index, fault)
        arena.check(params, arena.log(params))


def test_a_promotion_killed_beside_its_record_in_s3_is_repaired_by_the_next_command(arena: Arena) -> None:
    assert kill_at(arena, 0, "kill") == [arena.first]
    assert kill_at(arena, arena.requests - 1, "killed") == [arena.first, arena.second]


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("how", KILLS)
def test_a_promotion_killed_at_any_request_is_lost_or_made_once(arena: Arena, how: str) -> None:
    effects = [len(kill_at(arena, index, how)) for index in range(arena.requests)]
    print(
        f"killed at each of {arena.requests} requests: {effects.count(1)} before, {effects.count(2)} after the record"
    )
    assert effects == sorted(effects)
    assert set(effects) == {1, 2}


def kill_at(arena: Arena, index: int, how: str) -> list[str]:
    """The log after a promotion was killed at its request `index`; the next command leaves everything right."""
    params = arena.champion_of_a_new_model()
    arena.fault_at(index, how)

    def started(child: preloaded.Child) -> None:
        arena.proxy.on_kill = child.kill

    arguments = (arena.root, params.publish.model_dump(), arena.second)
    assert preloaded.call(promote_in_a_fork, *arguments, started=started).killed
    before = arena.log(params)
    arena.check(params, before)
    return before


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("racers", "rounds"), [(4, 6), pytest.param(16, 60, marks=pytest.mark.faults)])
def test_racing_promoters_make_one_linear_history_in_s3(s3: str, racers: int, rounds: int) -> None:
    params = publish_params(f"s3://retune/{uuid.uuid4().hex}", endpoint_url=s3, addressing_style="path")
    race(params, racers, rounds)
