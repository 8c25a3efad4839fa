"""Publishing and promoting in S3 while requests fail and processes die or race: nothing is incomplete, lost or doubled.

The server is Swift behind a proxy that makes conditional writes atomic, as on AWS. By default a few faults are tested;
`make test-faults` tests every fault at every request. `test_kills.py` does the same for a store in a folder.
"""

import json
import random
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import sleep  # `quicken` replaces `time.sleep`
from typing import Any

import preloaded
import pytest
from conftest import publish_params, with_
from fault_proxy import FAULTS, KILLS, FaultProxy
from test_kills import race
from test_store import publish
from versions import parameters, published

from pipeline import promote
from pipeline.params import Params
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.s3 import S3Store
from pipeline.registry.stores import fetch, open_store

PART_SIZE, SIZE = 5 * 2**20, 200_000
LONG = [pytest.mark.faults, pytest.mark.timeout(3600)]


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Use the smallest parts that S3 accepts, shorter pauses between attempts, and a timeout of one second."""
    patch.setattr("pipeline.registry.s3.PART_SIZE", PART_SIZE)
    patch.setattr("pipeline.registry.s3.PROBE_HOLD_S", 0.2)
    patch.setattr("botocore.endpoint.time.sleep", lambda seconds: sleep(seconds / 20))
    patch.setattr(S3Store.__init__, "__defaults__", (1.0,))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@dataclass(frozen=True)
class Publishing:
    """Publishes a second version (small files and one of `size` bytes) after a first one."""

    url: str
    folder: str
    size: int

    def fresh(self) -> str:
        """A new store's prefix, with the first version."""
        name = uuid.uuid4().hex
        self._publish(name, 1)
        return name

    def run(self, name: str) -> None:
        self._publish(name, 2)

    def is_done(self, name: str) -> bool:
        """Check that every visible version is complete; returns whether there are two."""
        store = self._store(name)
        for number, key in enumerate(store.list("versions/"), start=1):
            out = Path(self.folder) / "out"
            fetch(store, json.loads(store.read(key) or b""), self._files(number), out)
            for file, path in self._files(number).items():
                assert (out / file).read_bytes() == path.read_bytes()
            shutil.rmtree(out)
        return len(store.list("versions/")) == 2

    def check(self, name: str) -> None:
        assert len(self._store(name).list("objects/")) == 5  # two of each version, and one that both have

    def _publish(self, name: str, number: int) -> None:
        publish(self._store(name), f"v{number}", self._files(number))

    def _store(self, name: str) -> S3Store:
        at = {"endpoint_url": self.url, "addressing_style": "path", "max_concurrency": 1}
        return S3Store(publish_params(f"s3://retune/{name}", **at))

    def _files(self, number: int) -> dict[str, Path]:
        content = {"adapter/loss.csv": b"," * number, "merged/vocab.txt": b"same"}
        content |= {"parity/items.merged.parquet": random.Random(number).randbytes(self.size)}
        files = {name: Path(self.folder) / f"{number}-{name.replace('/', '-')}" for name in content}
        for name, path in files.items():
            if not path.exists():  # an upload refuses a file that is written meanwhile
                path.write_bytes(content[name])
        return files | {"merged/merges.txt": files["merged/vocab.txt"]}


@dataclass(frozen=True)
class Promoting:
    """Promotes the second of two versions after the first; each time as another model in the same store."""

    url: str
    folder: str
    prefix: str

    @cached_property
    def _versions(self) -> list[str]:
        return [published(Path(self.folder), self._params("all"), q, registered=False) for q in (0.4, 0.6)]

    def fresh(self) -> str:
        name, (first, second) = f"m{uuid.uuid4().hex[:8]}", self._versions
        (Path(self.folder) / name).write_text(second)
        assert self._promote(name, first).decision == "promoted"
        shutil.rmtree(Path(self.folder) / ".retune" / "versions", ignore_errors=True)  # so that files are downloaded
        return name

    def run(self, name: str) -> None:
        decision = self._promote(name, (Path(self.folder) / name).read_text())
        assert (decision.decision, decision.warnings) in (("promoted", []), ("unchanged", []))

    def is_done(self, name: str) -> bool:
        return len(self._log(name)) == 2

    def check(self, name: str) -> None:
        log = self._log(name)
        assert [(record.decision, record.version) for record in log] == [("promoted", v) for v in self._versions]
        client = ModelRegistry(self._params(name).publish.tracking_uri, name).client
        alias = client.get_registered_model(name).aliases["champion"]
        assert client.get_model_version(name, alias).tags["version_id"] == champion(log) == self._versions[1]

    def _promote(self, name: str, version: str) -> promote.Decision:
        params = self._params(name)
        return promote.promote(params, version, Path(self.folder))

    def _log(self, name: str) -> list[Any]:
        return read_log(open_store(self._params(name).publish), name)

    def _params(self, name: str) -> Params:
        at = {"endpoint_url": self.url, "addressing_style": "path", "max_concurrency": 1}
        params = parameters(Path(self.folder), artifact_store=f"s3://retune/{self.prefix}", **at)
        return with_(params, publish={"registered_model_name": name})


Work = Publishing | Promoting
KINDS = {"Publishing": Publishing, "Promoting": Promoting}


def run_in_a_fork(kind: str, fields: dict[str, Any], name: str) -> None:
    quicken(pytest.MonkeyPatch())
    KINDS[kind](**fields).run(name)


@pytest.fixture(scope="module")
def proxy(swift_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(int(swift_server.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = str(tmp_path_factory.mktemp("work"))
    if request.param == "promote":
        return Promoting(proxy.url, folder, uuid.uuid4().hex)
    return Publishing(proxy.url, folder, {"publish": SIZE, "publish in parts": PART_SIZE + 1}[request.param])


@pytest.fixture(scope="module")
def requests(work: Work, proxy: FaultProxy) -> int:
    """The number of requests without a fault."""
    name, before = work.fresh(), len(proxy.request_lines)
    work.run(name)
    number = len(proxy.request_lines) - before
    assert work.is_done(name) and number > 8
    work.check(name)
    return number


def plan(proxy: FaultProxy, fault: str, index: int) -> None:
    """Inject the fault into request `index`, counted from now."""
    at = len(proxy.request_lines) + index

    def fault_of(number: int, line: str) -> str | None:
        creates = line.startswith("PUT") and "partNumber" not in line  # only conditional writes conflict
        possible = creates or "Conflict" not in fault
        return fault if number == at and possible else None

    proxy.plan = fault_of


def at_first_attempt(work: Work, proxy: FaultProxy, fault: str, index: int) -> bool:
    """Whether the work succeeds despite a fault; if not, the next attempt must. Nothing may ever be incomplete."""
    name, error = work.fresh(), None
    plan(proxy, fault, index)
    try:
        work.run(name)
    except StoreError as raised:
        error = raised
    print(fault, index, error)
    proxy.plan = lambda number, line: None
    work.is_done(name)
    if error is not None:
        work.run(name)
    assert work.is_done(name)
    work.check(name)
    return error is None


@pytest.mark.parametrize("fault", [None, *(pytest.param(fault, marks=LONG) for fault in FAULTS)])
@pytest.mark.parametrize(
    "work", ["publish", pytest.param("publish in parts", marks=LONG), "promote"], indirect=True, ids=str
)
def test_a_fault_at_any_request_does_not_change_the_result(
    work: Work, proxy: FaultProxy, requests: int, fault: str | None
) -> None:
    """None: a random fault at a random request."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    indices = range(requests) if fault else [draw.randrange(requests)]
    failed = [index for index in indices if not at_first_attempt(work, proxy, fault or draw.choice(FAULTS), index)]
    print("not at the first attempt:", failed)
    in_parts = isinstance(work, Publishing) and work.size > PART_SIZE
    assert len(failed) <= in_parts  # completing an upload in parts twice may be an error of the server


def effect_of_kill(work: Work, proxy: FaultProxy, how: str, index: int) -> bool:
    """Whether the work had taken effect when it was killed at a request; the next run must repair everything."""
    name = work.fresh()
    plan(proxy, how, index)

    fork = (run_in_a_fork, type(work).__name__, asdict(work), name)
    assert preloaded.call(*fork, started=lambda child: setattr(proxy, "on_kill", child.kill)).killed
    proxy.plan = lambda number, line: None
    effect = work.is_done(name)
    work.run(name)
    assert work.is_done(name)
    work.check(name)
    return effect


@pytest.mark.parametrize("work", ["promote"], indirect=True)
def test_a_promotion_killed_before_or_after_its_record_is_repaired_by_the_next_command(
    work: Work, proxy: FaultProxy, requests: int
) -> None:
    assert not effect_of_kill(work, proxy, "kill", 0)
    assert effect_of_kill(work, proxy, "killed", requests - 1)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", KILLS)
@pytest.mark.parametrize("work", ["publish", "publish in parts", "promote"], indirect=True)
def test_work_killed_at_any_request_is_lost_or_done_once(
    work: Work, proxy: FaultProxy, requests: int, how: str
) -> None:
    effects = [effect_of_kill(work, proxy, how, index) for index in range(requests)]
    before, after = effects.count(False), effects.count(True)
    print(f"killed at each of {requests} requests: {before} before, {after} after the effect")
    assert effects == sorted(effects) and set(effects) == {False, True}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("racers", "rounds"), [(4, 6), pytest.param(16, 60, marks=pytest.mark.faults)])
def test_racing_promoters_make_one_linear_history(s3: str, racers: int, rounds: int) -> None:
    race(publish_params(f"s3://retune/{uuid.uuid4().hex}", endpoint_url=s3, addressing_style="path"), racers, rounds)
