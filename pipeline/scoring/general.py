"""The forgetting check: how well base and adapter do on general rows, which are not from the training task.

The rows come from a file in any format that ingest reads, pinned by its sha256. Each row's last answer gives a loss
and, with `scoring: exact`, a right or wrong answer.
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
from pipeline.scoring.items import compute_metric
from pipeline.scoring.likelihood import Losses
from pipeline.scoring.resampling import LOWER_IS_BETTER, difference, table_scores

METRICS = ("accuracy", "perplexity")


class GeneralError(ValueError):
    """The general set cannot be used; the message names the file or row."""


@dataclass(frozen=True)
class GeneralRow:
    id: str
    group: str
    reference: str
    sequence: tuple[list[int], list[int]]  # tokens and labels
    prompt: list[int] | None  # of a row that is answered; the others only have a loss


def read_general(params: GeneralParams, template: ChatTemplate, context: int | None) -> list[GeneralRow]:
    """The rows of the file, tokenised. A row with `scoring: exact` is also answered, unless its answer has tool calls.

    Raises GeneralError if the file is not the pinned one, or a row cannot be used or is longer than `context`.
    """
    path = Path(params.path)
    if not path.is_file():
        raise GeneralError(f"evaluate.general.path is {path}, which does not exist")
    digest = sha256_file(path)
    if digest != params.sha256:
        raise GeneralError(
            f"{path} has the sha256 {digest}; evaluate.general.sha256 is {params.sha256}. Restore the file, or set the "
            "parameter to the new sha256; scores on different files cannot be compared"
        )
    general = []
    for row in read_rows(path):
        if isinstance(row, Rejected):
            raise GeneralError(f"{row.source} cannot be used: {row.reason}")
        try:
            encoded = template.encode(row.messages, row.tools)
            prompt = template.prompt_ids(row.messages[:-1], row.tools)
        except RowError as error:
            raise GeneralError(f"{row.source}: {error}") from None
        ids, last = encoded.input_ids, row.messages[-1]
        if context is not None and len(ids) > context:
            raise GeneralError(f"{row.source} has {len(ids)} tokens, but the model's context is {context}")
        answered = row.scoring == "exact" and not last.get("tool_calls")
        sequence = (ids, [-100] * len(prompt) + encoded.labels[len(prompt) :])
        text, group = str(last.get("content") or ""), row.group or row.source
        general.append(GeneralRow(row.source, group, text, sequence, prompt if answered else None))
    return general


def general_items(general: Sequence[GeneralRow], answers: Sequence[Answer], losses: Losses) -> pa.Table:
    """The scored rows (N): `id, group, reference, answer, accuracy` (null for rows without a prompt), `loss, …`.

    `answers` are those to the rows with a prompt, in their order. A cut-off answer is wrong, whatever its text.
    """
    next_answer = iter(answers)
    row_answers = [None if row.prompt is None else next(next_answer) for row in general]
    references = [row.reference for row in general]
    predictions = ["" if answer is None or answer.cut_off else answer.text for answer in row_answers]
    scoring = ["text" if answer is None else "exact" for answer in row_answers]
    hits = compute_metric("accuracy", predictions=predictions, references=references, scoring=scoring)["items"]
    return pa.table(
        {
            "id": [row.id for row in general],
            "group": [row.group for row in general],
            "reference": references,
            "answer": pa.array([None if answer is None else answer.text for answer in row_answers], pa.string()),
            "accuracy": pa.array(hits, pa.float64()),
            "loss": pa.array(losses[0], pa.float64()),
            "loss_tokens": pa.array(losses[1], pa.int32()),
        }
    )


def measure_forgetting(before: pa.Table, after: pa.Table, params: EvaluateParams) -> dict[str, Any]:
    """Scores of the base (before) and the adapter (after), and how much worse it is (perplexity: as a fraction)."""
    base, adapter = (table_scores(t, METRICS, params.bootstrap_samples, params.seed) for t in (before, after))
    lost: dict[str, float | None] = dict.fromkeys(METRICS)
    for metric in METRICS:
        if (old := base[metric]) and (new := adapter[metric]):
            lost[metric] = difference(metric, new, old) * (1 if metric in LOWER_IS_BETTER else -1)
    return {"rows": len(before), "base": base, "adapter": adapter, "lost": lost}
