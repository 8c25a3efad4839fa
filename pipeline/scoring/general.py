"""The forgetting check: what the base could do before tuning, on rows that have nothing to do with the task.

Its rows are a file in any format that ingest reads, pinned by its sha256. For base and adapter: the loss of each
row's last answer, and whether an answer with one right answer was right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.chat.rendering import RowError
from pipeline.chat.responses import Answer
from pipeline.chat.template import ChatTemplate
from pipeline.core.files import sha256_file
from pipeline.data.formats import read_rows
from pipeline.data.records import Rejected
from pipeline.params import EvaluateParams, GeneralParams
from pipeline.scoring.items import compute
from pipeline.scoring.likelihood import Losses
from pipeline.scoring.resampling import LOWER_IS_BETTER, table_scores

METRICS = ("accuracy", "perplexity")


class GeneralError(ValueError):
    """The general set cannot be used; the message says what is wrong with which row."""


@dataclass(frozen=True)
class GeneralRow:
    id: str
    group: str
    reference: str
    sequence: tuple[list[int], list[int]]  # tokens and labels
    prompt: list[int] | None  # of a row with one right answer; the others are only read, not answered


def read_general(params: GeneralParams, template: ChatTemplate, context: int | None) -> list[GeneralRow]:
    """The rows of the file, tokenised. A row with `scoring: exact` is also answered, calls excepted.

    Raises:
        GeneralError: no such file, another one than the pinned one, an unusable row, or a row longer than `context`.
        FormatError: the file is in no known format.
    """
    path = Path(params.path)
    if not path.is_file():
        raise GeneralError(f"evaluate.general.path names {path}, which is not there")
    digest = sha256_file(path)
    if digest != params.sha256:
        raise GeneralError(
            f"{path} is not the file that evaluate.general names: its sha256 is {digest}. Scores on another file are "
            "not comparable; put the file back, or set evaluate.general.sha256 to this"
        )
    general = []
    for row in read_rows(path):
        if isinstance(row, Rejected):
            raise GeneralError(f"{row.source} is no usable row: {row.reason}")
        try:
            encoded = template.encode(row.messages, row.tools)
            prompt = template.prompt_ids(row.messages[:-1], row.tools)
        except RowError as error:
            raise GeneralError(f"{row.source}: {error}") from None
        ids, last = encoded.input_ids, row.messages[-1]
        if context is not None and len(ids) > context:
            raise GeneralError(f"{row.source} has {len(ids)} tokens, and the model's context is {context}")
        answered = row.scoring == "exact" and not last.get("tool_calls")
        sequence = (ids, [-100] * len(prompt) + encoded.labels[len(prompt) :])
        reference = str(last.get("content") or "")
        general.append(
            GeneralRow(row.source, row.group or row.source, reference, sequence, prompt if answered else None)
        )
    return general


def general_items(general: Sequence[GeneralRow], answers: Sequence[Answer], losses: Losses) -> pa.Table:
    """The scored rows, (N,): `id, group, reference, answer, accuracy` (null where none was asked), `loss, loss_tokens`.

    Args:
        answers: to the prompts, in their order. One that is cut off is wrong, whatever its text.
    """
    given = iter(answers)
    answered = [None if row.prompt is None else next(given) for row in general]
    references = [row.reference for row in general]
    counted = ["" if answer is None or answer.cut_off else answer.text for answer in answered]
    scoring = ["text" if answer is None else "exact" for answer in answered]
    hits = compute("accuracy", predictions=counted, references=references, scoring=scoring)["items"]
    return pa.table(
        {
            "id": [row.id for row in general],
            "group": [row.group for row in general],
            "reference": references,
            "answer": pa.array([None if answer is None else answer.text for answer in answered], pa.string()),
            "accuracy": pa.array(hits, pa.float64()),
            "loss": pa.array(losses[0], pa.float64()),
            "loss_tokens": pa.array(losses[1], pa.int32()),
        }
    )


def measure_forgetting(before: pa.Table, after: pa.Table, params: EvaluateParams) -> dict[str, Any]:
    """Both systems' scores with intervals, and how much worse the adapter is: perplexity as a fraction of the base."""
    base, adapter = (table_scores(t, METRICS, params.bootstrap_samples, params.seed) for t in (before, after))
    lost: dict[str, float | None] = {}
    for metric in METRICS:
        old, new = base[metric], adapter[metric]
        if old is None or new is None:
            lost[metric] = None
        elif metric in LOWER_IS_BETTER:
            lost[metric] = new["score"] / old["score"] - 1
        else:
            lost[metric] = old["score"] - new["score"]
    return {"rows": len(before), "base": base, "adapter": adapter, "lost": lost}
