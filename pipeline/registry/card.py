"""A version's model card for Hugging Face and its `MLmodel` for MLflow, published and signed with it."""

import json
from pathlib import Path
from typing import Any

from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.pages.templates import environment
from pipeline.registry.manifest import Manifest
from pipeline.scoring.resampling import METRICS

CHAT = "llm/v1/chat"  # MLflow's name for answering messages


def model_card(manifest: Manifest) -> str:
    """README.md of the version: metadata that the Hub reads, scores, and how to load it."""
    train, metrics = manifest["params"]["train"], manifest["metrics"]
    measured = [metric for metric in METRICS if metrics["merged"].get(metric)]
    return _render(
        "card.md.jinja",
        manifest=manifest,
        base=manifest["base_model"],
        train=train,
        task=_task(train),
        scores={metric: [metrics[system].get(metric) for system in ("base", "merged")] for metric in measured},
        use=use_code(train, manifest["evaluation"]["params"].get("max_new_tokens")).strip(),
    )


def use_code(train: dict[str, Any], max_new_tokens: int | None) -> str:
    """Code that loads the model and gives the answers that were scored."""
    return _render("use.py.jinja", auto_class=auto_class(train), max_new_tokens=max_new_tokens)


def auto_class(train: dict[str, Any]) -> str:
    """The transformers class that loads a model trained with the parameters `train`."""
    return f"AutoModelFor{'SequenceClassification' if train['task'] == CLASSIFICATION else 'CausalLM'}"


def mlmodel(manifest: Manifest) -> str:
    """The content of `MLmodel`, with which `mlflow.transformers.load_model` loads the model in `merged/`."""
    train, packages = manifest["params"]["train"], manifest["packages"]
    transformers = {
        "code": None,
        "components": ["tokenizer"],
        "framework": "pt",
        "instance_type": f"{_task(train).title().replace('-', '')}Pipeline",
        "model_binary": "merged",
        "pipeline_model_type": auto_class(train),
        "source_model_name": manifest["base_model"]["name_or_path"],
        "task": _task(train),
        "tokenizer_type": "AutoTokenizer",
        "transformers_version": packages["train"].get("transformers", ""),
    }
    python = {"loader_module": "mlflow.transformers", "python_version": packages["publish"]["python"]}
    description: dict[str, Any] = {
        "artifact_path": "model",
        "flavors": {"python_function": python, "transformers": transformers},
        "utc_time_created": manifest["created"],
    }
    if train["task"] != CLASSIFICATION:
        # pyfunc then takes {"messages": […], "max_tokens": …} and renders them with the model's template.
        transformers["inference_task"] = CHAT
        description["metadata"] = {"task": CHAT}
    return json.dumps(description, indent=2, sort_keys=True)  # JSON is valid YAML


def _render(template: str, **values: Any) -> str:
    return environment(Path(__file__).parent / "pages", html=False).get_template(template).render(values)


def _task(train: dict[str, Any]) -> str:
    return "text-classification" if train["task"] == CLASSIFICATION else "text-generation"
