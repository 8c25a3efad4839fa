"""Who becomes champion: by the gate, by a person, by nobody; and what is said about it."""

import http.server
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, with_, write_params
from versions import ITEMS, parameters, published, records, registry_lost

from pipeline import promote as gate
from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.registry import compare as comparing
from pipeline.registry.artifact_store import open_store
from pipeline.registry.compare import CompareError
from pipeline.registry.decisions import DecisionError, PromoteError, champion, read_log
from pipeline.registry.manifest import published_versions, read_manifest
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.preflight import PreflightError, require_ready
from pipeline.registry.retention import RetentionError, delete, outdated
from pipeline.registry.verdict import verdict_rows

NAME = "retune-sample"


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return parameters(tmp_path)


def decide(root: Path, params: Params, version: str | None = None, force: str | None = None) -> gate.Decision:
    return gate.promote(params.publish, params.promote, version, root, force)


def serving(root: Path, params: Params) -> str | None:
    """The champion by the log, after checking that MLflow's alias says the same."""
    log = read_log(open_store(params.publish), NAME)
    client = ModelRegistry(params.publish.tracking_uri, NAME).client
    aliases = client.get_registered_model(NAME).aliases
    alias = client.get_model_version(NAME, aliases["champion"]).tags["version_id"] if "champion" in aliases else None
    assert alias == champion(log)
    return champion(log)


def test_a_better_version_is_promoted_and_a_worse_one_refused_with_its_numbers(tmp_path: Path, params: Params) -> None:
    good = published(tmp_path, params, 0.5)
    assert decide(tmp_path, params).decision == "promoted"
    published(tmp_path, params, 0.4)
    refused = decide(tmp_path, params)
    assert (refused.decision, refused.number, refused.champion) == ("refused", "2", good)
    assert f"0.100 worse than that of champion v1 ({good[:6]}…) (0.400 against 0.500 on 100" in refused.reason
    assert "more than 0 is needed" in refused.reason
    assert (refused.word, f"v1 ({good[:6]}…) stays champion" in refused.title) == ("refused", True)
    assert "retune promote v2 --force" in refused.next
    rows = {row["metric"]: row for row in verdict_rows(refused.comparison)}
    assert rows["rougeL"] == {
        "metric": "rougeL",
        "candidate": "0.400",
        "champion": "0.500",
        "difference": "-0.100",
        "95 % interval": "-0.100 to -0.100",
        "needed": "more than 0",
        "p": "1.000",
        "verdict": "refused",
    }
    assert serving(tmp_path, params) == good


def test_a_guard_metric_that_no_item_counts_for_is_said(tmp_path: Path, params: Params) -> None:
    published(tmp_path, params, 0.5, exact=False)
    decision = decide(tmp_path, params)
    assert decision.decision == "promoted"
    assert decision.comparison["accuracy"]["passed"] is None
    assert verdict_rows(decision.comparison)[1]["verdict"] == "not measured"
    assert decision.notes == ["accuracy guards nothing here: no test item counts for it"]
    assert records(tmp_path)[0]["notes"] == decision.notes


def test_a_champion_trained_on_rows_of_a_larger_test_split_is_not_compared(tmp_path: Path, params: Params) -> None:
    first = published(tmp_path, params, 0.5, test_fraction=0.1)
    decide(tmp_path, params)
    published(tmp_path, params, 0.6, test_fraction=0.2, test_split="b")
    refused = decide(tmp_path, params)
    assert (refused.decision, refused.comparison) == ("refused", {})
    assert f"test_fraction is 0.2, and was 0.1 for the champion {first}: it was trained on rows" in refused.reason
    assert serving(tmp_path, params) == first
    assert decide(tmp_path, params).decision == "unchanged"
    forced = decide(tmp_path, params, force="the new split is what counts")
    assert (forced.decision, forced.comparison) == ("promoted", {})
    assert records(tmp_path)[-1]["overruled"][0].startswith("prepare.test_fraction is 0.2")


def test_a_smaller_test_split_is_a_fair_one_and_said(tmp_path: Path, params: Params) -> None:
    first = published(tmp_path, params, 0.5, test_fraction=0.2)
    decide(tmp_path, params)
    candidate = published(tmp_path, params, 0.6, test_fraction=0.1, test_split="b")
    # The champion's scores on the new split, as `retune score` leaves them for the next time.
    scored = tmp_path / ".retune" / "versions" / first / "scored"
    scored.mkdir(parents=True)
    wanted = read_json(tmp_path / "artifacts" / "parity" / "parity.json")["evaluation"]
    write_json(scored / "evaluation.json", wanted)
    (scored / "items.parquet").write_bytes((tmp_path / "artifacts/evaluation/items.base.parquet").read_bytes())
    decision = decide(tmp_path, params)
    assert (decision.decision, decision.champion) == ("promoted", candidate)
    assert decision.notes == ["the test split is a part of the champion's: prepare.test_fraction 0.1 instead of 0.2"]


def test_too_few_items_leave_the_champion_and_are_not_asked_again(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = published(tmp_path, params, 0.5)
    decide(tmp_path, params)
    published(tmp_path, params, 0.6)
    monkeypatch.setattr("pipeline.registry.gate.MIN_GROUPS", ITEMS + 1)
    decision = decide(tmp_path, params)
    assert (decision.decision, decision.champion) == ("undecided", first)
    assert f"needed at least {ITEMS + 1} independent test items, there are {ITEMS}" in decision.reason
    assert decision.next.startswith("Add about ")
    assert "test_fraction" not in decision.next  # the champion was trained on what would become test items
    log = read_log(open_store(params.publish), NAME)
    assert (log[-1].decision, serving(tmp_path, params)) == ("undecided", first)
    again = decide(tmp_path, params)
    assert again.decision == "unchanged"
    assert again.reason.startswith(
        "not decided before, and champion, gate and test items are the same: rougeL is 0.100 better"
    )
    assert again.next == decision.next


def test_a_version_that_forgot_too_much_is_refused(tmp_path: Path, params: Params) -> None:
    published(tmp_path, params, 0.5, forgets=0.3)
    refused = decide(tmp_path, params)
    assert (refused.decision, refused.champion) == ("refused", None)
    assert refused.reason.startswith("general_perplexity is ")
    assert "at most +0.7" in refused.reason
    rows = {row["metric"]: row["verdict"] for row in verdict_rows(refused.comparison)}
    assert (rows["rougeL"], rows["general_accuracy"], rows["general_perplexity"]) == ("passed", "passed", "refused")
    published(tmp_path, params, 0.5, forgets=0.01)
    assert decide(tmp_path, params).decision == "promoted"


def test_a_fresh_clone_promotes_by_the_scores_that_versions_were_published_with(tmp_path: Path, params: Params) -> None:
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    for folder in ("artifacts", ".retune"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert decide(tmp_path, params, first).decision == "promoted"
    decision = decide(tmp_path, params, second)
    assert (decision.decision, decision.champion) == ("promoted", second)
    assert decision.comparison["rougeL"]["candidate"] == pytest.approx(0.6, abs=0.01)


def test_a_fresh_clone_without_the_test_items_says_how_to_get_them(tmp_path: Path, params: Params) -> None:
    first = published(tmp_path, params, 0.5, test_fraction=0.2)
    decide(tmp_path, params)
    second = published(tmp_path, params, 0.6, test_split="b")
    shutil.rmtree(tmp_path / "artifacts")
    with pytest.raises(CompareError, match=f"{first}.*dvc repro prepare"):
        decide(tmp_path, params, second)


def test_scores_of_different_signatures_are_not_compared(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = published(tmp_path, params, 0.5, test_fraction=0.2)
    decide(tmp_path, params)
    published(tmp_path, params, 0.6, test_fraction=0.1, test_split="b")
    scored = tmp_path / ".retune" / "versions" / first / "scored"
    wanted = read_json(tmp_path / "artifacts" / "parity" / "parity.json")["evaluation"]
    other = wanted["signatures"] | {"bleu": "tok:zh|version:3.0.0"}

    def score_anew(*_: object) -> bool:
        write_json(scored / "evaluation.json", wanted | {"signatures": other})
        return True

    monkeypatch.setattr("pipeline.registry.compare.score_again", score_anew)
    with pytest.raises(CompareError, match=f"bleu of the candidate was scored as made .* {first} as tok:zh"):
        comparing.current_items(
            params.publish,
            read_manifest(open_store(params.publish), first),  # type: ignore[arg-type]
            wanted,
            tmp_path,
        )


def test_another_kind_of_model_under_the_champions_name_is_said_before_training(tmp_path: Path, params: Params) -> None:
    require_ready(params, tmp_path)  # nothing serves yet
    version = published(tmp_path, params)
    decide(tmp_path, params)
    require_ready(params, tmp_path)
    changes = {
        "train": {"task": "sequence-classification", "packing": False},
        "promote": {"primary_metric": "accuracy"},
    }
    other = with_(params, **changes)
    with pytest.raises(PreflightError, match=f"{version[:6]}.*causal-lm.*publish.registered_model_name"):
        require_ready(other, tmp_path)
    require_ready(with_(other, publish={"registered_model_name": "classes"}), tmp_path)


def test_a_guard_that_both_sides_miss_everywhere_is_noted(tmp_path: Path, params: Params) -> None:
    strict = with_(params, promote={"guard_metrics": {"accuracy": 0.05}})
    published(tmp_path, strict, 0.35)  # no answer of the candidate or of the base is right
    decision = decide(tmp_path, strict)
    assert (decision.decision, decision.comparison["accuracy"]["verdict"]) == ("promoted", "uninformative")
    assert decision.notes == [f"accuracy guards nothing here: both score 0 on all {ITEMS} test items that count for it"]


def test_force_promotes_what_the_gate_refuses_and_records_what_it_overruled(tmp_path: Path, params: Params) -> None:
    published(tmp_path, params, 0.5)
    decide(tmp_path, params)
    worse = published(tmp_path, params, 0.4)
    assert decide(tmp_path, params).decision == "refused"
    assert decide(tmp_path, params).decision == "unchanged"
    forced = decide(tmp_path, params, force="legal asked for it")
    assert (forced.decision, forced.reason, serving(tmp_path, params)) == ("promoted", "legal asked for it", worse)
    assert (forced.word, forced.title) == (
        "forced",
        f"Forced: v2 ({worse[:6]}…) is the champion now, against the gate",
    )
    record = records(tmp_path)[-1]
    assert record["overruled"][:3] == ["rougeL", "accuracy", "bleu"]
    assert record["overruled"][3].startswith("refused before")
    assert record["comparison"]["rougeL"]["passed"] is False


def test_what_is_not_published_or_was_deleted_is_not_promoted_even_by_force(tmp_path: Path, params: Params) -> None:
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    decide(tmp_path, params, first)
    decide(tmp_path, params, second)
    with pytest.raises(PromoteError, match="version 0000000000000000 is not published"):
        decide(tmp_path, params, "0" * 16, force="x")
    delete(params.publish, first, "not needed", tmp_path)
    with pytest.raises(DecisionError, match=r"was deleted by .* \(not needed\); an id never comes back"):
        decide(tmp_path, params, first, force="x")
    with pytest.raises(DecisionError, match="was deleted"):
        gate.rollback(params.publish, params.promote, first, root=tmp_path)


def test_a_registry_that_is_lost_gives_no_version_called_none(tmp_path: Path, params: Params) -> None:
    published(tmp_path, params, 0.5)
    decide(tmp_path, params)
    first = decide(tmp_path, params).version
    params = registry_lost(tmp_path, params)
    version = published(tmp_path, params, 0.6, registered=False)
    decision = decide(tmp_path, params, version)
    assert (decision.decision, decision.warnings) == ("promoted", [])
    assert f"that of champion {first}" in decision.reason  # it had no number then
    assert decision.number in ("1", "2")
    assert serving(tmp_path, params) == version


def test_a_registry_that_is_down_stops_no_rollback(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    first = published(tmp_path, params, 0.5)
    decide(tmp_path, params)
    published(tmp_path, params, 0.6)
    decide(tmp_path, params)
    down = with_(params, publish={"tracking_uri": "http://127.0.0.1:9"})
    record, warnings = gate.rollback(down.publish, down.promote, root=tmp_path)
    assert record.champion == first
    assert warnings[0].startswith("the registry http://127.0.0.1")
    assert "The decision stands" in warnings[0]
    assert gate.history(params.publish, tmp_path)[1] == []  # the next command repairs the alias
    assert serving(tmp_path, params) == first


@pytest.fixture
def manual(params: Params) -> Params:
    return with_(params, promote={"approval": "manual"})


def test_manual_approval_waits_with_the_numbers_and_promotes_when_a_person_agrees(
    tmp_path: Path, manual: Params
) -> None:
    version = published(tmp_path, manual, 0.5)
    proposal = decide(tmp_path, manual)
    assert (proposal.decision, proposal.champion, serving(tmp_path, manual)) == ("proposed", None, None)
    again = decide(tmp_path, manual)
    assert again.decision == "unchanged"
    assert "waits for approval" in again.reason
    agreed = gate.approve(manual.publish, manual.promote, None, True, "looks right", "Ada", tmp_path)
    assert (agreed.decision, agreed.comparison) == ("promoted", proposal.comparison)
    assert serving(tmp_path, manual) == version
    assert [(r["decision"], r["proposal"], r["actor"] == "Ada") for r in records(tmp_path)] == [
        ("proposed", None, False),
        ("promoted", 1, True),
    ]
    with pytest.raises(PromoteError, match="no version waits for approval"):
        gate.approve(manual.publish, manual.promote, root=tmp_path)


@pytest.mark.parametrize(("keys", "decision"), [("y\nfine\n", "promoted"), ("n\nnot yet\n", "refused")])
def test_promote_on_a_terminal_shows_the_numbers_and_asks(
    tmp_path: Path, manual: Params, keys: str, decision: str
) -> None:
    version = published(tmp_path, manual, 0.5)
    write_params(tmp_path, manual)
    master, slave = pty.openpty()
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "promote", version],
            cwd=tmp_path,
            env=environment(),
            stdin=slave,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.write(master, keys.encode())
        output, _ = child.communicate(timeout=120)
    finally:
        os.close(master)
        os.close(slave)
    assert child.returncode == (0 if decision == "promoted" else 3)
    assert output.index("│ rougeL") < output.index("Make it the champion?")
    assert [(r["decision"], r["reason"]) for r in records(tmp_path)][1:] == [(decision, keys.split("\n")[1])]


def test_a_rejected_version_is_refused_and_not_proposed_again(tmp_path: Path, manual: Params) -> None:
    published(tmp_path, manual, 0.5)
    decide(tmp_path, manual)
    no = gate.approve(manual.publish, manual.promote, None, False, "answers in the wrong tone", "Ada", tmp_path)
    assert (no.decision, no.champion, no.reason) == ("refused", None, "answers in the wrong tone")
    assert decide(tmp_path, manual).decision == "unchanged"
    assert len(records(tmp_path)) == 2


def test_an_approval_counts_only_for_the_champion_that_was_compared_with(tmp_path: Path, manual: Params) -> None:
    first, second = published(tmp_path, manual, 0.5), published(tmp_path, manual, 0.6)
    decide(tmp_path, manual, first)
    decide(tmp_path, manual, second, force="at once")
    with pytest.raises(PromoteError, match="no version waits for approval"):
        gate.approve(manual.publish, manual.promote, first, root=tmp_path)
    decide(tmp_path, manual, published(tmp_path, manual, 0.7))
    with pytest.raises(PromoteError, match=rf"v3 \(.*\) waits for approval, not v1 \({first[:6]}"):
        gate.approve(manual.publish, manual.promote, first, root=tmp_path)
    assert serving(tmp_path, manual) == second


def test_what_serves_or_waits_is_not_deleted(tmp_path: Path, manual: Params) -> None:
    first, third = (published(tmp_path, manual, quality) for quality in (0.5, 0.7))
    decide(tmp_path, manual, first, force="the first")
    assert decide(tmp_path, manual, third).decision == "proposed"
    for version, why in ((first, "is the champion"), (third, "is waiting for approval")):
        with pytest.raises(RetentionError, match=why):
            delete(manual.publish, version, "room", tmp_path)
    with pytest.raises(RetentionError, match="is not published"):
        delete(manual.publish, "0" * 16, "room", tmp_path)
    assert len(published_versions(open_store(manual.publish))) == 2


def test_a_deleted_version_is_gone_for_good(tmp_path: Path, params: Params) -> None:
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    decide(tmp_path, params, first)
    decide(tmp_path, params, second)
    assert delete(params.publish, "v1", "room", tmp_path).version == first
    store = open_store(params.publish)
    assert read_manifest(store, first) is None
    assert ModelRegistry(params.publish.tracking_uri, NAME).numbers() == {second: "2"}
    with pytest.raises(PromoteError, match="no champion before the present one"):
        gate.rollback(params.publish, params.promote, root=tmp_path)
    assert delete(params.publish, first, "again", tmp_path).reason == "room"  # finishes what a crash left
    assert [r["decision"] for r in records(tmp_path)] == ["promoted", "promoted", "deleted"]


def test_retention_keeps_the_newest_and_the_last_champions(tmp_path: Path, params: Params) -> None:
    params = with_(params, publish={"keep_versions": 2, "keep_champions": 2})
    made = [published(tmp_path, params, 0.30 + 0.05 * i) for i in range(8)]
    for number in (0, 2, 3):
        decide(tmp_path, params, made[number])
    unregistered = published(tmp_path, params, 0.9, registered=False)
    assert outdated(params.publish, tmp_path) == [made[0], made[1], made[4], made[5]]
    assert outdated(with_(params, publish={"keep_versions": None}).publish, tmp_path) == []
    for version in outdated(params.publish, tmp_path):
        delete(params.publish, version, "old", tmp_path)
    assert outdated(params.publish, tmp_path) == []
    left = published_versions(open_store(params.publish))
    assert set(left) == {made[2], made[3], made[6], made[7], unregistered}


def test_a_deletion_that_was_cut_short_is_finished_by_prune(tmp_path: Path, params: Params) -> None:
    first, second = published(tmp_path, params, 0.5), published(tmp_path, params, 0.6)
    decide(tmp_path, params, second)
    manifest = tmp_path / "store" / "versions" / first / "manifest.json"
    data = manifest.read_bytes()
    delete(params.publish, first, "room", tmp_path)
    manifest.write_bytes(data)
    assert outdated(params.publish, tmp_path) == [first]
    delete(params.publish, first, "room", tmp_path)
    assert not manifest.exists()


class Hook(http.server.BaseHTTPRequestHandler):
    """A webhook that keeps what it is sent, and answers with the status that its path names."""

    got: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Hook.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
        self.send_response(int(self.path.rsplit("/", 1)[1]))
        self.send_header("Location", "/elsewhere/200")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hook.got = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/secret-token"
    monkeypatch.setenv("TEAM_HOOK", f"{url}/200")
    monkeypatch.setenv("BROKEN_HOOK", f"{url}/500")
    monkeypatch.setenv("MOVED_HOOK", f"{url}/302")
    monkeypatch.setenv("DEAD_HOOK", "http://127.0.0.1:9/secret-token")
    monkeypatch.setenv("FILE_HOOK", "file:///etc/passwd")
    yield url
    server.shutdown()
    server.server_close()


def test_promotion_refusal_and_rollback_are_told_to_the_webhook(tmp_path: Path, params: Params, hook: str) -> None:
    told = with_(params, promote={"webhooks": ["TEAM_HOOK"]})
    for quality in (0.5, 0.4, 0.6):
        published(tmp_path, told, quality)
        assert decide(tmp_path, told).warnings == []
    gate.rollback(told.publish, told.promote, root=tmp_path)
    assert [body["decision"] for _, _, body in Hook.got] == ["promoted", "refused", "promoted", "rollback"]
    _, kind, body = Hook.got[1]
    assert kind == "application/json"
    assert body["model"] == NAME
    assert body["comparison"]["rougeL"]["candidate"] == pytest.approx(0.400, abs=0.001)
    assert body == {"model": NAME} | records(tmp_path)[1]


def test_a_webhook_that_fails_is_a_warning_that_keeps_its_secret(tmp_path: Path, params: Params, hook: str) -> None:
    names = ["BROKEN_HOOK", "MOVED_HOOK", "DEAD_HOOK", "FILE_HOOK", "UNSET_HOOK", "TEAM_HOOK"]
    told = with_(params, promote={"webhooks": names})
    version = published(tmp_path, told, 0.5)
    decision = decide(tmp_path, told)
    assert (decision.decision, serving(tmp_path, told)) == ("promoted", version)
    said = "\n".join(decision.warnings)
    for what in (
        "BROKEN_HOOK was not told of the decision: it answered with status 500",
        "MOVED_HOOK was not told of the decision: it answered with status 302",
        "DEAD_HOOK was not told of the decision: it cannot be reached",
        "FILE_HOOK was not told of the decision: it holds no http",
        "UNSET_HOOK was not told of the decision: the variable is not set",
    ):
        assert what in said
    assert "TEAM_HOOK" not in said
    assert "secret-token" not in said + json.dumps(records(tmp_path))
    assert [path for path, _, _ in Hook.got] == [f"/secret-token/{status}" for status in (500, 302, 200)]


def test_promoters_racing_for_one_model_agree_on_every_champion(tmp_path: Path, params: Params) -> None:
    """Threads with clients of their own; `make test-faults` races processes."""
    draw = random.Random(1)
    versions = [published(tmp_path, params, 0.2 + 0.05 * i) for i in range(6)]
    draw.shuffle(versions)
    errors: list[BaseException] = []

    def run(version: str) -> None:
        try:
            decide(tmp_path, params, version)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    log = read_log(open_store(params.publish), NAME)
    assert {record.version for record in log} == set(versions)
    for before, record in zip([None, *log], log, strict=False):
        assert record.previous == (before.champion if before else None)
    gate.history(params.publish, tmp_path)
    best = read_manifest(open_store(params.publish), str(serving(tmp_path, params)))
    assert best is not None
    assert best["metrics"]["merged"]["num_samples"] == ITEMS
    assert best["metrics"]["merged"]["rougeL"]["score"] == pytest.approx(0.450, abs=0.001)
