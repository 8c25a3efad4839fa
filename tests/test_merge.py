import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from safetensors.torch import load_file, save_file
from test_train import identity
from transformers import AutoModelForCausalLM

from pipeline.files import read_json
from pipeline.merge import MergeError, merge, score_model
from pipeline.model import load_adapter, load_base
from pipeline.params import Params


def logits(model: torch.nn.Module, dataset: Path) -> torch.Tensor:
    ids = torch.tensor([pq.read_table(dataset / "test.parquet").column("input_ids")[0].as_py()])
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def merged(
    tmp_path_factory: pytest.TempPathFactory, params: Params, dataset: Path, adapter: Path, evaluation: Path
) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    exact = with_(params, merge={"dtype": "float32", "min_agreement": 1.0}).merge
    merge(exact, dataset, adapter, evaluation, folder / "merged", folder / "parity")
    return folder


def test_a_plain_transformers_load_gives_the_logits_of_the_adapter(
    merged: Path, base: Path, dataset: Path, adapter: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(merged / "merged", dtype=torch.float32)
    quantisation = read_json(adapter / "training.json")["quantisation"]
    on_base = load_adapter(load_base(identity(base), quantisation), adapter)
    torch.testing.assert_close(logits(plain, dataset), logits(on_base, dataset), rtol=1e-3, atol=1e-3)


def test_the_base_that_is_measured_closer_is_chosen_and_both_errors_recorded(merged: Path) -> None:
    parity = read_json(merged / "parity" / "parity.json")
    errors = parity["mean_absolute_logit_error"]
    assert set(errors) == {"full", "nf4"}
    assert parity["base"] == min(errors, key=errors.get)
    assert errors["nf4"] < errors["full"] / 10
    assert parity["token_agreement"] == parity["identical_answers"] == 1.0


def test_merged_scores_are_the_adapters(merged: Path, evaluation: Path) -> None:
    adapter_scores = read_json(evaluation / "metrics.json")["adapter"]
    assert read_json(merged / "parity" / "metrics.json")["merged"] == adapter_scores


def test_scoring_a_shipped_model_again_gives_the_same_items(merged: Path, dataset: Path, tmp_path: Path) -> None:
    settings = read_json(merged / "parity" / "parity.json")["evaluation"]
    score_model(merged / "merged", dataset, settings, tmp_path / "scored")
    assert read_json(tmp_path / "scored" / "evaluation.json") == settings
    again = pq.read_table(tmp_path / "scored" / "items.parquet")
    assert again.equals(pq.read_table(merged / "parity" / "items.merged.parquet"))


def test_an_adapter_that_changes_nothing_is_refused(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path
) -> None:
    idle = tmp_path / "adapter"
    shutil.copytree(adapter, idle)
    weights = load_file(idle / "adapter_model.safetensors")
    zeroed = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in weights.items()}
    save_file(zeroed, idle / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="changes nothing"):
        merge(params.merge, dataset, idle, evaluation, tmp_path / "merged", tmp_path / "parity")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_answers_otherwise_is_refused_and_not_written(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path
) -> None:
    other = tmp_path / "evaluation"
    shutil.copytree(evaluation, other)
    items = pq.read_table(other / "items.adapter.parquet")
    column = items.column_names.index("answer_ids")
    pq.write_table(items.set_column(column, "answer_ids", [[[5, 6]] * len(items)]), other / "items.adapter.parquet")
    with pytest.raises(MergeError, match=r"chooses 0.00% of the adapter's answer tokens; merge.min_agreement is 50"):
        merge(params.merge, dataset, adapter, other, tmp_path / "merged", tmp_path / "parity")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "parity").exists()


def test_half_an_adapter_is_refused(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path
) -> None:
    from pipeline.model import ModelError

    half = tmp_path / "adapter"
    shutil.copytree(adapter, half)
    weights = load_file(half / "adapter_model.safetensors")
    kept = dict(list(weights.items())[: len(weights) // 2])
    save_file(kept, half / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit"):
        merge(params.merge, dataset, half, evaluation, tmp_path / "merged", tmp_path / "parity")
