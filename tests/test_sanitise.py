"""Published files contain no code, and no path or user name of this machine."""

import getpass
import shutil
from pathlib import Path

import pytest
from conftest import with_

from pipeline.chat.template import load_shipped
from pipeline.core.allowlist import PARTS, check_file, check_names
from pipeline.core.files import read_json, write_json
from pipeline.core.sanitise import portable, portable_name
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.train import train

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
