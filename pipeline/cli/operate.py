"""The commands about servers and the machine: up, status, down, doctor."""

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipeline.cli import doctor as diagnosis
from pipeline.cli.versions import Json, answer
from pipeline.core import current_run, graph
from pipeline.core.checks import as_json
from pipeline.core.files import read_of_living
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.registry.decisions import champion, proposed
from pipeline.registry.model import RegisteredModel
from pipeline.services import server, stack
from pipeline.services.flow_runs import refuse_runs_by_hand
from pipeline.settings import load_params

Port = Annotated[int | None, typer.Option(min=1, max=65535, help="The dashboard's; default: operations.prefect_port.")]
MlflowPort = Annotated[int | None, typer.Option(min=1, max=65535, help="MLflow's; default: operations.mlflow_port.")]


def up(port: Port = None, mlflow_port: MlflowPort = None, json_output: Json = False) -> None:
    """Start the local stack (dashboard, workers, schedules, MLflow) on loopback; it runs until `retune down`."""
    params = stack.with_ports(load_params(), port, mlflow_port)
    state = stack.up(params, on_wait=lambda text: print(f"up: {text}", file=sys.stderr))
    lines = [*_service_lines(state), f"up: dashboard at {state['url']}; `retune down` stops everything"]
    answer(json_output, state, "\n".join(lines))


def down(json_output: Json = False) -> None:
    """Stop what `retune up` started, its workers' runs included; a training saves a checkpoint first."""
    if url := server.running():
        refuse_runs_by_hand(url)
    stopped = stack.down()
    answer(json_output, {"stopped": stopped}, "down: stopped" if stopped else "down: nothing was running")


def status(json_output: Json = False) -> None:
    """Show servers and workers, the current run's progress and who started it, stale stages, and the champion."""
    params = load_params()
    state = stack.state()
    try:
        with only_run():
            pass  # do not hold the lock: `status` must not block a run
        stale = list(graph.stale())
    except RunUnderWay:
        stale = ["a run is under way"]
    model = RegisteredModel(params.publish)
    log, registry = model.log(), model.registry
    proposal = proposed(log)
    run = read_of_living(current_run.FILE) or None
    overview = {
        "run": run,
        "dashboard": state.get("url") if state.get("ready") else None,
        "services": state.get("services", []),
        "stale": stale,
        "champion": champion(log),
        "waiting": proposal.version if proposal else None,
    }
    if json_output:
        print(json.dumps(overview))
        return
    print(f"dashboard  {overview['dashboard'] or 'not running (`retune up` starts it)'}")
    for line in _service_lines(state):
        print(line)
    if run is not None:
        since = time.strftime("%H:%M", time.localtime(run["since"]))
        started = f"started at {since} by {run['by']} ({run['trigger']}, process {run['process'].partition(':')[0]})"
        print(f"run        {run['line'] or run['stage'] or 'starting'}; {started}")
    print(f"stale      {', '.join(stale) or 'nothing: every stage is up to date'}")
    print(f"champion   {registry.cached_name(overview['champion'])}")
    if overview["waiting"]:
        print(f"waiting    {registry.cached_name(overview['waiting'])} for approval (`retune promote --approve`)")


def doctor(json_output: Json = False) -> None:
    """Check everything a run needs; print how to fix what is missing, and exit with status 1 if something is."""
    checks = diagnosis.doctor()
    result = as_json(checks)
    if json_output:
        print(json.dumps(result))
    else:
        for check in checks:
            mark = {True: "ok", False: "FAILED", None: "–"}[check.passed]
            print(f"{mark:<7}{check.name:<15} {check.detail}")
            if check.advice:
                print(f"{'':<23}→ {check.advice}")
    if not result["passed"]:
        raise typer.Exit(1)


def _service_lines(state: dict[str, Any]) -> list[str]:
    return [
        f"{service['name']:<16} {service['state']:<16} {service['url'] or '':<22} process {service['pid']}, "
        f"{service['log']}"
        for service in state.get("services", [])
    ]


COMMANDS: list[Callable[..., None]] = [up, down, status, doctor]
