"""Lets commands work in every folder of a project, as in git and DVC."""

import os
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from pipeline.params import Params
from pipeline.settings import load_params

BASE, WORKSPACE = "base", "workspace"  # names of models that are not versions
_below = Path(".")  # from the project's top folder to the folder where the command was called


def enter_project() -> None:
    """Change to the nearest folder here or above that has params.yaml and dvc.yaml, if there is one."""
    global _below
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            _below = here.relative_to(folder)
            os.chdir(folder)
            return


def as_typed(path: str) -> str:
    """Make a path, relative to where the command was called, relative to the project's top folder; a URI stays."""
    return path if _below == Path(".") or "://" in path else os.path.normpath(_below / path)


def load_params_offline() -> Params:
    """The parameters; with a local base model, libraries imported after this send no requests to the Hub."""
    params = load_params()
    if Path(params.prepare.model_name_or_path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    return params


class ProjectCommand(TyperCommand):
    """A command whose paths are relative to where it was called, with its whole summary in the overview."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return super().get_short_help_str(10_000)

    def invoke(self, ctx: Any) -> Any:
        for param in self.params:
            annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
            if annotation is Path and ctx.params.get(param.name) is not None:
                ctx.params[param.name] = Path(as_typed(str(ctx.params[param.name])))
        return super().invoke(ctx)
