"""Renders the evaluation report as Markdown and as one self-contained HTML file.

Texts from models and data cannot run there: Jinja escapes them, and the page's own policy forbids scripts.
"""

import math
from pathlib import Path
from typing import Any

from pipeline.core.files import write_text
from pipeline.core.pages.templates import environment
from pipeline.registry.wording import number
from pipeline.report.contents import Change, Contents
from pipeline.report.tables import SYSTEMS, markdown, score_rows
from pipeline.scoring.resampling import METRICS, PERCENT, metric_items, num_counted

SLICES = {"by_task": "By task", "by_language": "By language", "by_length": "By length of the prompt"}


def write_report(contents: Contents, folder: Path) -> None:
    for name in ("report.md", "report.html"):
        write_text(folder / name, render(contents, name))


def render(contents: Contents, name: str) -> str:
    """The page `name`: report.md or report.html."""
    labels = SYSTEMS | contents.labels
    systems, items = contents.systems, contents.systems[-1].items
    counts = {metric: num_counted(metric_items(items, metric)) for metric in METRICS}
    pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
    pages.filters |= {"signed": lambda change, key: number(change.metric, getattr(change, key), "+")}
    return pages.get_template(f"evaluation.{name.removeprefix('report.')}.jinja").render(
        report=contents,
        score_rows=score_rows({system.name: system.metrics for system in systems}, counts, contents.items, labels),
        failures=[
            (state.replace("_", " "), [system.metrics[f"num_{state}"] for system in systems])
            for state in ("cut_off", "empty")
        ],
        items=contents.items,
        forest=[(change, *_on_track(change, contents.changes)) for change in contents.changes],
        slices=[
            (heading, bars)
            for kind, heading in SLICES.items()
            if len(bars := _bars(contents, kind)) > (kind != "by_task")  # not for a single language or length
        ],
        plot=plot_losses(contents.curve),
        number=number,
        label=lambda name: labels.get(name, name),
        markdown=markdown,
    )


Bar = tuple[str, float, float, float]  # a score as text; it and its interval on a scale from 0 to 100


def _bars(contents: Contents, kind: str) -> list[tuple[str, int, str, int, list[tuple[str, Bar | None]]]]:
    """For each slice: name, items, metric, items that the metric counts, and each system's bar."""
    return [
        (*part, [(s.name, _bar(part[2], s.slice_score(kind, part[0], part[2]))) for s in contents.systems])
        for part in contents.slices(kind)
    ]


def _bar(metric: str, score: dict[str, float] | None) -> Bar | None:
    if score is None:
        return None
    scale = 1 if metric in PERCENT else 100
    value, low, high = (min(100.0, max(0.0, scale * score[key])) for key in ("score", "low", "high"))
    return number(metric, score["score"]), value, low, high


def plot_losses(curve: list[dict[str, float]]) -> dict[str, Any] | None:
    """Loss by step in a box of 100 × 100, y downwards: points of polylines, ticks (text, position), last values."""
    kinds = ("loss", "validation_loss")
    measured = {
        kind: points for kind in kinds if (points := [(row["step"], row[kind]) for row in curve if kind in row])
    }
    if not measured:
        return None
    steps = sorted({row["step"] for row in curve})
    first, width = steps[0], (steps[-1] - steps[0]) or 1.0
    top = max(value for values in measured.values() for _, value in values) or 1.0
    power = 10.0 ** math.floor(math.log10(top / 4))
    tick = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= top / 4 * 0.999)
    high = tick * math.ceil(top / tick)

    def x(step: float) -> float:
        return round(100 * (step - first) / width, 2)

    def y(value: float) -> float:
        return round(100 - 100 * value / high, 2)

    ticks = [first + width * k / 4 for k in range(5)] if len(steps) > 4 else steps
    return {
        "lines": {kind: " ".join(f"{x(s)},{y(value)}" for s, value in values) for kind, values in measured.items()},
        "x_ticks": [(f"{round(step):,}", x(round(step))) for step in ticks],
        "y_ticks": [(f"{tick * k:g}", y(tick * k)) for k in range(round(high / tick) + 1)],
        "last": {kind: f"{values[-1][1]:.3f}" for kind, values in measured.items()},
    }


def _on_track(change: Change, changes: list[Change]) -> tuple[float, float, float]:
    """Low, high and difference in percent of the track; 50 is no difference, and all changes have the same scale."""
    longest = max((abs(share) for other in changes for share in other.gain), default=0) or 1.0
    low, difference, high = (50 + 48 * share / longest for share in change.gain)
    return low, high, difference
