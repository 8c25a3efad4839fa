"""The commands about models: parameters for known ones, and classes of texts from a trained classifier."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.project import as_typed
from pipeline.cli.talk import find_classifier
from pipeline.cli.versions import Json, answer
from pipeline.core.progress import counted


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
    lines.append(
        f"preset: {name} is in params.yaml, {counted(len(changed), 'value')} changed; `git diff params.yaml` shows them"
    )
    lines += [] if first is None else [f"first: {first}"]
    answer(json_output, {"preset": name, "changed": changed, "first": first}, "\n".join(lines))


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    model: Annotated[
        str | None,
        typer.Option(help="As for predict, or a merged model's folder; default: the champion.", show_default=False),
    ] = None,
    json_output: Json = False,
) -> None:
    """Print the class and confidence of each TEXT, from a model of train.task sequence-classification."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a merged model is whole
    from pipeline.cli.serving import BASE, WORKSPACE
    from pipeline.core.files import read_json
    from pipeline.scoring.classification import classify as classify_texts
    from pipeline.settings import load_params

    folder, name = Path(as_typed(model or "")), model
    # A folder with the name of a model is written ./champion.
    is_name = model in (None, "champion", WORKSPACE, BASE) or not (folder / "contract.json").is_file()
    if is_name and "/" in (model or ""):
        raise typer.BadParameter(f"{model} has no merged model; expected a folder with contract.json")
    if is_name:
        folder, name = find_classifier(load_params(), model, "classify")
    results = classify_texts(folder, [[{"role": "user", "content": text}] for text in texts])
    labels = read_json(folder / "contract.json")["labels"]
    rows = [
        {"text": text} | asdict(result) | {"probabilities": dict(zip(labels, result.probabilities, strict=True))}
        for text, result in zip(texts, results, strict=True)
    ]
    lines = [f"{row['label']} ({row['confidence']:.3f})  {row['text']}" for row in rows]
    answer(json_output, {"model": name, "texts": rows}, "\n".join(lines))


COMMANDS: tuple[Callable[..., None], ...] = (preset, classify)
