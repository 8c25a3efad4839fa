"""Talking to versions: the answers are those that were scored, adapters change places, and contracts are kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import versions
from conftest import COLOURS, environment, retune, with_, write_params
from safetensors.torch import load_file, save_file

from pipeline import promote as gate
from pipeline.chat.template import TemplateError
from pipeline.cli.serving import ServingError, Talk, adapter_folder, label_confidences, load_for_batches, read_prompts
from pipeline.cli.talk import chat, predict, report
from pipeline.core import graph
from pipeline.core.files import read_json, write_json
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.manifest import read_manifest
from pipeline.registry.model import RegisteredModel
from pipeline.registry.rescore import score_today


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
    merge(exact, dataset, adapter, evaluation, *(artifacts / name for name in ("merged", "parity", "exports")))
    for version in (1, 2):
        if version == 2:
            weights = load_file(artifacts / "adapter" / "adapter_model.safetensors")
            still = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in weights.items()}
            save_file(still, artifacts / "adapter" / "adapter_model.safetensors")
        versions.write_lock(root, own.model_dump())
        publish(root, own)
        gate.promote(own.publish, own.promote, root=root)
    write_params(root, own)
    return root


def publish(root: Path, params: Params) -> None:
    from pipeline.publish import ship_version

    model = RegisteredModel(params.publish, root)
    model.register(ship_version(model, graph.version_id(root))[0])


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


def test_a_conversation_on_the_command_line(there: Path, evaluation: Path) -> None:
    tuned, base = scored(evaluation, "adapter"), scored(evaluation, "base")
    question = next(question for question in tuned if tuned[question] != base[question])
    typed = [question, "/adapter v2", "/reset", question, "/adapters", "/adapter nowhere", "/help", "/quit", "never"]
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline", "chat", "champion"],
        input="\n".join(typed), cwd=there, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [tuned[question], base[question]]
    assert "chat: champion, v2 (answers)" in ran.stderr
    assert "no version nowhere" in ran.stderr
    assert "/adapter NAME" in ran.stderr


def test_one_prompt_has_one_answer(there: Path, evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question, answer = next(iter(scored(evaluation, "adapter").items()))
    chat(prompt=question, json_output=True)
    said = json.loads(capsys.readouterr().out)
    assert said["answer"] == answer
    assert said["model"] == "champion"
    assert not said["cut_off"]


def test_a_file_is_answered_line_by_line_by_the_merged_model(there: Path, tmp_path: Path, evaluation: Path) -> None:
    tuned = scored(evaluation, "adapter")
    rows = [{"id": i, "prompt": question} for i, question in enumerate(tuned)]
    rows[3] = {"id": 3, "messages": [{"role": "user", "content": rows[3]["prompt"]}]}
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    predict(file)
    answers = [json.loads(line) for line in (tmp_path / "questions.answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(len(rows)))
    assert [answer["answer"] for answer in answers] == list(tuned.values())
    assert not list((there / ".retune" / "predictions").iterdir())


def test_classification_has_a_label_and_its_confidence(
    there: Path, own: Params, tmp_path: Path, evaluation: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    question, answer = next(
        (question, answer) for question, answer in scored(evaluation, "adapter").items() if answer in COLOURS
    )
    file.write_text(json.dumps({"prompt": question}) + "\n")
    predict(file, labels=", ".join(COLOURS))
    [row] = [json.loads(line) for line in (tmp_path / "rows.answers.jsonl").read_text().splitlines()]
    assert row["label"] == answer
    assert 1 / len(COLOURS) < row["confidence"] <= 1
    model, template, _ = load_for_batches(own, "champion")
    asked = [{"role": "user", "content": question}]
    found = label_confidences(model, template, asked, None, ["red", "blue", "green"])
    assert sum(found.values()) == pytest.approx(1)
    alone = [label_confidences(model, template, asked, None, pair) for pair in (["red", "blue"], ["blue", "red"])]
    assert alone[0] == pytest.approx(alone[1])  # padding of the other label changes nothing
    assert alone[0]["blue"] / alone[0]["red"] == pytest.approx(found["blue"] / found["red"])


@pytest.mark.parametrize("cut", [1, 3])
def test_labels_of_a_killed_prediction_are_not_made_again(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    asked: list[str] = []

    def counted(model: Any, template: Any, messages: Any, tools: Any, labels: list[str]) -> dict[str, float]:
        if len(asked) == cut:
            raise KeyboardInterrupt
        asked.append(messages[0]["content"])
        return {"red": 0.9, "blue": 0.1}

    monkeypatch.setattr("pipeline.cli.serving.label_confidences", counted)
    file = tmp_path / f"labels{cut}.jsonl"
    questions = [f"Name the colour of box {i}: red" for i in range(4)]
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    with pytest.raises(KeyboardInterrupt):
        predict(file, labels="red, blue")
    first, asked[:] = list(asked), []
    cut = -1
    predict(file, labels="red, blue")
    assert first + asked == questions
    rows = [json.loads(line) for line in file.with_name(f"{file.stem}.answers.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["label"]) for row in rows] == [(question, "red") for question in questions]
    assert not list((there / ".retune" / "predictions").iterdir())


@pytest.mark.faults
def test_a_killed_prediction_goes_on_where_it_was(there: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Name the colour of box {i}: red"}) + "\n" for i in range(400)))
    kept = there / ".retune" / "predictions"
    child = subprocess.Popen([sys.executable, "-m", "pipeline", "predict", str(file)], cwd=there, env=environment())
    deadline = time.monotonic() + 120
    while not (lines := [line for path in kept.glob("*.jsonl") for line in path.read_text().splitlines()]):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "many.answers.jsonl").exists()
    [path] = kept.glob("*.jsonl")
    place, _ = json.loads(lines[0])
    rest = path.read_text().split("\n")[1:]
    path.write_text("\n".join([json.dumps([place, [40, 2]]), *rest]))  # if it comes out so, it was not made again
    assert retune(there, "predict", str(file)).returncode == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "many.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 400
    assert [i for i, answer in enumerate(answers) if answer != "red"].count(place) == 1


def test_another_template_is_refused(there: Path, own: Params, tmp_path: Path) -> None:
    folder = adapter_folder(own, "workspace")
    contract = read_json(folder / "contract.json")
    try:
        write_json(folder / "contract.json", contract | {"chat_template": contract["chat_template"] + " "})
        with pytest.raises(TemplateError, match="chat_template"):
            Talk(own, ["workspace"])
        write_json(folder / "contract.json", contract | {"chat_template_sha256": "0" * 64})
        with pytest.raises(TemplateError, match="chat_template_sha256 of workspace's template contract are not those"):
            Talk(own, ["champion", "workspace"])
        write_json(folder / "contract.json", contract | {"model": contract["model"] | {"digest": "0" * 64}})
        with pytest.raises(TemplateError, match="was trained on a base with digest 000000000000"):
            Talk(own, ["base", "workspace"])
    finally:
        write_json(folder / "contract.json", contract)
    tokenizer = there / "artifacts" / "merged" / "chat_template.jinja"
    text = tokenizer.read_text()
    try:
        tokenizer.write_text(text + "{# another #}")
        loaded = load_for_batches(own, "workspace")[1]
        assert loaded.text == contract["chat_template"]  # the contract's, whatever lies beside it
    finally:
        tokenizer.write_text(text)


def test_adapters_of_a_base_in_other_bits_do_not_share_it(there: Path, own: Params) -> None:
    path = adapter_folder(own, "workspace") / "training.json"
    training = read_json(path)
    try:
        write_json(path, training | {"quantisation": training["quantisation"] | {"load_in_4bit": False}})
        with pytest.raises(ServingError, match="in other bits"):
            Talk(own, ["champion", "workspace"])
    finally:
        write_json(path, training)


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "{}", '{"prompt": 5}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "{", '{"messages": 3}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ],
)  # fmt: skip
def test_a_line_that_asks_nothing_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(ServingError, match=r"rows\.jsonl, line 3: expected a JSON object with prompt"):
        read_prompts(file)


def test_a_text_may_hold_other_line_separators_and_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\n', encoding="utf-8")
    assert [row["prompt"] for row, _, _ in read_prompts(file)] == ["a\u2028b\x85c", "d"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte order mark, as Windows writes it
    assert [row["prompt"] for row, _, _ in read_prompts(file)] == ["a\u2028b\x85c", "d"]
    file.write_bytes('{"prompt": "你好"}'.encode("gbk"))
    with pytest.raises(ServingError, match=r"rows.jsonl is not UTF-8 text \(byte 12\)"):
        read_prompts(file)


def test_what_a_model_writes_cannot_move_the_cursor() -> None:
    from pipeline.cli.serving import printable

    assert printable("a\x1b[2Jb\n\tc\r") == "a�[2Jb\n\tc�"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda: chat(["v9"], prompt="a"), "has no version v9"),
        (lambda: chat(["0123456789abcdef"], prompt="a"), "version 0123456789abcdef is not published"),
        (lambda: chat(json_output=True), "--json needs --prompt"),
        (lambda: predict(Path("params.yaml"), labels="one"), "--labels needs at least two"),
        (lambda: predict(Path("params.yaml")), "params.yaml, line 1: expected a JSON object"),
    ],
)
def test_a_mistake_is_one_sentence(there: Path, command: Callable[[], None], words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words) as error:
        command()
    assert type(error.value).__module__.startswith("pipeline.")
    assert "\n" not in str(error.value)


def test_the_report_of_a_decision_is_written_beside_the_artifacts(there: Path, capsys: Any) -> None:
    report("v2", json_output=True)
    assert json.loads(capsys.readouterr().out)["decision"] == "refused"
    page = (there / "artifacts" / "report.html").read_text()
    for word in ("Refused", "champion", "candidate", "merged", "base", "not priced"):
        assert word in page
    report("champion", json_output=True)
    assert json.loads(capsys.readouterr().out)["decision"] == "promoted"
    text = (there / "artifacts" / "report.md").read_text()
    assert text.splitlines()[2].startswith("**Promoted: v1 ")


def test_a_version_is_scored_again_on_another_test_split(there: Path, own: Params) -> None:
    store = open_store(own.publish, there)
    serving = champion(read_log(store, own.publish.registered_model_name))
    manifest = read_manifest(store, str(serving))
    assert manifest is not None
    published = manifest["metrics"]["merged"]["accuracy"]["score"]
    assert score_today(RegisteredModel(own.publish, there), manifest, "accuracy") == published
    assert not (there / ".retune" / "versions" / str(serving) / "today").exists()  # the same split: nothing to compute
    report_file = there / "artifacts" / "dataset" / "report.json"
    before = report_file.read_bytes()
    try:
        write_json(report_file, read_json(report_file) | {"test_sha256": "0" * 64})
        assert score_today(RegisteredModel(own.publish, there), manifest, "accuracy") == pytest.approx(published)
    finally:
        report_file.write_bytes(before)
    assert (there / ".retune" / "versions" / str(serving) / "today" / "items.parquet").is_file()
