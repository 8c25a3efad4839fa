"""The plan of a training: counted without weights, compared with what the real step allocates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from trl.trainer.utils import add_fused_lm_head

from pipeline.model import load_base
from pipeline.params import Params, TrainParams
from pipeline.plan import GIB, Plan, PlanError, _one_step, describe, plan
from pipeline.train import QUANTISATION, train
from pipeline.training.methods import adapter_config

LLAMA = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=4000,
)
QWEN2 = Qwen2Config(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4000,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=4000, n_positions=1024)
MIXTRAL = MixtralConfig(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=4000,
    num_local_experts=4,
)
DEEPSEEK = DeepseekV3Config(
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=4000,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=64,
    q_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "65B": (8192, 22016, 80, 64)}


def of_size(size: str, layers: int | None = None) -> LlamaConfig:
    hidden, intermediate, all_layers, heads = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )


def planned(params: Params, **changes: Any) -> TrainParams:
    return with_(params, train={"lora_r": 16, "method": method_of(changes)} | changes).train


def method_of(changes: dict[str, Any]) -> str:
    return "qlora" if changes.get("load_in_4bit", True) else "lora"


def measured(config: PreTrainedConfig, params: TrainParams, length: int, folder: Path) -> int:
    """Bytes of weights and of the worst moment of one real micro-batch, by the allocator's own record."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    identity = {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}
    model = load_base(identity, {key: getattr(params, key) for key in QUANTISATION})
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    constants = [t for s in states if s for t in (s.absmax, *([s.state2.absmax] if s.nested else []))]
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *constants])
    model.requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tuned = get_peft_model(model, adapter_config(params, model)).train()
    if params.gradient_checkpointing:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    ids = torch.randint(0, 100, (1, length))
    positions = torch.arange(length // 2).repeat(2)[None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        (-tuned(input_ids=ids, labels=ids, position_ids=positions, fused_lm_head=True).log_probs.sum()).backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


@pytest.mark.parametrize(
    ("config", "load_in_4bit", "gradient_checkpointing"),
    [
        pytest.param(config, load_in_4bit, again, marks=[] if (load_in_4bit, again) in quick else pytest.mark.faults)
        for config, quick in (
            (LLAMA, [(True, False), (False, True)]),
            (QWEN2, [(True, True)]),
            (GPT2, [(True, False)]),
            (MIXTRAL, [(True, False)]),
            (DEEPSEEK, [(False, True)]),
        )
        for load_in_4bit in (False, True)
        for again in (False, True)
    ],
)
def test_the_planned_memory_is_within_a_tenth_of_the_measured(
    params: Params, tmp_path: Path, config: PreTrainedConfig, load_in_4bit: bool, gradient_checkpointing: bool
) -> None:
    settings = planned(params, load_in_4bit=load_in_4bit, gradient_checkpointing=gradient_checkpointing)
    memory = _one_step(config, settings, 512, on_gpu=False).memory
    real = measured(config, settings, 512, tmp_path / "base")
    assert memory.weights + memory.activations + memory.backward == pytest.approx(real, rel=0.10)


def test_the_parameters_are_those_of_the_training(params: Params, dataset: Path, tmp_path: Path) -> None:
    short = with_(params, train={"max_steps": 2, "warmup_ratio": 0.0})
    trained = train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    made = plan(short, dataset)
    assert made.trainable_parameters == trained.trainable_parameters
    assert made.steps == trained.steps


def test_the_steps_of_all_epochs_are_counted(params: Params, dataset: Path, adapter: Path) -> None:
    from pipeline.files import read_json

    made = plan(params, dataset)
    assert made.steps == read_json(adapter / "training.json")["steps"]
    assert made.tokens and made.tokens > 0


def test_a_token_costs_two_flops_a_weight_forward_and_two_back(params: Params) -> None:
    # Frozen weights take no gradient: 4 a weight, not 6; recomputing the forward pass adds 2. The head is recomputed
    # tile by tile in any case.
    config = of_size("7B", layers=4)
    layers = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    head = 4096 * 32000
    kept = _one_step(config, planned(params), 256, on_gpu=True)
    again = _one_step(config, planned(params, gradient_checkpointing=True), 256, on_gpu=True)
    assert kept.flops_per_token == pytest.approx(4 * layers + 6 * head, rel=0.05)
    assert again.flops_per_token == pytest.approx(6 * layers + 6 * head, rel=0.05)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("size", "load_in_4bit", "known_gb"), [("7B", False, 24), ("13B", False, 45), ("13B", True, 22)]
)
def test_the_known_table_comes_out(params: Params, size: str, load_in_4bit: bool, known_gb: float) -> None:
    settings = planned(params, load_in_4bit=load_in_4bit)
    peak = _one_step(of_size(size), settings, 1024, on_gpu=True).memory.peak
    assert peak / 1e9 + 1 == pytest.approx(known_gb, rel=0.10)  # 1 GB for the CUDA context


def test_7b_in_4_bits_stays_below_12_gb(params: Params) -> None:
    peak = _one_step(of_size("7B"), planned(params, load_in_4bit=True), 512, on_gpu=True).memory.peak
    assert peak / 1e9 + 1 < 12


@pytest.mark.faults
def test_65b_fits_into_48_gb_in_4_bits_with_checkpointing_only(params: Params) -> None:
    def fits(**changes: Any) -> bool:
        return _one_step(of_size("65B"), planned(params, **changes), 512, on_gpu=True).memory.peak < 44 * GIB

    assert fits(load_in_4bit=True, gradient_checkpointing=True)
    assert not fits(load_in_4bit=True)
    assert not fits(load_in_4bit=False, gradient_checkpointing=True)


def big(params: Params, tmp_path: Path, size: str, **train: Any) -> Params:
    of_size(size).save_pretrained(tmp_path / size)
    return with_(
        params,
        prepare={"model_name_or_path": str(tmp_path / size), "max_length": 2048},
        train={"lora_r": 16, "method": method_of(train)} | train,
    )


def test_a_run_that_cannot_fit_is_refused_with_what_would_fit(params: Params, tmp_path: Path) -> None:
    tried = big(params, tmp_path, "7B", load_in_4bit=False, per_device_train_batch_size=1)
    with pytest.raises(
        PlanError, match=r"needs \d+\.\d GiB; the L4 has 20\.2 GiB available; with train\.gradient_checkp"
    ) as e:
        plan(tried, gpu="L4")
    assert "train.gradient_checkpointing: true" in str(e.value)


@pytest.mark.faults
def test_a_model_too_large_for_any_setting_says_so(params: Params, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no setting makes it fit"):
        plan(big(params, tmp_path, "65B"), gpu="L4")


def test_an_unknown_gpu_is_refused_with_those_there_are(params: Params) -> None:
    with pytest.raises(PlanError, match="A100-80GB"):
        plan(params, gpu="Voodoo2")


def test_a_missing_model_is_refused(params: Params, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no model configuration could be read"):
        plan(with_(params, prepare={"model_name_or_path": str(tmp_path)}))


def test_time_and_cost_follow_from_tokens_and_price(params: Params, dataset: Path) -> None:
    made = plan(params, dataset, gpu="A100-80GB")
    assert made.tokens is not None and made.seconds is not None and made.cost_usd is not None
    assert made.seconds == pytest.approx(made.flops_per_token * made.tokens / (312e12 * 0.40))
    assert made.cost_usd == pytest.approx(made.seconds / 3600 * 1.80)
    assert "A100-80GB" in describe(made)


def test_several_gpus_take_fewer_steps_in_less_time_for_the_same_money(params: Params, dataset: Path) -> None:
    one = plan(params, dataset, gpu="A100-80GB")
    four = plan(with_(params, train={"strategy": "ddp", "num_processes": 4}), dataset, gpu="A100-80GB")
    assert one.steps and one.seconds and one.cost_usd and four.steps and four.seconds
    assert (
        one.steps / 4 <= four.steps < one.steps / 4 + params.train.num_train_epochs
    )  # an epoch's last step may be short
    assert four.seconds == pytest.approx(one.seconds / 4, rel=0.2)
    assert four.cost_usd == pytest.approx(one.cost_usd, rel=0.2)


def test_a_plan_without_a_dataset_says_what_is_missing(params: Params) -> None:
    made: Plan = plan(params)
    assert (made.steps, made.tokens, made.seconds) == (None, None, None)
    assert "dvc repro prepare" in describe(made)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "rslora", "ia3", "adalora", "prefix", "prompt", "full"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_method_is_planned_with_the_parameters_that_it_trains(params: Params, method: str, on_gpu: bool) -> None:
    settings = {"method": method, "load_in_4bit": "auto", "packing": method not in ("prefix", "prompt")}
    chosen = with_(params, train=settings).train
    step = _one_step(LLAMA, chosen, 64, on_gpu=on_gpu)
    model = AutoModelForCausalLM.from_config(LLAMA)
    peft_config = adapter_config(chosen, model)
    trained = get_peft_model(model, peft_config) if peft_config else model
    counted = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert step.trainable_parameters == pytest.approx(counted, rel=1e-3)  # AdaLoRA's rank counters are none on a GPU
    assert min(step.memory.weights, step.memory.activations, step.memory.backward, step.flops_per_token) > 0


def test_a_classifier_is_planned(params: Params) -> None:
    settings = {"task": "sequence-classification", "packing": False}
    chosen = with_(params, train=settings, promote={"primary_metric": "accuracy", "guard_metrics": {}}).train
    assert _one_step(LLAMA, chosen, 64, on_gpu=False).memory.peak > 0


def test_a_step_that_cannot_be_counted_is_refused_by_name(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_at_values(*_: Any) -> torch.Tensor:
        return torch.zeros(2, device="meta").nonzero()

    monkeypatch.setattr("pipeline.plan.experts", looks_at_values)
    with pytest.raises(PlanError, match="mixtral"):
        _one_step(MIXTRAL, planned(params), 64, on_gpu=True)
