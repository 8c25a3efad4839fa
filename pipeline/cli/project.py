"""Commands work from every folder of a project, as git's and DVC's do: at its top, with paths as they were typed."""

import os
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

_below = Path(".")  # from the project's top to the folder that the command was called in


def enter_project() -> None:
    """Make the nearest folder above with params.yaml and dvc.yaml the working directory, if there is one."""
    global _below
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            _below = here.relative_to(folder)
            os.chdir(folder)
            return


def as_typed(path: str) -> str:
    """`path`, typed in the folder that the command was called in, as seen from the project's top; an address stays."""
    return path if _below == Path(".") or "://" in path else os.path.normpath(_below / path)


class ProjectCommand(TyperCommand):
    """A command whose paths are meant from where it was called, and whose summary is shown whole."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return super().get_short_help_str(10_000)

    def invoke(self, ctx: Any) -> Any:
        for param in self.params:
            annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
            if annotation is Path and ctx.params.get(param.name) is not None:
                ctx.params[param.name] = Path(as_typed(str(ctx.params[param.name])))
        return super().invoke(ctx)
