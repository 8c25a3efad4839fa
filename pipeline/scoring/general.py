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
from pipeline.chat.template import ChatTemplate
from pipeline.core.files import sha256_file
from pipeline.data.formats import read_rows
from pipeline.data.records import Rejected
from pipeline.params import EvaluateParams, GeneralParams
from pipeline.scoring.generation import Answer
from pipeline.scoring.items import compute
from pipeline.scoring.resampling import LOWER_IS_BETTER, bootstrap_metrics, group_of, metric_items

METRICS = ("accuracy", "perplexity")


class GeneralError(ValueError):
    """The general set cannot be used; the message says what is wrong with which row."""


@dataclass(frozen=True)
class General:
    """N rows. `prompts` are those of the rows with one right answer; the others are only read, not answered."""

    ids: list[str]
    groups: list[str]
    references: list[str]
    prompts: dict[int, list[int]]
    sequences: list[tuple[list[int], list[int]]]  # tokens and labels


def read_general(params: GeneralParams, template: ChatTemplate, context: int | None) -> General:
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
    general = General([], [], [], {}, [])
    for number, row in enumerate(read_rows(path)):
        if isinstance(row, Rejected):
            raise GeneralError(f"{row.source} is no usable row: {row.reason}")
        answer = str(row.messages[-1].get("content") or "")
        try:
            encoded = template.encode(row.messages, row.tools)
            prompt = template.prompt_ids(row.messages[:-1], row.tools)
        except RowError as error:
            raise GeneralError(f"{row.source}: {error}") from None
        labels = [-100] * len(prompt) + encoded.labels[len(prompt) :]
        if row.scoring == "exact" and not row.messages[-1].get("tool_calls"):
            general.prompts[number] = prompt
        if context is not None and len(encoded.input_ids) > context:
            raise GeneralError(
                f"{row.source} has {len(encoded.input_ids)} tokens, and the model's context is {context}"
            )
        general.ids.append(row.source)
        general.groups.append(row.group or row.source)
        general.references.append(answer)
        general.sequences.append((encoded.input_ids, labels))
    return general


def general_items(general: General, answers: Sequence[Answer], losses: tuple[list[float], list[int]]) -> pa.Table:
    """The scored rows, (N,): `id, group, reference, answer, accuracy` (null where none was asked), `loss, loss_tokens`.

    Args:
        answers: to `general.prompts`, in their order. One that is cut off is wrong, whatever its text.
    """
    given = dict(zip(general.prompts, answers, strict=True))
    rows = range(len(general.ids))
    texts = [None if i not in given else given[i].text for i in rows]
    counted = ["" if i not in given or given[i].cut_off else given[i].text for i in rows]
    scoring = ["exact" if i in given else "text" for i in rows]
    hits = compute("accuracy", predictions=counted, references=general.references, scoring=scoring)["items"]
    return pa.table(
        {
            "id": general.ids,
            "group": general.groups,
            "reference": general.references,
            "answer": pa.array(texts, pa.string()),
            "accuracy": pa.array(hits, pa.float64()),
            "loss": pa.array(losses[0], pa.float64()),
            "loss_tokens": pa.array(losses[1], pa.int32()),
        }
    )


def forgetting(before: pa.Table, after: pa.Table, params: EvaluateParams) -> dict[str, Any]:
    """Both systems' scores with intervals, and how much worse the adapter is: perplexity as a fraction of the base."""
    scores: dict[str, dict[str, Any]] = {}
    for system, table in (("base", before), ("adapter", after)):
        values = {metric: metric_items(table, metric) for metric in METRICS}
        measured = bootstrap_metrics(values, group_of(table), params.bootstrap_samples, params.seed)
        scores[system] = {metric: score.as_dict() if score else None for metric, score in measured.items()}
    lost: dict[str, float | None] = {}
    for metric in METRICS:
        old, new = scores["base"][metric], scores["adapter"][metric]
        if old is None or new is None:
            lost[metric] = None
        elif metric in LOWER_IS_BETTER:
            lost[metric] = new["score"] / old["score"] - 1
        else:
            lost[metric] = old["score"] - new["score"]
    return {"rows": len(before), **scores, "lost": lost}
