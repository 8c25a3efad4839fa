"""The commands that ingest data and show rows."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pipeline.cli.project import as_typed, load_params_offline
from pipeline.cli.versions import CommandError, Json
from pipeline.core import graph
from pipeline.core.progress import counted
from pipeline.core.run_lock import only_run
from pipeline.data.columns import format_columns, parse_columns
from pipeline.data.formats import Ask, UnclearFormatError
from pipeline.data.known_formats import FORMATS
from pipeline.data.snapshot import recover
from pipeline.ingest import IngestResult
from pipeline.ingest import ingest as ingest_sources
from pipeline.params import ColumnsParams, IngestParams
from pipeline.services.events import contents, tell_updated
from pipeline.settings import load_params

Format = Annotated[str | None, typer.Option(help="The format, instead of ingest.format and ingest.columns.")]
Columns = Annotated[
    str | None, typer.Option(help="The mapping of columns, instead of ingest.columns: prompt=question,response=answer.")
]


def ingest(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Files, folders, quoted globs, hf://datasets/OWNER/NAME@COMMIT, s3://BUCKET/KEY, "
            "https://…#sha256=…; none: ingest.sources of params.yaml.",
            show_default=False,
        ),
    ] = None,
    format: Format = None,
    columns: Columns = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace the rows even if many are rejected, or far fewer come than before."),
    ] = False,
    json_output: Json = False,
) -> None:
    """Make the rows of all SOURCEs the new data snapshot, on which `retune run` then trains."""
    params, operations = load_params().ingest, load_params().operations
    with only_run():
        recover()
        base_from = _pull_base(load_params().prepare.model_name_or_path)
        before = contents()
        params = _with_options(params, format, columns)
        uris = [as_typed(source) for source in sources or ()]
        result = ingest_sources(params, uris, replace=replace, ask=None if json_output else _terminal())
        new_rows = len(contents() - before) if result.changed else 0
    sent = result.changed and tell_updated(new_rows, operations.min_new_rows)
    if json_output:
        print(json.dumps(asdict(result) | {"new_rows": new_rows, "told": sent, "remote": graph.team_remote()}))
        return
    if base_from is not None:
        print(f"ingest: the snapshot of data.dvc is lost; data/base is the base model of commit {base_from[:12]}")
    _print_result(result, sent, graph.team_remote())


def inspect(
    file: Annotated[Path | None, typer.Argument(help="A data file or folder; default: the prepared dataset.")] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="A split of the prepared dataset.")
    ] = "train",
    row: Annotated[int | None, typer.Option(min=0, help="The first row to show; 0 is the first of all.")] = None,
    id: Annotated[str | None, typer.Option(help="The row with this id, as shown in the reports.")] = None,
    task: Annotated[str | None, typer.Option(help="Only rows of this task.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    format: Format = None,
    columns: Columns = None,
    json_output: Json = False,
) -> None:
    """Show rows token by token, as the model sees them, with trained tokens marked; FILE is shown as if prepared."""
    model = Path(load_params().prepare.model_name_or_path)
    if file is not None and model.parts[:1] == ("data",) and not model.exists():  # a fresh clone
        with only_run():
            _pull_base(str(model))
    params = load_params_offline()
    from pipeline.data.inspection import as_text, inspect_dataset, inspect_file

    misplaced = format or columns if file is None else id
    if misplaced is not None:
        raise CommandError("--format and --columns are for a file, --id is for the prepared dataset")
    if file is None:
        rows = inspect_dataset(Path("artifacts/dataset"), split, row, id, task, count)
    else:
        params = params.model_copy(update={"ingest": _with_options(params.ingest, format, columns)})
        rows = inspect_file(params, file, row, task, count, None if json_output else _terminal())
    if json_output:
        print(json.dumps({"rows": [shown.as_json() for shown in rows]}, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for shown in rows:
        console.print(as_text(shown))


def _with_options(params: IngestParams, format: str | None, columns: str | None) -> IngestParams:
    """`params` with the format and columns of the command line; a format there replaces a mapping in `params`."""
    if format not in (None, "auto", *FORMATS):
        raise typer.BadParameter(f"{format} is not a format; expected auto, {', '.join(sorted(FORMATS))}")
    changes: dict[str, Any] = {}
    if columns is not None:
        changes = {"format": format or "auto", "columns": parse_columns(columns)}
    elif format is not None:
        changes = {"format": format, "columns": params.columns if format == "classification" else None}
    return params.model_copy(update=changes)


def _terminal() -> Ask | None:
    return _ask if sys.stdin.isatty() and sys.stderr.isatty() else None


def _ask(error: UnclearFormatError) -> tuple[str, ColumnsParams | None]:
    """Ask on the terminal for the format or the columns."""
    print(error, file=sys.stderr)
    guess = next(iter(error.formats), None) if error.columns is None else format_columns(error.columns)
    while True:
        answer = typer.prompt("Its format, or its columns", default=guess, err=True).strip()
        if answer in FORMATS:
            return answer, None
        try:
            return "auto", parse_columns(shlex.split(answer)[0] if answer[:1] in "'\"" else answer)
        except ValueError as fault:
            print(f"{answer} is not a format; expected {', '.join(sorted(FORMATS))}; {fault}", file=sys.stderr)


def _print_result(result: IngestResult, sent: bool, remote: str | None) -> None:
    print(f"ingest: {counted(result.rows, 'row')} from {counted(len(result.files), 'file')}")
    for file in result.files[:20]:
        rejected = f", {file['rejected']:,} rejected" if file["rejected"] else ""
        unused = f"; not used: {', '.join(file['not_used'])}" if file["not_used"] else ""
        print(
            f"  {file['name']}: {file['format']}, {file['container']}, {counted(file['rows'], 'row')}{rejected}{unused}"
        )
    if len(result.files) > 20:
        print(f"  and {len(result.files) - 20} more, in data/instructions/snapshot.json")
    if result.left_out:
        print(f"  {counted(result.left_out, 'row')} left out by weight and cap")
    for reason, count in result.rejected.items():
        print(f"  {count:,} cannot be used: {reason}")
    for repair, count in result.repaired.items():
        print(f"  {count:,} repaired: {repair}")
    if result.rejected:
        print("  the records that cannot be used are in data/instructions/rejected.jsonl with their lines")
    if not result.changed:
        print("  the same data as before; data.dvc is unchanged")
        return
    print("  these rows replace the previous ones; data.dvc now points to the new snapshot")
    print("  the server starts its deployment retrain" if sent else "  next: `retune run` trains on them")
    if remote is not None:
        print(f"  to share them: commit data.dvc, then `dvc push data.dvc` sends the rows to the DVC remote {remote}")
    else:
        print(
            "  only this machine has the rows; so that a colleague's clone can train on them, push them to a remote:\n"
            "    dvc remote add -d team s3://BUCKET/PATH    # or ssh://, gs://, azure://, a folder both can reach\n"
            '    git add .dvc/config data.dvc && git commit -m "New data"\n'
            "    dvc push data.dvc"
        )


def _pull_base(model: str) -> str | None:
    """Check out `data/` before its rows are replaced; if the rows are lost, the base model of the returned commit."""
    try:
        graph.pull_data()
    except graph.SnapshotMissing:
        commit = graph.restore_base()
        if Path(model).parts[:1] == ("data",) and not Path(model).exists():
            raise
        return commit
    return None


COMMANDS: list[Callable[..., None]] = [ingest, inspect]
