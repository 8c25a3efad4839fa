"""What tells other tools about a version: its Hugging Face model card and MLflow's `MLmodel`, made from the manifest.

Nothing stands here that the manifest does not hold; both files are published, and signed, with the version.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.core.combinations import CLASSIFICATION, RANKED
from pipeline.core.pages.templates import environment
from pipeline.registry.manifest import Manifest
from pipeline.scoring.resampling import METRICS

CHAT = "llm/v1/chat"  # MLflow's name for answering messages
# What the card calls each score, in the Hub's vocabulary.
HUB_METRICS = {"macro_f1": "f1"} | dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge")


def model_card(manifest: Manifest) -> str:
    """README.md of the version: YAML metadata that the Hub and its tools read, and the same for people."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, metrics, train = manifest["base_model"], manifest["metrics"], manifest["params"]["train"]
    method = train["method"]
    results = [
        EvalResult(
            task_type=_task(train),
            dataset_type="retune",
            dataset_name="test split",
            dataset_split="test",
            dataset_revision=manifest["data"]["test_sha256"],
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=metrics["merged"][metric]["score"],
        )
        for metric in METRICS
        if metrics["merged"].get(metric)
    ]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=_task(train),
        # A folder is no name that the Hub could resolve.
        base_model=base["name_or_path"] if base["revision"] else None,
        base_model_relation="adapter" if base["revision"] else None,
        tags=["retune", method, "4-bit-base" if train["load_in_4bit"] else "full-precision-base"],
        model_name=manifest["name"],
        eval_results=results,
    )
    text = _render(
        "card.md.jinja",
        manifest=manifest,
        base=base,
        train=train,
        cost=manifest["cost"],
        method=method,
        ranked=method in RANKED,
        seconds=sum(seconds for seconds in manifest["time"].values() if seconds is not None),
        scores={
            metric: [_score(metrics[of].get(metric)) for of in ("base", "adapter", "merged")] for metric in METRICS
        },
        **_use(manifest["name"], train, manifest["evaluation"]["params"].get("max_new_tokens")),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def use(name: str, train: dict[str, Any], longest: int | None) -> str:
    """The loading and the call that give the answers that were scored."""
    return _render("use.py.jinja", **_use(name, train, longest))


def auto_class(train: dict[str, Any]) -> str:
    """The class of transformers that loads a model trained with the parameters `train`."""
    return "AutoModelForSequenceClassification" if _classifies(train) else "AutoModelForCausalLM"


def mlmodel(manifest: Manifest) -> str:
    """`MLmodel`: lets `mlflow.transformers.load_model` load the merged model where `merged/` lies."""
    train = manifest["params"]["train"]
    classifies = _classifies(train)
    transformers = {
        "code": None,
        "components": ["tokenizer"],
        "framework": "pt",
        "instance_type": f"Text{'Classification' if classifies else 'Generation'}Pipeline",
        "model_binary": "merged",
        "pipeline_model_type": auto_class(train),
        "source_model_name": manifest["base_model"]["name_or_path"],
        "task": _task(train),
        "tokenizer_type": "AutoTokenizer",
        "transformers_version": manifest["packages"]["train"].get("transformers", ""),
    }
    python = {
        "loader_module": "mlflow.transformers",
        "python_version": manifest["packages"]["publish"]["python"],
    }
    described: dict[str, Any] = {
        "artifact_path": "model",
        "flavors": {"python_function": python, "transformers": transformers},
        "utc_time_created": manifest["created"],
    }
    if not classifies:  # pyfunc then takes {"messages": […], "max_tokens": …} and renders them by the model's template
        transformers["inference_task"] = CHAT
        described["metadata"] = {"task": CHAT}
    return json.dumps(described, indent=2, sort_keys=True)  # JSON is YAML


def _render(template: str, **values: Any) -> str:
    return environment(Path(__file__).parent / "pages", html=False).get_template(template).render(values)


def _use(name: str, train: dict[str, Any], longest: int | None) -> dict[str, Any]:
    return {"name": name, "auto": auto_class(train), "classifies": _classifies(train), "longest": longest}


def _classifies(train: dict[str, Any]) -> bool:
    return bool(train["task"] == CLASSIFICATION)


def _task(train: dict[str, Any]) -> str:
    return "text-classification" if _classifies(train) else "text-generation"


def _score(score: dict[str, Any] | None) -> str:
    return "–" if score is None else f"{score['score']:.3g} ({score['low']:.3g} to {score['high']:.3g})"
