"""The code that a result depends on: a module and what it imports. As a program, it writes it into `dvc.yaml`."""

import ast
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.core.files import sha256_file
from pipeline.core.graph import STAGES

ROOT = Path(__file__).parents[2]
# Modules that read, check, print or start something, so no result depends on them. A folder stands for its modules.
WITHOUT_EFFECT = {
    "pipeline.core",
    "pipeline.params",
    "pipeline.settings",
    "pipeline.registry.artifact_store",
    "pipeline.registry.decisions",
    "pipeline.registry.manifest",
    "pipeline.training.checkpoints",
    "pipeline.training.launch",
    "pipeline.training.watching",
}
SHAPING = {"pipeline.core.memory", "pipeline.core.pages.templates", "pipeline.core.sanitise", "pipeline.core.text"}


def code_behind(module: str) -> list[Path]:
    """The files of `module` and its imports (those in functions too), and data next to modules that use `__file__`."""
    known: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in known and (name in SHAPING or not f"{name}.".startswith(tuple(f"{m}." for m in WITHOUT_EFFECT))):
            known.add(name)
            todo += _imported(name)
    modules = {_file(name) for name in known}
    folders = {path.parent for path in modules if "__file__" in path.read_text(encoding="utf-8")}
    return sorted(modules | {path for folder in folders for path in _data_in(folder)})


def code_digests(module: str) -> dict[str, str]:
    """The digest of each file of `code_behind`, by its path in the project."""
    return {str(path.relative_to(ROOT)): sha256_file(path) for path in code_behind(module)}


def write_dependencies(dvc_yaml: Path = ROOT / "dvc.yaml") -> None:
    """Replace the code in every stage's `deps`; data and outputs stay."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(dvc_yaml)
    for stage in STAGES:
        deps = document["stages"][stage]["deps"]
        others = [path for path in deps if not str(path).startswith("pipeline/")]
        deps[:] = [*others, *(str(path.relative_to(ROOT)) for path in code_behind(f"pipeline.{stage}"))]
    yaml.dump(document, dvc_yaml)


def _file(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _data_in(folder: Path) -> list[Path]:
    subfolders = [path for path in folder.iterdir() if path.is_dir() and not (path / "__init__.py").exists()]
    files = [*folder.iterdir(), *(path for subfolder in subfolders for path in subfolder.rglob("*"))]
    return [
        path
        for path in files
        if path.is_file() and path.suffix != ".pyc" and (path.suffix, path.parent) != (".py", folder)
    ]


@cache
def _imported(module: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if _file(name).is_file() else node.module for name in imported]
    return [name for name in names if name.startswith("pipeline.")]


if __name__ == "__main__":
    write_dependencies()
