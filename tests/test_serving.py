"""Talking to versions: the answers are those that were scored, adapters change places, and contracts are kept."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pyarrow.parquet as pq
import pytest
import versions
from conftest import environment, retune, with_, write_params
from safetensors.torch import load_file, save_file

from pipeline import promote as gate
from pipeline.chat.template import TemplateError
from pipeline.cli.serving import ServingError, Talk, printable, read_prompts
from pipeline.cli.talk import _limit, chat, predict, report
from pipeline.core import graph
from pipeline.core.files import read_json, write_json
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.publish import ship_version
from pipeline.registry.compare import score_on_current_split
from pipeline.registry.model import RegisteredModel


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Params:
    root = tmp_path_factory.mktemp("serving")
    shutil.copytree(base, root / "data" / "base")
    places = versions.parameters(root).publish.model_dump()
    return with_(params, prepare={"model_name_or_path": "data/base"}, publish=places)


@pytest.fixture(scope="module")
def root(own: Params, params: Params, dataset: Path, adapter: Path, evaluation: Path) -> Path:
    """A project with v1, the champion, and v2, whose adapter changes nothing; both published and decided on."""
    root = Path(own.publish.artifact_store.removeprefix("file://")).parent
    artifacts = root / "artifacts"
    for folder in (dataset, adapter, evaluation):
        shutil.copytree(folder, artifacts / folder.name)
    exact = with_(params, merge={"dtype": "float32"}).merge
    merge(exact, dataset, adapter, evaluation, *(artifacts / name for name in ("merged", "parity")))
    for version in (1, 2):
        if version == 2:
            weights = load_file(artifacts / "adapter" / "adapter_model.safetensors")
            still = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in weights.items()}
            save_file(still, artifacts / "adapter" / "adapter_model.safetensors")
        versions.write_lock(root, own.model_dump())
        model = RegisteredModel(own.publish, root)
        model.register(ship_version(model, graph.version_id(root))[0])
        gate.promote(own, root=root)
    write_params(root, own)
    return root


@pytest.fixture
def there(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)  # the base is named by a folder of the project
    return root


def scored(evaluation: Path, system: str) -> dict[str, str]:
    """Question → the answer that was scored."""
    items = pq.read_table(evaluation / f"items.{system}.parquet").to_pylist()
    return {item["prompt"].split("user\n")[1].split("<|im_end|>")[0]: item["answer"] for item in items}


def ask(talk: Talk, question: str) -> str:
    pieces: list[str] = []
    answer = talk.answer([{"role": "user", "content": question}], 8, pieces.append)
    assert "".join(pieces).strip() == answer.text
    return answer.text


def test_adapters_change_places_and_each_answers_as_it_was_scored(there: Path, own: Params, evaluation: Path) -> None:
    tuned, base = scored(evaluation, "adapter"), scored(evaluation, "base")
    questions = [question for question in tuned if tuned[question] != base[question]][:4]
    assert questions
    talk = Talk(own, ["champion"])
    for question in questions:
        for name, expected in (("champion", tuned), ("v2", base), ("base", base), ("champion", tuned)):
            talk.use(name)
            assert ask(talk, question) == expected[question], name
    assert talk.names == ["champion", "v2", "base"]
    from_base = Talk(own, ["base", "v1"])
    assert ask(from_base, questions[0]) == base[questions[0]]
    from_base.use("v1")
    assert ask(from_base, questions[0]) == tuned[questions[0]]


def test_a_model_trained_whole_answers_alone(
    own: Params, base: Path, adapter: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "data" / "base")
    shutil.copytree(base, tmp_path / "artifacts" / "adapter")  # as `train.method: full` leaves it, here with no change
    for name in ("contract.json", "training.json"):
        shutil.copy(adapter / name, tmp_path / "artifacts" / "adapter")
    monkeypatch.chdir(tmp_path)
    talk, expected = Talk(own, ["workspace"], tmp_path), scored(evaluation, "base")
    question = next(iter(expected))
    assert ask(talk, question) == expected[question]
    with pytest.raises(ServingError, match="workspace is a whole model"):
        talk.use("base")
    assert talk.names == ["workspace"]


def test_a_conversation_on_the_command_line(there: Path, evaluation: Path) -> None:
    tuned, base = scored(evaluation, "adapter"), scored(evaluation, "base")
    question = next(question for question in tuned if tuned[question] != base[question])
    typed = [question, "/adapter v2", "/reset", question, "/adapters", "/adapter nowhere", "/help", "/quit", "never"]
    ran = preloaded.run("retune", ["chat", "champion"], there, environment(), "\n".join(typed))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [tuned[question], base[question]]
    for said in ("chat: champion, v2 (answers)", "version nowhere is not published", "/adapter NAME"):
        assert said in ran.stderr
    asked = json.loads(retune(there, "chat", "--prompt", question, "--json").stdout)
    assert (asked["model"], asked["answer"], asked["cut_off"]) == ("champion", tuned[question], False)
    assert printable("a\x1b[2Jb\n\tc\r") == "a�[2Jb\n\tc�"  # what a model writes cannot move the cursor


def test_a_file_is_answered_line_by_line_and_a_line_without_an_answer_says_why(
    there: Path, tmp_path: Path, evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = scored(evaluation, "adapter")
    rows = [{"id": i, "prompt": question} for i, question in enumerate(tuned)]
    rows[3] = {"id": 3, "messages": [{"role": "user", "content": rows[3]["prompt"]}]}
    rows.insert(1, {"id": "long", "prompt": "and " * 2000})
    rows[0] |= {"error": "of an earlier run", "cut_off": "perhaps"}
    rows.append(
        {
            "id": "refused",
            "answer": "an earlier one",
            "messages": [{"role": "user", "content": "a"}] * 2,
            "tools": "[3]",
        }
    )
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    predict(file)
    answers = [json.loads(line) for line in (tmp_path / "questions.answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    faults = {answer["id"]: answer["error"] for answer in answers if "error" in answer}
    assert faults.keys() == {"long", "refused"} and "2 lines not answered" in capsys.readouterr().out
    assert [answer["answer"] for answer in answers if answer["id"] not in faults] == list(tuned.values())
    assert not any("answer" in answer for answer in answers if answer["id"] in faults)
    assert not list((there / ".retune" / "predictions").iterdir())


def test_an_answer_may_be_as_long_as_a_row_if_no_option_or_parameter_limits_it(own: Params) -> None:
    auto = with_(own, evaluate={"max_new_tokens": "auto"})
    assert (_limit(auto, None), _limit(auto, 3)) == (own.prepare.max_length, 3)
    assert _limit(own, None) == own.evaluate.max_new_tokens != own.prepare.max_length


@pytest.mark.parametrize(
    ("models", "file", "change", "error", "named"),
    [
        (["workspace"], "contract.json", {"chat_template": " "}, TemplateError, "chat_template"),
        (["champion", "workspace"], "contract.json", {"chat_template_sha256": "0"}, ServingError, "sha256"),
        (["base", "workspace"], "contract.json", {"model": {"digest": "0" * 64}}, TemplateError, "0" * 12),
        (["v1", "workspace"], "training.json", {"quantisation": {"load_in_4bit": False}}, ServingError, "quantisation"),
    ],
)
def test_adapters_that_do_not_share_base_and_template_are_refused(
    there: Path, own: Params, models: list[str], file: str, change: dict[str, Any], error: type[Exception], named: str
) -> None:
    path = there / "artifacts" / "adapter" / file
    before = path.read_bytes()
    values = read_json(path)
    write_json(path, values | {k: values[k] | v if isinstance(v, dict) else values[k] + v for k, v in change.items()})
    try:
        with pytest.raises(error, match=named):
            Talk(own, models)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "{}", '{"prompt": 5}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": 3}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": 5, "tool_calls": []}]}',
    ],
)  # fmt: skip
def test_a_line_that_asks_nothing_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    # A text may hold other line separators; Windows writes a byte order mark.
    file.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\n\n', encoding="utf-8")
    assert [row["prompt"] for row, _, _ in read_prompts(file)] == ["a\u2028b\x85c"]
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ServingError, match=r"rows\.jsonl, line 3"):
        read_prompts(file)
    file.write_bytes('{"prompt": "你好"}'.encode("gbk"))
    with pytest.raises(ServingError, match="byte 12"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda: chat(["v9"], prompt="a"), "has no version v9"),
        (lambda: chat(["0123456789abcdef"], prompt="a"), "version 0123456789abcdef is not published"),
        (lambda: chat(json_output=True), "--json needs --prompt"),
        (lambda: predict(Path("params.yaml")), "params.yaml, line 1: expected a JSON object"),
    ],
)
def test_a_mistake_is_one_sentence(there: Path, command: Callable[[], None], words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words) as error:
        command()
    assert type(error.value).__module__.startswith("pipeline.") and "\n" not in str(error.value)


def test_the_report_of_a_decision_is_written_beside_the_artifacts(there: Path, capsys: Any) -> None:
    report("v2", json_output=True)
    assert json.loads(capsys.readouterr().out)["decision"] == "refused"
    page = (there / "artifacts" / "report.html").read_text()
    for word in ("Refused", "champion", "candidate", "merged", "base"):
        assert word in page
    report("champion", json_output=True)
    assert json.loads(capsys.readouterr().out)["decision"] == "promoted"
    text = (there / "artifacts" / "report.md").read_text()
    assert text.splitlines()[2].startswith("**Promoted: v1 ")


def test_a_version_is_scored_again_on_another_test_split(
    there: Path, own: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    retune_of_tests = str(Path(sys.executable).with_name("retune"))  # the same command, in a fork
    monkeypatch.setattr(
        "pipeline.registry.compare.python_ending_with_parent", lambda _, *arguments: [retune_of_tests, *arguments]
    )
    model = RegisteredModel(own.publish, there)
    manifest = model.manifest(str(model.champion()))
    published, scored = manifest["metrics"]["merged"]["accuracy"]["score"], model.folder(manifest["version"]) / "scored"
    assert score_on_current_split(model, manifest, "accuracy") == published
    assert not scored.exists()  # the same split: nothing to compute
    report_file = there / "artifacts" / "dataset" / "report.json"
    before = report_file.read_bytes()
    try:
        write_json(report_file, read_json(report_file) | {"test_sha256": "0" * 64})
        assert score_on_current_split(model, manifest, "accuracy") == pytest.approx(published)
    finally:
        report_file.write_bytes(before)
    assert (scored / "items.parquet").is_file()
