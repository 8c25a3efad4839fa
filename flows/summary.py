"""What a person who looks only at the dashboard is shown of a run: one page, and tags to find the run by."""

import os
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.context import get_run_context
from ruamel.yaml import YAML

from pipeline.params import Params
from pipeline.process import identity
from pipeline.progress import clock
from pipeline.statistics import METRICS
from pipeline.store.artifact_store import open_store
from pipeline.versions.compare import BASE
from pipeline.versions.gate import verdict_rows
from pipeline.versions.manifest import read_manifest


def show_run(params: Params, trigger: str, result: dict[str, Any]) -> None:
    """The page of a whole run as artifact `run`, and its tags: trigger, data, model, decision."""
    store = open_store(params.publish)
    manifest = read_manifest(store, result["version"]["version"]) or {}
    create_markdown_artifact(page(result, manifest, store.uri, params.publish.tracking_uri), key="run")
    version = result["version"]
    model = f"{params.publish.registered_model_name}-v{version['number']}" if version["number"] else version["version"]
    tag_run(trigger, f"model:{model}", result["decision"]["decision"])


def tag_run(trigger: str, *more: str) -> None:
    """Tags on the present flow run: those it had at its start, `retune` for the automations, its trigger and data.

    By request, not by Prefect's `tags`: each of those costs every task a request for its concurrency limit.
    """
    context: Any = get_run_context()
    run = getattr(context, "flow_run", None)
    if run is None:
        return
    process = None if run.deployment_id else identity()  # a worker says it of its own
    tags = {*run.tags, "retune", f"trigger:{trigger}", *filter(None, [_data_tag()]), *more}
    with get_client(sync_client=True) as client:
        client.update_flow_run(run.id, tags=sorted(tags), infrastructure_pid=process)


def page(result: dict[str, Any], manifest: dict[str, Any], store: str, registry: str) -> str:
    """Markdown: verdict, scores of base, champion and candidate, stages, cost, and where everything lies."""
    version, decision = result["version"], result["decision"]
    name = f"v{version['number']}" if version["number"] else version["version"]
    lines = [f"# {decision['decision'].capitalize()}: {name}", "", decision["reason"], ""]
    lines += [f"- {note}" for note in [*decision["notes"], *decision["warnings"]]]
    lines += ["", "## Test scores", "", "| metric | base | champion | candidate |", "|---|---|---|---|"]
    serving = decision["comparison"] if decision["against"] != BASE else {}
    for metric in METRICS:
        base, candidate = (result["metrics"][system][metric] for system in ("base", "merged"))
        champion = serving.get(metric, {}).get("champion")
        cells = [_score(base and base["score"]), _score(champion), _score(candidate and candidate["score"])]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    if rows := verdict_rows(decision["comparison"]):
        lines += ["", "## The gate", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    lines += ["", "## Stages", "", "| stage | outcome | time |", "|---|---|---|"]
    lines += [f"| {each['stage']} | {each['outcome']} | {clock(each['seconds'])} |" for each in result["stages"]]
    lines += [f"| all | | {clock(sum(each['seconds'] for each in result['stages']))} |", ""]
    cost = manifest.get("cost") or {"price_per_hour": None, "total": None}
    lines += ["## Cost and places", ""]
    unknown = "publish.price_per_hour is not set" if cost["price_per_hour"] is None else "a stage was not timed here"
    lines.append("- cost: " + (unknown if cost["total"] is None else f"{cost['total']:.2f}"))
    lines.append(f"- version: `{store}/versions/{version['version']}/manifest.json`")
    link = f"[{registry}]({registry})" if registry.startswith("http") else f"`{registry}`"
    lines.append(f"- registry: {link}; the whole report is the artifact `evaluation-report`")
    return "\n".join(lines) + "\n"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _data_tag() -> str | None:
    path = Path(os.environ.get("RETUNE_ROOT", ".")) / "data.dvc"
    if not path.is_file():
        return None
    return "data:" + str(YAML(typ="safe").load(path.read_text(encoding="utf-8"))["outs"][0]["md5"])[:8]
