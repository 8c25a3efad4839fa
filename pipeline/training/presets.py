"""Parameter sets for known models (infra/presets), written into params.yaml.

The user's comments and order stay. A preset sets the same parameters as all others, so that none of an earlier preset
is left over; what no preset sets stays as it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.settings import change_params, load_params

PRESETS = Path(__file__).parents[2] / "infra" / "presets"


class PresetError(ValueError):
    """There is no such preset, or no such variant of it."""


@dataclass(frozen=True)
class Preset:
    name: str
    about: str
    gpu: str | None  # of infra/gpus.yaml, the smallest it is meant for; None: a CPU will do
    tasks: list[str]  # of `--for`
    first: str | None  # what to do before it can be used


def available() -> list[Preset]:
    """All presets by name, as infra/presets has them."""
    trees = {path.stem: _read(path.stem) for path in sorted(PRESETS.glob("*.yaml"))}
    return [Preset(name, tree["about"], tree["gpu"], list(tree["for"]), tree["first"]) for name, tree in trees.items()]


def apply(name: str, path: Path, task: str | None = None) -> dict[str, tuple[Any, Any]]:
    """Write the preset's values into `path`, and nothing else; returns what changed: parameter → value before, now.

    Args:
        task: of the preset's `for`: rank, alpha and target modules for classification, generation or reasoning.

    Raises:
        PresetError: no such preset or task.
        ParamsError: `path` cannot be used as it is, or not with the preset's values.
    """
    load_params(path)  # a file that is wrong already is not made wrong in another way
    before: dict[str, dict[str, Any]] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    changed = {
        f"{section}.{key}": (before[section][key], new)
        for section, settings in values(name, task).items()
        for key, new in settings.items()
        if before[section][key] != new or isinstance(new, bool) != isinstance(before[section][key], bool)
    }
    change_params({key: new for key, (_, new) in changed.items()}, path)
    return changed


def values(name: str, task: str | None = None) -> dict[str, dict[str, Any]]:
    """What a preset sets: section → parameter → value."""
    tree = _read(name)
    if task is not None and task not in tree["for"]:
        raise PresetError(f"{name} has no values for {task}; it has them for {', '.join(tree['for'])}")
    sections: dict[str, dict[str, Any]] = {key: dict(settings) for key, settings in tree["params"].items()}
    if task is not None:
        sections["train"] |= tree["for"][task]
    return sections


def _read(name: str) -> dict[str, Any]:
    files = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name not in files:
        raise PresetError(f"{name} is not a preset; there are {', '.join(files)}")
    tree: dict[str, Any] = YAML(typ="safe").load(files[name].read_text(encoding="utf-8"))
    return tree
