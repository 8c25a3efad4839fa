"""What the code may know of what: the rules that no single module can break unseen."""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, environment
from ruamel.yaml import YAML

from pipeline.core.dependencies import code_digests
from pipeline.core.graph import SHIPPED
from pipeline.core.graph import STAGES as DVC_STAGES

SOURCES = sorted(path for folder in ("pipeline", "flows") for path in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES if "__" not in path.name}
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
# Each folder imports those before it; the stages stand on all of them, the command on the stages.
FOLDERS = ("core", "params", "settings", "chat", "data", "weights", "training", "scoring", "registry", "report")
SERVICES_KNOW = {"core", "params", "settings"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in inside}
    return frozenset(names)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def may_import(module: str, other: str) -> bool:
    folder, target = module.split(".")[1], other.split(".")[1]
    if folder == target or folder in ("cli", "__main__"):
        return True
    if folder == "services":
        return target in SERVICES_KNOW
    known = FOLDERS[: FOLDERS.index(folder)] if folder in FOLDERS else FOLDERS  # a stage
    return target in known


def test_folders_import_in_one_direction_and_no_stage_another() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module.startswith("pipeline.")
        for other in imported(path)
        if other.startswith("pipeline.") and not may_import(module, other)
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {module: {name for name in imported(path) if name in MODULES} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(known).prepare()  # CycleError names the circle


def test_the_flow_and_the_commands_start_without_the_libraries_of_the_stages() -> None:
    # huggingface_hub and transformers read the environment that Retune sets (offline, no telemetry) when imported.
    slow = "{'torch', 'transformers', 'huggingface_hub', 'evaluate'}"
    code = f"import pipeline.cli.main, flows.retrain, flows.deployments, sys; print({slow} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_only_flows_know_prefect_and_flows_and_no_command() -> None:
    for path in SOURCES:
        inside = path.parent.name == "flows"
        tops = {name.split(".")[0] for name in imported(path)}
        assert inside or not tops & {"flows", "prefect"}, path
        assert not inside or not any(name.startswith("pipeline.cli") for name in imported(path)), path


def test_no_module_has_a_name_of_the_standard_library_or_of_another() -> None:
    names = [module.rpartition(".")[2] for module in MODULES if module.startswith("pipeline.")]
    assert not set(names) & sys.stdlib_module_names
    assert len(set(names)) == len(names)


def test_a_module_begins_with_its_purpose_and_leaves_nothing_for_later() -> None:
    for path in SOURCES:
        assert ast.get_docstring(tree(path)) or path.name in ("__init__.py", "__main__.py"), path
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8")), path


def test_no_code_is_loaded_from_files_of_data() -> None:
    for path in SOURCES:
        assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
        for call in calls(path):
            name, keywords = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
            assert name not in ("eval", "exec", "os.system"), path
            assert ast.unparse(keywords.get("shell", ast.Constant(False))) == "False", path
            if name == "torch.load":
                assert ast.unparse(keywords.get("weights_only", ast.Constant(False))) == "True", path


def test_dvcs_stages_are_those_of_the_graph_and_what_only_speaks_or_refuses_trains_nothing_again() -> None:
    assert tuple(STAGES) == DVC_STAGES
    assert set(SHIPPED) <= {out for stage in STAGES.values() for out in stage["outs"]}
    listed = {path for stage in STAGES.values() for path in stage["deps"]}
    assert not [path for path in listed if path.startswith(("pipeline/cli/", "pipeline/services/"))]
    assert [stage for stage in STAGES if "pipeline/training/packing.py" in STAGES[stage]["deps"]] == ["train"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_dvc_stage_has_its_own_command_and_parameters_and_exactly_the_code_that_shapes_its_result(stage: str) -> None:
    # prepare tokenises for the task, which is a parameter of train.
    assert STAGES[stage]["params"] == [stage] + ["train.task"] * (stage == "prepare")
    assert STAGES[stage]["cmd"] == f"retune stage {stage}"
    code = {path for path in STAGES[stage]["deps"] if path.startswith("pipeline/")}
    assert code == set(code_digests(f"pipeline.{stage}"))
    made = {out for each in STAGES.values() for out in each["outs"]}
    for dependency in STAGES[stage]["deps"]:
        inside_out = any(dependency == out or dependency.startswith(f"{out}/") for out in made)
        assert inside_out or dependency.split("/")[0] == "data" or (ROOT / dependency).exists()
