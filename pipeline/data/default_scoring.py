"""Chooses how a task's rows without a `scoring` are scored: `exact` if answers are short and recur, else `text`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.chat import Message
from pipeline.core.progress import counted
from pipeline.core.text import fold

MAX_LABEL = 40  # characters
MIN_SHORT = 0.95  # share of a task's answers that must be short for `exact`
MIN_REPEATS = 5  # average number of rows with the same answer for `exact`
MAX_TASKS = 4  # named on one line


class Choice(TypedDict):
    scoring: str  # exact | text
    rows: int  # without a scoring column
    short: int  # of these, rows with a short answer
    answers: int  # different short answers, after folding case and the like


def short_answer(message: Message) -> str | None:
    """The answer, folded, if it is short enough for a label; else None."""
    content = str(message["content"])
    return fold(content) if len(content) <= MAX_LABEL and "\n" not in content.strip() else None


def choose_scoring(
    folders: list[Path], rows_file: str, kept: NDArray[np.bool_], default_scoring: str
) -> dict[str, Choice]:
    """Task → how its rows without a scoring are scored, from the `kept` (N,) rows of all splits."""
    columns = ["task", "scoring", "short_answer"]
    rows = pa.concat_tables(pq.read_table(folder / rows_file, columns=columns) for folder in folders)
    rows = rows.filter(pc.and_(pa.array(kept), rows["scoring"].is_null()))
    aggregates = [([], "count_all"), ("short_answer", "count"), ("short_answer", "count_distinct")]
    counts = rows.group_by("task").aggregate(aggregates).sort_by("task")
    choices = {}
    for task, total, short, answers in zip(*counts.to_pydict().values(), strict=True):
        repeated = short >= MIN_SHORT * total and MIN_REPEATS * answers <= total
        scoring = ("exact" if repeated else "text") if default_scoring == "auto" else default_scoring
        choices[task] = Choice(scoring=scoring, rows=total, short=short, answers=answers)
    return choices


def explain_choice(choice: Choice) -> str:
    if choice["short"] < MIN_SHORT * choice["rows"]:
        return f"{choice['rows'] - choice['short']:,} of {choice['rows']:,} answers are longer than a label"
    return f"{counted(choice['answers'], 'different answer')} in {choice['rows']:,} rows"


def summarise_choices(choices: Mapping[str, Choice]) -> str:
    """One line about the choices for the largest tasks."""
    largest = sorted(choices.items(), key=lambda item: -item[1]["rows"])
    parts = [f"{task} as {choice['scoring']} ({explain_choice(choice)})" for task, choice in largest[:MAX_TASKS]]
    parts += ["others in the data report"] * (len(largest) > MAX_TASKS)
    return f"rows without a scoring column are scored by their answers: {', '.join(parts)}"
