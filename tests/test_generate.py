"""Answers in slots equal those to single prompts, for each kind of attention; a kill loses no answer."""

import gc
import random
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.chat.template import load_contract, local_source
from pipeline.core.files import read_json
from pipeline.evaluate import evaluate
from pipeline.params import Params
from pipeline.scoring import slots
from pipeline.scoring.generation import (
    BackendError,
    KeptAnswers,
    generate,
    generate_in_slots,
    generate_tokens,
    kept_file,
    rows_at_once,
    vllm_tokens,
)
from pipeline.scoring.slots import SlotBatch, why_no_slots
from pipeline.weights.loading import ModelError, load_base

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2, "eos_token_id": 1}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 1}
LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "moe_layers": []}
LLAMA4 |= {"attention_chunk_size": 16, "layer_types": ["chunked_attention"] * 2, "use_qk_norm": False}
GPT_NEO = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 45}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 32}
STOPPING = SimpleNamespace(stop_ids=frozenset(range(1, 256, 9)))
SLOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "gpt2": ("gpt2", GPT2 | {"bos_token_id": 2}),
    "a window of 6": ("mistral", GROUPED | WINDOW),
    "a window in some layers": ("qwen2", GROUPED | WINDOW | {"max_window_layers": 1}),
    "softcaps": ("gemma2", GROUPED | WINDOW | {"head_dim": 16}),
    "windows, and layers that share keys": ("gemma4_text", GROUPED | WINDOW | {"head_dim": 16}),
    "sinks": ("gpt_oss", GROUPED | WINDOW | {"head_dim": 16, "num_local_experts": 4}),
    "other rotations for long rows": ("phi3", GROUPED | {"rope_parameters": LONG, "eos_token_id": 1}),
    "experts": ("qwen3_moe", GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}
NO_SLOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunks": ("llama4_text", GROUPED | LLAMA4),
    "positions from the mask": ("bloom", {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "a window counted from the cache's end": ("gpt_neo", GPT_NEO),
    "mamba": ("mamba", {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}),
    "linear attention": ("qwen3_next", GROUPED),
}


def make(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    for parameter in model.parameters():  # a fresh model repeats itself; this one reacts to its input
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    return model


def random_prompts(number: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(12, 256) for _ in range(draw.randint(1, 40))] for _ in range(number)]


@torch.inference_mode()
def answer_alone(model: Any, prompt: list[int], limit: int = 20) -> list[int]:
    stops = sorted(STOPPING.stop_ids)
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=0)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("name", SLOTS)
def test_answers_in_slots_equal_those_to_single_prompts(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache grows and shrinks while rows are answered."""
    monkeypatch.setattr(slots, "PREFILL_TOKENS", 80)  # two long prompts
    monkeypatch.setattr(slots, "COLUMNS", {"cpu": columns})
    model, prompts = make(*SLOTS[name]), random_prompts(14)
    assert why_no_slots(model, prompts, 60) is None
    answers = dict(generate_in_slots(model, prompts, [20] * 14, STOPPING, 4))
    assert len({len(ids) for ids in answers.values()}) > 1  # so rows have left one by one
    assert answers == {i: answer_alone(model, prompt) for i, prompt in enumerate(prompts)}


@pytest.mark.parametrize("name", NO_SLOTS)
def test_a_model_with_another_memory_or_other_masks_is_not_computed_in_slots(name: str) -> None:
    assert why_no_slots(make(*NO_SLOTS[name]), random_prompts(14), 60)


def test_slots_with_other_logits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = make(*SLOTS["llama"]), SlotBatch._forward

    def one_position_off(batch: SlotBatch) -> Any:
        batch.positions.sub_(1)
        return real(batch)

    monkeypatch.setattr(SlotBatch, "_forward", one_position_off)
    reason = why_no_slots(model, random_prompts(14), 60)
    assert reason is not None and "logits differ" in reason


@torch.inference_mode()
def assert_answered(batch: SlotBatch, first: int, model: Any, prompts: list[list[int]]) -> None:
    answers = [[token] for token in batch.last[first:]]
    for _ in range(3):
        batch.step()
        answers = [[*answer, token] for answer, token in zip(answers, batch.last[first:], strict=True)]
    expected = [answer_alone(model, prompt, 4) for prompt in prompts]
    assert max(map(len, expected)) == 4
    assert [answer[: len(alone)] for answer, alone in zip(answers, expected, strict=True)] == expected


@pytest.mark.parametrize(("kept", "joining"), [([3], [2, 1, 0]), ([1, 2, 3], [10])], ids=["more rows", "longer rows"])
@torch.inference_mode()
def test_rows_join_a_batch_that_has_too_few_slots_or_columns(
    kept: list[int], joining: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "COLUMNS", {"cpu": 16})
    model, prompts = make(*SLOTS["llama"]), sorted(random_prompts(14), key=len)
    batch = SlotBatch(model, rows=4, longest=60)
    batch.join(prompts[3::-1])
    batch.keep(kept)
    batch.step()
    batch.join([prompts[i] for i in joining])
    assert_answered(batch, len(kept), model, [prompts[i] for i in joining])


@torch.inference_mode()
def test_numbers_that_overflowed_in_an_ended_row_do_not_reach_the_next_one_in_its_slot() -> None:
    model, (first, *prompts) = make(*SLOTS["llama"]), random_prompts(3)
    batch = SlotBatch(model, rows=2, longest=60)
    batch.join([max(prompts, key=len), min(prompts, key=len)])
    batch.keep([1])
    for layer in batch.layers:
        layer.keys[0], layer.values[0] = torch.nan, torch.nan
    batch.join([first])
    assert_answered(batch, 1, model, [first])


@torch.inference_mode()
def test_a_batch_leaves_no_memory_for_the_garbage_collector() -> None:
    batch = SlotBatch(make(*SLOTS["llama"]), rows=2, longest=60)
    batch.join([[5, 6, 7]])
    batch.step()
    left = weakref.ref(batch)
    gc.disable()
    try:
        del batch
        assert left() is None
    finally:
        gc.enable()


def test_slots_of_ended_rows_are_given_to_others_and_dropped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, real = [], SlotBatch._forward
    monkeypatch.setattr(SlotBatch, "_forward", lambda batch: computed.append(len(batch.tokens)) or real(batch))
    answers = dict(generate_in_slots(make(*SLOTS["llama"]), random_prompts(64), [20] * 64, STOPPING, 8))
    needed = sum(len(ids) - 1 for ids in answers.values())  # the first token comes with the prompt
    assert max(computed) == 8 and computed[-1] < 4
    assert needed <= sum(computed) < 1.25 * needed
    model, prompts = make(*SLOTS["llama"]), random_prompts(11)  # rows that end together leave their slots to fewer
    answers = dict(generate_in_slots(model, prompts, [2] * 11, STOPPING, 8))
    assert answers == {i: answer_alone(model, prompt, 2) for i, prompt in enumerate(prompts)}


def test_fixed_batches_give_the_same_answers_and_are_reported(
    base: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    model = load_base(local_source(base))
    prompts = pq.read_table(dataset / "test.parquet").column("input_ids").to_pylist()[:9]
    slot_answers = dict(generate_tokens(model, prompts, [5] * 9, template, 4, "--max-new-tokens"))
    monkeypatch.setattr("pipeline.scoring.generation.why_no_slots", lambda *_: "a reason")
    assert dict(generate_tokens(model, prompts, [5] * 9, template, 4, "--max-new-tokens")) == slot_answers
    assert "fixed batches" in capsys.readouterr().err
    limits = [2, *[5] * 8]  # the end of the context leaves one prompt fewer tokens
    answers = dict(generate_tokens(model, prompts, limits, template, 4, "--max-new-tokens"))
    assert answers == slot_answers | {0: slot_answers[0][:2]}


def test_an_answer_ends_at_its_end_token_or_is_cut_off_at_the_limit_or_the_end_of_the_context(
    base: Path, dataset: Path
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    prompt = pq.read_table(dataset / "test.parquet").column("input_ids").to_pylist()[:1]
    model = load_base(local_source(base))
    [short] = generate(model, template, prompt, 1, 1, "test", "base")
    [complete] = generate(model, template, prompt, 64, 1, "test", "base")
    assert (short.cut_off, len(short.ids), complete.cut_off) == (True, 1, False)
    assert 1 < len(complete.ids) < 64
    assert generate(model, template, [], 8, 4, "test", "base") == []
    long, other = generate(model, template, [[1] * 510, [1]], 8, 2, "test", "base")
    assert (long.cut_off, len(long.ids), len(other.ids) > 2) == (True, 2, True)
    with pytest.raises(ModelError, match="512 tokens, and the model takes 512"):
        generate(model, template, [[1], [1] * 512], 8, 1, "test", "base")


def test_a_gpu_answers_as_many_prompts_at_once_as_fit_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_3_8b = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    model = SimpleNamespace(config=CONFIG_MAPPING["llama"](**llama_3_8b), dtype=torch.bfloat16)
    monkeypatch.setattr("pipeline.scoring.generation.input_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * 2**30, 24 * 2**30))
    assert rows_at_once(model, "auto", 512) == 67  # 128 KiB per token
    assert rows_at_once(model, "auto", 64) == 256 and rows_at_once(model, "auto", 10**6) == 1
    assert rows_at_once(model, 16, 512) == 16
    layer_types = ["sliding_attention"] * 3 + ["full_attention"]  # whose heads are twice as wide
    gemma = {"head_dim": 128, "global_head_dim": 256, "num_key_value_heads": 8, "layer_types": layer_types * 8}
    model.config = CONFIG_MAPPING["gemma4_text"](**llama_3_8b | gemma)
    assert rows_at_once(model, "auto", 512) == int(67.2 / 1.25)
    model.config = CONFIG_MAPPING["mamba"]()
    assert rows_at_once(model, "auto", 512) == 256


def test_kept_answers_of_another_model_or_setting_are_not_used(tmp_path: Path) -> None:
    settings = {"model": {"base": "a"}, "prompts": [[1, 2]], "max_new_tokens": 8, "stop_ids": frozenset({1})}
    changes = [{"model": {"base": "b"}}, {"prompts": [[1], [2]]}, {"max_new_tokens": 9}, {"stop_ids": frozenset({2})}]
    assert len({kept_file(tmp_path, **settings | change) for change in [{}, *changes]}) == 5


def test_a_line_that_was_cut_short_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("[0, [5, 6]]\n[3, [7, ")
    kept = KeptAnswers(path)
    assert kept == {0: [5, 6]}
    kept[3] = [7, 8]
    assert KeptAnswers(path) == {0: [5, 6], 3: [7, 8]}


def test_a_killed_evaluation_continues_where_it_stopped(
    tmp_path: Path, dataset: Path, adapter: Path, evaluation: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, output = tmp_path / "kept", tmp_path / "evaluation"
    add, added = KeptAnswers.__setitem__, []

    def add_ten(answers: KeptAnswers, number: int, ids: Any) -> None:
        if len(added) == 10:
            raise KeyboardInterrupt
        # The first kept answer is altered; if the result has it, it was not generated again.
        added.append((number, ids if added else [40, *ids]))
        add(answers, *added[-1])

    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "__setitem__", add_ten)
        with pytest.raises(KeyboardInterrupt):
            evaluate(params.evaluate, dataset, adapter, output, kept)
    assert not output.exists()
    (kept / "an earlier run's.jsonl").write_text("")
    evaluate(params.evaluate, dataset, adapter, output, kept)
    assert len(list(kept.iterdir())) == 2
    expected = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
    expected[added[0][0]] = added[0][1]
    assert pq.read_table(output / "items.adapter.parquet").column("answer_ids").to_pylist() == expected
    same = (pq.read_table(folder / "items.base.parquet") for folder in (output, evaluation))
    assert next(same).equals(next(same))


def test_vllm_answers_greedily_with_base_and_adapter_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, base: Path, adapter: Path
) -> None:
    """With a stand-in that has vLLM's documented arguments; the package itself is not installed for tests."""
    for quantised, expected_text in ((True, "4-bit"), (False, "No module named 'vllm'")):
        with pytest.raises(BackendError, match=expected_text):
            vllm_tokens(local_source(base), adapter, [[1]], 8, frozenset({2}), quantised)

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            assert arguments["load_format"] == "safetensors" and not arguments["trust_remote_code"]
            assert (arguments["max_lora_rank"], arguments["max_model_len"]) == (8, 512)

        def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, lora_request: Any) -> list[Any]:
            assert [row["max_tokens"] for row in sampling] == [8, 2]  # the second ends 2 tokens before the context
            assert (sampling[0]["temperature"], sampling[0]["stop_token_ids"]) == (0.0, [2, 7])
            last = 5 if lora_request is None else 6
            tokens = [[*prompt["prompt_token_ids"], last] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in tokens]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **arguments: arguments)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *arguments: arguments))
    tokens = vllm_tokens(local_source(base), adapter, [[1, 2, 3], [4] * 510], 8, frozenset({7, 2}), quantised=False)
    assert tokens == {"adapter": [[1, 2, 3, 6], [*[4] * 510, 6]], "base": [[1, 2, 3, 5], [*[4] * 510, 5]]}
