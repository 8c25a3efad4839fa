"""The commands about training: parameter sets for known models, and the classes that a trained model gives to texts."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.versions import Json, answer


def preset(
    name: Annotated[str | None, typer.Argument(help="Of those that `retune preset` lists.")] = None,
    task: Annotated[
        str | None, typer.Option("--for", help="Rank, alpha and modules for this task; the list names those there are.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the parameters for a model and task into params.yaml, comments kept; without NAME, list what there is."""
    from pipeline.settings import yaml_text
    from pipeline.training.presets import apply_preset, list_presets

    presets = list_presets()
    if name is None:
        lines = [f"{each.name:20} {each.about} (--for {', '.join(each.tasks)})" for each in presets]
        answer(json_output, [asdict(each) for each in presets], "\n".join(lines))
        return
    changed = apply_preset(name, Path("params.yaml"), task)
    first = next(each.first for each in presets if each.name == name)
    lines = [f"  {key}: {yaml_text(old)} → {yaml_text(new)}" for key, (old, new) in changed.items()]
    lines.append(f"preset: {name} is in params.yaml, {len(changed)} values changed; `git diff params.yaml` shows them")
    lines += [] if first is None else [f"first: {first}"]
    answer(json_output, {"preset": name, "changed": changed, "first": first}, "\n".join(lines))


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
    lines = [f"{each.label} ({each.confidence:.3f})  {text}" for text, each in zip(texts, answers, strict=True)]
    answer(json_output, [asdict(each) for each in answers], "\n".join(lines))


COMMANDS: tuple[Callable[..., None], ...] = (preset, classify)
