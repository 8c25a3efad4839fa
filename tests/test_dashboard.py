"""What a person knows who looks only at the dashboard: a real run on a real server, in a real browser.

With RETUNE_SCREENSHOTS=FOLDER the pages are kept there as pictures.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import make_project, retune
from test_flow import api
from test_stack import free_port

from pipeline.params import Params

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
Page = Callable[[str, str], str]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Iterator[int]:
    """The port of a server on which one whole run was made."""
    root = make_project(tmp_path_factory.mktemp("dashboard") / "project", base, params)
    number = free_port()
    try:
        assert retune(root, "up", "--port", str(number)).returncode == 0
        done = retune(root, "run", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["decision"]["decision"] == "promoted"
        yield number
    finally:
        retune(root, "down")


@pytest.fixture
def page(port: int, tmp_path: Path) -> Page:
    """The page at a path as the browser shows it after its scripts have run; a picture of it under `name`."""

    def shown(path: str, name: str) -> str:
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-background-networking"
        options += " --disable-component-update --window-size=1280,1000 --virtual-time-budget=20000"
        options += f" --user-data-dir={tmp_path / name}"
        url = f"http://127.0.0.1:{port}{path}"
        if folder := os.environ.get("RETUNE_SCREENSHOTS"):
            picture = f"--screenshot={Path(folder).resolve() / name}.png"
            subprocess.run(
                [str(CHROMIUM), *options.split(), picture, url], capture_output=True, timeout=120, check=True
            )
        ran = subprocess.run(
            [str(CHROMIUM), *options.split(), "--dump-dom", url], capture_output=True, text=True, timeout=120
        )
        return ran.stdout

    return shown


def test_the_runs_are_found_by_name_trigger_model_and_decision(page: Page) -> None:
    shown = page("/runs", "dashboard-runs")
    for words in ("retrain-by-hand", "trigger:by-hand", "model:retune-sample-v1", "promoted", "data:"):
        assert words in shown


def test_a_run_shows_which_stages_ran_and_what_they_left(page: Page, port: int) -> None:
    [run] = api(port, "flow_runs/filter", {"flow_runs": {"name": {"any_": ["retrain-by-hand"]}}})
    shown = page(f"/runs/flow-run/{run['id']}", "dashboard-run")
    for stage in ("prepare", "train", "evaluate", "merge", "publish", "promote"):
        assert f"{stage}-" in shown
    shown = page(f"/runs/flow-run/{run['id']}?tab=Artifacts", "dashboard-artifacts")
    for artifact in ("run", "training-progress", "metrics", "verdict", "evaluation-report", "data-report", "version"):
        assert artifact in shown


def test_the_page_of_a_run_has_verdict_scores_times_and_places(page: Page, port: int) -> None:
    [made] = api(port, "artifacts/latest/filter", {"artifacts": {"key": {"any_": ["run"]}}})
    shown = page(f"/artifacts/artifact/{made['latest_id']}", "dashboard-verdict")
    for words in ("Promoted: v1", "Test scores", "champion", "rougeL", "The gate", "Stages", "manifest.json", "cost"):
        assert words in shown
