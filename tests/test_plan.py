"""The plan of a training: the formula against what a GPU took, and what a plan says and refuses."""

from pathlib import Path
from typing import Any

import pytest
from conftest import with_
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

from pipeline.params import Params
from pipeline.train import train
from pipeline.training.methods import adapter_config
from pipeline.training.plan import GIB, Plan, PlanError, _one_step, describe, plan

SMALL: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 4000}
LLAMA = LlamaConfig(**SMALL, intermediate_size=704, num_attention_heads=8)
MIXTRAL = MixtralConfig(**SMALL, intermediate_size=256, num_attention_heads=8, num_local_experts=4)
LLAMA_3_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
SIZES = {"7B": (4096, 11008, 32, 32), "65B": (8192, 22016, 80, 64)}


def of_size(size: str, layers: int | None = None) -> LlamaConfig:
    hidden, intermediate, all_layers, heads = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
    )


def planned(params: Params, **changes: Any) -> Any:
    settings = {"lora_r": 16, "lora_target_modules": "all-linear", "method": method_of(changes)}
    return with_(params, train=settings | changes).train


def method_of(changes: dict[str, Any]) -> str:
    return "qlora" if changes.get("load_in_4bit", True) else "lora"


VARLEN: dict[str, Any] = {"attn_implementation": "flash_attention_2"}  # packed rows without a mask


# Measured on one H200 (November 2026; torch 2.11, transformers 5.23, trl 1.16, peft 0.21.2, bitsandbytes 0.50.2,
# liger-kernel 0.8.5): Llama-3.1-8B's shape, LoRA r 16 on all linear layers, packed lines of 2,048, bf16;
# `max_memory_allocated` in the steps.
@pytest.mark.parametrize(
    ("rows", "changes", "peak_gib"),
    [
        (2, {}, 30.98),
        (2, {"gradient_checkpointing": True}, 7.66),
        (2, VARLEN, 29.98),
        (2, VARLEN | {"use_liger_kernel": True}, 24.48),
        (4, VARLEN | {"use_liger_kernel": True}, 43.14),
        (2, {"load_in_4bit": False}, 39.56),
    ],
)
def test_the_formula_is_within_a_tenth_of_a_gpu(
    params: Params, rows: int, changes: dict[str, Any], peak_gib: float
) -> None:
    step = _one_step(LLAMA_3_8B, planned(params, per_device_train_batch_size=rows, **changes), 2048, on_gpu=True)
    assert step.memory.peak / GIB == pytest.approx(peak_gib, rel=0.10)


def test_the_parameters_are_those_of_the_training(params: Params, dataset: Path, tmp_path: Path) -> None:
    short = with_(params, train={"max_steps": 2, "warmup_ratio": 0.0})
    trained = train(short.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    made = plan(short, dataset)
    assert made.trainable_parameters == trained.trainable_parameters
    assert made.steps == trained.steps


def test_the_steps_of_all_epochs_are_counted(params: Params, dataset: Path, adapter: Path) -> None:
    from pipeline.core.files import read_json

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


def test_a_mixture_of_experts_works_with_those_that_a_token_goes_to(params: Params) -> None:
    few, all_four = (MixtralConfig(**MIXTRAL.to_dict() | {"num_experts_per_tok": n}) for n in (2, 4))
    settings = planned(params, lora_target_modules="attention")
    steps = [_one_step(config, settings, 64, on_gpu=True) for config in (few, all_four)]
    assert steps[0].parameters == steps[1].parameters
    assert steps[0].flops_per_token < steps[1].flops_per_token
    assert steps[0].memory.peak < steps[1].memory.peak


def test_a_model_without_the_sizes_of_the_formula_is_refused_by_name(params: Params) -> None:
    config = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100)
    with pytest.raises(PlanError, match="mamba"):
        _one_step(config, planned(params), 64, on_gpu=True)
