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
from pipeline.core.pages.templates import environment
from pipeline.core.processes import identity
from pipeline.core.progress import clock
from pipeline.params import Params
from pipeline.promote import Decision
from pipeline.registry.decisions import name_of
from pipeline.registry.gate import BASE
from pipeline.registry.manifest import require_manifest
from pipeline.registry.stores import open_store
from pipeline.report import tables


def show_run(params: Params, trigger: str, result: dict[str, Any]) -> None:
    """Create the artifact `run`, the page of the whole run, and tag the run with trigger, data, model, decision."""
    store, version, decision = open_store(params.publish), result["version"], result["decision"]
    template = environment(Path(__file__).parent / "pages", html=False).get_template("run.md.jinja")
    page = template.render(
        result=result,
        name=name_of(version["version"], version["number"]),
        verdict=verdict(decision),
        scores=tables.markdown(tables.score_rows(_systems(result))),
        stages=tables.markdown(_stage_rows(result, sum(stage["seconds"] for stage in result["stages"]))),
        cost=require_manifest(store, version["version"])["cost"],
        store=store.uri,
        registry=params.publish.tracking_uri,
    )
    create_markdown_artifact(page, key="run", description=decision["title"])
    model = f"{params.publish.registered_model_name}-v{version['number']}" if version["number"] else version["version"]
    describe_run(trigger, decision["decision"], model)


def state_of(decision: str, message: str, data: Any = None) -> State[Any]:
    """A run's last state, named after the decision; one that needs a person's attention is not green.

    Prefect's engine raises the data of a cancelled run: an Abort ends a worker's run quietly, anything else with a
    traceback.
    """
    if decision not in ("refused", "undecided", "regressed"):
        return Completed(name=decision.capitalize(), message=message, data=data)
    return Cancelled(name=decision.capitalize(), message=message, data=Abort(message) if data is None else data)


def describe_run(trigger: str, decision: str | None = None, model: str | None = None) -> None:
    """Tag this flow run and name it after its decision in one request; Prefect's `tags` would take one per task."""
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


def show(result: dict[str, Any], seconds: float) -> None:
    """Print the summary on the terminal: the verdict first, then the numbers."""
    version, decision = result["version"], result["decision"]
    if not result["changed"]:
        print("Nothing to do: data, parameters and code are those of the last run.")
    tables.show_decision(decision)
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
