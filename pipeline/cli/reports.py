"""`retune compare`: two versions next to each other, on the terminal, as a page, or for scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.versions import Json
from pipeline.report.tables import WIDTH

if TYPE_CHECKING:
    from pipeline.report.contents import Contents, Difference

SHOWN = 3  # texts of each side on the terminal; the page has more


def compare(
    old: Annotated[str, typer.Argument(help="v3, 3, champion, workspace or a version's id.")] = "champion",
    new: Annotated[str, typer.Argument(help="The one that is compared with it.")] = "workspace",
    html: Annotated[Path | None, typer.Option(help="Also write it as a page, with every text.")] = None,
    json_output: Json = False,
) -> None:
    """Compare two versions: scores with intervals, parameters and data that differ, texts that changed most."""
    from pipeline.core.files import write_text
    from pipeline.report.evaluation_pages import render
    from pipeline.report.versus import as_json, compare_versions
    from pipeline.settings import load_params

    contents = compare_versions(load_params(), old, new)
    if html is not None:
        write_text(html, render(contents, "report.html"))
    if json_output:
        print(json.dumps(as_json(contents), ensure_ascii=False))
        return
    _show(contents)
    if html is not None:
        print(f"compare: {html} is the same as a page")


def _show(contents: "Contents") -> None:
    from rich.console import Console

    from pipeline.report.tables import terminal
    from pipeline.report.versus import change_rows

    console = Console(width=WIDTH, highlight=False, markup=False)
    print(f"{contents.title}: {contents.verdict}.")
    items = contents.systems[-1].metrics["num_samples"]
    print(f"{items:,} test items: {contents.better:,} better, {contents.worse:,} worse, {contents.same:,} the same.")
    for note in contents.notes:
        print(f"note: {note}.")
    console.print(terminal(change_rows(contents)))
    for heading, rows in contents.tables.items():
        if rows:
            console.print(terminal(rows, heading))
        else:
            print(f"{heading}: none.")
    for heading, texts in (("Most improved answers", contents.best), ("Most worsened answers", contents.worst)):
        print(f"{heading}:" if texts else f"{heading}: none.")
        for text in texts[:SHOWN]:
            _show_text(text, contents)


def _show_text(text: "Difference", contents: "Contents") -> None:
    metric, before, after = text.most
    print(f"  {text.task}, {metric} {before:.3f} → {after:.3f}: {text.prompt}")
    for name, said in (
        ("expected", text.reference),
        (contents.labels[contents.old], text.old),
        (contents.labels[contents.new], text.new),
    ):
        print(f"    {name}: {said or '(nothing)'}")


COMMANDS: list[Callable[..., None]] = [compare]
