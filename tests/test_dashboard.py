"""What a person knows who looks only at the dashboard: a real run on a real server, in a real browser.

With RETUNE_SCREENSHOTS=FOLDER the pages are kept there as pictures.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from conftest import make_project, retune
from local_servers import api, whole_stack

from pipeline.params import Params

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, base: Path, params: Params) -> Iterator[str]:
    """A server on which one whole run was made."""
    root = make_project(tmp_path_factory.mktemp("dashboard") / "project", base, params)
    # Deployments come with the workers that take them.
    with whole_stack(root, operations={"services": ["cpu"]}) as known:
        done = retune(root, "run", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["decision"]["decision"] == "promoted"
        yield known["url"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as running:
        yield running


def test_the_runs_are_found_by_name_trigger_model_and_decision(browser: Browser, url: str) -> None:
    browser.open(f"{url}/runs")
    browser.see("retrain-by-hand", "trigger:by-hand", "model:retune-sample-v1", "promoted", "data:", "Promoted")
    browser.picture("dashboard-runs")


def test_a_run_shows_which_stages_ran_and_what_they_left(browser: Browser, url: str) -> None:
    [run] = api(url, "flow_runs/filter", {"flow_runs": {"name": {"like_": "retrain-by-hand"}}})
    browser.open(f"{url}/runs/flow-run/{run['id']}")
    browser.see("retrain-by-hand", "Promoted", "Logs", "prepare:", "train:")  # the stages' own lines, as they came
    browser.picture("dashboard-run")
    browser.click("Task Runs")
    browser.see("ingest-", "prepare-", "train-", "evaluate-", "merge-", "publish-", "promote-", "Cached", "Ran")
    browser.click("Artifacts")
    browser.scroll_down()  # what is not in sight is not made
    browser.see("run", "training-progress", "metrics", "verdict", "evaluation-report", "data-report", "version")
    browser.picture("dashboard-artifacts")


def test_the_page_of_a_run_has_verdict_scores_times_and_places(browser: Browser, url: str) -> None:
    [made] = api(url, "artifacts/latest/filter", {"artifacts": {"key": {"any_": ["run"]}}})
    browser.open(f"{url}/artifacts/artifact/{made['latest_id']}")
    browser.see("Promoted: v1", "Test scores", "champion", "rougeL", "needed", "Stages", "manifest.json", "cost")
    browser.picture("dashboard-verdict")


def test_a_deployment_can_be_started_by_hand_with_its_parameters_in_a_form(browser: Browser, url: str) -> None:
    [deployment] = api(url, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    browser.open(f"{url}/deployments/deployment/{deployment['id']}/run")
    browser.see("changes", "Submit")
    browser.picture("dashboard-form")
