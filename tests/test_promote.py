"""Decisions: by the gate and by people, with their reasons, aliases and webhooks."""

import json
import os
import pty
import shutil
import tempfile
from pathlib import Path
from typing import Any

import preloaded
import pytest
from conftest import environment, once, with_, write_params
from local_servers import posted_to
from test_signature import make_key
from versions import ITEMS, parameters, promote_version, published, records, registry_lost

from pipeline import promote
from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.registry.artifact_store import FileStore, StoreError
from pipeline.registry.decisions import DecisionError, champion, read_log
from pipeline.registry.gate import CompareError
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.retention import delete
from pipeline.registry.signature import SignatureError
from pipeline.registry.stores import open_store

NAME = "retune-sample"
BASE_ITEMS = "evaluation/items.base.parquet"


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return parameters(tmp_path)


@pytest.fixture
def manual(params: Params) -> Params:
    return with_(params, promote={"approval": "manual"})


def serving(root: Path, params: Params) -> str | None:
    """The champion by the log, after checking that MLflow's alias says the same."""
    log = read_log(open_store(params.publish), NAME)
    client = ModelRegistry(params.publish.tracking_uri, NAME).client
    aliases = client.get_registered_model(NAME).aliases
    alias = client.get_model_version(NAME, aliases["champion"]).tags["version_id"] if "champion" in aliases else None
    assert alias == champion(log)
    return champion(log)


@pytest.fixture
def first(tmp_path: Path, params: Params) -> str:
    """The champion, v1; made once and copied."""

    def make(folder: Path) -> None:
        (folder / "version").write_text(published(folder, parameters(folder), 0.5))
        assert promote_version(folder, parameters(folder)).decision == "promoted"

    shutil.copytree(once("champion", make), tmp_path, dirs_exist_ok=True)
    return (tmp_path / "version").read_text()


def test_a_worse_version_is_refused_with_its_numbers_and_force_records_what_it_overrules(
    tmp_path: Path, params: Params, first: str
) -> None:
    worse = published(tmp_path, params, 0.4)
    refused = promote_version(tmp_path, params)
    assert (refused.decision, refused.word, refused.number, refused.champion) == ("refused", "refused", "2", first)
    assert f"0.100 worse than that of champion v1 ({first[:6]}…) (0.400 against 0.500 on 100" in refused.reason
    assert f"v1 ({first[:6]}…) stays champion" in refused.title
    assert "retune promote v2 --force" in refused.next
    assert (promote_version(tmp_path, params).decision, serving(tmp_path, params)) == ("unchanged", first)
    forced = promote_version(tmp_path, params, force="legal asked for it")
    assert (forced.decision, forced.reason, serving(tmp_path, params)) == ("promoted", "legal asked for it", worse)
    assert (forced.word, forced.title[:10]) == ("forced", "Forced: v2")
    record = records(tmp_path)[-1]
    assert record["overruled"][:3] == ["rougeL", "accuracy", "bleu"]
    assert record["overruled"][3].startswith("refused before")
    assert record["comparison"]["rougeL"]["passed"] is False


def test_a_champion_trained_on_rows_of_a_larger_test_split_is_not_compared(
    tmp_path: Path, params: Params, first: str
) -> None:
    published(tmp_path, params, 0.6, test_fraction=0.2, test_split="b")  # 0.1 for the champion
    refused = promote_version(tmp_path, params)
    assert (refused.decision, refused.comparison) == ("refused", {})
    assert f"test_fraction is 0.2, and was 0.1 for the champion {first}: it was trained on rows" in refused.reason
    assert (serving(tmp_path, params), promote_version(tmp_path, params).decision) == (first, "unchanged")
    forced = promote_version(tmp_path, params, force="the new split is what counts")
    assert (forced.decision, forced.comparison) == ("promoted", {})
    assert records(tmp_path)[-1]["overruled"][0].startswith("prepare.test_fraction is 0.2")


def replace_scoring(patch: pytest.MonkeyPatch, artifacts: Path, items: dict[str, str], **changes: Any) -> None:
    """When promotion scores a version again, let it get the version's `items`, with `changes` to the signatures."""

    def score(model: Any, manifest: Any, settings: dict[str, Any], output: Path) -> None:
        signatures = settings["signatures"] | changes
        write_json(output / "evaluation.json", settings | {"signatures": signatures})
        shutil.copy(artifacts / items.get(manifest["version"], BASE_ITEMS), output / "items.parquet")

    patch.setattr("pipeline.registry.compare._score", score)


def test_on_a_smaller_test_split_the_champion_is_scored_again_and_compared_if_metrics_are_computed_alike(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = published(tmp_path, params, 0.5, test_fraction=0.2)
    promote_version(tmp_path, params)
    candidate = published(tmp_path, params, 0.35, test_fraction=0.1, test_split="b")
    replace_scoring(monkeypatch, tmp_path / "artifacts", {}, bleu="tok:zh|version:3.0.0")
    with pytest.raises(CompareError, match=f"bleu of version {first} .*tok:zh"):
        promote_version(tmp_path, params)
    replace_scoring(monkeypatch, tmp_path / "artifacts", {})
    decision = promote_version(tmp_path, params)
    assert (decision.decision, decision.champion) == ("promoted", candidate)
    smaller = "the test split is a part of the champion's: prepare.test_fraction 0.1 instead of 0.2"
    uninformative = f"accuracy guards nothing here: both score 0 on all {ITEMS} test items that count for it"
    assert decision.notes == records(tmp_path)[-1]["notes"] == [smaller, uninformative]


def test_an_undecided_version_is_compared_again_only_on_other_test_items(
    tmp_path: Path, params: Params, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = published(tmp_path, params, 0.6)
    monkeypatch.setattr("pipeline.registry.gate.MIN_GROUPS", ITEMS + 1)
    decision = promote_version(tmp_path, params)
    assert (decision.decision, serving(tmp_path, params)) == ("undecided", first)
    assert f"needed: at least {ITEMS + 1} independent test items, there are {ITEMS}" in decision.reason
    again = promote_version(tmp_path, params)
    assert (again.decision, again.next) == ("unchanged", decision.next)
    assert again.reason.startswith("not decided before") and decision.reason in again.reason
    assert promote.settled(params, second, tmp_path) == again.reason
    monkeypatch.setattr("pipeline.registry.gate.MIN_GROUPS", ITEMS)
    replace_scoring(monkeypatch, tmp_path / "artifacts", {second: "parity/items.merged.parquet"})
    report, parity = (tmp_path / "artifacts" / name for name in ("dataset/report.json", "parity/parity.json"))
    content = read_json(parity)
    write_json(report, read_json(report) | {"test_sha256": "e" * 64})
    write_json(parity, content | {"evaluation": content["evaluation"] | {"test_sha256": "e" * 64}})
    assert promote.settled(params, second, tmp_path) is None
    assert promote_version(tmp_path, params, second).decision == "promoted"
    assert records(tmp_path)[2]["test_sha256"] == "e" * 64


def test_a_version_that_forgot_too_much_is_refused(tmp_path: Path, params: Params) -> None:
    published(tmp_path, params, 0.5, forgets=0.3)
    refused = promote_version(tmp_path, params)
    assert (refused.decision, refused.champion) == ("refused", None)
    rows = {metric: row["verdict"] for metric, row in refused.comparison.items()}
    assert (rows["rougeL"], rows["general_accuracy"], rows["general_perplexity"]) == ("passed", "passed", "failed")
    published(tmp_path, params, 0.5, forgets=0.01)
    assert promote_version(tmp_path, params).decision == "promoted"


def test_a_decision_says_how_many_answers_were_cut_off_if_these_are_many(tmp_path: Path, params: Params) -> None:
    shown = {}
    for cut_off in (5, 6):
        published(tmp_path, params, 0.5 + cut_off / 10, cut_off=cut_off)
        shown[cut_off] = [note for note in promote_version(tmp_path, params).notes if "cut off" in note]
    assert (shown[5], [note.split()[0] for note in shown[6]]) == ([], ["6"])


def test_a_fresh_clone_promotes_by_published_scores(tmp_path: Path, params: Params, first: str) -> None:
    second, third = published(tmp_path, params, 0.6), published(tmp_path, params, 0.7, test_split="b")
    for folder in ("artifacts", ".retune"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    decision = promote_version(tmp_path, params, second)
    assert (decision.decision, decision.champion) == ("promoted", second)
    assert decision.comparison["rougeL"]["candidate"] == pytest.approx(0.6, abs=0.01)
    with pytest.raises(CompareError, match=f"{second}.*dvc repro prepare"):  # the test items are not here
        promote_version(tmp_path, params, third)


def test_a_model_for_another_task_than_the_champions_is_refused_before_training(
    tmp_path: Path, params: Params, first: str
) -> None:
    promote.require_ready(params, tmp_path)
    train = {"task": "sequence-classification", "packing": False}
    other = with_(params, train=train, promote={"primary_metric": "accuracy"})
    with pytest.raises(CompareError, match=f"{first[:6]}.*causal-lm.*publish.registered_model_name"):
        promote.require_ready(other, tmp_path)
    promote.require_ready(with_(other, publish={"registered_model_name": "classes"}), tmp_path)


def test_an_unpublished_or_deleted_version_cannot_be_promoted_even_by_force(
    tmp_path: Path, params: Params, first: str
) -> None:
    promote_version(tmp_path, params, published(tmp_path, params, 0.6))
    delete(params.publish, first, "not needed", tmp_path)
    for use, error in (
        (lambda: promote_version(tmp_path, params, "0" * 16, force="x"), StoreError),
        (lambda: promote_version(tmp_path, params, first, force="x"), DecisionError),
        (lambda: promote.rollback(params, first, root=tmp_path), DecisionError),
    ):
        with pytest.raises(error, match=r"is not published|was deleted by .* \(not needed\)"):
            use()


def test_decisions_work_without_the_registry_and_it_is_repaired_afterwards(
    tmp_path: Path, params: Params, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lost = registry_lost(tmp_path, params)
    second = published(tmp_path, lost, 0.6, registered=False)
    decision = promote_version(tmp_path, lost, second)
    assert (decision.decision, decision.warnings, decision.number) == ("promoted", [], "2")
    assert f"that of champion {first}" in decision.reason  # without a number
    assert serving(tmp_path, lost) == second
    down = with_(params, publish={"tracking_uri": "http://127.0.0.1:9"})
    record, [warning] = promote.rollback(down, root=tmp_path)
    assert record.champion == first
    assert warning.startswith("the registry http://127.0.0.1") and "The decision stands" in warning
    assert promote.settled(lost, first, tmp_path) == "it is the champion"  # repairs the alias
    assert serving(tmp_path, lost) == first
    again = promote_version(tmp_path, lost, second)  # after a rollback there is no next step
    assert (again.decision, again.champion, again.next) == ("unchanged", first, "")


@pytest.mark.parametrize("agreed", [True, False])
def test_with_manual_approval_a_version_waits_for_a_persons_answer(
    tmp_path: Path, manual: Params, agreed: bool
) -> None:
    version = published(tmp_path, manual, 0.5)
    proposal = promote_version(tmp_path, manual)
    assert (proposal.decision, proposal.champion, serving(tmp_path, manual)) == ("proposed", None, None)
    again = promote_version(tmp_path, manual)
    assert again.decision == "unchanged" and "waits for approval" in again.reason
    answering = manual
    if not agreed:  # a version that may no longer be used can still be refused
        make_key(tmp_path / "key.pem")
        answering = with_(manual, publish={"require_signature": True, "verify_key": str(tmp_path / "key.pub")})
        with pytest.raises(SignatureError):
            promote.approve(answering, root=tmp_path)
    answer = promote.approve(answering, None, agreed, "I read them", "Ada", tmp_path)
    assert (answer.decision, answer.comparison) == ("promoted" if agreed else "refused", proposal.comparison)
    assert serving(tmp_path, manual) == (version if agreed else None)
    log = [(r["decision"], r["proposal"], r["actor"] == "Ada") for r in records(tmp_path)]
    assert log == [("proposed", None, False), (answer.decision, 1, True)]
    again = promote_version(tmp_path, manual)
    assert again.decision == "unchanged"  # a refused version is not proposed again
    if not agreed:
        assert answer.next == again.next and "--force" in again.next and "gate" not in again.next
        forced = promote_version(tmp_path, manual, force="Ada was wrong")
        assert forced.word == "forced" and "gate" not in forced.title  # the gate had passed
    with pytest.raises(DecisionError, match="no version"):
        promote.approve(manual, root=tmp_path)


def test_promote_on_a_terminal_shows_the_numbers_and_asks(tmp_path: Path, manual: Params) -> None:
    version = published(tmp_path, manual, 0.5)
    write_params(tmp_path, manual)
    master, slave = pty.openpty()
    try:
        with tempfile.TemporaryFile("w+") as output:
            command = {"program": "retune", "arguments": ["promote", version], "folder": str(tmp_path)}
            child = preloaded.Child(command | {"environment": environment()}, [slave, output.fileno(), output.fileno()])
            os.write(master, b"n\nnot yet\n")
            status = child.wait()
            output.seek(0)
            text = output.read()
    finally:
        os.close(master)
        os.close(slave)
    assert status == 3
    assert text.index("│ rougeL") < text.index("Make it the champion?")
    assert [(r["decision"], r["reason"]) for r in records(tmp_path)][1:] == [("refused", "not yet")]


def test_a_proposal_expires_when_the_champion_changes(tmp_path: Path, manual: Params) -> None:
    first, second = published(tmp_path, manual, 0.5), published(tmp_path, manual, 0.6)
    promote_version(tmp_path, manual, first)
    promote_version(tmp_path, manual, second, force="at once")
    with pytest.raises(DecisionError, match="no version waits for approval"):
        promote.approve(manual, first, root=tmp_path)
    promote_version(tmp_path, manual, published(tmp_path, manual, 0.7))
    with pytest.raises(DecisionError, match=rf"v3 \(.*\) waits for approval, not v1 \({first[:6]}"):
        promote.approve(manual, first, root=tmp_path)
    assert serving(tmp_path, manual) == second


def test_decisions_are_sent_to_webhooks_and_a_failure_is_a_warning_without_the_secret_url(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"BROKEN": "status 500", "MOVED": "status 302", "DEAD": "cannot be reached", "FILE": "not an http"}
    reasons |= {"UNSET": "not set"}
    with posted_to(lambda request: int(request.path.rsplit("/", 1)[1])) as (address, posts):
        urls = {
            name: f"{address}/secret-token/{code}" for name, code in (("TEAM", 200), ("BROKEN", 500), ("MOVED", 302))
        }
        for name, url in (urls | {"FILE": "file:///etc/passwd", "DEAD": "http://127.0.0.1:9/secret-token"}).items():
            monkeypatch.setenv(f"{name}_HOOK", url)
        hooked = with_(params, promote={"webhooks": [f"{name}_HOOK" for name in (*reasons, "TEAM")]})
        version = published(tmp_path, hooked, 0.5)
        decision = promote_version(tmp_path, hooked)
        assert (decision.decision, serving(tmp_path, hooked)) == ("promoted", version)
        for (name, reason), warning in zip(reasons.items(), decision.warnings, strict=True):
            assert name in warning and reason in warning
        assert "secret-token" not in json.dumps([decision.warnings, records(tmp_path)])
        assert [status for status, _ in posts] == [500, 302, 200]
        team = with_(params, promote={"webhooks": ["TEAM_HOOK"]})
        for quality in (0.4, 0.6):
            published(tmp_path, team, quality)
            assert promote_version(tmp_path, team).warnings == []
        promote.rollback(team, root=tmp_path)
    assert [body["decision"] for _, body in posts[2:]] == ["promoted", "refused", "promoted", "rollback"]
    assert [body for _, body in posts[2:]] == [{"model": NAME} | record for record in records(tmp_path)]


def test_the_slower_of_two_promotions_decides_again_against_the_new_champion(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_kills.py` races processes for the log."""
    slow, quick = (published(tmp_path, params, quality) for quality in (0.4, 0.6))
    create, raced = FileStore.create, []

    def create_late(store: FileStore, key: str, data: bytes) -> bool:
        if key.startswith("promotions/") and not raced:
            raced.append(key)
            assert promote_version(tmp_path / "other", params, quick).decision == "promoted"
        return create(store, key, data)

    monkeypatch.setattr(FileStore, "create", create_late)
    assert promote_version(tmp_path, params, slow).decision == "refused"
    log = [(record["decision"], record["version"], record["previous"]) for record in records(tmp_path)]
    assert log == [("promoted", quick, None), ("refused", slow, quick)]
    assert serving(tmp_path, params) == quick
