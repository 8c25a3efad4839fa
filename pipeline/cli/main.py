"""The `retune` command. Each subcommand reads its parameters, calls one function, and prints the result."""

import os
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import datasets, operate, talk, versions
from pipeline.cli.project import ProjectCommand, enter_project, load_params_offline
from pipeline.cli.versions import Json, answer, print_warnings
from pipeline.core import graph, timings
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.environment import collect_rarely, set_environment
from pipeline.core.files import FULL_DISK, WORK_DIR, read_json
from pipeline.core.processes import end_with_parent, lives, python_ending_with_parent, run_forwarding_sigterm
from pipeline.core.progress import clock, counted
from pipeline.core.redaction import redact, redact_process
from pipeline.core.run_lock import only_on_gpus, only_run
from pipeline.data.snapshot import recover
from pipeline.promote import require_ready, settled
from pipeline.registry.init_adapter import fetch_init
from pipeline.registry.model import RegisteredModel
from pipeline.registry.retention import collect
from pipeline.registry.stores import open_store
from pipeline.report.whole import report_decision
from pipeline.services import server
from pipeline.services.events import record_unchanged
from pipeline.services.flow_runs import close_lost_runs
from pipeline.settings import load_params, yaml_text
from pipeline.training.presets import apply_preset, list_presets

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,  # `retune --install-completion`
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: boxes break sentences
    help="Scheduled, gated retraining of LLM adapters. Works in every folder of a project.",
)
ARTIFACTS = Path("artifacts")


def main() -> None:
    """Run the command line; errors of this project become one sentence and exit status 1, or 143 after SIGTERM."""
    collect_rarely()
    redact_process()
    enter_project()
    set_environment()
    try:
        app()
    except (ValueError, RuntimeError) as error:
        # Errors of this project are written for people; any other is a defect and keeps its traceback.
        if not type(error).__module__.startswith(("pipeline.", "flows.")):
            raise
        print(redact(f"error: {error}"), file=sys.stderr)
        sys.exit(143 if type(error).__name__ == "Interrupted" else 1)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        if error.errno in FULL_DISK:
            where += "; free space (docs/operations.md, The disk is full)"
        if isinstance(error, PermissionError) and WORK_DIR.exists() and not os.access(WORK_DIR, os.W_OK | os.X_OK):
            where += f"; this project belongs to {WORK_DIR.owner()}, make a clone of your own"
        print(redact(f"error: {error.strerror}{where}"), file=sys.stderr)
        sys.exit(1)


@app.command(cls=ProjectCommand)
def run(json_output: Json = False) -> None:
    """Bring everything up to date: train if something changed, publish, and promote if it is better."""
    params = load_params()
    with only_run() as lock:
        recover()  # after an ingest that was killed
        require_ready(params)
        version = None if graph.stale() else graph.version_id()
        if version and (reason := settled(params, version)):
            _print_unchanged(params, version, reason, json_output)
            return
        dashboard = server.running()
        if dashboard is None:
            print("run: starting the Prefect server (about 10 seconds)", file=sys.stderr, flush=True)
        with server.for_one_run() as url:
            close_lost_runs(url)
            settings = {
                "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the flow prints its own lines
                "RETUNE_RUN_LOCK": str(lock),  # the flow releases it while it waits for a person
                "RETUNE_DASHBOARD": dashboard or "",
            }
            command = python_ending_with_parent("flows", *(["--json"] if json_output else []))
            environment = server.environment(Path("."), url) | settings
            status = run_forwarding_sigterm(command, environment, pass_fds=[lock])
    if status in (130, 143):
        print("run: interrupted; `retune run` continues from the last checkpoint", file=sys.stderr)
    raise typer.Exit(status)


def _print_unchanged(params: Any, version: str, reason: str, json_output: bool) -> None:
    name = RegisteredModel(params.publish).registry.cached_name(version)
    if not (ARTIFACTS / "report.html").is_file():
        print_warnings(report_decision(params.publish, version, ARTIFACTS))
    record_unchanged(f"version {name}: {reason}")
    text = f"Nothing to do: data, parameters and code are those of the last run.\nVersion {name}: {reason}."
    answer(json_output, {"changed": False, "version": version, "reason": reason}, text)


@app.command(cls=ProjectCommand)
def stage(name: Annotated[str, typer.Argument(help="prepare, train, evaluate or merge.")]) -> None:
    """Run one stage of dvc.yaml; `dvc repro` calls this."""
    # DVC forwards no signals, and a stage must not outlive it. SIGTERM lets a training save a checkpoint.
    end_with_parent(signal.SIGTERM)

    if graph.RUN in os.environ and not lives(os.environ[graph.RUN]):
        raise typer.Exit(143)  # the run and DVC died before the call of `end_with_parent`

    started = time.monotonic()
    summary = _run_stage(name)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timings.record(name, seconds, peak)
    print(f"{name}: {summary} · {clock(seconds)}, {peak / 2**30:.1f} GiB at its peak", flush=True)


for module in (datasets, versions, talk, operate):
    for command in module.COMMANDS:
        app.command(cls=ProjectCommand)(command)


@app.command("gc", cls=ProjectCommand)
def collect_garbage(
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without this they are only counted.")] = False,
    json_output: Json = False,
) -> None:
    """Count objects of the store that no version needs and that are older than seven days; --delete removes them."""
    garbage = collect(open_store(load_params().publish), delete)
    what = f"{garbage.objects:,} objects, {garbage.bytes / 1e6:,.1f} MB, and {garbage.unfinished:,} unfinished uploads"
    done = "deleted" if garbage.deleted else "could be deleted (`retune gc --delete`)"
    kept = f"{garbage.kept:,} objects are kept: in use, or younger than seven days"
    answer(json_output, asdict(garbage), f"gc: {what} {done}\n    {kept}")


@app.command(cls=ProjectCommand)
def plan(
    gpu: Annotated[str | None, typer.Option(help="A name of infra/gpus.yaml; without one, a CPU.")] = None,
    json_output: Json = False,
) -> None:
    """Estimate a training before it starts: parameters, memory, steps, time and cost."""
    from pipeline.training import plan as planning

    dataset = ARTIFACTS / "dataset"
    result = planning.plan(load_params(), dataset if (dataset / "contract.json").is_file() else None, gpu)
    answer(json_output, asdict(result), planning.describe(result))


@app.command(cls=ProjectCommand)
def preset(
    name: Annotated[str | None, typer.Argument(help="One of the presets that `retune preset` lists.")] = None,
    task: Annotated[
        str | None, typer.Option("--for", help="Also set rank, alpha and modules for one of the listed tasks.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the parameters for a model and task into params.yaml, and keep its comments; without NAME, list presets."""
    presets = list_presets()
    if name is None:
        lines = [f"{preset.name:20} {preset.about} (--for {', '.join(preset.tasks)})" for preset in presets]
        answer(json_output, [asdict(preset) for preset in presets], "\n".join(lines))
        return
    changed = apply_preset(name, Path("params.yaml"), task)
    first = next(preset.first for preset in presets if preset.name == name)
    lines = [f"  {key}: {yaml_text(old)} → {yaml_text(new)}" for key, (old, new) in changed.items()]
    lines.append(
        f"preset: {name} is in params.yaml, {counted(len(changed), 'value')} changed; `git diff params.yaml` shows them"
    )
    lines += [] if first is None else [f"first: {first}"]
    answer(json_output, {"preset": name, "changed": changed, "first": first}, "\n".join(lines))


@app.command(hidden=True, cls=ProjectCommand)
def score(model: Path, settings: Annotated[Path, typer.Option()], output: Annotated[Path, typer.Option()]) -> None:
    """Score a merged model on the workspace's test split; `promote` calls this for versions scored on another one."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a shipped model is whole
    from pipeline.merge import score_model

    score_model(model, ARTIFACTS / "dataset", read_json(settings), output)


def _run_stage(name: str) -> str:
    """Run one stage on the project's folders; returns a summary of its result."""
    params = load_params_offline()
    classes = params.train.task == CLASSIFICATION
    dataset, adapter, evaluation = ARTIFACTS / "dataset", ARTIFACTS / "adapter", ARTIFACTS / "evaluation"
    match name:
        case "prepare":
            from pipeline.data.default_scoring import summarise_choices
            from pipeline.prepare import prepare

            prepared = prepare(
                params.prepare, Path("data/instructions"), dataset, WORK_DIR / "prepared", params.train.task
            )
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in prepared.dropped.items())
            dropped = f", {sum(prepared.dropped.values()):,} dropped ({reasons})" if prepared.dropped else ""
            rows = ", ".join(f"{count:,} {split}" for split, count in prepared.rows.items())
            loss = "" if classes else f"; {prepared.trained_tokens:,} of {prepared.tokens:,} training tokens carry loss"
            show_scoring = prepared.scoring and params.prepare.default_scoring == "auto" and not classes
            return f"{rows} rows{dropped}{loss}" + (f"; {summarise_choices(prepared.scoring)}" if show_scoring else "")
        case "train":
            from pipeline.train import train
            from pipeline.weights.loading import visible_gpus

            with only_on_gpus(visible_gpus(), lambda line: print(f"train · {line}", flush=True)):
                trained = train(params.train, dataset, adapter, tables=ARTIFACTS / "training", init=fetch_init(params))
            return (
                f"{trained.steps} steps, loss {trained.loss:.3f}, "
                f"{trained.trainable_parameters:,} trainable parameters, {trained.tokens_per_second:,.0f} tokens/s"
            )
        case "evaluate":
            from pipeline.evaluate import evaluate

            scored = evaluate(params.evaluate, dataset, adapter, evaluation, WORK_DIR / "answers")
            return ", ".join(
                f"{metric} {scored['base'][metric]['score']:.3g} → {scored['adapter'][metric]['score']:.3g}"
                for metric in (("accuracy", "macro_f1") if classes else ("accuracy", "bleu", "rougeL"))
                if scored["base"][metric]
            )
        case "merge":
            from pipeline.merge import merge

            merged = merge(params.merge, dataset, adapter, evaluation, ARTIFACTS / "merged", ARTIFACTS / "parity")
            if classes:
                return f"into the {merged.base} base; {merged.agreement:.1%} of the test texts have the adapter's class"
            peft = f", by PEFT because {merged.merging.reason}" if merged.merging.reason else ""
            return (
                f"into the {merged.base} base{peft}; agrees with the adapter on {merged.agreement:.1%} of tokens, "
                f"{merged.identical:.1%} of answers are the same"
            )
    raise typer.BadParameter(f"{name} is not a stage; expected prepare, train, evaluate or merge")
