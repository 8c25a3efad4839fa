"""The chat template as a contract: what is trained, what is refused, and what a later stage finds unchanged."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_base, with_
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pipeline.chat import Message
from pipeline.chat.template import (
    ChatTemplate,
    Encoded,
    RowError,
    TemplateError,
    load_contract,
    load_shipped,
    load_template,
)
from pipeline.params import Params

END = "<|im_end|>"
TOOLS = json.dumps([{"name": "clock", "description": "时间"}], ensure_ascii=False)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '' if loop.last or m.role == 'user' else '(earlier) ' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(template: ChatTemplate, messages: list[Message], tools: str | None = None) -> str:
    return trained_of(template, template.encode(messages, tools))


def trained_of(template: ChatTemplate, row: Encoded) -> str:
    return template.tokenizer.decode([label for label in row.labels if label != -100])


def with_template(params: Params, folder: Path, text: str, **prepare: Any) -> ChatTemplate:
    (folder / "template.jinja").write_text(text)
    path = str(folder / "template.jinja")
    return load_template(with_(params, prepare=prepare | {"chat_template": path}).prepare)[0]


@pytest.fixture(scope="module")
def template(params: Params) -> ChatTemplate:
    return load_template(params.prepare)[0]


@pytest.fixture(scope="module")
def last(params: Params) -> ChatTemplate:
    return load_template(with_(params, prepare={"train_on": "last_response"}).prepare)[0]


@pytest.fixture(scope="module")
def dropping(params: Params) -> ChatTemplate:
    return load_template(with_(params, prepare={"on_control_tokens": "drop"}).prepare)[0]


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def contract_of(params: Params, folder: Path) -> dict[str, Any]:
    template, identity = load_template(with_(params, prepare={"model_name_or_path": str(folder)}).prepare)
    contract: dict[str, Any] = json.loads(json.dumps(template.contract(identity)))  # as a later stage reads it
    return contract


@pytest.mark.parametrize(
    "contents",
    [
        ("Hello", "Good day."),
        ("1 + 1?", "2", "再见", "再见。"),
        ("q", "two\n\nlines  here"),
        ("你好吗", "我很好😀谢谢"),
    ],
)
def test_the_labelled_text_is_the_answers_with_their_end_tokens(
    template: ChatTemplate, contents: tuple[str, ...]
) -> None:
    assert trained(template, talk(*contents)) == "".join(answer + END for answer in contents[1::2])


def test_only_the_last_answer_is_labelled_on_demand(last: ChatTemplate) -> None:
    assert trained(last, talk("1 + 1?", "2", "再见", "再见。")) == f"再见。{END}"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_labels_and_prompt_hold_for_any_text(template: ChatTemplate, pairs: list[tuple[str, str]]) -> None:
    messages = talk(*(text for pair in pairs for text in pair))
    encoded = template.encode(messages)
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert trained(template, messages) == "".join(answer + END for _, answer in pairs)
    prompt = template.prompt_ids(messages[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != -100


def test_the_end_token_is_trained_and_what_follows_it_is_not(template: ChatTemplate) -> None:
    encoded = template.encode(talk("Hello", "Good day."))
    end = template.tokenizer.convert_tokens_to_ids(END)
    place = max(k for k, token in enumerate(encoded.input_ids) if token == end)
    assert encoded.labels[place] == end
    assert template.tokenizer.decode(encoded.input_ids[place + 1 :]) == "\n"
    assert set(encoded.labels[place + 1 :]) == {-100}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_message_are_refused_on_demand(dropping: ChatTemplate, role: str) -> None:
    messages = [{"role": "system", "content": "s"}, *talk("q", "a")]
    next(message for message in messages if message["role"] == role)["content"] += "<|im_start|>"
    with pytest.raises(RowError, match=r"contains the model's control token <\|im_start\|>"):
        dropping.encode(messages)


def test_control_tokens_in_the_tools_are_refused_on_demand(dropping: ChatTemplate) -> None:
    with pytest.raises(RowError, match=r"contains the model's control token <\|im_end\|>"):
        dropping.encode(talk("q", "a"), json.dumps([{"name": END}]))


def test_a_template_that_rewrites_earlier_turns_gets_a_row_for_each_answer(params: Params, tmp_path: Path) -> None:
    messages = talk("q1", "a1", "q2", "a2")
    template = with_template(params, tmp_path, REWRITES)
    encoded = template.encode(messages)
    rows = [*encoded.earlier, encoded]
    assert [trained_of(template, row) for row in rows] == [f"a1{END}", f"a2{END}"]
    for row, asked in zip(rows, (messages[:1], messages[:3]), strict=True):
        prompt = template.prompt_ids(asked)
        assert row.input_ids[: len(prompt)] == prompt
    last = with_template(params, tmp_path, REWRITES, train_on="last_response").encode(messages)
    assert (last.input_ids, last.earlier) == (encoded.input_ids, ())


def test_a_template_that_appends_keeps_all_answers_in_one_row(template: ChatTemplate) -> None:
    encoded = template.encode(talk("q1", "a1", "q2", "a2"))
    assert encoded.earlier == ()
    assert trained_of(template, encoded) == f"a1{END}a2{END}"


def test_without_an_end_of_its_own_a_turn_ends_with_the_token_that_ends_generations(
    params: Params, tmp_path: Path
) -> None:
    template = with_template(params, tmp_path, CHATML.replace(END, ""))
    assert trained(template, talk("q", "a")) == f"a\n{END}"


def test_a_turn_that_the_next_header_ends_is_trained_with_that_header(params: Params, tmp_path: Path) -> None:
    glm = (
        "{% for m in messages %}{{ '<|im_end|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    encoded = with_template(params, tmp_path, glm).encode(talk("q1", "a1", "q2", "a2"))
    assert encoded.earlier == ()
    assert trained_of(with_template(params, tmp_path, glm), encoded) == f"a1{END}a2{END}"


def test_an_answer_is_tokenised_by_itself_and_not_across_its_prompts_end(params: Params, tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>Name the co' if m.role == 'assistant' }}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>Name the co{% endif %}"
    )
    template = with_template(params, tmp_path, text)
    messages = talk("q", "lour", "q", "!")
    assert len(template.tokenizer.encode("colour")) < len(template.tokenizer.encode("co")) + len("lour")
    encoded = template.encode(messages)
    # The second prompt has the word as one text, so the first answer stands in a row of its own.
    rows = [*encoded.earlier, encoded]
    assert [trained_of(template, row) for row in rows] == [f"lour{END}", f"!{END}"]
    for row, asked in zip(rows, (messages[:1], messages[:3]), strict=True):
        prompt = template.prompt_ids(asked)
        assert row.input_ids[: len(prompt)] == prompt


def test_answers_marked_as_not_trained_are_not(params: Params, template: ChatTemplate) -> None:
    messages = talk("q1", "bad", "q2", "good")
    messages[1]["weight"] = 0
    assert trained_of(template, template.encode(messages)) == f"good{END}"
    messages[3]["weight"] = 0
    with pytest.raises(RowError):
        template.encode(messages)


def test_a_row_that_the_template_cannot_carry_does_not_condemn_the_others(params: Params, tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = with_template(params, tmp_path, refuses + CHATML)
    assert trained(template, talk("q", "a")) == f"a{END}"
    with pytest.raises(RowError, match="System role not supported"):
        template.encode([{"role": "system", "content": "s"}, *talk("q", "a")])


def test_a_template_with_a_syntax_error_is_refused(params: Params, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="template"):
        with_template(params, tmp_path, "{% for m in messages %}{{ m.content }").encode(talk("q", "a"))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_reach_the_prompt_of_a_template_that_ignores_them(template: ChatTemplate, system: str | None) -> None:
    messages = ([{"role": "system", "content": system}] if system else []) + talk("q", "a")
    prompt = template.tokenizer.decode(template.prompt_ids(messages[:-1], TOOLS))
    assert TOOLS in prompt
    assert system is None or system in prompt
    assert prompt.count("<|im_start|>system") == 1
    assert trained(template, messages, TOOLS) == f"a{END}"


def test_a_template_with_tools_gets_them_as_objects(params: Params, tmp_path: Path) -> None:
    template = with_template(params, tmp_path, "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHATML)
    assert template.render(talk("q"), TOOLS).startswith("clock;")


def test_the_contract_of_an_unchanged_base_is_accepted(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    assert load_contract(contract).golden() == contract["golden"]


def test_another_base_model_is_refused(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    make_base(copy, seed=1)
    with pytest.raises(TemplateError, match=r"is not the one the dataset was prepared for"):
        load_contract(contract)


def test_another_tokenizer_is_refused(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["Hello"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(TemplateError, match="is not the one"):
        load_contract(contract)
    (copy / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(TemplateError, match=r"golden.*tokenizer_sha256.* differ from the contract it was shipped with"):
        load_shipped(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chat_template", CHATML.replace(f"{END}\n", f"{END}\n\n")),
        ("tokenizer_sha256", "0" * 64),
        ("stop_ids", [0]),
        ("pad_id", 1),
        ("train_on", "last_response"),
        ("on_control_tokens", "drop"),
        ("golden", []),
    ],
)
def test_a_changed_contract_names_what_changed(params: Params, copy: Path, key: str, value: Any) -> None:
    contract = contract_of(params, copy) | {key: value}
    with pytest.raises(TemplateError, match=r"differ from the template contract.*dvc repro prepare") as error:
        load_contract(contract)
    expected = {"chat_template": "chat_template_sha256", "train_on": "golden", "on_control_tokens": "golden"}.get(
        key, key
    )
    assert expected in str(error.value).split(" differ")[0]


def test_a_shipped_model_needs_no_base(params: Params, copy: Path, tmp_path: Path) -> None:
    contract = contract_of(params, copy)
    moved = copy.rename(tmp_path / "elsewhere")
    (moved / "contract.json").write_text(json.dumps(contract))
    assert load_shipped(moved).golden() == contract["golden"]


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        ({"model_name_or_path": "data/none"}, "there is no such folder"),
        ({"model_name_or_path": "some/model"}, "needs prepare.model_revision"),
        ({"chat_template": "none.jinja"}, "prepare.chat_template is none.jinja, which does not exist"),
    ],
)
def test_a_base_or_template_that_is_not_there_is_refused(params: Params, prepare: dict[str, str], what: str) -> None:
    with pytest.raises(TemplateError, match=what):
        load_template(with_(params, prepare=prepare).prepare)


def test_a_named_template_brings_the_end_token_that_a_base_does_not_name(params: Params, copy: Path) -> None:
    # As bases before instruction tuning: <|im_end|> is a token, but generation ends with <|endoftext|>.
    (copy / "generation_config.json").unlink()
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    base = {"model_name_or_path": str(copy)}
    own, _ = load_template(with_(params, prepare=base).prepare)
    assert trained(own, talk("q", "a")) == f"a{END}"
    template, identity = load_template(with_(params, prepare=base | {"chat_template": "chatml"}).prepare)
    assert trained(template, talk("q", "a")) == f"a{END}"
    contract = json.loads(json.dumps(template.contract(identity)))
    assert contract["chat_template_name"] == "chatml"
    assert load_contract(contract).stop_ids == template.stop_ids
    assert template.tokenizer.convert_tokens_to_ids(END) in template.stop_ids


def test_a_named_template_of_another_family_is_refused(params: Params) -> None:
    with pytest.raises(TemplateError, match=r"prepare\.chat_template is llama3, whose bos_token, .*eot_id"):
        load_template(with_(params, prepare={"chat_template": "llama3"}).prepare)


def test_rows_longer_than_the_models_positions_are_refused_without_its_weights(params: Params, copy: Path) -> None:
    for weights in copy.glob("*.safetensors"):
        save_file({}, weights)
    prepare = {"model_name_or_path": str(copy), "max_length": 512}
    load_template(with_(params, prepare=prepare).prepare)
    with pytest.raises(TemplateError, match=r"prepare\.max_length is 513; .* for 512 tokens at most"):
        load_template(with_(params, prepare=prepare | {"max_length": 513}).prepare)


def test_the_contract_holds_a_call_a_system_message_and_an_injected_token(template: ChatTemplate) -> None:
    golden = template.golden()
    assert [sum(label != -100 for label in entry["labels"]) > 0 for entry in golden] == [True] * 5
    assert golden[2]["messages"][0]["role"] == "system"
    assert "tool_calls" in golden[3]["messages"][1] and golden[3]["tools"]
    end = template.tokenizer.convert_tokens_to_ids(END)
    assert END in golden[4]["messages"][0]["content"]
    assert golden[4]["input_ids"].count(end) == golden[0]["input_ids"].count(end)


def test_a_contract_with_other_golden_conversations_is_still_checked(params: Params, copy: Path) -> None:
    # A later version may choose others: a model that was shipped with these must stay servable, and be checked.
    contract = contract_of(params, copy)
    contract["golden"] = contract["golden"][:1]
    assert load_contract(contract).text == contract["chat_template"]
    contract["golden"][0]["labels"][-2] = -100
    with pytest.raises(TemplateError, match="golden differ"):
        load_contract(contract)


def test_a_contract_of_an_older_version_is_refused_with_the_way_out(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    del contract["on_control_tokens"]
    with pytest.raises(TemplateError, match=r"lacks on_control_tokens.*dvc repro"):
        load_contract(contract)


def test_pickled_weights_are_refused(params: Params, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(TemplateError, match=r"has no \.safetensors weights; pickled weights are not loaded"):
        contract_of(params, copy)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"added_tokens": []}', b"\xff"])
def test_a_damaged_tokenizer_is_refused(params: Params, copy: Path, content: bytes) -> None:
    (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(TemplateError, match="no tokenizer could be loaded"):
        contract_of(params, copy)


def test_a_base_without_chat_template_is_refused(params: Params, copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match="has no chat template; name one with prepare.chat_template"):
        contract_of(params, copy)


def test_a_base_without_end_token_is_refused(params: Params, copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(TemplateError, match="names no end-of-sequence token"):
        contract_of(params, copy)


def test_a_dataset_of_yesterday_is_the_contracts_today(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text("{{ 'Today: ' + strftime_now('%d %b %Y') }}" + CHATML)
    settings = with_(params, prepare={"chat_template": str(tmp_path / "dated.jinja")}).prepare

    class Yesterday(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2025, 12, 31)

    monkeypatch.setattr("pipeline.chat.template.datetime.date", Yesterday)
    template, identity = load_template(settings)
    contract = json.loads(json.dumps(template.contract(identity)))
    monkeypatch.undo()
    assert contract["chat_template_date"] == "2025-12-31"
    loaded = load_contract(contract)
    assert loaded.render(talk("q")) == template.render(talk("q"))
    assert loaded.render(talk("q")).startswith("Today: 31 Dec 2025")
    today = load_template(settings)[0]
    assert today.date == datetime.date.today().isoformat()
    fixed = with_(params, prepare=settings.model_dump() | {"chat_template_date": "2026-01-31"}).prepare
    assert load_template(fixed)[0].date == "2026-01-31"


def test_a_template_without_a_date_has_none_in_its_contract(template: ChatTemplate) -> None:
    assert template.date is None


def test_a_contract_of_an_earlier_version_is_still_read(params: Params, copy: Path) -> None:
    contract = contract_of(params, copy)
    for key in ("chat_template_kwargs", "chat_template_date", "reasoning", "on_left_out"):
        del contract[key]
    assert load_contract(contract).date is None
