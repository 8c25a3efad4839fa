"""The plan against a GPU's measured memory; presets fit their model and GPU and keep the user's comments."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, retune, with_
from peft import get_peft_model
from ruamel.yaml import YAML
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SiglipVisionConfig,
)

from pipeline.chat.template import NAMED, TemplateError
from pipeline.core.combinations import METHODS, VIRTUAL_TOKENS
from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.settings import change_params, load_params, yaml_text
from pipeline.training import plan as planning
from pipeline.training.footprint import GIB, UnplannedError, count, flops_per_token, step_memory
from pipeline.training.methods import adapter_config
from pipeline.training.plan import PlanError, describe, find_gpu, plan
from pipeline.training.presets import PRESETS, PresetError, apply_preset, list_presets, preset_values

SMALL: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 4000}
LLAMA = LlamaConfig(**SMALL, intermediate_size=704, num_attention_heads=8)
LLAMA_3_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
LLAMA_65B = LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64)
SIZES = {"7B": LlamaConfig(), "65B": LLAMA_65B}
SDPA = {"attn_implementation": "sdpa"}  # with a mask over the packed sequence


def train_params(params: Params, **changes: Any) -> Any:
    method = "qlora" if changes.get("load_in_4bit", True) else "lora"
    settings = {"lora_r": 16, "lora_target_modules": "all-linear", "use_liger_kernel": False, "method": method}
    return with_(params, train=settings | changes).train


# Measured on one H200, and the last three on an H100 over the whole of train (November 2026; torch 2.11, transformers
# 5.23, trl 1.16, peft 0.21.2, bitsandbytes 0.50.2, liger-kernel 0.8.5): Llama-3.1-8B's shape, LoRA r 16 on all linear
# layers, packed sequences of 2,048, bf16; `max_memory_allocated`.
@pytest.mark.parametrize(
    ("rows", "changes", "measured"),
    [
        (2, SDPA, 30.98),
        (2, SDPA | {"gradient_checkpointing": True}, 7.66),
        (2, {}, 29.98),
        (2, {"use_liger_kernel": True}, 24.48),
        (4, {"use_liger_kernel": True}, 43.14),
        (2, {"use_liger_kernel": True}, 24.50),
        (2, {"use_liger_kernel": True, "gradient_checkpointing": True}, 7.51),
        (2, {"use_liger_kernel": True, "load_in_4bit": False}, 38.65),
    ],
)
def test_the_formula_is_within_a_tenth_of_a_gpu(
    params: Params, rows: int, changes: dict[str, Any], measured: float
) -> None:
    train = train_params(params, **changes)
    memory = step_memory(count(LLAMA_3_8B, train), train, rows, 2048, on_gpu=True)
    assert memory["peak"] / GIB == pytest.approx(measured, rel=0.10)


def test_parameters_steps_time_and_cost_are_those_of_the_training(params: Params, dataset: Path, adapter: Path) -> None:
    record, planned = read_json(adapter / "training.json"), plan(params, dataset, gpu="A100-80GB")
    assert (planned.trainable_parameters, planned.steps) == (record["trainable_parameters"], record["steps"])
    assert planned.tokens and planned.seconds and planned.cost_usd
    assert planned.seconds == pytest.approx(planned.flops_per_token * planned.tokens / (312e12 * 0.40))
    assert planned.cost_usd == pytest.approx(planned.seconds / 3600 * 1.80)
    assert "A100-80GB" in describe(planned)


@pytest.mark.parametrize("gpu", ["Voodoo2", "A100", ""])
def test_a_gpu_that_is_unknown_or_one_of_several_is_refused(params: Params, gpu: str) -> None:
    with pytest.raises(PlanError, match="L4.*A100-80GB"):
        plan(params, gpu=gpu)


def test_part_of_a_gpus_name_is_enough_if_it_fits_one(params: Params) -> None:
    texts = ("H100", "4090", "l4", "L40s", "A100-80GB")
    assert [find_gpu(text)[0] for text in texts] == ["H100-80GB", "RTX-4090", "L4", "L40S", "A100-80GB"]
    assert plan(params, gpu="h200").gpu == "H200"


@pytest.mark.parametrize("model", ["data/missing", "/missing", "owner/name"])
def test_a_base_model_that_is_not_there_is_refused_without_asking_the_hub(
    params: Params, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.delattr(planning, "load_config")  # which asks the Hub
    with pytest.raises(TemplateError, match=f"{model}.*dvc pull"):
        plan(with_(params, prepare={"model_name_or_path": model}))


SAVING = {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"}


@pytest.mark.parametrize(
    ("size", "gpu", "train", "refused"),
    [
        ("7B", "GPU-12GB", {"method": "lora"}, r" 11\.0 .*gradient_checkpointing: .*qlora and .*load_in_4bit: true"),
        ("65B", "GPU-12GB", SAVING | {"tokens_per_step": 1024}, "prepare.max_length and train.packed_length"),
        ("7B", "A100-80GB", {}, None),
        ("65B", "A6000", SAVING, None),
    ],
)
def test_a_run_that_fits_is_planned_and_another_is_refused_with_advice(
    params: Params, tmp_path: Path, monkeypatch: Any, size: str, gpu: str, train: Any, refused: str | None
) -> None:
    entry = "GPU-12GB: {memory_gib: 12, bf16_tflops: 50, usd_per_hour: 0.2, utilization: 0.3}\n"
    (tmp_path / "gpus.yaml").write_text(planning.GPUS.read_text() + entry)
    monkeypatch.setattr(planning, "GPUS", tmp_path / "gpus.yaml")
    config = SIZES[size]
    config.save_pretrained(tmp_path / size)
    prepare = {"model_name_or_path": str(tmp_path / size), "max_length": 512}
    common = {"method": "qlora", "load_in_4bit": "auto", "lora_r": 16, "packed_length": 512}
    settings = with_(params, prepare=prepare, train=common | train)
    if refused:
        with pytest.raises(PlanError, match=refused):
            plan(settings, gpu=gpu)
        return
    planned = plan(settings, gpu=gpu)
    fits_unquantised = gpu == "A100-80GB"
    assert ("in bfloat16" if fits_unquantised else "in 4 bits") in planned.evaluate
    cache = 2 * 2 * 512 * config.num_hidden_layers * config.hidden_size / 2**20  # only keys and values of a prompt
    assert cache < float(re.findall(r"; ([\d.]+) MiB for each prompt", planned.evaluate)[0]) < 2 * cache
    assert ("device map" in planned.merge) == (not fits_unquantised)
    assert (planned.steps, planned.tokens, planned.seconds) == (None, None, None)
    assert "dvc repro prepare" in describe(planned)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_has_the_number_of_parameters_that_a_method_trains(params: Params, method: str) -> None:
    settings = {"method": method, "load_in_4bit": "auto", "packing": method not in VIRTUAL_TOKENS}
    train = with_(params, train=settings).train
    counts = count(LLAMA, train)
    model = AutoModelForCausalLM.from_config(LLAMA)
    adapter = adapter_config(train, model)
    trained = get_peft_model(model, adapter) if adapter else model
    expected = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert counts.trainable == pytest.approx(expected, rel=1e-3)  # AdaLoRA also counts its rank counters
    for on_gpu in (False, True):
        memory = step_memory(counts, train, 1, 64, on_gpu)
        assert min(memory["weights"], memory["activations"], memory["backward"]) > 0


def test_work_counts_the_weights_that_a_token_passes(params: Params) -> None:
    # 4 operations per frozen weight, which needs no gradient, and 2 more for recomputing the forward pass. The head is
    # always recomputed in tiles.
    config = LlamaConfig(num_hidden_layers=4)
    layers, head = 4 * (4 * 4096**2 + 3 * 4096 * 11008), 4096 * 32000
    for checkpointing, per_weight in ((False, 4), (True, 6)):
        train = train_params(params, gradient_checkpointing=checkpointing)
        assert flops_per_token(count(config, train), train, 1, 256) == pytest.approx(
            per_weight * layers + 6 * head, rel=0.05
        )
    counts, isolated = count(config, train), train_params(params, packing=True, attn_implementation="auto")
    assert flops_per_token(counts, isolated, 8, 2048) == flops_per_token(counts, isolated, 1, 2048)
    dense = isolated.model_copy(update={"attn_implementation": "sdpa"})
    assert flops_per_token(counts, dense, 8, 2048) > 1.5 * flops_per_token(counts, isolated, 8, 2048)
    mixture = MixtralConfig(**SMALL, intermediate_size=256, num_attention_heads=8, num_local_experts=4).to_dict()
    train = train_params(params, lora_target_modules="attention")
    few, all_four = (count(MixtralConfig(**mixture | {"num_experts_per_tok": n}), train) for n in (2, 4))
    assert few.parameters == all_four.parameters
    assert flops_per_token(few, train, 1, 64) < flops_per_token(all_four, train, 1, 64)
    assert step_memory(few, train, 1, 64, True)["peak"] < step_memory(all_four, train, 1, 64, True)["peak"]


def test_layers_of_different_widths_are_planned_by_their_mean(params: Params) -> None:
    widths = {"hidden_size": 64, "head_dim": 16, "global_head_dim": 32, "num_attention_heads": 4, "vocab_size": 100}
    layer_types = ["sliding_attention", "full_attention"]
    gemma = Gemma4TextConfig(**widths, num_key_value_heads=2, num_hidden_layers=2, layer_types=layer_types)
    counts = count(gemma, train_params(params))
    assert (counts.query_width, counts.key_width, counts.heads) == (4 * 24, 2 * 24, 4)


def test_a_classifier_is_planned_and_a_model_without_known_sizes_is_refused(params: Params) -> None:
    settings = {"task": "sequence-classification", "packing": False}
    train = with_(params, train=settings, promote={"primary_metric": "accuracy", "guard_metrics": {}}).train
    assert step_memory(count(LLAMA, train), train, 1, 64, on_gpu=True)["peak"] > 0
    with pytest.raises(UnplannedError, match="mamba"):
        count(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100), train_params(params))


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
FAST = {"gpt2-lora", "qwen3-0.6b-qlora", "roberta-base-imdb"}


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


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.faults) for n in NAMES])
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
