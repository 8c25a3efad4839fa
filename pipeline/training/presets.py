"""Parameter sets for known models (infra/presets), written into params.yaml.

All presets set the same parameters, so nothing of an earlier preset remains; other parameters stay as they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.settings import change_params, load_params

PRESETS = Path(__file__).parents[2] / "infra" / "presets"


class PresetError(ValueError):
    """The preset is unknown, or has no values for the task."""


@dataclass(frozen=True)
class Preset:
    name: str
    about: str
    gpu: str | None  # the smallest GPU in infra/gpus.yaml that it is meant for; None: a CPU is enough
    tasks: list[str]  # values of `--for`
    first: str | None  # what to do before using it


def list_presets() -> list[Preset]:
    """All presets, sorted by name."""
    trees = {path.stem: _read(path.stem) for path in sorted(PRESETS.glob("*.yaml"))}
    return [Preset(name, tree["about"], tree["gpu"], list(tree["for"]), tree["first"]) for name, tree in trees.items()]


def apply_preset(name: str, path: Path, task: str | None = None) -> dict[str, tuple[Any, Any]]:
    """Write the preset's values into `path`; returns the changes: parameter → (old value, new value).

    `task` adds the values for classification, generation or reasoning. Raises PresetError if preset or task is unknown,
    ParamsError if `path` is invalid, before or after the changes.
    """
    load_params(path)  # refuses an invalid file before it is changed
    before: dict[str, dict[str, Any]] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    changed = {
        f"{section}.{key}": (before[section][key], new)
        for section, settings in preset_values(name, task).items()
        for key, new in settings.items()
        if before[section][key] != new or isinstance(new, bool) != isinstance(before[section][key], bool)
    }
    change_params({key: new for key, (_, new) in changed.items()}, path)
    return changed


def preset_values(name: str, task: str | None = None) -> dict[str, dict[str, Any]]:
    """The values that a preset sets: section → parameter → value."""
    tree = _read(name)
    if task is not None and task not in tree["for"]:
        raise PresetError(f"{name} has no values for {task}, only for {', '.join(tree['for'])}")
    sections: dict[str, dict[str, Any]] = {key: dict(settings) for key, settings in tree["params"].items()}
    for key, value in (tree["for"][task] if task is not None else {}).items():
        next(settings for settings in sections.values() if key in settings)[key] = value
    return sections


def _read(name: str) -> dict[str, Any]:
    files = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name not in files:
        raise PresetError(f"{name} is not a preset; the presets are {', '.join(files)}")
    return YAML(typ="safe").load(files[name].read_text(encoding="utf-8"))
