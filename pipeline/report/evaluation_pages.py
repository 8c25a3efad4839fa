"""The evaluation report as pages for people: Markdown, and one HTML file that needs nothing else.

What a model or the data wrote cannot act in them: Jinja escapes it, and the HTML page forbids every script by its own
policy.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.files import write_text
from pipeline.core.pages.templates import environment
from pipeline.report.contents import Change, Contents
from pipeline.report.tables import SYSTEMS, markdown, number, score_rows
from pipeline.scoring.resampling import PERCENT, num_counting

SLICES = {"by_task": "By task", "by_language": "By language", "by_length": "By length of the prompt"}


def render(contents: Contents, name: str) -> str:
    """The page `name`: report.md or report.html."""
    names = SYSTEMS | contents.labels
    pages = environment(Path(__file__).parent / "pages", html=name.endswith(".html"))
    pages.filters |= {"signed": lambda change, key: number(change.metric, getattr(change, key), "+")}
    return pages.get_template(f"evaluation.{name.removeprefix('report.')}.jinja").render(
        report=contents,
        score_rows=score_rows(
            {s.name: s.metrics for s in contents.systems},
            num_counting(contents.systems[-1].items),
            contents.systems[-1].metrics["num_samples"],
            names,
        ),
        failures=[
            (state.replace("_", " "), [s.metrics[f"num_{state}"] for s in contents.systems])
            for state in ("cut_off", "empty", "failed")
        ],
        items=contents.systems[-1].metrics["num_samples"],
        forest=[(change, *_place(change, contents.changes)) for change in contents.changes],
        slices=[
            (heading, _bars(contents, kind))
            for kind, heading in SLICES.items()
            if len(contents.slices(kind)) > (kind != "by_task")
        ],
        plot=Plot.of(contents.curve),
        number=number,
        label=lambda name: names.get(name, name),
        markdown=markdown,
    )


def _bars(contents: Contents, kind: str) -> list[tuple[str, int, str, int, list[tuple[str, "Bar | None"]]]]:
    """Name, items, metric, the items that it counts, and each system's bar."""
    return [
        (
            name,
            items,
            metric,
            counting,
            [(s.name, Bar.of(metric, s.metrics.get(kind, {}).get(name, {}).get(metric))) for s in contents.systems],
        )
        for name, items, metric, counting in contents.slices(kind)
    ]


@dataclass(frozen=True)
class Bar:
    """A score on a scale from 0 to 100, with its interval."""

    text: str
    at: float
    low: float
    high: float

    @classmethod
    def of(cls, metric: str, score: dict[str, float] | None) -> "Bar | None":
        if score is None:
            return None
        scale = 1 if metric in PERCENT else 100
        places = (min(100.0, max(0.0, scale * score[key])) for key in ("score", "low", "high"))
        return cls(number(metric, score["score"]), *places)


@dataclass(frozen=True)
class Plot:
    """Loss by step in a box of 100 × 100, y downwards; ticks as text and place."""

    lines: dict[str, str]  # loss, validation_loss → points of a polyline
    x_ticks: list[tuple[str, float]]
    y_ticks: list[tuple[str, float]]
    last: dict[str, str]

    @classmethod
    def of(cls, curve: list[dict[str, float]]) -> "Plot | None":
        kinds = [kind for kind in ("loss", "validation_loss") if any(kind in row for row in curve)]
        if not kinds:
            return None
        steps = [row["step"] for row in curve]
        top = max(row[kind] for row in curve for kind in kinds if kind in row) or 1.0
        step = _round_step(top / 4)
        high = step * math.ceil(top / step)
        first, width = min(steps), (max(steps) - min(steps)) or 1.0

        def x(value: float) -> float:
            return round(100 * (value - first) / width, 2)

        def y(value: float) -> float:
            return round(100 - 100 * value / high, 2)

        lines = {k: " ".join(f"{x(row['step'])},{y(row[k])}" for row in curve if k in row) for k in kinds}
        ticks = [first + width * k / 4 for k in range(5)] if len(set(steps)) > 4 else sorted(set(steps))
        return cls(
            lines,
            [(f"{round(tick):,}", x(round(tick))) for tick in ticks],
            [(f"{step * k:g}", y(step * k)) for k in range(round(high / step) + 1)],
            {k: f"{[row[k] for row in curve if k in row][-1]:.3f}" for k in kinds},
        )


def _place(change: Change, changes: list[Change]) -> tuple[float, float, float]:
    """Where interval and difference lie, in percent of the track; 50 is no difference, and the scale is one for all."""
    reach = max((abs(share) for each in changes for share in each.gain), default=0) or 1.0
    low, at, high = (50 + 48 * share / reach for share in change.gain)
    return low, high, at


def _round_step(value: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= value * 0.999)


def write_report(contents: Contents, folder: Path) -> None:
    """`report.md` and `report.html` in `folder`."""
    for name in ("report.md", "report.html"):
        write_text(folder / name, render(contents, name))
