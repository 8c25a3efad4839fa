"""Presets: all set the same parameters, fit their model's real architecture, and keep the user's comments."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, retune, with_
from ruamel.yaml import YAML
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SiglipVisionConfig,
)

from pipeline.chat.template import NAMED
from pipeline.params import Params
from pipeline.settings import change_params, load_params, yaml_text
from pipeline.training.footprint import GIB, count, step_memory
from pipeline.training.methods import adapter_config
from pipeline.training.plan import find_gpu
from pipeline.training.presets import PRESETS, PresetError, apply_preset, list_presets, preset_values

PRESET = {preset.name: preset for preset in list_presets()}
NAMES = [*PRESET]


def sized(kind: Any, *sizes: int, **others: Any) -> PreTrainedConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config: PreTrainedConfig = kind(**dict(zip((*names, "num_key_value_heads"), sizes, strict=True)), **others)
    return config


# The published configurations, as far as they determine memory and module names.
GEMMA_TEXT = sized(Gemma3TextConfig, 262208, 2560, 10240, 34, 8, 4, head_dim=256, max_position_embeddings=131072)
GEMMA_VISION = SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896,
    patch_size=14,
)  # fmt: skip
TIED: dict[str, Any] = {"max_position_embeddings": 40960, "tie_word_embeddings": True}
GLM: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 8192, "pad_token_id": 0}
MODELS: dict[str, PreTrainedConfig] = {
    "gpt2-lora": GPT2Config(),
    "bloomz-560m-lora": BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16),
    "llama-2-7b-qlora": LlamaConfig(max_position_embeddings=4096),
    "chatglm3-6b-lora": sized(GlmConfig, 65024, 4096, 13696, 28, 32, 2, **GLM),
    "qwen2.5-0.5b-qlora": sized(Qwen2Config, 151936, 896, 4864, 24, 14, 2, **TIED),
    "qwen2.5-7b-qlora": sized(Qwen2Config, 152064, 3584, 18944, 28, 28, 4),
    "llama-3.1-8b-qlora": sized(LlamaConfig, 128256, 4096, 14336, 32, 32, 8, max_position_embeddings=131072),
    "qwen3-0.6b-qlora": sized(Qwen3Config, 151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED),
    "qwen3-8b-qlora": sized(Qwen3Config, 151936, 4096, 12288, 36, 32, 8, head_dim=128, max_position_embeddings=40960),
    "llama-3.2-3b-qlora": sized(LlamaConfig, 128256, 3072, 8192, 28, 24, 8, **TIED),
    "gemma-3-4b-qlora": Gemma3Config(text_config=GEMMA_TEXT, vision_config=GEMMA_VISION),
    "glm-4-9b-qlora": sized(Glm4Config, 151552, 4096, 13696, 40, 32, 2, **GLM),
    "gpt-oss-20b-lora": sized(
        GptOssConfig, 201088, 2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32, max_position_embeddings=131072,
        pad_token_id=199999,
    ),
    "roberta-base-imdb": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
}  # fmt: skip
SMALL = {"gpt2-lora", "qwen3-0.6b-qlora", "roberta-base-imdb"}


@pytest.fixture
def project_file(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def comments(text: str) -> list[str]:
    return re.findall(r"#.*", text)


def test_presets_set_the_same_parameters_and_keep_every_comment(project_file: Path) -> None:
    keys = [{(section, key) for section, settings in preset_values(name).items() for key in settings} for name in NAMES]
    assert all(preset == keys[0] for preset in keys)  # so nothing of an earlier preset remains
    before = project_file.read_text()
    for name, task in (("gpt2-lora", None), ("qwen3-8b-qlora", "reasoning"), ("roberta-base-imdb", None)):
        apply_preset(name, project_file, task)
        assert comments(project_file.read_text()) == comments(before)
        params = load_params(project_file).model_dump()
        for section, settings in preset_values(name, task).items():
            for key, value in settings.items():
                assert params[section][key] == value or value == "auto", f"{section}.{key}"
    assert apply_preset(name, project_file, task) == {}


@pytest.fixture(scope="module")
def project() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_pins_its_model_and_names_an_existing_template_and_modules(name: str, project: Params) -> None:
    prepare = preset_values(name)["prepare"]
    assert re.fullmatch(r"[0-9a-f]{40}", prepare["model_revision"])
    assert prepare["chat_template"] in {*NAMED, None}  # null: the tokenizer's own
    with torch.device("meta"):
        auto: Any = AutoModelForSequenceClassification if "imdb" in name else AutoModelForCausalLM
        model = auto.from_config(MODELS[name])
    for task in PRESET[name].tasks:
        params = with_(project, **preset_values(name, task))
        adapter_config(params.train, model)
        context = getattr(MODELS[name].get_text_config(), "max_position_embeddings", None) or 2048
        assert params.prepare.max_length <= context


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.faults) for n in NAMES])
def test_a_preset_fits_its_gpu(name: str, project: Params) -> None:
    params = with_(project, **preset_values(name))
    gpu, size = PRESET[name].gpu, params.train.per_device_train_batch_size
    length = max(params.prepare.max_length, params.train.packed_length if params.train.packing else 0)
    counts = count(MODELS[name], params.train)
    memory = step_memory(counts, params.train, 1 if size == "auto" else size, length, on_gpu=gpu is not None)
    assert memory["peak"] < (16 * GIB if gpu is None else find_gpu(gpu)[1].usable)


def test_a_block_becomes_one_line_when_its_keys_change(tmp_path: Path) -> None:
    file = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    block = "  prompts:   # questions\n    - Who?   # half\n    - Why?\n  # of what comes next\n"
    file.write_text(re.sub(r"  prompts: \[\] .*\n", block, file.read_text()))
    assert load_params(file).evaluate.prompts == ["Who?", "Why?"]
    before = file.read_text()
    change_params({"evaluate.prompts": [], "promote.guard_metrics": {"chrf": 1.0}}, file)
    now = load_params(file)
    assert (now.evaluate.prompts, now.promote.guard_metrics) == ([], {"chrf": 1.0})
    assert comments(file.read_text()) == [comment for comment in comments(before) if comment != "# half"]
    lost = Counter(before.split("\n")) - Counter(file.read_text().split("\n"))
    assert lost.total() == 6  # two keys, two items, two metrics


@pytest.mark.parametrize(
    "value", [None, True, 0.0002, 5e-05, "null", "a: b", "0123", "颜色 # x", ["q"], {"a": [1, {"b": None}]}, [], ""]
)
def test_a_value_is_written_as_yaml_that_reads_back(value: Any) -> None:
    text = yaml_text(value)
    again = YAML(typ="safe").load(text)
    assert again == value and type(again) is type(value) and "\n" not in text


@pytest.mark.parametrize(
    ("name", "task", "named"), [("gpt3", None, "bloomz-560m"), ("gpt2-lora", "poetry", "reasoning")]
)
def test_an_unknown_preset_or_task_is_refused_with_the_known_ones(
    project_file: Path, name: str, task: str | None, named: str
) -> None:
    before = project_file.read_text()
    with pytest.raises(PresetError, match=named):
        apply_preset(name, project_file, task)
    assert project_file.read_text() == before


def test_the_command_lists_and_applies(tmp_path: Path, project_file: Path) -> None:
    listed = retune(tmp_path, "preset", "--json")
    assert [each["name"] for each in json.loads(listed.stdout)] == sorted(p.stem for p in PRESETS.glob("*.yaml"))
    said = retune(tmp_path, "preset", "roberta-base-imdb")
    assert "train.task: causal-lm → sequence-classification" in said.stdout
    assert "prepare.model_revision: null → " in said.stdout and "None" not in said.stdout
    assert load_params(project_file).train.task == "sequence-classification"
    first = retune(tmp_path, "preset", "chatglm3-6b-lora")
    assert first.stdout.split("first: ")[1].startswith("convert zai-org/chatglm3-6b")
