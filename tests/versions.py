"""Makes workspaces like those after a run, with real files and scores but without training, and versions of them."""

import json
import random
import shutil
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT, git, once, with_
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from pipeline import promote, publish
from pipeline.core import graph
from pipeline.core.files import sha256_json, write_json
from pipeline.params import Params
from pipeline.registry.mlflow import ModelRegistry
from pipeline.registry.model import RegisteredModel
from pipeline.scoring.resampling import METRICS, table_scores
from pipeline.settings import load_params

ITEMS = 100


def parameters(root: Path, **publishing: Any) -> Params:
    if not (root / "mlflow.db").exists():
        shutil.copy(_empty_registry(), root / "mlflow.db")
    uris = {"artifact_store": (root / "store").as_uri(), "tracking_uri": f"sqlite:///{root}/mlflow.db"}
    return with_(load_params(ROOT / "params.yaml"), publish=uris | publishing)


def registry_lost(root: Path, params: Params) -> Params:
    """`params` with another, empty registry. (Deleting the database would not help: MLflow keeps it open.)"""
    shutil.copy(_empty_registry(), root / "empty.db")
    return with_(params, publish={"tracking_uri": f"sqlite:///{root}/empty.db"})


def _empty_registry() -> Path:
    """A database with MLflow's tables; MLflow takes seconds to create them."""
    made = once("mlflow", lambda folder: ModelRegistry(f"sqlite:///{folder}/mlflow.db", "none").numbers())
    return made / "mlflow.db"


def published(root: Path, params: Params, quality: float = 0.5, registered: bool = True, **workspace: Any) -> str:
    """Publish a version with about this ROUGE-L and accuracy, without running DVC; returns its id."""
    make_workspace(root, params, quality, **workspace)
    model = RegisteredModel(params.publish, root)
    version = graph.version_id(root)
    manifest, _ = publish.ship_version(model, version)
    if registered:
        model.register(manifest)
    return version


def make_workspace(
    root: Path, params: Params, quality: float = 0.5, test_fraction: float = 0.1, test_split: str = "a",
    exact: bool = True, model: Path | None = None, commit: bool = False, forgets: float | None = None, cut_off: int = 0,
) -> None:  # fmt: skip
    """Write artifacts and dvc.lock to `root`.

    `exact`: whether test items count for accuracy; `model`: the merged model's folder; `forgets`: by how many nats per
    token the loss on a general set rose; `cut_off`: how many answers were cut off.
    """
    artifacts = root / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    test_sha256 = sha256_json(test_split)
    base, merged = items(0.1, exact, test_split), items(quality, exact, test_split, cut_off)
    contract = {"model": {}, "chat_template_sha256": "c" * 64, "tokenizer_sha256": "d" * 64}
    contract |= {"train_on": "all_responses"}
    training = {
        "params": params.train.model_dump(),
        "base_model": {"name_or_path": "data/base", "revision": None, "digest": "b" * 64},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu",
    }
    evaluation = {
        "test_sha256": test_sha256,
        "params": params.evaluate.model_dump(),
        "decoding": "greedy",
        "signatures": dict.fromkeys(METRICS, "made for a test"),
        "versions": {"torch": "2.13.0"},
    }
    proof = {"base": "nf4", "token_agreement": 1.0, "identical_answers": 1.0, "prompts": ITEMS}
    if model is not None:
        shutil.copytree(model, artifacts / "merged")
    documents = {
        "adapter/contract.json": contract,
        "adapter/training.json": training,
        "merged/contract.json": contract,
        "dataset/report.json": {"rows": {"train": 90, "test": ITEMS}, "test_sha256": test_sha256},
        "evaluation/scores.json": {"base": _scores(base), "adapter": _scores(merged)},
        "parity/scores.json": {"merged": _scores(merged)},
        "parity/parity.json": proof | {"evaluation": evaluation},
    } | ({} if model else {"merged/config.json": {"quality": quality}, "merged/tokenizer.json": {}})
    for name, content in documents.items():
        write_json(artifacts / name, content)
    if model is None:
        weights(artifacts / "merged" / "model.safetensors", quality, 100)
    weights(artifacts / "adapter" / "adapter_model.safetensors", quality, 10)
    (artifacts / "adapter" / "loss.csv").write_text("step,loss,validation_loss\n1,2.0,\n2,1.0,1.5\n")
    (artifacts / "evaluation" / "report.md").write_text("# Evaluation\n")
    pq.write_table(base, artifacts / "evaluation" / "items.base.parquet")
    pq.write_table(merged, artifacts / "evaluation" / "items.adapter.parquet")
    pq.write_table(merged, artifacts / "parity" / "items.merged.parquet")
    if forgets is not None:
        columns = {"id": merged["id"], "group": merged["group"], "loss_tokens": [10] * ITEMS, "accuracy": [1.0] * ITEMS}
        for system, loss in (("base", 20.0), ("adapter", 20.0 + 10 * forgets)):
            table = pa.table(columns | {"loss": [loss + (i % 7) / 10 for i in range(ITEMS)]})
            pq.write_table(table, artifacts / "evaluation" / f"general.{system}.parquet")
        write_json(artifacts / "evaluation" / "general.json", {"rows": ITEMS})
    tree = params.model_dump()
    tree["prepare"]["test_fraction"] = test_fraction
    write_lock(root, tree)
    if commit:
        for command in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "start"]):
            git(root, *command)


def write_lock(root: Path, tree: dict[str, Any]) -> None:
    """Write the dvc.lock of a run with the parameters `tree` and the present artifacts in `root`."""
    stages = {}
    for stage, parts in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].items():
        outs = [out for out in parts["outs"] if isinstance(out, str)]
        for path in outs:
            (root / path).mkdir(parents=True, exist_ok=True)

        stages[stage] = {
            "cmd": f"retune stage {stage}",
            "deps": [{"path": "data/instructions", "hash": "md5", "md5": "0" * 32 + ".dir"}],
            # A section, or one parameter as `train.task`.
            "params": {"params.yaml": {key: reduce(getitem, key.split("."), tree) for key in parts["params"]}},
            "outs": [{"path": path, "hash": "md5", "md5": _digest(root / path)} for path in outs],
        }
    with (root / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)


def weights(path: Path, value: float, number: int) -> None:
    """A file of `number` weights of 4 bytes; a seed's random ones where `value` is whole."""
    random_ones = np.random.default_rng(int(value)).random(number, np.float32)
    save_file({"w": random_ones if value == int(value) else np.full(number, value, np.float32)}, path)


COUNTED = ("macro_f1", "bleu", "chrf", "perplexity")  # their items are counts, the others' are scores


def items(quality: float, exact: bool = True, test_split: str = "a", cut_off: int = 0) -> pa.Table:
    """Scored answers: each item's difficulty is its own, `quality` moves all of them."""
    draw = random.Random(test_split)
    places = [draw.random() for _ in range(ITEMS)]
    scores = [min(max(quality + 0.2 * (place - 0.5), 0.0), 1.0) for place in places]
    matches = [round(10 * score) for score in scores]
    ids = [f"{test_split}{i}" for i in range(ITEMS)]
    return pa.table(
        {
            "id": ids,
            "group": ids,
            "task": ["colours"] * ITEMS,
            "language": ["en"] * ITEMS,
            "prompt_tokens": [8] * ITEMS,
            "messages": [json.dumps([{"role": "user", "content": f"Which colour has box {i}?"}]) for i in ids],
            "prompt": [f"<|user|>Which colour has box {i}?" for i in ids],
            "reference": ["red"] * ITEMS,
            "status": ["cut_off"] * cut_off + ["ok"] * (ITEMS - cut_off),
            "scoring": ["exact" if exact else "text"] * ITEMS,
            "answer": [f"red to {score:.2f}" for score in scores],
            "accuracy": pa.array([float(s > 0.5) if exact else None for s in scores], pa.float64()),
            "bleu": [[10.0, 10.0, *[float(n)] * 4, *[10.0] * 4] for n in matches],
            "chrf": [[10.0, 10.0, float(n)] * 6 for n in matches],
            "exact_match": [float(s > 0.5) for s in scores],
            "label": pa.nulls(ITEMS, pa.string()),
            "predicted": pa.nulls(ITEMS, pa.string()),
            "loss": [30 * (1 - score) for score in scores],
            "loss_tokens": [10] * ITEMS,
        }
        | {metric: scores for metric in METRICS if metric not in (*COUNTED, "accuracy", "exact_match")}
    )


def _scores(table: pa.Table) -> dict[str, Any]:
    return {"num_samples": ITEMS, "num_cut_off": 0, "num_empty": 0} | table_scores(table, METRICS, 100, 0)


def _digest(folder: Path) -> str:
    return sha256_json({p.name: p.read_bytes().hex() for p in folder.rglob("*") if p.is_file()})[:32] + ".dir"


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((root / "store" / "promotions").rglob("*.json"))]


def promote_version(root: Path, params: Params, version: str | None = None, force: Any = None) -> promote.Decision:
    return promote.promote(params, version, root, force)
