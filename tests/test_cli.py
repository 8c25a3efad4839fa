"""What a person meets on the command line: help, one sentence for each mistake, statuses that scripts can rely on."""

import fcntl
import json
from pathlib import Path

import pytest
from conftest import ROOT, change_params, make_project, retune

from pipeline.params import Params

COMMANDS = [
    "run",
    "ingest",
    "inspect",
    "stage",
    "publish",
    "sign",
    "verify",
    "promote",
    "rollback",
    "canary",
    "history",
]
COMMANDS += [
    "report",
    "chat",
    "predict",
    "download",
    "delete",
    "prune",
    "gc",
    "diff-data",
    "plan",
    "up",
    "down",
    "status",
    "doctor",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Path:
    return make_project(tmp_path_factory.mktemp("cli") / "project", base, params)


def sentence(root: Path, *arguments: str) -> str:
    done = retune(root, *arguments)
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_every_command_explains_itself(tmp_path: Path) -> None:
    overview = retune(tmp_path, "--help").stdout
    for command in COMMANDS:
        assert f" {command} " in overview
        assert "--help" in retune(tmp_path, command, "--help").stdout
    assert not list(tmp_path.iterdir())


def test_every_command_of_the_readme_exists() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    named = {line.split()[1] for line in lines if line.startswith("retune ") and not line.startswith("retune --")}
    assert named
    assert named <= set(COMMANDS)


def test_outside_a_project_the_way_in_is_named(tmp_path: Path) -> None:
    assert "run this command in the project's top folder" in sentence(tmp_path, "run")
    assert not (tmp_path / ".retune").exists()


def test_a_wrong_parameter_is_one_sentence_with_its_line(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("lora_r: 8", "lora_r: 0"))
    line = text.splitlines().index("  lora_r: 8") + 1
    assert f"train.lora_r is 0; input should be greater than or equal to 1 (params.yaml, line {line})" in sentence(
        root, "run"
    )
    (root / "params.yaml").write_text(text)


def test_bad_data_leaves_the_snapshot_as_it_was(root: Path, tmp_path: Path) -> None:
    before = (root / "data.dvc").read_text()
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "a", ')
    assert "bad.json, line 1" in sentence(root, "ingest", str(bad))
    assert "does not exist" in sentence(root, "ingest", str(tmp_path / "nowhere.json"))
    assert (root / "data.dvc").read_text() == before
    assert [path.name for path in (root / "data" / "instructions").iterdir()] == ["rows.json"]


def test_data_changed_by_hand_is_not_run_on(root: Path) -> None:
    file = root / "data" / "instructions" / "rows.json"
    text = file.read_text()
    file.unlink()
    file.write_text(json.dumps(json.loads(text)[:50]))
    assert "data/ was changed by hand" in sentence(root, "run")
    file.write_text(text)


def test_one_run_at_a_time(root: Path) -> None:
    (root / ".retune").mkdir(exist_ok=True)
    with (root / ".retune" / "run.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4321")
        lock.flush()
        assert "a run is under way here (process 4321)" in sentence(root, "run")


def test_before_the_first_run_nothing_is_there_to_promote(root: Path) -> None:
    assert "dvc.lock is missing" in sentence(root, "promote")
    assert "no champion before the present one" in sentence(root, "rollback")
    assert json.loads(retune(root, "history", "--json").stdout) == []
    assert "has no champion yet" in sentence(root, "download", "champion", "here")
    assert "is not published" in sentence(root, "verify", "0123456789abcdef")
    assert "nothing to delete; publish.keep_versions is null" in retune(root, "prune").stdout
    status = json.loads(retune(root, "status", "--json").stdout)
    assert status["champion"] is None
    assert "train" in status["stale"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "v1", "--force"], "--force needs --reason"),
        (["promote", "v1", "--force", "--reason", " "], "--force needs --reason"),
        (["promote", "--approve", "--reject"], "exclude each other"),
        (["promote", "--approve"], "no version waits for approval"),
        (["canary"], "name the version, or --end"),
        (["canary", "--end"], "has no canary"),
        (["history", "7"], "there are 0 decisions, no number 7"),
        (["delete", "v1", "--reason", "room"], "has no version v1; it has none"),
    ],
)
def test_a_command_about_versions_says_what_it_lacks(root: Path, arguments: list[str], words: str) -> None:
    assert words in sentence(root, *arguments)


def test_a_version_without_a_reason_is_not_deleted(root: Path) -> None:
    assert retune(root, "delete", "v1").returncode == 2


def test_a_signature_that_is_required_needs_a_key_to_check_it_with(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("require_signature: false", "require_signature: true"))
    assert "publish.verify_key names no key to check with" in sentence(root, "history")
    (root / "params.yaml").write_text(text)


def test_a_registry_address_with_a_password_in_it_is_refused(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    changed = text.replace("tracking_uri: sqlite:///mlflow.db", "tracking_uri: https://me:secret@mlflow.example.org")
    (root / "params.yaml").write_text(changed)
    assert "publish.tracking_uri holds a password" in sentence(root, "history")
    (root / "params.yaml").write_text(text)


def test_a_store_that_cannot_be_written_is_named(root: Path) -> None:
    change_params(root, publish={"artifact_store": "file://params.yaml/store"})
    assert "the artifact store params.yaml/store cannot be made" in sentence(root, "history")
    change_params(root, publish={"artifact_store": "file://store"})


def test_a_stage_that_is_none_is_a_usage_error(root: Path) -> None:
    done = retune(root, "stage", "deploy")
    assert done.returncode == 2
    assert "expected prepare, train, evaluate or merge" in done.stderr
