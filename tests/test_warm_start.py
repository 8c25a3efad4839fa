"""Training that starts from an earlier adapter: the pinned champion's, a version's, or one in a folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_
from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import load_file
from test_methods import short
from versions import parameters, published

from pipeline.core import graph
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.params import Params
from pipeline.promote import promote
from pipeline.registry.artifact_store import StoreError
from pipeline.registry.init_adapter import PIN, fetch_init, pin_champion
from pipeline.registry.model import RegisteredModel
from pipeline.train import train
from pipeline.training.methods import check_init
from pipeline.training.watching import TrainError


def digest(adapter: Path) -> str:
    return sha256_file(adapter / "adapter_model.safetensors")


def tiny_steps(params: Params, method: str = "qlora", **train: Any) -> Params:
    """Steps that change almost nothing, so the result is the adapter that the training started with."""
    return short(params, method, learning_rate=1e-9, max_steps=1, logging_steps=1, **train)


@pytest.mark.parametrize(
    ("method", "dtype"), [("qlora", torch.float32), ("qlora", torch.bfloat16), ("prompt", torch.float32)]
)
def test_a_training_starts_with_the_weights_of_init(
    tmp_path: Path, params: Params, dataset: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("pipeline.train.compute_dtype", lambda: dtype)  # bfloat16 as on a GPU
    train(short(params, method).train, dataset, tmp_path / "first", tmp_path / "checkpoints")
    rate = 1e-9 if dtype is torch.float32 else 1e-3  # bfloat16 has no smaller steps
    settings = with_(tiny_steps(params, method), train={"learning_rate": rate}).train
    train(settings, dataset, tmp_path / "second", tmp_path / "checkpoints", init=tmp_path / "first")
    train(settings, dataset, tmp_path / "new", tmp_path / "checkpoints")
    first, second, new = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second", "new")
    )
    assert {weight.dtype for weight in second.values()} == {dtype}
    assert all(torch.allclose(first[name], second[name], atol=max(1e-6, 5 * rate)) for name in first)
    assert not all(torch.allclose(first[name], new[name], atol=1e-4) for name in first)
    assert read_json(tmp_path / "second" / "training.json")["init_adapter_sha256"] == digest(tmp_path / "first")


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (LoraConfig(r=4, lora_alpha=32), r" r 8.* train\.lora_r .*4"),
        (LoraConfig(r=8, lora_alpha=8), r" lora_alpha 32.* train\.lora_alpha .*8"),
        (LoraConfig(r=8, lora_alpha=32, use_dora=True), r" use_dora False.* train\.method .*True"),
        (IA3Config(), r" peft_type LORA.* train\.method .*IA3"),
    ],
)
def test_an_adapter_with_other_settings_is_refused(
    dataset: Path, adapter: Path, config: PeftConfig, difference: str
) -> None:
    contract = read_json(dataset / "contract.json")
    check_init(adapter, contract, LoraConfig(r=8, lora_alpha=32))
    with pytest.raises(TrainError, match=difference):
        check_init(adapter, contract, config)


def test_an_adapter_of_another_base_or_other_modules_is_refused_before_training(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path
) -> None:
    other = tiny_steps(params, lora_target_modules=["q_proj"], lora_r=8).train
    with pytest.raises(TrainError, match=r"train\.lora_target_modules"):
        train(other, dataset, tmp_path / "out", tmp_path / "other", init=adapter)
    shutil.copytree(adapter, tmp_path / "adapter")
    contract = read_json(adapter / "contract.json")
    write_json(tmp_path / "adapter" / "contract.json", contract | {"model": contract["model"] | {"digest": "0" * 64}})
    with pytest.raises(TrainError, match=r"another base.* \(digest 000000000000\)"):
        train(params.train, dataset, tmp_path / "out", tmp_path / "checkpoints", init=tmp_path / "adapter")
    assert not (tmp_path / "checkpoints").exists()


def test_an_adapter_in_a_folder_needs_the_digest_of_its_weights(tmp_path: Path, params: Params, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "earlier")
    pinned = with_(params, train={"init_adapter": f"earlier@{digest(adapter)}"})
    assert fetch_init(pinned, tmp_path) == tmp_path / "earlier"
    with pytest.raises(TrainError, match=f"{digest(adapter)}.*{'0' * 64}"):
        fetch_init(with_(params, train={"init_adapter": f"earlier@{'0' * 64}"}), tmp_path)
    with pytest.raises(TrainError, match="nowhere.*adapter_model"):
        fetch_init(with_(params, train={"init_adapter": f"nowhere@{'0' * 64}"}), tmp_path)
    with pytest.raises(StoreError, match="0123456789abcdef is not published"):
        fetch_init(with_(params, train={"init_adapter": "0123456789abcdef"}), tmp_path)


def test_the_champions_adapter_comes_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(tmp_path)
    version = published(tmp_path, params)
    promote(params.publish, params.promote, version, tmp_path, force="the first one")
    write_json(tmp_path / PIN, {"version": None})
    monkeypatch.setattr(graph, "stale", lambda root: {"train": []})
    settings = with_(params, train={"init_adapter": "champion"})
    assert pin_champion(settings, tmp_path) == version
    for name in ("champion", version):
        folder = fetch_init(with_(params, train={"init_adapter": name}), tmp_path)
        assert folder is not None and digest(folder) == digest(tmp_path / "artifacts" / "adapter")


def test_the_pin_moves_to_the_champion_only_when_the_run_trains_anyway(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale: dict[str, Any] = {}
    serving = "a" * 16
    monkeypatch.setattr(graph, "stale", lambda root: stale)
    monkeypatch.setattr(RegisteredModel, "champion", lambda model: serving)
    write_json(tmp_path / PIN, {"version": None})
    settings = with_(params, train={"init_adapter": "champion"})
    assert fetch_init(settings, tmp_path) is None and "no champion is pinned" in capsys.readouterr().out
    assert pin_champion(settings, tmp_path) is None  # nothing to train
    stale["train"] = [{"changed deps": {"artifacts/dataset": "modified"}}]
    assert pin_champion(params, tmp_path) is None  # init_adapter is none
    assert pin_champion(settings, tmp_path) == serving
    assert read_json(tmp_path / PIN) == {"version": serving}
    stale.clear()
    serving = "b" * 16  # promoted by this very run
    assert pin_champion(settings, tmp_path) == "a" * 16
    assert read_json(tmp_path / PIN) == {"version": "a" * 16}
