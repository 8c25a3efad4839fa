"""The report as the evaluate stage knows it: base and adapter, no verdict yet.

Nothing in it differs between two runs on the same inputs (no times, no versions), since it is part of a version's name.
"""

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import read_json, write_json, write_text
from pipeline.params import EvaluateParams
from pipeline.report.contents import (
    Contents,
    System,
    compare_items,
    contract_facts,
    data_facts,
    differences,
    evaluation_facts,
    read_curve,
    read_other_sets,
    read_prompts,
    training_facts,
)
from pipeline.report.evaluation_pages import write_report
from pipeline.report.tables import number
from pipeline.scoring.items import Metrics, summarise
from pipeline.scoring.resampling import LOWER_IS_BETTER, METRICS, PERCENT

OPEN = (
    "The gate decides at promotion, on the merged model and against the champion; artifacts/report.html then has its "
    "decision."
)


def write_scores(
    items: dict[str, pa.Table],
    params: EvaluateParams,
    recorded: dict[str, Any],
    dataset: Path,
    adapter: Path,
    folder: Path,
) -> dict[str, Metrics]:
    """Scores, items, what they depend on (`recorded`) and the report of `base` and `adapter`; answers or classes."""
    metrics = {system: summarise(table, params) for system, table in items.items()}
    for system, table in items.items():
        pq.write_table(table, folder / f"items.{system}.parquet")
    write_json(folder / "scores.json", metrics)
    write_json(folder / "evaluation.json", recorded)
    base, candidate = (System(name, metrics[name], items[name]) for name in ("base", "adapter"))
    write_stage_report(base, candidate, dataset, adapter, folder)
    return metrics


def write_stage_report(base: System, candidate: System, dataset: Path, adapter: Path, evaluation: Path) -> None:
    """`report.md` and `report.html` in `evaluation`, and what `dvc plots` draws: `scores.csv` and `tasks.csv`."""
    contents = stage_contents(base, candidate, dataset, adapter, evaluation)
    write_report(contents, evaluation)
    measured = [metric for metric in METRICS if metric not in LOWER_IS_BETTER]
    _write_bars(evaluation / "scores.csv", [(m, m, s.name, s.metrics) for m in measured for s in contents.systems])
    tasks = [
        (task, metric, s.name, s.metrics["by_task"].get(task, {}))
        for task, _, metric, _ in contents.slices("by_task")
        for s in contents.systems
    ]
    _write_bars(evaluation / "tasks.csv", tasks)


def _write_bars(path: Path, bars: list[tuple[str, str, str, Metrics]]) -> None:
    """A line for each bar (what, metric, system, scores): its score and interval, from 0 to 100."""
    with io.StringIO(newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("of", "score", "low", "high"))
        for what, metric, system, scores in bars:
            if score := scores.get(metric):
                scale = 1 if metric in PERCENT else 100
                writer.writerow(
                    (f"{what}, {system}", *(round(scale * score[key], 4) for key in ("score", "low", "high")))
                )
        write_text(path, text.getvalue())


def stage_contents(base: System, candidate: System, dataset: Path, adapter: Path, evaluation: Path) -> Contents:
    """The adapter against the base that it was trained on, with the files that `evaluation` holds by now."""
    settings = read_json(evaluation / "evaluation.json")
    params = settings["params"]
    changes = compare_items(candidate, base, params["bootstrap_samples"], params["seed"])
    better, worse, best, worst = differences(candidate, base)
    training = read_json(adapter / "training.json")
    first = next((c for c in changes if c.metric == "rougeL"), changes[0] if changes else None)
    verdict = (
        ""
        if first is None
        else (
            f"Before merge, the candidate scores {number(first.metric, first.new)} in {first.metric}, the base "
            f"{number(first.metric, first.old)} (95 % CI of the difference {number(first.metric, first.low, '+')} to "
            f"{number(first.metric, first.high, '+')}). "
        )
    )
    return Contents(
        about={"base model": training["base_model"]["name_or_path"], "state": "evaluated, not published"},
        title="Not decided yet",
        verdict=verdict + OPEN,
        decision="open",
        systems=[base, candidate],
        new=candidate.name,
        old=base.name,
        changes=changes,
        better=better,
        worse=worse,
        best=best,
        worst=worst,
        curve=read_curve((adapter / "loss.csv").read_text(encoding="utf-8")),
        facts={
            "Data": data_facts(read_json(dataset / "report.json")),
            "Training": training_facts(training),
            "Evaluation": evaluation_facts(settings),
            "Template contract": contract_facts(read_json(adapter / "contract.json")),
        },
        prompts=read_prompts({"base": (evaluation, "base"), "adapter": (evaluation, "adapter")}),
        tables=read_other_sets(evaluation),
    )
