"""A base model that cannot be used is refused before training, with one sentence that names the fault."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_base, with_
from safetensors.torch import load_file, save_file
from test_methods import short
from transformers import AutoTokenizer

from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.train import train

ENCODER_DECODER = {
    "model_type": "musicgen",
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"model_type": "musicgen_decoder"},
}


def config(**values: Any) -> Callable[[Path], None]:
    return lambda base: write_json(base / "config.json", read_json(base / "config.json") | values)


def truncated(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def shard_missing(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    first = {name: weights[name] for name in names if files[name].startswith("model-00001")}
    save_file(first, base / "model-00001-of-00002.safetensors", {"format": "pt"})
    (base / "model.safetensors").unlink()
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def smaller_vocabulary(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config(vocab_size=300)(base)


def control_token_beyond(base: Path) -> None:
    """A control token is added to the tokenizer, but not to the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"model.safetensors may not be loaded"),
        (smaller_vocabulary, r"300 tokens.* has the id 300"),
        (control_token_beyond, r"<\|turn\|> has the id \d+"),
        (config(model_type="unheard-of"), r"^no model configuration could be read from .*base: "),
        (config(**ENCODER_DECODER), r"^no model configuration could be read from .*base: "),
    ],
)
def test_a_base_model_that_cannot_be_used_is_refused_by_prepare(
    tmp_path: Path, params: Params, data: Path, damage: Callable[[Path], None], message: str
) -> None:
    base = make_base(tmp_path / "base")
    damage(base)
    with pytest.raises(ValueError, match=message) as error:
        prepare(with_(params, prepare={"model_name_or_path": str(base)}).prepare, data, tmp_path / "dataset")
    assert "\n" not in str(error.value) and type(error.value).__module__.startswith("pipeline.")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model_name_or_path is .*base"),
        (config(rms_norm_eps=1e-5), r"base is not the one .* \(digest [0-9a-f]{12}"),
        (lambda base: make_base(base, seed=1), r"base is not the one .* \(digest [0-9a-f]{12}"),
    ],
)
def test_a_base_model_that_changed_after_prepare_is_refused_by_train(
    tmp_path: Path, params: Params, data: Path, damage: Callable[[Path], None], message: str
) -> None:
    base = make_base(tmp_path / "base")
    prepare(with_(params, prepare={"model_name_or_path": str(base)}).prepare, data, tmp_path / "dataset")
    damage(base)
    with pytest.raises(ValueError, match=message):
        train(params.train, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_the_error_names_a_missing_shard_of_the_base_model(tmp_path: Path, params: Params, data: Path) -> None:
    base = make_base(tmp_path / "base")
    shard_missing(base)
    settings = with_(params, prepare={"model_name_or_path": str(base)})
    prepare(settings.prepare, data, tmp_path / "dataset")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors") as error:
        train(params.train, tmp_path / "dataset", tmp_path / "adapter", tmp_path / "checkpoints")
    assert type(error.value).__module__.startswith("pipeline.")


def test_virtual_tokens_that_do_not_fit_the_context_are_refused(tmp_path: Path, params: Params, dataset: Path) -> None:
    many = short(params, "prompt", num_virtual_tokens=500).train
    with pytest.raises(ValueError, match=r"num_virtual_tokens is 500 .*512 .*max_length .* 12$"):
        train(many, dataset, tmp_path / "adapter", tmp_path / "checkpoints")
