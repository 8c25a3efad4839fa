"""The merged model answers as the adapter does; published files have no code, and no path of this machine."""

import getpass
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.chat.template import TemplateError, load_shipped, local_source
from pipeline.core.allowlist import PARTS, check_file, check_names
from pipeline.core.files import read_json, write_json
from pipeline.core.sanitise import portable, portable_name
from pipeline.merge import merge, score_model
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.registry import card
from pipeline.scoring.resampling import METRICS
from pipeline.train import train
from pipeline.weights.loading import compute_dtype, load_adapter, load_base, record_dtype
from pipeline.weights.merging import MergeError


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
    on_base = load_adapter(load_base(local_source(base), quantisation), adapter)
    torch.testing.assert_close(logits(plain, dataset), logits(on_base, dataset), rtol=1e-3, atol=1e-3)


def test_the_closer_base_is_chosen_and_the_differences_are_recorded(merged: Path, evaluation: Path) -> None:
    parity = read_json(merged / "parity" / "parity.json")
    errors = parity["mean_absolute_logit_error"]
    assert set(errors) == {"full", "nf4"} and parity["base"] == min(errors, key=errors.get)
    assert errors["nf4"] < min(errors["full"] / 10, parity["mean_absolute_logit_change"] / 1000)
    assert (parity["method"], parity["reason"], parity["modules"]) == ("shards", None, 14)
    assert parity["token_agreement"] == parity["identical_answers"] == 1.0
    assert abs(parity["metric_difference"].pop("perplexity")) < 1e-3
    assert set(parity["metric_difference"].values()) == {0.0}
    scores = read_json(merged / "parity" / "scores.json")["merged"]
    evaluated = read_json(evaluation / "scores.json")
    for metric in set(METRICS) - {"perplexity"}:
        assert scores[metric] == evaluated["adapter"][metric]
    metrics = read_json(merged / "parity" / "metrics.json")  # for `dvc metrics`
    assert metrics.pop("base") == {m: evaluated["base"][m]["score"] for m in ("accuracy", "rougeL")}
    assert metrics == {metric: scores[metric]["score"] for metric in METRICS if scores[metric]}


def test_a_plain_load_has_the_dtype_and_stop_tokens_of_the_evaluation(
    merged: Path, base: Path, dataset: Path, tmp_path: Path
) -> None:
    contract = read_json(dataset / "contract.json")
    config = GenerationConfig.from_pretrained(merged / "merged")
    assert (config.eos_token_id, config.pad_token_id) == (contract["stop_ids"], contract["pad_id"])
    load_base(local_source(base)).to(torch.float16).save_pretrained(tmp_path)
    record_dtype(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == compute_dtype()


def test_scoring_a_shipped_model_again_gives_the_same_items(merged: Path, dataset: Path, tmp_path: Path) -> None:
    settings = read_json(merged / "parity" / "parity.json")["evaluation"]
    score_model(merged / "merged", dataset, settings, tmp_path / "scored")
    assert read_json(tmp_path / "scored" / "evaluation.json") == settings
    again = pq.read_table(tmp_path / "scored" / "items.parquet")
    assert again.equals(pq.read_table(merged / "parity" / "items.merged.parquet"))


def test_the_model_cards_own_code_gives_the_answers_that_were_scored(
    merged: Path, dataset: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = card.use_code(params.train.model_dump(), params.evaluate.max_new_tokens)
    test = pq.read_table(dataset / "test.parquet")
    scored = pq.read_table(merged / "parity" / "items.merged.parquet")
    monkeypatch.chdir(merged)
    for row in range(3):
        messages = json.loads(test["messages"][row].as_py())
        exec(code.replace('"A question"', repr(messages[0]["content"])), {})
        assert capsys.readouterr().out.strip() == scored["answer"][row].as_py().strip()


def replace_answers(evaluation: Path) -> None:
    items = pq.read_table(evaluation / "items.adapter.parquet")
    column = items.column_names.index("answer_ids")
    pq.write_table(
        items.set_column(column, "answer_ids", [[[5, 6]] * len(items)]), evaluation / "items.adapter.parquet"
    )


def scale_score(metric: str, factor: float) -> Callable[[Path], None]:
    def change(evaluation: Path) -> None:
        scores = read_json(evaluation / "scores.json")
        scores["adapter"][metric]["score"] *= factor
        write_json(evaluation / "scores.json", scores)

    return change


@pytest.mark.parametrize(
    ("settings", "change", "expected_text"),
    [
        ({"base": "nf4"}, replace_answers, "merge.min_agreement"),
        ({"base": "full", "max_logit_error": 1e-9}, lambda _: None, "merge.max_logit_error"),
        ({"base": "nf4"}, scale_score("accuracy", 1.5), "accuracy .* merge.max_metric_drop"),
        ({"base": "nf4"}, scale_score("perplexity", 0.9), "perplexity .* merge.max_metric_drop"),
    ],
)
def test_a_model_too_far_from_the_adapter_is_refused_and_not_written(
    tmp_path: Path, params: Params, dataset: Path, adapter: Path, evaluation: Path, settings: dict[str, Any],
    change: Callable[[Path], None], expected_text: str,
) -> None:  # fmt: skip
    changed = Path(shutil.copytree(evaluation, tmp_path / "evaluation"))
    change(changed)
    outputs = [tmp_path / name for name in ("merged", "parity")]
    with pytest.raises(MergeError, match=expected_text):
        merge(with_(params, merge=settings).merge, dataset, adapter, changed, *outputs)
    assert not any(folder.exists() for folder in outputs)


def test_another_or_a_damaged_base_is_refused(
    tmp_path: Path, params: Params, base: Path, dataset: Path, adapter: Path, evaluation: Path, merged: Path
) -> None:
    copied_base, *inputs = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (base, dataset, adapter))
    for folder in inputs:
        contract = read_json(folder / "contract.json")
        write_json(
            folder / "contract.json", contract | {"model": contract["model"] | {"name_or_path": str(copied_base)}}
        )
    outputs = [tmp_path / name for name in ("out", "parity")]
    weights = (base / "model.safetensors").read_bytes()
    for other in ((merged / "merged" / "model.safetensors").read_bytes(), weights[:-1]):
        (copied_base / "model.safetensors").write_bytes(other)
        with pytest.raises(TemplateError):
            merge(params.merge, *inputs, evaluation, *outputs)
    assert not any(path.exists() for path in outputs)


MAP = {"AutoModelForCausalLM": "modeling_evil.M", "AutoConfig": "evil/repo--configuration_evil.C"}


def test_code_and_paths_in_a_base_model_are_not_published(
    tmp_path: Path, base: Path, params: Params, data: Path, evaluation: Path
) -> None:
    own = tmp_path / "home" / "alice" / "own-base"
    shutil.copytree(base, own)
    for name in ("config.json", "tokenizer_config.json"):
        extra = {"auto_map": MAP if name == "config.json" else {"AutoTokenizer": ["t.T", None]}}
        extra |= {"_name_or_path": str(own), "name_or_path": str(own), "custom_pipelines": {"a": {"impl": "m.M"}}}
        write_json(own / name, read_json(own / name) | extra)
    settings = with_(
        params,
        prepare={"model_name_or_path": str(own)},
        train={"max_steps": 3},
        merge={"min_agreement": 0.0, "max_metric_drop": 1.0, "max_logit_error": 1000.0},
    )
    folders = {name: tmp_path / name for name in (*PARTS, "dataset")}
    prepare(settings.prepare, data, folders["dataset"])
    train(settings.train, folders["dataset"], folders["adapter"], tmp_path / "checkpoints")
    shutil.copytree(evaluation, folders["evaluation"])
    merge(settings.merge, *(folders[name] for name in ("dataset", "adapter", "evaluation", "merged", "parity")))
    names = [
        f"{part}/{path.name}"
        for part in PARTS
        for path in folders[part].rglob("*")
        if path.is_file() and path.suffix != ".html"
    ]
    check_names(names)
    for name in names:
        check_file(tmp_path / name)
        text = (tmp_path / name).read_bytes()
        for leak in (str(tmp_path), "/home/", "alice", '"auto_map"', "evil", "custom_pipelines", "training_args"):
            assert leak.encode() not in text, (name, leak)
        if f"{getpass.getuser()}@".encode() in text:
            raise AssertionError(name)
    assert read_json(folders["adapter"] / "adapter_config.json")["base_model_name_or_path"] == "own-base"
    assert read_json(folders["merged"] / "contract.json")["model"]["name_or_path"] == "own-base"
    load_shipped(folders["merged"])


def test_all_usual_files_of_models_and_tokenizers_may_be_published() -> None:
    names = "tokenizer.model spiece.model sentencepiece.bpe.model vocab.txt vocab.json merges.txt added_tokens.json "
    names += "special_tokens_map.json generation_config.json additional_chat_templates/rag.jinja chat_template.jinja "
    names += "model-00001-of-00002.safetensors model.safetensors.index.json"
    check_names(f"merged/{name}" for name in names.split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/alice/models/x", "x"),
        ("~/models/x", "x"),
        ("../models/x", "x"),
        ("C:\\Users\\alice\\x", "x"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("file:///home/alice/store", "file://…/store"),
        ("file://store", "file://store"),
        ("sqlite:////home/alice/mlflow.db", "sqlite://…/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("/{{ x }}", "/{{ x }}"),
    ],
)
def test_only_local_paths_are_shortened(name: str, expected: str) -> None:
    assert portable_name(name) == expected
    assert portable({"a": [{"model_name_or_path": name}]}) == {"a": [{"model_name_or_path": expected}]}
    assert portable({"content": name, "n": 1, "none": None}) == {"content": name, "n": 1, "none": None}
