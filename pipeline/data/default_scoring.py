"""How the answers of rows without a `scoring` are scored: chosen for each task by what its answers look like.

Answers that are short and come back, as labels and choices do, are right or wrong as a whole: `exact`. All others are
texts, of which no single one is right: compared word by word alone, as BLEU and ROUGE do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.chat import Message
from pipeline.core.text import fold

SHORT = 40  # characters of an answer that can be a label
MIN_SHORT = 0.95  # of a task's answers
MIN_ROWS_EACH = 5  # rows that have the same answer, on average
MOST_TASKS = 4  # named on one line


class Choice(TypedDict):
    scoring: str  # exact | text
    rows: int  # without a scoring of their own
    short: int  # of them, rows with a short answer
    answers: int  # different short answers, case and the like folded


def short_answer(message: Message) -> str | None:
    """The answer as it is compared, if it is short enough for a label."""
    content = str(message["content"])
    return fold(content) if len(content) <= SHORT and "\n" not in content.strip() else None


def choose_scoring(
    folders: list[Path], rows_file: str, kept: NDArray[np.bool_], default_scoring: str
) -> dict[str, Choice]:
    """Task → how its rows without a scoring are scored, from the rows that are `kept` (N,), of all splits."""
    columns = ["task", "scoring", "short_answer"]
    rows = pa.concat_tables(pq.read_table(folder / rows_file, columns=columns) for folder in folders)
    rows = rows.filter(pc.and_(pa.array(kept), rows["scoring"].is_null()))
    counts = rows.group_by("task").aggregate(
        [([], "count_all"), ("short_answer", "count"), ("short_answer", "count_distinct")]
    )
    names = ("task", "count_all", "short_answer_count", "short_answer_count_distinct")
    choices = {}
    for task, total, short, answers in sorted(zip(*(counts[name].to_pylist() for name in names), strict=True)):
        repeated = short >= MIN_SHORT * total and MIN_ROWS_EACH * answers <= total
        scoring = ("exact" if repeated else "text") if default_scoring == "auto" else default_scoring
        choices[task] = Choice(scoring=scoring, rows=total, short=short, answers=answers)
    return choices


def reason(choice: Choice) -> str:
    """What the choice was made by."""
    if choice["short"] < MIN_SHORT * choice["rows"]:
        return f"{choice['rows'] - choice['short']:,} of {choice['rows']:,} answers are longer than a label"
    return f"{choice['answers']:,} different answer{'s' * (choice['answers'] != 1)} in {choice['rows']:,} rows"


def sentence(choices: Mapping[str, Choice]) -> str:
    """What a person is told of the choices, of the largest tasks first."""
    first = sorted(choices, key=lambda task: -choices[task]["rows"])[:MOST_TASKS]
    parts = [f"{task} as {choices[task]['scoring']} ({reason(choices[task])})" for task in first]
    more = ["others in the data report"] if len(choices) > len(first) else []
    return f"rows without a scoring are scored by their answers: {', '.join(parts + more)}"
