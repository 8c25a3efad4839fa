"""Writes the evaluate stage's report (base and adapter, no verdict yet), and reads the parts of any report from files.

The stage's report is part of what a version's id is computed from, so it contains no times and no versions.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import read_json, write_json, write_text
from pipeline.data.data_report import excerpt
from pipeline.params import EvaluateParams
from pipeline.registry.wording import number
from pipeline.report.contents import Contents, System
from pipeline.report.evaluation_pages import write_report
from pipeline.report.tables import SYSTEMS, Row, interval
from pipeline.scoring.resampling import LOWER_IS_BETTER, METRICS, PERCENT, RELATIVE

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
) -> dict[str, dict[str, Any]]:
    """Write scores, items, their provenance (`recorded`) and the report of `base` and `adapter`; returns the scores."""
    from pipeline.scoring.items import summarise  # imports torch; the flow writes reports without it

    systems = [System(name, summarise(items[name], params), items[name]) for name in ("base", "adapter")]
    metrics = {system.name: system.metrics for system in systems}
    for system in systems:
        pq.write_table(system.items, folder / f"items.{system.name}.parquet")
    write_json(folder / "scores.json", metrics)
    write_json(folder / "evaluation.json", recorded)
    contents = stage_contents(systems, dataset, adapter, folder)
    write_report(contents, folder)
    # For `dvc plots`.
    measured = [metric for metric in METRICS if metric not in LOWER_IS_BETTER]
    _write_bars(folder / "scores.csv", [(m, s.name, s.metrics.get(m)) for m in measured for s in systems])
    tasks = [(task, metric) for task, _, metric, _ in contents.slices("by_task")]
    bars = [(task, s.name, s.slice_score("by_task", task, metric)) for task, metric in tasks for s in systems]
    _write_bars(folder / "tasks.csv", bars)
    return metrics


def _write_bars(path: Path, bars: list[tuple[str, str, dict[str, float] | None]]) -> None:
    """Write a line for each bar (metric or task, system, score): score and interval, from 0 to 100."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("of", "score", "low", "high"))
    for name, system, score in bars:
        if score is not None:
            scale = 1 if name in PERCENT else 100
            numbers = (round(scale * score[key], 4) for key in ("score", "low", "high"))
            writer.writerow((f"{name}, {system}", *numbers))
    write_text(path, text.getvalue())


def stage_contents(systems: list[System], dataset: Path, adapter: Path, evaluation: Path) -> Contents:
    """The adapter against its base, with the files that are in `evaluation` so far."""
    settings = read_json(evaluation / "evaluation.json")
    contents = Contents.compare(
        systems,
        systems[0],
        settings["params"],
        about={
            "base model": read_json(adapter / "training.json")["base_model"]["name_or_path"],
            "state": "evaluated, not published",
        },
        title="Not decided yet",
        verdict=OPEN,
        decision="open",
        **file_parts(adapter, evaluation, settings),
    )
    contents.facts["Data"] = facts(read_json(dataset / "report.json"), "rows", "test_sha256")
    return contents


def file_parts(adapter: Path, evaluation: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Contents` from the files of an adapter and its evaluation; `settings`: its evaluation.json."""
    return {
        "curve": read_curve((adapter / "loss.csv").read_text(encoding="utf-8")),
        "facts": {
            "Training": facts(
                read_json(adapter / "training.json"), "base_model", "steps", "trainable_parameters", "device", "params"
            ),
            "Evaluation": facts(settings, "decoding", "params", "signatures"),
            "Template contract": facts(
                read_json(adapter / "contract.json"), "labels", "chat_template_name", "chat_template_sha256",
                "tokenizer_sha256", "stop_ids", "train_on", "on_control_tokens", "max_length",
            ),
        },
        "prompts": read_prompts({"base": (evaluation, "base"), "adapter": (evaluation, "adapter")}),
        "tables": read_other_sets(evaluation),
    }  # fmt: skip


def facts(tree: dict[str, Any], *keys: str) -> dict[str, str]:
    """The values of `keys` as text, nested ones by their path."""
    values = flatten({key: tree[key] for key in keys if key in tree})
    return {path: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for path, v in values.items()}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dictionary by their path, such as `train.lora_r`."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def read_prompts(sources: dict[str, tuple[Path, str]]) -> dict[str, list[tuple[str, str]]]:
    """The prompts of `adapter`, each with every system's answer; `sources`: of each, its folder and its name there."""
    answers: dict[str, dict[str, str]] = {}
    for system, (folder, name) in sources.items():
        path = folder / "prompts.json"  # which classifiers lack
        answers[system] = {}
        for row in read_json(path) if path.is_file() else []:
            cut_off = " (cut off)" if row[name]["cut_off"] else ""
            answers[system][row["prompt"]] = excerpt(row[name]["answer"]) + cut_off
    return {
        prompt: [(system, texts.get(prompt, "(was not asked)")) for system, texts in answers.items()]
        for prompt in answers["adapter"]
    }


def read_other_sets(evaluation: Path) -> dict[str, list[Row]]:
    """A table of adapter against base on the general set, if there is one."""
    if not (evaluation / "general.json").is_file():
        return {}
    general, rows = read_json(evaluation / "general.json"), []
    for metric, lost in general["lost"].items():
        if lost is not None:
            scores = {SYSTEMS[system]: interval(metric, general[system][metric]) for system in ("base", "adapter")}
            higher = lost if metric in LOWER_IS_BETTER else -lost
            difference = f"{100 * higher:+.1f} %" if metric in RELATIVE else number(metric, higher, "+")
            rows.append({"": metric} | scores | {"difference": difference})
    return {"General set: what was forgotten": rows}


def read_curve(table: str) -> list[dict[str, float]]:
    """The rows of `loss.csv`: step, and loss and validation_loss if they were measured and are finite."""
    curve = []
    for row in csv.DictReader(table.splitlines()):
        values = {key: float(row[key]) for key in ("step", "loss", "validation_loss") if row.get(key)}
        curve.append({key: value for key, value in values.items() if math.isfinite(value)})
    return curve
