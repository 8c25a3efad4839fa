import csv
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import environment, make_base, with_
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.core.sanitise import portable
from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params, TrainParams
from pipeline.train import QUANTISATION, train
from pipeline.training.checkpoints import last_checkpoint, seal
from pipeline.training.watching import Interrupted
from pipeline.weights.loading import load_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def identity(base: Path) -> dict[str, object]:
    return {"name_or_path": str(base), "revision": None, "trust_remote_code": False}


def test_the_adapter_is_saved_as_safetensors_with_its_contract_and_curve(adapter: Path, dataset: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert read_json(adapter / "contract.json") == portable(read_json(dataset / "contract.json"))
    rows = list(csv.DictReader((adapter / "loss.csv").open()))
    assert float(rows[-1]["loss"] or rows[-2]["loss"]) < float(rows[0]["loss"])
    assert any(row["validation_loss"] for row in rows)


def test_the_same_seed_gives_the_same_adapter_in_another_process(tmp_path: Path, params: Params, dataset: Path) -> None:
    short = with_(params, train={"max_steps": 3, "logging_steps": 1}).train
    train(short, dataset, tmp_path / "here", tmp_path / "checkpoints")
    command = training_command(short, dataset, tmp_path)
    subprocess.run(command, env=environment() | {"PYTHONHASHSEED": "1"}, check=True)  # another order of sets
    assert_same_files(tmp_path / "here", tmp_path / "adapter")


def training_command(params: TrainParams, dataset: Path, folder: Path) -> list[str]:
    """A command that trains into `folder` in another process."""
    code = (
        "import sys, pathlib, pipeline.train as t, pipeline.params as p\n"
        "settings, dataset, folder = p.TrainParams.model_validate_json(sys.argv[1]), *map(pathlib.Path, sys.argv[2:])\n"
        "t.train(settings, dataset, folder / 'adapter', folder / 'checkpoints')"
    )
    return [sys.executable, "-c", code, params.model_dump_json(), str(dataset), str(folder)]


def assert_same_files(folder: Path, other: Path) -> None:
    for path in folder.iterdir():
        assert sha256_file(other / path.name) == sha256_file(path), path.name


def test_every_frozen_layer_passes_gradients_after_an_evaluation(base: Path, dataset: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first inference on AVX512-BF16 CPUs, and gradients stop there."""
    ids = torch.tensor([pq.read_table(dataset / "train.parquet").column("input_ids")[0].as_py()])

    def gradients(evaluate_first: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(load_base(identity(base), NF4), lora)
        if evaluate_first:
            with torch.no_grad():
                model.eval()(ids)
        model.train()(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    before, after = gradients(False), gradients(True)
    assert before.keys() == after.keys()
    for name, gradient in after.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6)


def test_another_base_than_the_datasets_is_refused(tmp_path: Path, params: Params, data: Path) -> None:
    from pipeline.chat.template import TemplateError
    from pipeline.prepare import prepare

    base = make_base(tmp_path / "base")
    prepare(with_(params, prepare={"model_name_or_path": str(base)}).prepare, data, tmp_path / "dataset")
    make_base(base, seed=1)
    with pytest.raises(TemplateError, match=str(base)):
        train(params.train, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "checkpoints")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigterm_saves_and_the_next_run_makes_the_same_adapter(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Kills that cannot be caught are in `test_kills.py`; bfloat16 is what adapters have on a GPU."""
    monkeypatch.setattr("pipeline.train.compute_dtype", lambda: dtype)
    short, steps = with_(params, train={"max_steps": 10, "logging_steps": 4}).train, iter(range(1000))
    train(short, dataset, tmp_path / "alone", tmp_path / "checkpoints")
    hook = register_optimizer_step_post_hook(
        lambda *_: signal.raise_signal(signal.SIGTERM) if next(steps) == 6 else None
    )
    try:
        with pytest.raises(Interrupted, match="signal at step 7"):
            train(short, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    finally:
        hook.remove()
    assert not (tmp_path / "adapter").exists()
    assert train(short, dataset, tmp_path / "adapter", tmp_path / "checkpoints").resumed_from_step == 7
    assert_same_files(tmp_path / "alone", tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert not list((tmp_path / "checkpoints").iterdir())


def test_no_stage_uses_a_deprecated_name(tmp_path: Path, params: Params, dataset: Path) -> None:
    settings = {"max_steps": 2, "logging_steps": 1, "warmup_ratio": 0.0, "gradient_checkpointing": True}
    params = with_(params, train=settings, evaluate={"max_samples": 4}, merge={"min_agreement": 0.0})
    inputs = (dataset, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(params.train, *inputs, tmp_path / "checkpoints")
        evaluate(params.evaluate, *inputs, tmp_path / "evaluation")
        merge(params.merge, *inputs, tmp_path / "evaluation", tmp_path / "merged", tmp_path / "parity")
    deprecations = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, deprecations)] == []


@pytest.mark.parametrize("truncated", ["adapter_model.safetensors", "digests.json"])
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], truncated: str
) -> None:
    from safetensors.torch import save_file

    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "target_modules": "all-linear"})
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({"step": torch.zeros(2)}, folder / name)
        seal(folder)
    file = tmp_path / "checkpoint-4" / truncated
    file.write_bytes(file.read_bytes()[:-3])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4" in capsys.readouterr().out


def test_the_base_is_nf4_and_the_record_says_so_to_later_stages(base: Path, adapter: Path) -> None:
    state = load_base(identity(base), NF4).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    record = read_json(adapter / "training.json")
    assert (record["quantisation"], record["device"]) == (NF4, "cpu")
    assert record["shipped_step"] == record["steps"]
    assert set(NF4) == set(QUANTISATION)
