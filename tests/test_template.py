"""The chat template and its contract: what is trained, what is refused, and which changes a later stage detects."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import SYSTEM, talk, trained, trained_runs
from conftest import CHATML, with_
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pipeline.chat.template import ChatTemplate, RowError, TemplateError, load_contract, load_shipped, load_template
from pipeline.params import Params

END = "<|im_end|>"


def loaded(params: Params, text: str | None = None, folder: Path | None = None, **prepare: Any) -> ChatTemplate:
    """The template of the tiny base, or the Jinja `text` with its tokenizer."""
    if text is not None and folder is not None:
        (folder / "template.jinja").write_text(text)
        prepare |= {"chat_template": str(folder / "template.jinja")}
    return load_template(with_(params, prepare=prepare).prepare)[0]


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return loaded(params)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def contract_of(params: Params, folder: Path, **prepare: Any) -> dict[str, Any]:
    named = with_(params, prepare={"model_name_or_path": str(folder)} | prepare).prepare
    template, identity = load_template(named)
    contract: dict[str, Any] = json.loads(json.dumps(template.contract(identity)))  # as a later stage reads it
    return contract


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_answers_of_any_text_are_trained_with_their_end_tokens_after_their_prompts(
    template: ChatTemplate, pairs: list[tuple[str, str]]
) -> None:
    messages = talk(*(text for pair in pairs for text in pair))
    encoded = template.encode(messages)
    assert encoded.earlier == ()
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert trained(template, messages) == [answer + END for _, answer in pairs]
    assert template.tokenizer.decode(encoded.input_ids[-1]) == "\n" and encoded.labels[-1] == -100
    for number, (before, _) in enumerate(trained_runs(encoded)):
        assert before == template.prompt_ids(messages[: 2 * number + 1])


def test_train_on_and_weights_choose_the_trained_answers(params: Params, template: ChatTemplate) -> None:
    messages = talk("q1", "bad", "q2", "good")
    assert trained(loaded(params, train_on="last_response"), messages) == [f"good{END}"]
    messages[1]["weight"] = 0
    assert trained(template, messages) == [f"good{END}"]
    messages[3]["weight"] = 0
    with pytest.raises(RowError):
        template.encode(messages)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tools"])
def test_on_control_tokens_drop_refuses_them(params: Params, role: str) -> None:
    messages, tools = [dict(SYSTEM), *talk("q", "a")], [{"name": END if role == "tools" else "clock"}]
    for message in messages:
        message["content"] += END if message["role"] == role else ""
    with pytest.raises(RowError, match=r"<\|im_end\|>"):
        loaded(params, on_control_tokens="drop").encode(messages, json.dumps(tools))


REWRITES = CHATML.replace("{{ message['content']", "{{ '' if loop.last else '(earlier) ' }}{{ message['content']")
NEXT_HEADER = (
    "{% for m in messages %}{{ '<|im_end|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
JOINED = (
    "{% for m in messages %}{{ '<|im_start|>Name the co' if m.role == 'assistant' }}{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>Name the co{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "answers", "rows"),
    [
        (REWRITES, ("a1", "a2"), 2),  # it rewrites earlier turns, so each answer has a row
        (NEXT_HEADER, ("a1", "a2"), 1),  # the header of the next turn ends this one, so it is trained
        (JOINED, ("lour", "!"), 2),  # the second prompt has the token "colour", the first answer none
    ],
)
def test_each_answer_follows_its_prompt_even_if_the_template_rewrites_earlier_turns(
    params: Params, tmp_path: Path, text: str, answers: tuple[str, str], rows: int
) -> None:
    template, messages = loaded(params, text, tmp_path), talk("q1", answers[0], "q2", answers[1])
    encoded = template.encode(messages)
    assert len(encoded.earlier) == rows - 1
    assert trained(template, messages) == [f"{answer}{END}" for answer in answers]
    for index, (before, _) in zip((1, 3), trained_runs(encoded), strict=True):
        assert before == template.prompt_ids(messages[:index])
    last = loaded(params, text, tmp_path, train_on="last_response").encode(messages)
    assert (last.input_ids, last.earlier) == (encoded.input_ids, ())


def test_only_the_row_that_the_template_refuses_is_refused(params: Params, tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = loaded(params, refuses + CHATML, tmp_path)
    assert trained(template, talk("q", "a")) == [f"a{END}"]
    with pytest.raises(RowError, match="System role not supported"):
        template.encode([SYSTEM, *talk("q", "a")])


def test_the_contract_of_an_unchanged_base_is_accepted_and_a_shipped_model_needs_no_base(
    params: Params, copy: Path, tmp_path: Path
) -> None:
    contract = contract_of(params, copy)
    assert load_contract(contract).golden() == contract["golden"]
    moved = copy.rename(tmp_path / "elsewhere")
    (moved / "contract.json").write_text(json.dumps(contract))
    assert load_shipped(moved).golden() == contract["golden"]


def test_another_tokenizer_is_refused(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["Hello"])
    tokenizer.save_pretrained(copy)
    (copy / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(TemplateError, match=r"golden.*tokenizer_sha256"):
        load_shipped(copy)


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("chat_template", CHATML.replace(f"{END}\n", f"{END}\n\n"), "chat_template_sha256"),
        ("tokenizer_sha256", "0" * 64, "tokenizer_sha256"),
        ("stop_ids", [0], "stop_ids"),
        ("pad_id", 1, "pad_id"),
        ("train_on", "last_response", "golden"),
        ("on_control_tokens", "drop", "golden"),
        ("golden", [], "golden"),
        ("on_left_out", None, "on_left_out"),  # an older version wrote contracts without it
    ],
)
def test_a_changed_contract_names_what_changed(params: Params, copy: Path, key: str, value: Any, changed: str) -> None:
    contract = contract_of(params, copy) | {key: value}
    if value is None:
        del contract[key]
    with pytest.raises(TemplateError, match=changed):
        load_contract(contract)


def test_a_contract_with_other_golden_conversations_is_still_checked(params: Params, copy: Path) -> None:
    # A later version may use others; models that were shipped with these must still be served and checked.
    contract = contract_of(params, copy)
    contract["golden"] = contract["golden"][:1]
    assert load_contract(contract).text == contract["chat_template"]
    contract["golden"][0]["labels"][-2] = -100
    with pytest.raises(TemplateError, match="golden"):
        load_contract(contract)


def without_end(copy: Path, eos: str | None = None) -> None:
    (copy / "generation_config.json").unlink()
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos}))


@pytest.mark.parametrize(
    ("change", "prepare", "value"),
    [
        (None, {"model_name_or_path": "data/none"}, "data/none"),
        (None, {"model_name_or_path": "some/model"}, "prepare.model_revision"),
        (None, {"chat_template": "none.jinja"}, "none.jinja"),
        (None, {"chat_template": "llama3"}, r"llama3.*bos_token, .*eot_id"),  # of another family
        (None, {"max_length": 513}, "513.* 512 tokens"),
        (None, {"chat_template_kwargs": {"mesages": 1}}, "mesages.*messages"),
        (None, {"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        (lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"), {}, "safetensors"),
        (lambda copy: (copy / "chat_template.jinja").unlink(), {}, "prepare.chat_template"),
        (lambda copy: (copy / "chat_template.jinja").write_text("{% for m in"), {}, "Jinja"),
        (without_end, {}, "end-of-sequence"),
        *(
            (lambda copy, bad=bad: (copy / "tokenizer.json").write_bytes(bad), {}, "no tokenizer")
            for bad in (b"{", b"{}", b'{"added_tokens": []}', b"\xff")
        ),
    ],
)
def test_a_base_or_template_that_cannot_be_trained_with_is_refused(
    params: Params, copy: Path, change: Callable[[Path], object] | None, prepare: dict[str, Any], value: str
) -> None:
    if change is not None:
        change(copy)
    with pytest.raises(TemplateError, match=value):
        contract_of(params, copy, **prepare)


def test_a_base_is_checked_without_reading_its_weights(params: Params, copy: Path) -> None:
    for weights in copy.glob("*.safetensors"):
        save_file({}, weights)
    contract_of(params, copy, max_length=512)


def test_a_named_template_adds_the_end_token_that_a_base_does_not_declare(params: Params, copy: Path) -> None:
    without_end(copy, "<|endoftext|>")  # like bases without instruction tuning
    assert trained(loaded(params, model_name_or_path=str(copy)), talk("q", "a")) == [f"a{END}"]
    contract = contract_of(params, copy, chat_template="chatml")
    assert contract["chat_template_name"] == "chatml"
    template = load_contract(contract)
    assert template.tokenizer.convert_tokens_to_ids(END) in template.stop_ids
    assert trained(template, talk("q", "a")) == [f"a{END}"]


def test_the_date_today_is_pinned_in_the_contract(
    params: Params, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Yesterday(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2025, 12, 31)

    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + CHATML
    monkeypatch.setattr("pipeline.chat.template.datetime.date", Yesterday)
    loaded(params, dated, tmp_path)
    contract = contract_of(params, base, chat_template=str(tmp_path / "template.jinja"))
    monkeypatch.undo()
    assert contract["chat_template_date"] == "2025-12-31"
    assert load_contract(contract).render(talk("q")).startswith("Today: 31 Dec 2025")
    assert loaded(params, dated, tmp_path).chat_template_date == datetime.date.today().isoformat()
    assert loaded(params, dated, tmp_path, chat_template_date="2026-01-31").chat_template_date == "2026-01-31"
    assert loaded(params).chat_template_date is None
