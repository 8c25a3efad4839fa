"""What the code may know of what: the rules that no single module can break unseen."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, environment
from ruamel.yaml import YAML

SOURCES = sorted(path for folder in ("pipeline", "flows") for path in (ROOT / folder).rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if path.is_relative_to(ROOT / "pipeline")
    and not path.is_relative_to(ROOT / "pipeline" / "metrics")
    and "__" not in path.name
]
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f"{'.' * node.level}{node.module or ''}")
    return names


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def test_the_pipeline_runs_without_prefect() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "import gc; gc.freeze()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'prefect', 'flows'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_flows_know_prefect_and_flows(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert "flows" not in tops or path.parent.name == "flows"
    assert "prefect" not in tops or path.parent.name == "flows"


@pytest.mark.parametrize("path", (ROOT / "pipeline" / "chat").rglob("*.py"), ids=lambda path: path.name)
def test_the_chat_folder_does_not_import_the_data_folder(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith("pipeline.data")}


@pytest.mark.parametrize("stage", ["ingest", "prepare", "train", "evaluate", "merge", "publish", "promote"])
def test_a_stage_function_says_what_it_raises(stage: str) -> None:
    function = getattr(importlib.import_module(f"pipeline.{stage}"), stage)
    docstring = inspect.getdoc(function) or ""
    assert docstring.split("\n")[0]
    [_, raises] = docstring.split("\nRaises:\n")
    assert re.match(r"    \w+(, \w+)*: ", raises)


@pytest.mark.parametrize("stage", ["ingest", "prepare", "train", "evaluate", "merge", "publish", "promote"])
def test_a_stage_names_its_own_error_in_its_raises(stage: str) -> None:
    module = importlib.import_module(f"pipeline.{stage}")
    own = {
        name for name, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
    }
    docstring = inspect.getdoc(getattr(module, stage)) or ""
    for error in (name for name in own if name.endswith("Error")):
        assert error in docstring


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_begins_with_its_purpose(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.name in ("__init__.py", "__main__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_loaded_from_files_of_data(path: Path) -> None:
    assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for call in calls(path):
        name, keywords = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
        assert name not in ("eval", "exec", "os.system")
        assert ast.unparse(keywords.get("shell", ast.Constant(False))) == "False"
        if name == "torch.load":
            assert ast.unparse(keywords.get("weights_only", ast.Constant(False))) == "True"


def test_the_stages_of_dvc_are_those_of_the_graph() -> None:
    from pipeline.graph import SHIPPED
    from pipeline.graph import STAGES as names

    assert tuple(STAGES) == names
    assert set(SHIPPED) <= {out for stage in STAGES.values() for out in stage["outs"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_dvc_stage_depends_on_its_own_code_and_parameters(stage: str) -> None:
    # prepare tokenises for the task, which is a parameter of train.
    assert STAGES[stage]["params"] == [stage] + ["train.task"] * (stage == "prepare")
    assert f"pipeline/{stage}.py" in STAGES[stage]["deps"]
    assert STAGES[stage]["cmd"] == f"retune stage {stage}"
    others = {f"pipeline/{other}.py" for other in STAGES if other != stage}
    assert not others & set(STAGES[stage]["deps"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_dvc_stage_depends_on_files_that_exist_or_are_made(stage: str) -> None:
    made = {out for each in STAGES.values() for out in each["outs"]}
    for dependency in STAGES[stage]["deps"]:
        inside_out = any(dependency == out or dependency.startswith(f"{out}/") for out in made)
        assert inside_out or dependency.split("/")[0] == "data" or (ROOT / dependency).exists()
