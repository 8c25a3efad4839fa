"""What tells other tools about a version: its Hugging Face model card and MLflow's `MLmodel`, made from the manifest.

Nothing stands here that the manifest does not hold; both files are published, and signed, with the version.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Template

from pipeline.core.combinations import CLASSIFICATION, RANKED
from pipeline.core.pages.templates import environment
from pipeline.registry.manifest import Manifest
from pipeline.scoring.resampling import METRICS

CHAT = "llm/v1/chat"  # MLflow's name for answering messages
BODY = """\
# {{ manifest.name }} {{ manifest.version }}

An adapter and the merged model, made by Retune.

| | |
|---|---|
| base model | {{ base }} |
| base digest | `{{ manifest.base_model.digest }}` |
| rows | {{ rows }} |
| code | `{{ manifest.git.commit or "no git commit" }}`{{ " with changes" if manifest.git.dirty }} |
| trained on | {{ manifest.hardware.train }} |
| time | {{ minutes }} |
| cost | {{ cost }} |
| method | {{ method }} |
| merged | into the {{ manifest.parity.base }} base; equals the adapter on {{ agreement }} of tokens |

## Scores on the test split

95 % intervals; BLEU and chrF 0–100, perplexity from 1 (lower is better), the others 0–1.

| metric | base | candidate before merge | candidate (merged) | signature |
|---|---|---|---|---|
{% for metric, systems in scores.items() %}
| {{ metric }} | {{ systems|join(" | ") }} | {{ manifest.evaluation.signatures.get(metric, "–") }} |
{% endfor %}

## Use

```python
{{ use }}
```

The dtype is that of `merged/config.json`, in which the scores above were measured.

`manifest.json` holds the whole lineage: parameters, packages, digests of data and files.
"""
USE = """\
from transformers import {{ auto }}, AutoTokenizer

model = {{ auto }}.from_pretrained("merged")
tokenizer = AutoTokenizer.from_pretrained("merged")
{% if classifies %}
logits = model(**tokenizer("A text", return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
{% else %}
messages = [{"role": "user", "content": "A question"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens={{ longest }}, do_sample=False)[0]
print(tokenizer.decode(answer[inputs["input_ids"].shape[1]:], skip_special_tokens=True))

# Or from the registry, with Retune installed:
import mlflow

model = mlflow.pyfunc.load_model("models:/{{ name }}@champion")
model.predict({"messages": messages, "max_tokens": {{ longest }}, "do_sample": False})
{% endif %}
"""
# What the card calls each score, in the Hub's vocabulary.
HUB_METRICS = {"macro_f1": "f1"} | dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge")


def model_card(manifest: Manifest) -> str:
    """README.md of the version: YAML metadata that the Hub and its tools read, and the same for people."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, merged, train = manifest["base_model"], manifest["metrics"]["merged"], manifest["params"]["train"]
    task = "text-classification" if _classifies(train) else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="retune",
            dataset_name="test split",
            dataset_split="test",
            dataset_revision=manifest["data"]["test_sha256"],
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=merged[metric]["score"],
        )
        for metric in METRICS
        if merged.get(metric)
    ]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=task,
        # A folder is no name that the Hub could resolve.
        base_model=base["name_or_path"] if base["revision"] else None,
        base_model_relation="adapter" if base["revision"] else None,
        tags=["retune", _method(train), "4-bit-base" if train["load_in_4bit"] else "full-precision-base"],
        model_name=manifest["name"],
        eval_results=results,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(manifest)}"))


def mlmodel(manifest: Manifest) -> str:
    """`MLmodel`: lets `mlflow.transformers.load_model` load the merged model where `merged/` lies."""
    versions = manifest["packages"]["train"]
    classifies = _classifies(manifest["params"]["train"])
    return json.dumps(  # JSON is YAML
        {
            "artifact_path": "model",
            "flavors": {
                "python_function": {
                    "loader_module": "mlflow.transformers",
                    "python_version": manifest["packages"]["publish"]["python"],
                },
                "transformers": {
                    "code": None,
                    "components": ["tokenizer"],
                    "framework": "pt",
                    "instance_type": f"Text{'Classification' if classifies else 'Generation'}Pipeline",
                    "model_binary": "merged",
                    "pipeline_model_type": auto_class(manifest["params"]["train"]),
                    "source_model_name": manifest["base_model"]["name_or_path"],
                    "task": "text-classification" if classifies else "text-generation",
                    # pyfunc then takes {"messages": […], "max_tokens": …} and renders them by the model's template
                    **({} if classifies else {"inference_task": CHAT}),
                    "tokenizer_type": "AutoTokenizer",
                    "transformers_version": versions.get("transformers", ""),
                },
            },
            **({} if classifies else {"metadata": {"task": CHAT}}),
            "utc_time_created": manifest["created"],
        },
        indent=2,
        sort_keys=True,
    )


def _body(manifest: Manifest) -> str:
    """The card for people, by the template `BODY`."""
    train, cost = manifest["params"]["train"], manifest["cost"]
    seconds = [s for s in manifest["time"].values() if s is not None]
    method = _method(train)
    rank = f", r {train['lora_r']}, alpha {train['lora_alpha']}" if method in RANKED else ""
    systems, base = ("base", "adapter", "merged"), manifest["base_model"]
    cost_text = f"{cost['total']:.2f} at {cost['price_per_hour']:g} an hour" if cost["total"] is not None else ""
    return _template(BODY).render(
        manifest=manifest,
        base=f"`{base['name_or_path']}`" + (f" at `{base['revision']}`" if base["revision"] else ""),
        rows=", ".join(f"{count:,} {split}" for split, count in manifest["data"]["rows"].items()),
        agreement=f"{manifest['parity']['token_agreement']:.1%}",
        method=f"{method}{rank}, {'4-bit' if train['load_in_4bit'] else 'full-precision'} base",
        minutes=f"{sum(seconds) / 60:.1f} minutes" if seconds else "not measured",
        cost=cost_text or "not priced",
        scores={metric: [_score(manifest["metrics"][system].get(metric)) for system in systems] for metric in METRICS},
        use=use(manifest["name"], train, manifest["evaluation"]["params"].get("max_new_tokens")),
    )


def use(name: str, train: dict[str, Any], longest: int | None) -> str:
    """The loading and the call that give the answers that were scored."""
    classifies = _classifies(train)
    return _template(USE).render(name=name, auto=auto_class(train), classifies=classifies, longest=longest).strip()


def _template(text: str) -> Template:
    return environment(Path(__file__).parent, html=False).from_string(text)


def _method(train: dict[str, Any]) -> str:
    """Of versions before there was a choice, what it was then."""
    return str(train.get("method", "qlora" if train["load_in_4bit"] else "lora"))


def _classifies(train: dict[str, Any]) -> bool:
    return train.get("task") == CLASSIFICATION


def auto_class(train: dict[str, Any]) -> str:
    return "AutoModelForSequenceClassification" if _classifies(train) else "AutoModelForCausalLM"


def _score(score: dict[str, Any] | None) -> str:
    return "–" if score is None else f"{score['score']:.3g} ({score['low']:.3g} to {score['high']:.3g})"
