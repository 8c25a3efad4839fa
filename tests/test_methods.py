"""Every train.method and every model family, trained, evaluated and merged on tiny real architectures."""

import csv
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import make_base, with_
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DeepseekV32Config,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    LagunaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from pipeline.chat.template import local_source
from pipeline.core.combinations import VIRTUAL_TOKENS
from pipeline.core.files import read_json
from pipeline.core.vetting import DENIED
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params, TrainParams
from pipeline.prepare import prepare
from pipeline.train import train
from pipeline.training.methods import adapter_config
from pipeline.training.targets import describe_experts, target_modules
from pipeline.training.trainer import AdapterTrainer
from pipeline.training.watching import TrainError
from pipeline.weights.loading import load_base
from pipeline.weights.merging import MergeError
from pipeline.weights.placement import load_tuned, untuned

SIZES = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SIZES | {"intermediate_size": 128, "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": None}
GROUPED = WIDE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 64}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**HEADS),
    "mistral": MistralConfig(**HEADS),
    "gemma": GemmaConfig(**WIDE, num_key_value_heads=1, head_dim=16),
    "phi": PhiConfig(**WIDE),
    "glm": GlmConfig(**HEADS),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**WIDE, **LATENT),  # no experts in its first layer, shared ones in its second
    "gemma3": Gemma3Config(  # with a part for images, whose layers have the same names
        text_config=Gemma3TextConfig(**HEADS, sliding_window=16),
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
    ),
    "llama4": Llama4TextConfig(**HEADS, intermediate_size_mlp=128, num_local_experts=4),
    "modernbert": ModernBertDecoderConfig(**GROUPED | {"bos_token_id": 1}, cls_token_id=1, sep_token_id=2),
    "deepseek_v32": DeepseekV32Config(**WIDE, **LATENT, index_head_dim=32, index_n_heads=2),
    "gemma4": Gemma4TextConfig(  # with wider heads in some layers
        **GROUPED, head_dim=16, global_head_dim=32, layer_types=["sliding_attention", "full_attention"],
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=400,
    ),
    "falcon_h1": FalconH1Config(**HEADS, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16),
    "qwen3_5": Qwen3_5TextConfig(**HEADS, layer_types=["linear_attention", "full_attention"]),
    "bloom": BloomConfig(vocab_size=400, hidden_size=64, n_layer=2, n_head=4, eos_token_id=2),
    "gpt2": GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=512, eos_token_id=2),
}  # fmt: skip
# Bloom's ALiBi counts positions over the whole packed sequence; the others need a package to keep rows apart.
UNPACKED = {family: {"packing": False} for family in ("bloom", "falcon_h1", "qwen3_5")}
ONLY_LORA = ("llama4", "modernbert", "deepseek_v32", "gemma4", "falcon_h1", "qwen3_5")
# TRL's fused head does not find Llama 4's layers, and skips one of ModernBERT's.
OWN_LOSS = ("llama4", "modernbert")
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
METHODS = get_args(TrainParams.model_fields["method"].annotation)
LINEAR_ONLY = ("dora", "ia3", "adalora")  # methods that cannot train experts
# By default each method is tested on one family; the other pairs are marked faults.
QUICK = {
    "lora": "modernbert", "qlora": "mixtral", "dora": "gemma", "rslora": "phi", "ia3": "gpt2", "adalora": "qwen2",
    "prefix": "mixtral", "prompt": "qwen3", "full": "gemma3",
}  # fmt: skip
PAIRS = [
    pytest.param(family, method, marks=[] if QUICK[method] == family else pytest.mark.faults)
    for family in FAMILIES
    for method in METHODS
    if method == "lora" or family not in ONLY_LORA
]


def on_meta(family: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family])


def of_family(params: Params, data: Path, config: PretrainedConfig, folder: Path) -> Path:
    """A dataset prepared from `data` for a random model of `config`."""
    base = make_base(folder / "base")
    (base / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    prepare(with_(params, prepare={"model_name_or_path": str(base)}).prepare, data, folder / "dataset")
    return folder / "dataset"


def short(params: Params, method: str, **values: Any) -> Params:
    settings = {"method": method, "load_in_4bit": "auto", "max_steps": 4, "logging_steps": 2, "warmup_ratio": 0.0}
    settings |= {"learning_rate": 0.02, "packing": method not in ("prefix", "prompt"), "per_device_train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 1, "tokens_per_step": None}
    settings |= {"lora_target_modules": "all-linear", "num_virtual_tokens": 4} | values
    evaluate = {"max_samples": 6, "max_new_tokens": 3, "bootstrap_samples": 100}
    return with_(params, train=settings, evaluate=evaluate, merge={"max_metric_drop": 1.0})


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_family_is_trained_evaluated_and_merged(
    tmp_path: Path, params: Params, data: Path, family: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = of_family(params, data, FAMILIES[family], tmp_path)
    attention = {"lora_target_modules": "attention"} if family in EXPERTS and method in LINEAR_ONLY else {}
    settings = short(params, method, **UNPACKED.get(family, {}), **attention)
    if (family, method) == ("deepseek_v3", "prefix"):  # its cache is compressed
        with pytest.raises(TrainError, match="deepseek_v3"):
            train(settings.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
        return
    result = train(settings.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    evaluate(settings.evaluate, dataset, tmp_path / "adapter", tmp_path / "evaluation")
    assert result.steps == 4 and result.trainable_parameters > 0
    assert f"loss: {'the model' if family in OWN_LOSS else 'TRL'}'s" in capsys.readouterr().out
    scores = read_json(tmp_path / "evaluation" / "scores.json")
    assert scores["adapter"]["num_samples"] == scores["base"]["num_samples"] == 6
    folders = (tmp_path / name for name in ("adapter", "evaluation", "merged", "parity"))
    if method in VIRTUAL_TOKENS:
        with pytest.raises(MergeError):
            merge(settings.merge, dataset, *folders)
        return
    merged = merge(settings.merge, dataset, *folders)
    assert merged.agreement >= 0.5
    if method != "qlora":  # nothing is rounded
        assert merged.logit_error["full"] < 1e-4 and merged.agreement == 1
    read_json(tmp_path / "merged" / "config.json")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_fused_head_trains_and_validates_as_the_models_own_loss(
    tmp_path: Path, params: Params, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = of_family(params, data, FAMILIES["mixtral"], tmp_path)
    settings = short(params, "lora", gradient_accumulation_steps=2, logging_steps=1).train
    train(settings, dataset, tmp_path / "fused", tmp_path / "checkpoints")
    monkeypatch.setattr(AdapterTrainer, "use_fused_head", lambda trainer: None)
    train(settings, dataset, tmp_path / "own", tmp_path / "checkpoints")
    fused, own = (csv.DictReader((tmp_path / name / "loss.csv").open()) for name in ("fused", "own"))
    for a, b in zip(fused, own, strict=True):
        for column in ("loss", "validation_loss", "grad_norm"):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), rel=1e-5)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_untuned_base_answers_as_the_base_alone(
    tmp_path: Path, params: Params, dataset: Path, base: Path, method: str
) -> None:
    settings = short(params, method)
    train(settings.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    quantisation = read_json(tmp_path / "adapter" / "training.json")["quantisation"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = load_base(local_source(base), quantisation).eval()(ids).logits
        tuned = load_tuned(local_source(base), quantisation, tmp_path / "adapter")
        changed = tuned(ids).logits[:, -3:]
        with untuned(tuned, local_source(base)) as plain:
            assert torch.equal(plain(ids).logits, alone)
        if method != "full":  # whose weights the base has replaced
            assert torch.equal(tuned(ids).logits[:, -3:], changed)  # the adapter is active again
    assert not torch.allclose(changed, alone, atol=1e-3)
    if method == "full":
        before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "adapter" / "model.safetensors")
        assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)


def test_adalora_cuts_rank_and_keeps_its_factors_orthogonal(tmp_path: Path, params: Params, dataset: Path) -> None:
    settings = short(params, "adalora", max_steps=10, lora_r=4)
    train(settings.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    ranks = [sum(rank) for rank in config["rank_pattern"].values()]
    assert (config["init_r"], config["target_r"]) == (6, 4)
    assert sum(ranks) == 4 * len(ranks)  # the budget is spent, by importance and not evenly
    assert config["total_step"] == 10


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", "auto", ["q_proj", "v_proj"]),
        ("llama", "attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt2", "auto", ["c_attn"]),
        ("gpt2", "attention", ["attn.c_proj", "c_attn"]),  # another c_proj is in the feed-forward part
        ("bloom", "auto", ["query_key_value"]),
        ("glm", "auto", ["k_proj", "o_proj", "q_proj", "v_proj"]),  # PEFT has no default for it
        ("phi", ["fc1", "dense"], ["dense", "fc1"]),
        ("mixtral", "all-linear", ["k_proj", "o_proj", "q_proj", "v_proj"]),  # and its experts, but not its router
        ("deepseek_v32", "attention", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
        ("falcon_h1", "all-linear",
         ["down_proj", "gate_proj", "in_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("deepseek_v3", "attention", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
    ],
)  # fmt: skip
def test_target_modules_get_names_of_linear_layers(params: Params, family: str, targets: Any, names: list[str]) -> None:
    model = on_meta(family)
    assert target_modules(with_(params, train={"lora_target_modules": targets}).train, model) == names


def test_all_linear_leaves_out_layers_that_pass_no_gradient_or_ignore_an_adapter(params: Params) -> None:
    def layers(*names: str) -> torch.nn.Module:
        return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})

    block = {
        "self_attn": layers("q_proj", "gate"),
        "indexer": layers("wq_b"),
        "router": layers("classifier"),
        "mamba": layers("in_proj", "dt_proj", "out_proj"),
        "adapters": torch.nn.ModuleList([torch.nn.Linear(4, 4)]),  # the name "0" would also mean the whole block
    }
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(block)])})
    train = short(params, "ia3").train
    assert target_modules(train, model) == ["in_proj", "layers.0.adapters.0", "q_proj"]


@pytest.mark.parametrize(
    ("family", "method", "name", "possible"),
    [
        *(("gpt2", method, "q_proj", "attn.c_proj, c_attn, c_fc, mlp.c_proj") for method in ("lora", "ia3", "adalora")),
        ("llama", "lora", "lm_head", "q_proj"),  # the output layer
        ("llama", "lora", "embed_tokens", "q_proj"),
        ("mixtral", "lora", "gate", "experts.down_proj"),  # a router
        ("deepseek_v3", "lora", "gate_proj", "experts.gate_up_proj"),  # PEFT takes it for the experts
        ("gemma3", "lora", "fc1", "up_proj"),  # in the part for images
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_with_the_possible_names(
    params: Params, family: str, method: str, name: str, possible: str
) -> None:
    model = on_meta(family)
    with pytest.raises(TrainError, match=f"names {name}.*{possible}"):
        adapter_config(short(params, method, lora_target_modules=[name]).train, model)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_targets_of_all_linear_and_by_name_and_routers_are_not(params: Params, family: str) -> None:
    model = on_meta(family)
    all_linear = adapter_config(short(params, "lora").train, model)
    assert all_linear.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    named = short(params, "lora", lora_target_modules=["o_proj", "experts.down_proj"]).train
    assert adapter_config(named, model).target_parameters == ["experts.down_proj"]
    tuned = get_peft_model(model, all_linear)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any(".experts." in name for name in trained) and not any(".gate." in name for name in trained)
    assert "not trained" not in (describe_experts(named, model) or "")  # modules that were not named are not missing
    settings = tuned.peft_config["default"]
    assert not settings.rank_pattern and not settings.alpha_pattern


@pytest.mark.parametrize("targets", ["all-linear", "attention", "auto", ["q_proj", "up_proj"]])
def test_only_text_layers_of_a_model_for_images_are_trained(params: Params, targets: Any) -> None:
    model = on_meta("gemma3")
    for method in ("lora", "ia3"):
        chosen = target_modules(short(params, method, lora_target_modules=targets).train, model)
        assert all(path.startswith("model.language_model.layers.") for path in chosen)
        assert ("model.language_model.layers.1.self_attn.q_proj" in chosen) and len(chosen) in (14, 8, 4)


@pytest.mark.parametrize("change", [{"method": m} for m in LINEAR_ONLY] + [{"lora_dropout": 0.05}])
def test_methods_and_dropout_that_cannot_train_experts_are_refused(params: Params, change: dict[str, Any]) -> None:
    model = on_meta("mixtral")
    key = next(iter(change))
    with pytest.raises(TrainError, match=rf"train\.{key} is .*experts\.down_proj"):
        adapter_config(short(params, change.pop("method", "lora"), **change).train, model)
    adapter_config(short(params, "lora", lora_target_modules="attention", **change).train, model)


# PEFT 0.21 saves its shared experts under names that it does not load.
LAGUNA = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [(LlamaConfig(**GROUPED), "lora_alpha = "), (LagunaConfig(**HEADS, **LAGUNA), "missing weights")],
)
def test_an_adapter_that_could_not_be_loaded_again_is_refused_before_the_first_step(
    tmp_path: Path, params: Params, data: Path, monkeypatch: pytest.MonkeyPatch, config: Any, message: str
) -> None:
    monkeypatch.setattr("pipeline.training.methods.require_gradients", lambda _: pytest.fail("training has begun"))
    if "alpha" in message:
        monkeypatch.setattr("pipeline.core.vetting.DENIED", (*DENIED, "lora_alpha"))
    dataset = of_family(params, data, config, tmp_path)
    with pytest.raises(TrainError, match=message):
        train(short(params, "lora").train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
