"""Merging compared with PEFT's own, on tiny random models of real architectures with several shards."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import huggingface_hub
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from pipeline.chat.template import local_source
from pipeline.weights import checkpoint as weights
from pipeline.weights.checkpoint import WeightsError
from pipeline.weights.loading import ModelError, load_base
from pipeline.weights.merging import MergeError, Merging, merge_adapter
from pipeline.weights.placement import load_for_scoring

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SIZES | {"intermediate_size": 192}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**WIDE, num_key_value_heads=4),
    "llama-tied": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**WIDE, num_key_value_heads=2),
    "gemma": GemmaConfig(**WIDE, num_key_value_heads=1, head_dim=16),
    "bloom": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
EXPERTS = MixtralConfig(**WIDE | {"intermediate_size": 64}, num_local_experts=2, num_key_value_heads=2)
Make = Callable[..., tuple[Path, Path]]
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Save a base with random weights in several shards, and an adapter with random changes to it."""

    def save(config: PretrainedConfig, dtype: torch.dtype, settings: PeftConfig) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        randomise(model, 0.05)
        model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), settings)
        randomise(tuned, 0.05, trained=True)
        tuned.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return save


def randomise(model: torch.nn.Module, size: float, trained: bool = False) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not trained:
                parameter += size * torch.randn_like(parameter)


def merge_with_peft(base: Path, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter
    ).merge_and_unload()


def merge(base: Path, adapter: Path, **options: Any) -> tuple[Merging, Path]:
    folder = base.with_name("merged")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return merge_adapter(local_source(base), adapter, folder, **options), folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(folder: Path, expected: PreTrainedModel, saved: Path) -> None:
    """The files equal what `expected` saves, bit for bit, and load into the same model."""
    expected.save_pretrained(saved)
    actual, expected_tensors = tensors(folder), tensors(saved)
    assert set(actual) == set(expected_tensors)
    for name in expected_tensors:
        assert actual[name].dtype == expected_tensors[name].dtype, name
        assert torch.equal(actual[name], expected_tensors[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == expected.dtype
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


BF16 = torch.bfloat16
MERGES: list[tuple[str, torch.dtype, PeftConfig, str | None]] = [  # and why PEFT merges it
    *((name, BF16, LoraConfig(**LORA, lora_alpha=3), None) for name in MODELS),
    ("llama", torch.float32, LoraConfig(**LORA, use_rslora=True, alpha_pattern={"layers.1.mlp.up_proj": 5}), None),
    ("gpt2", torch.float16, LoraConfig(**LORA, lora_alpha=3), None),
    ("llama", BF16, LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]), None),
    # transformers fuses its experts when it loads.
    ("mixtral", BF16, LoraConfig(**LORA | {"target_modules": ["q_proj", "v_proj"]}), None),
    ("llama", BF16, IA3Config(task_type="CAUSAL_LM"), "IA3"),
    ("gpt2", BF16, LoraConfig(**LORA, bias="all"), "bias"),
    ("llama", BF16, LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}), "lm_head"),  # the head too
    ("llama", BF16, LoraConfig(**LORA, use_dora=True), "the method is DoRA"),
    ("llama", BF16, AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["q_proj"]), "ADALORA"),
    ("llama", BF16, LoraConfig(**LORA | {"target_modules": ["embed_tokens", "q_proj"]}), "embed_tokens"),
    ("llama-tied", BF16, LoraConfig(**LORA, modules_to_save=["lm_head"]), "lm_head.weight.* tied"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "settings", "reason"), MERGES, ids=lambda v: v if isinstance(v, str) else str(v)[:12]
)
@pytest.mark.filterwarnings("ignore")
def test_a_merge_equals_that_of_peft_bit_for_bit(
    make: Make, tmp_path: Path, name: str, dtype: torch.dtype, settings: PeftConfig, reason: str | None
) -> None:
    base, adapter = make(MODELS.get(name, EXPERTS), dtype, settings)
    merging, folder = merge(base, adapter)
    assert merging.method == ("shards" if reason is None else "peft")
    assert re.search(reason or "", merging.reason or "")
    assert_same(folder, merge_with_peft(base, adapter, dtype), tmp_path / "peft")
    if reason is None:
        shards = [load_file(path) for path in folder.glob("*.safetensors")]
        assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= weights.SHARD_BYTES for shard in shards)


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "dora"),
    [
        ("llama", torch.float32, "nf4", False),
        ("qwen2", BF16, "fp4", False),
        ("bloom", BF16, "nf4", False),
        ("gpt2", torch.float32, "nf4", False),
        ("gpt2", torch.float32, "nf4", True),  # by PEFT
    ],
)
def test_the_round_trip_base_is_what_the_quantised_model_computes_with(
    make: Make, tmp_path: Path, name: str, dtype: torch.dtype, kind: str, dora: bool
) -> None:
    base, adapter = make(MODELS[name], dtype, LoraConfig(**LORA, use_dora=dora))
    quantisation = NF4 | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    merging, folder = merge(base, adapter, quantisation=quantisation)
    assert merging.method == ("peft" if dora else "shards")
    quantised, plain = load_base(local_source(base), quantisation), load_base(local_source(base))
    layers = [(path, m) for path, m in quantised.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) >= 8
    for path, module in layers:
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        target = plain.get_submodule(path)
        target.weight.data.copy_(weight.T if isinstance(target, Conv1D) else weight)
    expected = PeftModel.from_pretrained(plain, adapter).merge_and_unload().to(dtype)
    assert_same(folder, expected, tmp_path / "peft")


def test_rows_that_bitsandbytes_computes_wrongly_on_a_cpu_are_refused_in_4_bits(make: Make) -> None:
    base, _ = make(LlamaConfig(**WIDE | {"hidden_size": 48}), torch.float32, LoraConfig(**LORA))
    load_base(local_source(base))
    for load in (load_base, load_for_scoring):
        with pytest.raises(ModelError, match=r"q_proj of .*base .* 48 "):
            load(local_source(base), NF4)


@pytest.mark.parametrize(("stored", "written"), [(BF16, torch.float32), (torch.float32, BF16)], ids=str)
def test_a_merge_is_written_in_the_type_that_was_chosen(
    make: Make, tmp_path: Path, stored: torch.dtype, written: torch.dtype
) -> None:
    base, adapter = make(MODELS["qwen2"], stored, LoraConfig(**LORA))
    _, folder = merge(base, adapter, dtype=written)
    assert_same(folder, merge_with_peft(base, adapter, torch.float32).to(written), tmp_path / "peft")
    assert AutoConfig.from_pretrained(folder).dtype == written


def test_tensor_names_without_the_models_prefix_are_kept(make: Make, tmp_path: Path) -> None:
    base, adapter = make(MODELS["gpt2"], torch.float32, LoraConfig(**LORA))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors(base).items()}
    for path in base.glob("model*"):
        path.unlink()
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    merging, folder = merge(base, adapter)
    assert merging.method == "shards"
    assert set(tensors(folder)) == set(bare)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, value in merge_with_peft(base, adapter, torch.float32).state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_a_hub_repository_is_merged_from_the_cache_at_its_revision(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make(MODELS["llama"], torch.bfloat16, LoraConfig(**LORA))
    _, folder = merge(base, adapter)
    expected = tensors(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.move(base, tmp_path / "hub" / "models--owner--name" / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "from-hub").mkdir()
    identity = {"name_or_path": "owner/name", "revision": commit, "trust_remote_code": False}
    merge_adapter(identity, adapter, tmp_path / "from-hub")
    actual = tensors(tmp_path / "from-hub")
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_weights_of_the_adapter_that_the_base_does_not_have_are_listed(make: Make) -> None:
    base, adapter = make(MODELS["llama"], torch.float32, LoraConfig(**LORA))
    adapter_weights = load_file(adapter / "adapter_model.safetensors")
    stray = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    adapter_weights[stray] = torch.ones(4, 64)
    save_file(adapter_weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r" 1 .*layers\.7\.self_attn\.q_proj"):
        merge(base, adapter)


@pytest.mark.parametrize("dora", [False, True], ids=["shards", "peft"])
@pytest.mark.parametrize(
    ("key", "factor", "expected_text"),
    [
        ("layers.1.mlp.down_proj.lora_B.weight", 0.0, "changes nothing in model.layers.1.mlp.down_proj"),
        ("layers.0.mlp.up_proj.lora_B.weight", float("inf"), "layers.0.mlp.up_proj has infinite"),
    ],
)
def test_a_module_that_does_not_change_or_is_infinite_is_named(
    make: Make, dora: bool, key: str, factor: float, expected_text: str
) -> None:
    base, adapter = make(MODELS["llama"], torch.float16, LoraConfig(**LORA, use_dora=dora))
    adapter_weights = load_file(adapter / "adapter_model.safetensors")
    adapter_weights[f"base_model.model.model.{key}"] *= factor
    if dora and not factor:  # then the magnitude is that of the base
        weight = tensors(base)["model.layers.1.mlp.down_proj.weight"].float()
        adapter_weights["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"] = weight.norm(dim=1)
    save_file(adapter_weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=re.escape(expected_text)):
        merge(base, adapter)


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_a_base_is_merged_without_its_own_code_or_refused(make: Make, tmp_path: Path, model_type: str) -> None:
    base, adapter = make(MODELS["llama"], torch.bfloat16, LoraConfig(**LORA))
    expected = merge_with_peft(base, adapter, torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (base / "config.json").write_text(json.dumps(config | code | {"model_type": model_type}))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "merged").mkdir()
    identity = local_source(base) | {"trust_remote_code": True}
    if model_type == "own":
        with pytest.raises(ModelError, match="Python code"):
            merge_adapter(identity, adapter, tmp_path / "merged")
    else:  # transformers has a class for it
        merge_adapter(identity, adapter, tmp_path / "merged")
        assert "auto_map" not in json.loads((tmp_path / "merged" / "config.json").read_text())
        assert_same(tmp_path / "merged", expected, tmp_path / "peft")
    assert not (tmp_path / "ran").exists()


def write_index(shard: Path, weight_map: Any) -> None:
    shard.with_name(weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "expected_text"),
    [
        (Path.unlink, "model-00002-of"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:100]), "model-00002-of"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), "model-00002-of"),
        (lambda shard: write_index(shard, {"model.layers.9.up": shard.name}), r"model\.layers\.9\.up"),
        (lambda shard: write_index(shard, 3), "index"),
    ],
)
def test_an_incomplete_or_damaged_base_is_refused_with_the_files_name(
    make: Make, damage: Callable[[Path], object], expected_text: str
) -> None:
    base, adapter = make(MODELS["llama"], torch.bfloat16, LoraConfig(**LORA))
    damage(sorted(base.glob("*.safetensors"))[1])
    with pytest.raises(WeightsError, match=expected_text):
        merge(base, adapter)


def test_tensors_that_are_not_floating_point_keep_their_type_and_all_their_shape(tmp_path: Path) -> None:
    stored = {"a": torch.ones(2, 3), "b": torch.tensor([4, 5], dtype=torch.int32)}
    stored |= {"scalar": torch.tensor(3.0), "flags": torch.tensor([True, False, True])}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "written").mkdir()
    checkpoint = weights.open_checkpoint(tmp_path)
    weights.rewrite(checkpoint, tmp_path / "written", {}, torch.bfloat16, "merge")
    loaded = load_file(tmp_path / "written" / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(loaded[name], value.bfloat16() if value.is_floating_point() else value)
    with pytest.raises(WeightsError, match="written"):
        weights.rewrite(checkpoint, tmp_path / "written", {"a": lambda tensor: tensor.T}, None, "merge")
