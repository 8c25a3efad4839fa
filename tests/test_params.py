"""params.yaml: what is accepted, and the errors for what is not."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, with_

from pipeline.params import Params
from pipeline.settings import ParamsError, load_params

PROJECT = ROOT / "params.yaml"

FAR = {"operations": {"train_pool": "gpu"}}
TWO: dict[str, Any] = {"num_processes": 2}
CLASSES = {"train": {"task": "sequence-classification", "packing": False}, "promote": {"primary_metric": "accuracy"}}


def changed(tmp_path: Path, key: str, new: str) -> tuple[Path, int]:
    """A copy of the project's file with `new` instead of the value of the unique `key`, and the number of that line."""
    lines = PROJECT.read_text().split("\n")
    [index] = [i for i, line in enumerate(lines) if re.match(rf" +{key}:", line)]
    lines[index] = re.sub(r"^ +[^#]*", f"{new}  ", lines[index])
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines))
    return path, index + 1


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ("  lora_r: 0", "train.lora_r is 0; .*greater than or equal to 1"),
        ("  lora_r: '16'", "train.lora_r is '16'; .*integer"),
        ("  lora_r: true", "train.lora_r is True; .*integer"),
        ("  lora_r:", "train.lora_r is null; .*integer"),
        ("  packing: yes", "train.packing is 'yes'; .*boolean"),
        ("  learning_rate: .inf", "train.learning_rate is inf; .*finite"),
        ("  optim: sgd", "train.optim is 'sgd'; .*'adamw_torch' or 'paged_adamw_8bit'"),
        ("  lora_dropout: 1.0", "train.lora_dropout is 1.0; .*less than 1"),
        ("  model_revision: main", "prepare.model_revision is 'main'; .*commit"),
        ("  artifact_store: ftp://b", "publish.artifact_store is 'ftp://b'; .*(s3://.*file://|file://.*s3://)"),
        ("  tracking_uri: mlruns", "publish.tracking_uri is 'mlruns'; .*sqlite:///.*https"),
        ("  registered_model_name: 2026-01-31", r"publish.registered_model_name is datetime.date\(.*; .*string"),
        ("  registered_model_name: a b", "publish.registered_model_name is 'a b'; .*64 letters"),
        ("  git_branch: a b", "operations.git_branch is 'a b'; .*branch"),
        ("  webhooks: [https://x]", r"promote.webhooks is \['https://x'\]; .*environment variables"),
        ("  server_side_encryption: aws", "publish.server_side_encryption is 'aws'; .*'AES256' or 'aws:kms'"),
        ("    bleu: -1.0", r"promote\.guard_metrics\.bleu is -1.0; .*greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_key_file_and_line(tmp_path: Path, new: str, sentence: str) -> None:
    path, line = changed(tmp_path, new.strip().split(":")[0], new)
    with pytest.raises(ParamsError, match=rf"^{sentence}.* \({re.escape(str(path))}, line {line}\)$") as error:
        load_params(path)
    assert "^" not in str(error.value)  # what is expected is said in words


def test_an_unknown_key_is_named_with_file_and_line(tmp_path: Path) -> None:
    path, line = changed(tmp_path, "lora_r", "  lora_rank: 16")
    section = PROJECT.read_text().split("\n").index("train:") + 1
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert str(error.value).split("\n") == [
        f"train.lora_rank is not a parameter ({path}, line {line}); did you mean lora_r?",
        f"train.lora_r is missing ({path}, line {section}); no parameter has a default, "
        "copy it from the project's params.yaml",
    ]
    with pytest.raises(ParamsError, match=r"guard_metrics has the key blue.*'bleu'.*params.yaml, line "):
        load_params(changed(tmp_path, "bleu", "    blue: 5.0")[0])


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    path, _ = changed(tmp_path, "lora_r", "  lora_r: 0")
    path.write_text(path.read_text().replace("  on_overlong: drop ", "  on_overlong: cut "))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert [line.split(" ")[0] for line in str(error.value).split("\n")] == ["prepare.on_overlong", "train.lora_r"]


@pytest.mark.parametrize(("cut", "key"), [("(?m)^  lora_r:.*\n", "train.lora_r"), ("(?m)^merge:\n(  .*\n)+", "merge")])
def test_a_missing_parameter_or_section_is_named(tmp_path: Path, cut: str, key: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(cut, "", PROJECT.read_text()))
    with pytest.raises(ParamsError, match=rf"^{re.escape(key)} is missing \({re.escape(str(path))}"):
        load_params(path)


# The parameter that an error must name, and changes to the project's parameters.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("merge.base", {"train": {"method": "lora", "load_in_4bit": False}, "merge": {"base": "nf4"}}),
    ("prepare.test_fraction", {"prepare": {"test_fraction": 0.5, "validation_fraction": 0.5}}),
    ("prepare.trust_remote_code", {"prepare": {"trust_remote_code": True}}),
    ("prepare.chat_template_kwargs", {"prepare": {"chat_template_kwargs": {"tools": []}}}),
    ("publish.sse_kms_key_id", {"publish": {"sse_kms_key_id": "alias/key"}}),
    ("publish.require_signature", {"publish": {"require_signature": True}}),
    ("train.init_adapter", FAR | {"train": {"init_adapter": "champion"}}),
    ("train.init_adapter", {"train": {"init_adapter": "v3"}}),
    ("train.init_adapter", {"train": {"method": "full", "load_in_4bit": False, "init_adapter": "champion"}}),
    ("train.init_adapter", {"train": {"method": "adalora", "load_in_4bit": False, "init_adapter": "champion"}}),
    ("train.load_in_4bit", {"train": {"method": "qlora", "load_in_4bit": False}}),
    ("train.load_in_4bit", {"train": {"method": "full", "load_in_4bit": True}}),
    ("train.packing", {"train": {"method": "prompt", "packing": True}}),
    ("train.gradient_checkpointing", {"train": {"method": "prefix", "packing": False, "gradient_checkpointing": True}}),
    ("train.max_steps", {"train": {"max_steps": 0}}),
    ("train.gradient_accumulation_steps", {"train": {"tokens_per_step": None}}),
    ("train.strategy", {"train": {"num_processes": 2}}),
    ("train.bnb_4bit_quant_storage", {"train": {"strategy": "fsdp", "num_processes": 2}}),
    ("train.early_stopping_patience", {"train": TWO | {"strategy": "deepspeed", "early_stopping_patience": 3}}),
    ("train.optim", {"train": TWO | {"strategy": "deepspeed", "optim": "paged_adamw_8bit"}}),
    ("promote.declared_effect", {"promote": {"declared_effect": 0.01, "min_improvement": 0.01}}),
    ("operations.mlflow_port", {"operations": {"mlflow_port": 4200}}),
    ("evaluate.prompts", CLASSES | {"evaluate": {"prompts": ["Why?"]}}),
    ("evaluate.backend", CLASSES | {"evaluate": {"backend": "vllm"}}),
]


@pytest.mark.parametrize(("parameter", "sections"), REFUSED, ids=[f"{i} {row[0]}" for i, row in enumerate(REFUSED)])
def test_a_combination_that_cannot_work_names_the_parameter_alone(parameter: str, sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error") as error:
        with_(load_params(PROJECT), **sections)
    assert set(re.findall(r"(?m)(?:^|error, )([a-z]+\.[a-z_0-9]+) is ", str(error.value))) == {parameter}


@pytest.mark.parametrize(
    "sections",
    [
        {"prepare": {"trust_remote_code": True, "model_revision": "a" * 40}},
        FAR | {"train": {"init_adapter": "champion"}, "publish": {"artifact_store": "s3://bucket/models"}},
        FAR | {"train": {"init_adapter": f"elsewhere@{'0' * 64}"}},
        CLASSES | {"evaluate": {"backend": "transformers"}},
        {"publish": {"sse_kms_key_id": "alias/key", "server_side_encryption": "aws:kms"}},
        {"train": TWO | {"strategy": "fsdp", "bnb_4bit_quant_storage": "bfloat16"}},
    ],
)
def test_the_nearest_combination_that_works_is_accepted(sections: dict[str, dict[str, object]]) -> None:
    assert isinstance(with_(load_params(PROJECT), **sections), Params)


def test_every_parameter_that_does_not_fit_the_task_is_named_and_the_preset_that_sets_them(tmp_path: Path) -> None:
    text = PROJECT.read_text()
    for old, new in (("task: causal-lm", "task: sequence-classification"), ("method: qlora", "method: prompt"),
                     ("on_overlong: drop", "on_overlong: split"), ("prompts: []", "prompts: [Why?]"),
                     ("packing: true", "packing: false")):  # fmt: skip
        assert f"  {old}" in text
        text = text.replace(f"  {old}", f"  {new}", 1)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError) as error:
        load_params(path)
    *sentences, preset = str(error.value).split("\n")
    parameters = ["train.method", "prepare.on_overlong", "promote.primary_metric", "evaluate.prompts"]
    assert [sentence.split()[0] for sentence in sentences] == parameters
    lines = text.split("\n")
    for sentence in sentences:
        line = int(re.findall(r"line (\d+)\)$", sentence)[0])
        assert lines[line - 1].startswith(f"  {sentence.split()[0].partition('.')[2]}:")
    name = re.search(r"retune preset ([\w.-]+)", preset)
    assert name is not None and (ROOT / "infra" / "presets" / f"{name[1]}.yaml").is_file()


@pytest.mark.parametrize("method", ["lora", "qlora", "full", "dora", "rslora", "ia3", "adalora", "prefix", "prompt"])
def test_only_qlora_loads_the_base_in_4_bits_by_default_and_most_methods_work_with_both(method: str) -> None:
    fixed = method in ("lora", "qlora", "full")
    for load_in_4bit, resolved in (("auto", method == "qlora"), *(() if fixed else ((True, True), (False, False)))):
        train = {"method": method, "load_in_4bit": load_in_4bit, "packing": method not in ("prefix", "prompt")}
        assert with_(load_params(PROJECT), train=train).train.load_in_4bit is resolved


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path, _ = changed(tmp_path, "learning_rate", "  learning_rate: 2e-4")
    assert load_params(path).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no sections"),
        ("ingest: # größer\n".encode("latin-1"), "UTF-8"),
        (b"train:\n  a: [16\n  b: 32", "line 3"),
        (b"train:\n  a: 16\n  a: 17", "line 3"),
        (None, "is not in a Retune project"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, named: str) -> None:
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=named) as error:
        load_params(tmp_path / "params.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_the_sections_are_the_stages_in_their_order_and_operations() -> None:
    stages = ["ingest", "prepare", "train", "evaluate", "merge", "publish", "promote"]
    assert list(Params.model_fields) == [*stages, "operations"]
    assert re.findall(r"(?m)^(\w+):", PROJECT.read_text()) == list(Params.model_fields)
