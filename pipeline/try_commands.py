"""The commands that look at what was made: the report of a version, a conversation with it, answers to a file."""

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.commands import Json, Version, find


def report(version: Version = None, json_output: Json = False) -> None:
    """Write artifacts/report.html and .md: verdict, scores, tasks, texts, curves and lineage of a version."""
    from pipeline.report.whole import report as do

    params, _, _, target = find(version)
    contents = do(params.publish, target, Path("artifacts"))
    if json_output:
        print(json.dumps({"version": target, "decision": contents.decision, "path": "artifacts/report.html"}))
    else:
        print(f"report: {contents.verdict}")
        print("report: artifacts/report.html opens in any browser, artifacts/report.md is the same as text")


COMMANDS: list[Callable[..., None]] = [report]
