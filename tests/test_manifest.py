"""The manifest: its content and schema; the state of the code in it, and the commit that a promoted run becomes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, git
from huggingface_hub import ModelCard
from versions import parameters, published

from pipeline import publish
from pipeline.core import graph, timings
from pipeline.core.files import sha256_file, write_json
from pipeline.core.git import GitError, changes, record_version, state
from pipeline.params import Params
from pipeline.registry import manifest as manifests
from pipeline.registry.artifact_store import FileStore, StoreError
from pipeline.registry.card import model_card
from pipeline.registry.manifest import Manifest, read_manifest, require_manifest
from pipeline.registry.stores import open_store

SCHEMA = json.loads((ROOT / "pipeline" / "registry" / "manifest.schema.json").read_text())
DIGEST = {"sha256": "0" * 64, "size": 1}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params, str]:
    root = tmp_path_factory.mktemp("manifest")
    params = parameters(root, price_per_hour=3.6)
    return root, params, published(root, params, registered=False, commit=True)


@pytest.fixture
def manifest(shipped: tuple[Path, Params, str]) -> Manifest:
    return require_manifest(open_store(shipped[1].publish), shipped[2])


def test_a_manifest_has_the_versions_files_and_lineage(manifest: Manifest, shipped: tuple[Path, Params, str]) -> None:
    root, params, version = shipped
    assert graph.version_id(stages=manifest["dvc_lock"]) == version
    assert len(manifest["git"]["commit"]) == 40
    assert not manifest["git"]["dirty"]  # uncommitted artifacts are not code
    assert manifest["data"]["dvc_md5"] == {"data/instructions": "0" * 32 + ".dir"}
    assert manifest["params"]["prepare"] == params.prepare.model_dump()
    assert set(manifest["params"]) == {"prepare", "train", "evaluate", "merge", "publish"}
    assert manifest["evaluation"]["signatures"]
    assert set(manifest["metrics"]) == {"base", "adapter", "merged"}
    for name, entry in manifest["files"].items():
        stored = root / "store" / "objects" / entry["sha256"]
        assert stored.stat().st_size == entry["size"]
        if name.partition("/")[0] in ("adapter", "merged", "parity", "evaluation"):
            assert stored.read_bytes() == (root / "artifacts" / name).read_bytes()
    assert {"README.md", "MLmodel", "components/tokenizer/tokenizer.json"} <= set(manifest["files"])


def test_files_that_a_run_writes_do_not_make_the_code_dirty(clone: Path) -> None:
    (clone / ".dvc").mkdir()
    (clone / ".dvc" / "init_adapter.json").write_text("before")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "more")
    for name, text, changed in (
        ("dvc.lock", "written by a run", []),
        (".dvc/init_adapter.json", "written by a run", []),
        ("rows.csv", "nothing reads it", []),
        ("pipeline/new.py", "", ["pipeline/new.py"]),
        ("params.yaml", "evaluate: {general: {path: ./rows.csv}}", ["params.yaml", "pipeline/new.py", "rows.csv"]),
    ):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(text)
        assert sorted(changes(clone, manifests.WRITTEN_BY_RUNS)) == changed
        assert state(clone, manifests.WRITTEN_BY_RUNS)["dirty"] == bool(changed)


def test_publishing_again_restores_an_object_that_the_store_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gc` can delete an object that an upload found in the store, just before the manifest is written."""
    params = parameters(tmp_path)
    published(tmp_path, params)
    monkeypatch.setattr(graph, "stale", lambda root: {})
    assert publish.publish(params.publish, tmp_path).uploaded_bytes == 0
    path = tmp_path / "artifacts/merged/config.json"
    lost = tmp_path / "store/objects" / sha256_file(path)
    lost.unlink()
    again = publish.publish(params.publish, tmp_path)
    assert (again.created, again.uploaded_bytes) == (False, path.stat().st_size)
    assert lost.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("schema_version", 1),
        ("version", "../../x"),
        ("git.commit", "main"),
        ("metrics.merged.rougeL.score", "high"),
        ("parity.token_agreement", 1.5),
        ("data.rows.train", -1),
        ("contract.sha256", "z" * 64),
        ("files", {"../evil.json": DIGEST}),
        ("files", {"a/./b": DIGEST}),
        ("files", {"a.json": DIGEST | {"sha256": "0" * 63}}),
        ("files", {"a.json": DIGEST | {"size": -1}}),
        ("surprise", True),
        *((required, None) for required in SCHEMA["required"]),  # missing
    ],
)
def test_what_the_schema_does_not_allow_is_neither_written_nor_read(
    manifest: Manifest, tmp_path: Path, where: str, value: Any
) -> None:
    changed: Any = copy.deepcopy(manifest)
    *path, last = where.split(".")
    node = changed
    for key in path:
        node = node[key]
    node[last] = value
    if value is None:
        del node[last]
    with pytest.raises(StoreError, match=r"manifest\.schema\.json"):
        manifests.encode(changed)
    store = FileStore(tmp_path)
    store.create(manifests.manifest_key(manifest["version"]), json.dumps(changed).encode())
    with pytest.raises(StoreError, match="is damaged"):
        read_manifest(store, manifest["version"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps, "its bytes are not"),  # the same content, formatted differently
        (lambda manifest: '{"schema": 1}', "its schema is 1, this Retune reads 2"),
        (lambda manifest: '{"version": "v", "files": {"a": {}, "a": {"sha256": "0"}}}', "the key 'a' comes twice"),
    ],
)
def test_other_bytes_than_retune_writes_are_refused(
    manifest: Manifest, tmp_path: Path, text: Callable[[Manifest], str], why: str
) -> None:
    store = FileStore(tmp_path)
    store.create(manifests.manifest_key(manifest["version"]), text(manifest).encode())
    with pytest.raises(StoreError, match=why):
        read_manifest(store, manifest["version"])


def test_time_and_cost_are_recorded_only_for_the_output_that_was_timed(tmp_path: Path) -> None:
    params = parameters(tmp_path, price_per_hour=3.6)
    published(tmp_path, params, registered=False)
    write_json(tmp_path / "artifacts" / "training" / "run.json", {"earlier_seconds": 480.0})  # before a checkpoint
    seconds = {"prepare": 10.0, "train": 500.0, "evaluate": 5.0, "merge": 5.0}
    for stage, time in seconds.items():
        timings.record(stage, time, 0, tmp_path)
    built = manifests.build(params.publish, "a" * 16, {}, tmp_path)
    assert built["time"] == seconds | {"train": 980.0}
    assert built["cost"] == {"price_per_hour": 3.6, "total": 1.0}
    marker = tmp_path / "artifacts" / timings.MARKERS["train"]
    marker.write_text(marker.read_text() + " ")  # another adapter, restored from DVC's cache
    built = manifests.build(params.publish, "a" * 16, {}, tmp_path)
    assert (built["time"]["train"], built["cost"]["total"]) == (None, None)


def test_the_hub_can_read_the_model_card(manifest: Manifest, shipped: tuple[Path, Params, str]) -> None:
    root, _, _ = shipped
    card = ModelCard((root / "store" / "objects" / manifest["files"]["README.md"]["sha256"]).read_text())
    assert card.data.library_name == "transformers" and card.data.base_model is None  # a folder
    score = manifest["metrics"]["merged"]["rougeL"]["score"]
    assert "on 90 rows" in card.text and f"{score:.3g} (" in card.text
    assert "accuracy" in card.text and "macro_f1" not in card.text  # no item of the workspace is a classification
    base = {"name_or_path": "Qwen/Qwen2.5-0.5B", "revision": "a" * 40, "digest": "a" * 40}
    assert ModelCard(model_card(manifest | {"base_model": base})).data.base_model == "Qwen/Qwen2.5-0.5B"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    for name in ("data.dvc", "dvc.lock", "params.yaml"):
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "start")
    return tmp_path


def test_each_champion_is_a_commit_of_its_run_and_a_tag_and_the_checkout_stays(clone: Path) -> None:
    head = git(clone, "rev-parse", "HEAD")
    (clone / "dvc.lock").write_text("second\n")
    (clone / "params.yaml").write_text("changed\n")
    first = record_version("retune/champions", "model", "abc", "1", clone)
    assert [git(clone, "show", f"model/v1:{name}") for name in ("dvc.lock", "params.yaml")] == ["second", "changed"]
    assert (git(clone, "rev-parse", "HEAD"), git(clone, "branch", "--show-current")) == (head, "main")
    assert git(clone, "status", "--porcelain").split() == ["M", "dvc.lock", "M", "params.yaml"]
    assert record_version("retune/champions", "model", "abc", "1", clone) == first
    git(clone, "commit", "-qam", "by hand")
    (clone / "dvc.lock").write_text("third\n")
    second = record_version("retune/champions", "model", "def", "2", clone)
    assert git(clone, "rev-parse", "retune/champions") == second
    assert {first, git(clone, "rev-parse", "HEAD")} < set(git(clone, "rev-list", second).split())


def test_a_dirty_tree_or_the_checked_out_branch_is_refused(clone: Path) -> None:
    with pytest.raises(GitError, match="which is checked out"):
        record_version("main", "model", "abc", "1", clone)
    (clone / "dvc.yaml").write_text("changed\n")
    with pytest.raises(GitError, match=r"dvc\.yaml differ from HEAD"):
        record_version("retune/champions", "model", "abc", "1", clone)
    assert (git(clone, "tag"), git(clone, "branch", "--format=%(refname:short)")) == ("", "main")
