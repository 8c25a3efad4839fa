"""The commands about models: parameters for known ones, and classes of texts from a trained classifier."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.versions import Json, answer


def preset(
    name: Annotated[str | None, typer.Argument(help="One of the presets that `retune preset` lists.")] = None,
    task: Annotated[
        str | None,
        typer.Option("--for", help="Also set rank, alpha and modules for one of the listed tasks."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the parameters for a model and task into params.yaml, and keep its comments; without NAME, list presets."""
    from pipeline.settings import yaml_text
    from pipeline.training.presets import apply_preset, list_presets

    presets = list_presets()
    if name is None:
        lines = [f"{preset.name:20} {preset.about} (--for {', '.join(preset.tasks)})" for preset in presets]
        answer(json_output, [asdict(preset) for preset in presets], "\n".join(lines))
        return
    changed = apply_preset(name, Path("params.yaml"), task)
    first = next(preset.first for preset in presets if preset.name == name)
    lines = [f"  {key}: {yaml_text(old)} → {yaml_text(new)}" for key, (old, new) in changed.items()]
    lines.append(f"preset: {name} is in params.yaml, {len(changed)} values changed; `git diff params.yaml` shows them")
    lines += [] if first is None else [f"first: {first}"]
    answer(json_output, {"preset": name, "changed": changed, "first": first}, "\n".join(lines))


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    model: Annotated[Path, typer.Option(help="The merged model's folder.")] = Path("artifacts/merged"),
    json_output: Json = False,
) -> None:
    """Print the class and confidence of each TEXT, from a model of train.task sequence-classification."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a merged model is whole
    from pipeline.scoring.classification import classify as classify_texts

    if not (model / "contract.json").is_file():
        raise typer.BadParameter(f"{model} has no merged model; `dvc repro` makes artifacts/merged")
    results = classify_texts(model, [[{"role": "user", "content": text}] for text in texts])
    lines = [f"{result.label} ({result.confidence:.3f})  {text}" for text, result in zip(texts, results, strict=True)]
    answer(json_output, [asdict(result) for result in results], "\n".join(lines))


COMMANDS: tuple[Callable[..., None], ...] = (preset, classify)
