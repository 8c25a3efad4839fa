"""Attention and fused kernels by choice: the same loss whichever computes it, and a sentence where one cannot run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_

from pipeline.chat.template import local_source
from pipeline.params import Params
from pipeline.train import _arguments, train
from pipeline.training.kernels import KernelError, require_kernels
from pipeline.weights.loading import load_base

ASKED: list[tuple[dict[str, Any], str, str]] = [
    ({"attn_implementation": "flash_attention_2"}, "flash_attn", "train.attn_implementation flash_attention_2 needs"),
    ({"attn_implementation": "flash_attention_3"}, "flash_attn_interface", "flash_attention_3 needs"),
    ({"use_liger_kernel": True}, "liger_kernel", "train.use_liger_kernel needs"),
    ({"torch_compile": True}, "torch", "train.torch_compile needs"),
]


@pytest.mark.parametrize(("settings", "package", "said"), ASKED)
def test_a_kernel_without_its_gpu_or_package_is_refused_before_training(
    params: Params, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], package: str, said: str
) -> None:
    asked = with_(params, train=settings).train
    installed = importlib.util.find_spec(package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match=f"{said} a GPU.*; set it to"):
        require_kernels(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else installed)
    with pytest.raises(KernelError, match=f"{said} the Python package {package}; set it to"):
        require_kernels(asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_kernels(asked)


def test_train_says_it_before_it_loads_the_base(tmp_path: Path, params: Params, dataset: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    asked = with_(params, train={"use_liger_kernel": True}).train
    with pytest.raises(KernelError, match="needs a GPU and the Python package liger_kernel; set it to false"):
        train(asked, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
    assert not (tmp_path / "adapter").exists()


def test_what_is_asked_for_reaches_model_and_trainer(tmp_path: Path, params: Params, base: Path) -> None:
    for name in ("sdpa", "eager"):
        assert load_base(local_source(base), None, None, name).config._attn_implementation == name
    asked = with_(params, train={"use_liger_kernel": True, "torch_compile": True}).train
    arguments = _arguments(asked, tmp_path)
    assert arguments.use_liger_kernel
    assert arguments.torch_compile


def test_the_loss_is_the_same_whichever_attention_computes_it(tmp_path: Path, params: Params, dataset: Path) -> None:
    losses = []
    for name in ("auto", "sdpa", "eager"):
        settings = {"attn_implementation": name, "max_steps": 4, "logging_steps": 2, "warmup_ratio": 0.0}
        settings |= {"method": "lora", "load_in_4bit": "auto"}
        done = train(with_(params, train=settings).train, dataset, tmp_path / name, tmp_path / "checkpoints")
        losses.append((done.loss, done.validation_loss))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
