"""What DVC's own commands show of a run: few numbers, and plots that open without a network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, dump_dom
from conftest import ROOT, environment

from pipeline.core import graph
from pipeline.core.files import write_text
from pipeline.core.graph import GraphError
from pipeline.settings import ParamsError, load_params


@pytest.fixture
def plots(tmp_path: Path) -> Path:
    """The page of `dvc plots show` on a curve, by the project's own DVC settings."""
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True)
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots", dirs_exist_ok=True)
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    write_text(tmp_path / "loss.csv", "step,loss\n1,2.0\n2,1.0\n")
    write_text(tmp_path / "dvc.yaml", "plots:\n  - loss: {y: {loss.csv: loss}, x: step}\n")
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show"], cwd=tmp_path, env=environment(), check=True)
    return tmp_path / "dvc_plots" / "index.html"


def test_the_plots_load_nothing_from_elsewhere(plots: Path) -> None:
    page = plots.read_text(encoding="utf-8")
    assert "vegaEmbed" in page
    assert re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page) == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_without_network_draws_the_plots(plots: Path, tmp_path: Path) -> None:
    shown = dump_dom("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'browser'}", plots.as_uri())
    assert re.search(r"<canvas|<svg[^>]*marks", shown.stdout), shown.stderr


@pytest.mark.parametrize("name", ["dvc.lock", "data.dvc", "dvc.yaml"])
def test_a_record_with_gits_conflict_markers_is_one_sentence_with_the_way_out(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "schema: '2.0'\n<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n")
    with pytest.raises(GraphError) as error:
        graph.stale(tmp_path)
    assert f"{name}, line 2" in str(error.value) and f"git checkout --ours {name}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_parameters_with_gits_conflict_markers_say_so(tmp_path: Path) -> None:
    write_text(tmp_path / "params.yaml", "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n")
    with pytest.raises(ParamsError, match="line 2"):
        load_params(tmp_path / "params.yaml")
