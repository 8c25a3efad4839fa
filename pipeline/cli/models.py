"""The commands about training: parameter sets for known models, and the classes that a trained model gives to texts."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.versions import Json


def preset(
    name: Annotated[str | None, typer.Argument(help="Of those that `retune preset` lists.")] = None,
    task: Annotated[
        str | None, typer.Option("--for", help="Rank, alpha and modules for this task; the list names those there are.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the parameters for a model and task into params.yaml, comments kept; without NAME, list what there is."""
    from pipeline.settings import yaml_text
    from pipeline.training.presets import apply, available

    if name is None:
        presets = available()
        if json_output:
            print(json.dumps([asdict(each) for each in presets]))
            return
        for each in presets:
            print(f"{each.name:20} {each.about} (--for {', '.join(each.tasks)})")
        return
    changed = apply(name, Path("params.yaml"), task)
    chosen = next(each for each in available() if each.name == name)
    if json_output:
        print(json.dumps({"preset": name, "changed": changed, "first": chosen.first}))
        return
    for key, (old, new) in changed.items():
        print(f"  {key}: {yaml_text(old)} → {yaml_text(new)}")
    print(f"preset: {name} is in params.yaml, {len(changed)} values changed; `git diff params.yaml` shows them")
    if chosen.first is not None:
        print(f"first: {chosen.first}")


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    model: Annotated[Path, typer.Option(help="The merged model's folder.")] = Path("artifacts/merged"),
    json_output: Json = False,
) -> None:
    """Class and confidence of each TEXT, by a model trained with train.task sequence-classification."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a merged model is whole
    from pipeline.scoring.classification import classify as do

    if not (model / "contract.json").is_file():
        raise typer.BadParameter(f"{model} holds no merged model; `dvc repro` makes artifacts/merged")
    answers = do(model, [[{"role": "user", "content": text}] for text in texts])
    if json_output:
        print(json.dumps([asdict(each) for each in answers]))
        return
    for text, each in zip(texts, answers, strict=True):
        print(f"{each.label} ({each.confidence:.3f})  {text}")


COMMANDS: tuple[Callable[..., None], ...] = (preset, classify)
