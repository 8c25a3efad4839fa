"""Answers in slots are those of one by one, whatever the model remembers with; what is done survives a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, environment
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.chat.template import load_contract
from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.scoring.generation import in_slots, new_tokens, rows_at_once
from pipeline.scoring.kept import KeptAnswers, kept_file
from pipeline.scoring.slots import Slots, why_unfit
from pipeline.scoring.vllm import BackendError, vllm_tokens
from pipeline.weights.loading import load_base

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
STOPS = frozenset({1, 7, 9, 11})
IN_SLOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "gpt2": ("gpt2", GPT2),
    "mistral, a window of 6": ("mistral", GROUPED | {"sliding_window": 6}),
    "qwen2, some layers with a window": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "gemma2, softcaps and a window": ("gemma2", GROUPED | {"head_dim": 16, "sliding_window": 6}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "falcon": ("falcon", SIZES),
}
IN_BATCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}),
    "bloom, positions from the mask": ("bloom", {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
}


def make(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    for parameter in model.parameters():  # a fresh model repeats itself; this one depends on what it has read
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    return model


def made_up(number: int, prefix: int = 9) -> tuple[list[list[int]], list[int]]:
    draw = random.Random(0)
    prompts = [[5] * prefix + [draw.randrange(12, 256) for _ in range(draw.randint(1, 30))] for _ in range(number)]
    return prompts, [draw.randint(1, 20) for _ in prompts]


@torch.inference_mode()
def alone(model: Any, prompt: list[int], limit: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=sorted(STOPS), pad_token_id=0)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", IN_SLOTS)
def test_answers_in_slots_are_those_of_one_by_one(name: str) -> None:
    model = make(*IN_SLOTS[name])
    prompts, limits = made_up(14)
    assert why_unfit(model, prompts) is None
    answers = dict(in_slots(model, prompts, limits, STOPS, 4))
    assert len({len(ids) for ids in answers.values()}) > 5  # so rows did leave one by one
    assert answers == {i: alone(model, prompt, limits[i]) for i, prompt in enumerate(prompts)}


@pytest.mark.parametrize("name", IN_BATCHES)
def test_a_model_that_remembers_otherwise_is_noticed(name: str) -> None:
    assert why_unfit(make(*IN_BATCHES[name]), made_up(4)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_neighbour_seen_through_the_mask_is_more_than_the_models_own_noise(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model, (prompts, _) = make(*IN_SLOTS["llama"]).to(dtype), made_up(4)
    assert why_unfit(model, prompts) is None
    real = Slots._masks
    monkeypatch.setattr(Slots, "_masks", lambda *args: torch.ones_like(real(*args)))
    assert why_unfit(model, prompts)


def test_models_in_batches_end_at_their_stop_tokens_too(
    base: Path, dataset: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    template = load_contract(read_json(dataset / "contract.json"))
    model = load_base(local(base))
    prompts = pq.read_table(dataset / "test.parquet").column("input_ids").to_pylist()[:9]
    limits = [8, 3, 5] * 3
    ours = dict(new_tokens(model, prompts, limits, template, 4))
    monkeypatch.setattr("pipeline.scoring.generation.why_unfit", lambda *_: "of no reason")
    assert dict(new_tokens(model, prompts, limits, template, 4)) == ours
    assert "of no reason" in capsys.readouterr().err


def test_a_gpu_answers_as_many_prompts_at_once_as_it_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_3_8b = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config = CONFIG_MAPPING["llama"](**llama_3_8b)
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)
    monkeypatch.setattr("pipeline.scoring.generation.input_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * 2**30, 24 * 2**30))
    assert rows_at_once(model, "auto", 512) == 67  # of 128 KiB a token
    assert rows_at_once(model, "auto", 64) == 256 and rows_at_once(model, "auto", 10**6) == 1
    assert rows_at_once(model, 16, 512) == 16


def test_a_row_that_ends_takes_no_further_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompts, _) = make(*IN_SLOTS["llama"]), made_up(16)
    rows = []
    real = Slots.step
    monkeypatch.setattr(Slots, "step", lambda self: rows.append(len(self.tokens)) or real(self))
    limits = [1] * 15 + [30]
    answers = dict(in_slots(model, prompts, limits, frozenset(), 8))
    assert sum(rows) == sum(map(len, answers.values())) == sum(limits)


def test_answers_made_by_something_else_are_not_found(tmp_path: Path) -> None:
    names = [
        kept_file(tmp_path, {"base": base}, prompts, limit, frozenset(stops))
        for base in ("a", "b")
        for prompts in ([[1, 2]], [[1], [2]])
        for limit in (8, 9)
        for stops in ({1}, {2})
    ]
    assert len(set(names)) == 16


def test_a_line_cut_short_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("[0, [5, 6]]\n[3, [7, ")
    with KeptAnswers(path) as kept:
        assert kept.answers == {0: [5, 6]}
        kept.add(3, [7, 8])
    with KeptAnswers(path) as kept:
        assert kept.answers == {0: [5, 6], 3: [7, 8]}


KILLED = """
import sys, time, torch
from pathlib import Path
import pipeline.scoring.kept as kept
from pipeline.evaluate import evaluate
from pipeline.params import EvaluateParams
real = kept.KeptAnswers.add
kept.KeptAnswers.add = lambda *args: (real(*args), time.sleep(0.05))  # time to be killed in
torch.set_num_threads(1)
params, dataset, adapter, output, folder = sys.argv[1:]
evaluate(EvaluateParams.model_validate_json(params), Path(dataset), Path(adapter), Path(output), Path(folder))
"""


def test_a_killed_evaluation_goes_on_where_it_was(
    tmp_path: Path, dataset: Path, adapter: Path, evaluation: Path, params: Params
) -> None:
    from pipeline.evaluate import evaluate

    kept, output = tmp_path / "kept", tmp_path / "evaluation"
    arguments = [params.evaluate.model_dump_json(), *map(str, (dataset, adapter, output, kept))]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=environment(), cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(lines := [line for path in kept.glob("*.jsonl") for line in path.read_text().splitlines()]) < 10:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not output.exists()
    # One kept answer is altered: if it comes out so, it was not made again.
    (kept / "an earlier run's.jsonl").write_text("")
    [path] = kept.glob("*[0-9a-f].jsonl")
    place, ids = json.loads(lines[0])
    path.write_text("\n".join([json.dumps([place, [40, *ids]]), *path.read_text().split("\n")[1:]]))
    evaluate(params.evaluate, dataset, adapter, output, kept)
    assert len(list(kept.iterdir())) == 2
    expected = pq.read_table(evaluation / "items.adapter.parquet").column("answer_ids").to_pylist()
    expected[place] = [40, *ids]
    assert pq.read_table(output / "items.adapter.parquet").column("answer_ids").to_pylist() == expected
    same = (pq.read_table(folder / "items.base.parquet") for folder in (output, evaluation))
    assert next(same).equals(next(same))


def local(folder: Path) -> dict[str, Any]:
    return {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}


def test_vllm_without_its_package_or_for_a_quantised_base_is_refused(base: Path, adapter: Path) -> None:
    for quantised, named in ((True, "4-bit"), (False, "No module named 'vllm'")):
        with pytest.raises(BackendError, match=named):
            vllm_tokens(local(base), adapter, [[1]], 8, frozenset({2}), quantised)


def test_vllm_is_asked_with_tokens_greedily_and_with_the_adapter(
    monkeypatch: pytest.MonkeyPatch, base: Path, adapter: Path
) -> None:
    """Against a stand-in with vLLM's documented arguments: no machine of the tests has the package."""

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            assert arguments["load_format"] == "safetensors" and not arguments["trust_remote_code"]
            assert (arguments["max_lora_rank"], arguments["max_model_len"]) == (8, 11)

        def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, lora_request: Any) -> list[Any]:
            assert (sampling["temperature"], sampling["max_tokens"], sampling["stop_token_ids"]) == (0.0, 8, [2, 7])
            last = 5 if lora_request is None else 6
            tokens = [[*prompt["prompt_token_ids"], last] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in tokens]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **arguments: arguments)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *arguments: arguments))
    made = vllm_tokens(local(base), adapter, [[1, 2, 3], [4]], 8, frozenset({7, 2}), quantised=False)
    assert made == {"adapter": [[1, 2, 3, 6], [4, 6]], "base": [[1, 2, 3, 5], [4, 5]]}
