"""What the dashboard and the terminal show of a run: a page, tags to find the run by, the summary."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.exceptions import Abort
from prefect.states import Cancelled, Completed

from pipeline.core import graph
from pipeline.core.processes import identity
from pipeline.core.progress import clock
from pipeline.params import Params
from pipeline.promote import Decision
from pipeline.registry.compare import BASE
from pipeline.registry.decisions import name_of
from pipeline.registry.manifest import read_manifest
from pipeline.registry.stores import open_store
from pipeline.report import tables


def show_run(params: Params, trigger: str, result: dict[str, Any]) -> None:
    """Create the artifact `run`, the page of the whole run, and tag the run with trigger, data, model, decision."""
    store = open_store(params.publish)
    manifest = read_manifest(store, result["version"]["version"]) or {}
    text = page(result, manifest, store.uri, params.publish.tracking_uri)
    create_markdown_artifact(text, key="run", description=result["decision"]["title"])
    version = result["version"]
    model = f"{params.publish.registered_model_name}-v{version['number']}" if version["number"] else version["version"]
    describe_run(trigger, result["decision"]["decision"], model)


def state_of(decision: str, message: str, data: Any = None) -> State[Any]:
    """A run's last state, named after the decision; one that needs a person's attention is not green.

    Prefect's engine raises the data of a cancelled run: an Abort ends a worker's run quietly, anything else with a
    traceback.
    """
    if decision not in ("refused", "undecided", "regressed"):
        return Completed(name=decision.capitalize(), message=message, data=data)
    return Cancelled(name=decision.capitalize(), message=message, data=Abort(message) if data is None else data)


def describe_run(trigger: str, decision: str | None = None, model: str | None = None) -> None:
    """Tag the present flow run (`retune` for the automations, trigger, data, model) and name it after its decision.

    This is one request. With Prefect's `tags`, every task would make one for each tag's concurrency limit.
    """
    context: Any = get_run_context()
    run = getattr(context, "flow_run", None)
    if run is None:
        return
    process = None if run.deployment_id else identity()  # a worker reports its own
    root = Path(os.environ.get("RETUNE_ROOT", "."))
    data = f"data:{graph.snapshot(root)['md5'][:8]}" if (root / "data.dvc").is_file() else None
    tags = {*run.tags, "retune", f"trigger:{trigger}", *filter(None, [data, decision, model and f"model:{model}"])}
    name = "-".join(["retrain", trigger, *filter(None, [decision, model])])
    with get_client(sync_client=True) as client:
        client.update_flow_run(run.id, name=name, tags=sorted(tags), infrastructure_pid=process)


def verdict(decision: dict[str, Any]) -> str:
    """A decision as Markdown: three lines for a person, then the gate's numbers."""
    lines = [f"**{decision['title']}.**", "", f"{decision['reason']}."]
    lines += ["", f"Next: {decision['next']}."] if decision["next"] else []
    if rows := tables.verdict_rows(decision["comparison"], decision["against"] == BASE):
        lines += ["", *tables.markdown(rows), "", tables.P_NOTE]
    return "\n".join([*lines, "", *(f"- {note}" for note in [*decision["notes"], *decision["warnings"]])])


def record_verdict(decision: Decision) -> None:
    create_markdown_artifact(verdict(asdict(decision)), key="verdict", description=decision.title)


def page(result: dict[str, Any], manifest: dict[str, Any], store: str, registry: str) -> str:
    """Markdown: verdict, scores of base, champion and candidate, stages, cost, and where everything lies."""
    version, decision = result["version"], result["decision"]
    cost = manifest.get("cost") or {"price_per_hour": None, "total": None}
    unknown = "publish.price_per_hour is not set" if cost["price_per_hour"] is None else "a stage was not timed here"
    link = f"[{registry}]({registry})" if registry.startswith("http") else f"`{registry}`"
    seconds = sum(stage["seconds"] for stage in result["stages"])
    scores, stages = (
        "\n".join(tables.markdown(rows)) for rows in (tables.score_rows(_systems(result)), _stage_rows(result, seconds))
    )
    return f"""\
# {decision["decision"].capitalize()}: {name_of(version["version"], version["number"])}

{verdict(decision)}

## Test scores

{scores}

## Stages

{stages}

## Cost and places

- cost: {unknown if cost["total"] is None else format(cost["total"], ".2f")}
- version: `{store}/versions/{version["version"]}/manifest.json`
- registry: {link}; the whole report is the artifact `report`
"""


def show(result: dict[str, Any], seconds: float) -> None:
    """Print the summary on the terminal: the verdict first, then the numbers."""
    version, decision = result["version"], result["decision"]
    if not result["changed"]:
        print("Nothing to do: data, parameters and code are those of the last run.")
    print("\n".join(tables.verdict_lines(decision["title"], decision["reason"], decision["next"])))
    for line in [*decision["notes"], *decision["warnings"]]:
        print(f"         {line}.")
    tables.show_verdict(decision["comparison"], decision["against"] == BASE)
    tables.show_table(tables.score_rows(_systems(result)), "Test scores (95 % interval)")
    tables.show_table(_stage_rows(result, seconds), "Stages")
    alias = " (champion)" if decision["champion"] == version["version"] else ""
    before = "" if version["created"] else ", published before"
    print(f"Version  {name_of(version['version'], version['number'])}{alias}{before}, id {version['version']}")
    print("Files    artifacts/merged is the model, artifacts/report.html the report")


def _systems(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of each system; for a champion only those that the gate compared, without intervals."""
    metrics, decision = result["metrics"], result["decision"]
    compared = decision["comparison"] if decision["against"] != BASE else {}
    scores = {metric: {"score": row["champion"]} for metric, row in compared.items() if row["champion"] is not None}
    champion = {"champion": scores} if scores else {}
    return {"base": metrics["base"], **champion, "adapter": metrics["adapter"], "merged": metrics["merged"]}


def _stage_rows(result: dict[str, Any], seconds: float) -> list[tables.Row]:
    stages = [*result["stages"], {"stage": "all", "outcome": "", "seconds": seconds}]
    return [{"stage": s["stage"], "outcome": s["outcome"], "time": clock(s["seconds"])} for s in stages]
