"""prepare: instruction data in, tokenised train, validation and test splits with their template contract out.

Every row gets a verdict: kept, repaired or dropped with a reason; dropped rows are kept in `dropped.jsonl`. A row's
split follows from the hash of its group alone, so a row never moves between splits when data is added or removed, and
nothing that is asked in the test split is answered in the training split.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import sha256_json, whole_directory, write_json, write_text
from pipeline.formats import Rejected, Row, find_files, read_rows
from pipeline.params import PrepareParams
from pipeline.progress import Progress
from pipeline.template import ChatTemplate, Encoded, RowError, load_template

SPLITS = ("train", "validation", "test")
OVERLONG = "longer than prepare.max_length"
DUPLICATE = "exact duplicate of an earlier row"
LEAKED = "its prompt is in the test split too"


class PrepareError(ValueError):
    """The data cannot become a dataset; the message says what is wrong with how many rows, and the way out."""


@dataclass(frozen=True)
class Prepared:
    rows: dict[str, int]  # split → rows
    dropped: dict[str, int]  # reason → rows
    trained_tokens: int  # of the training split: tokens that carry loss
    tokens: int  # of the training split


def prepare(params: PrepareParams, data: Path, output: Path) -> Prepared:
    """Write `train|validation|test.parquet`, `contract.json`, `report.json|md` and `dropped.jsonl` to `output`.

    Train and validation shards have `id, task, input_ids, labels` (labels −100 where a token carries no loss); the test
    shard has `id, task, group, scoring, messages` (JSON), `tools, prompt` (rendered), `input_ids` (its tokens) and
    `reference`, the expected answer. Lengths are in tokens of the base model's tokenizer.

    Raises:
        FormatError, TemplateError: see `read_rows` and `load_template`.
        PrepareError: too many unusable rows, an overlong row with `on_overlong: error`, or an empty split.
    """
    template, identity = load_template(params)
    rows, dropped = _read(data)
    total = len(rows) + len(dropped)
    rows = _without_duplicates(rows, dropped)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    split_by_row = [split_of(row, params) for row in rows]
    test_prompts = {_prompt_key(row) for row, split in zip(rows, split_by_row, strict=True) if split == "test"}
    declared = any(row.scoring for row in rows)
    progress = Progress("prepare", len(rows), "rows")
    for done, (row, split) in enumerate(zip(rows, split_by_row, strict=True)):
        if split != "test" and not test_prompts.isdisjoint(_asked(row)):
            dropped.append(Rejected(row.source, LEAKED, row.messages))
            continue
        try:
            encoded = template.encode(row.messages, row.tools)
            record = _record(row, split, encoded, template, declared)
        except RowError as error:
            dropped.append(Rejected(row.source, str(error), row.messages))
            continue
        if len(encoded.input_ids) > params.max_length:
            if params.on_overlong == "error":
                raise PrepareError(
                    f"{row.source} has {len(encoded.input_ids)} tokens; prepare.max_length is {params.max_length}: "
                    "raise it, or set prepare.on_overlong to drop"
                )
            dropped.append(Rejected(row.source, OVERLONG, row.messages))
            continue
        splits[split].append(record)
        progress.update(done)
    _check(params, splits, dropped, total)
    report = _report(splits, dropped, rows, total, template)
    with whole_directory(output) as folder:
        for split, records in splits.items():
            pq.write_table(pa.Table.from_pylist(records, schema=_schema(split)), folder / f"{split}.parquet")
        write_json(folder / "contract.json", template.contract(identity) | {"max_length": params.max_length})
        write_json(folder / "report.json", report)
        write_text(folder / "report.md", _markdown(report))
        lines = [json.dumps({"source": d.source, "reason": d.reason, "record": d.record}, default=str) for d in dropped]
        write_text(folder / "dropped.jsonl", "".join(line + "\n" for line in lines))
    return Prepared(
        rows={split: len(records) for split, records in splits.items()},
        dropped=report["dropped"],
        trained_tokens=report["train_tokens"]["trained"],
        tokens=report["train_tokens"]["total"],
    )


def split_of(row: Row, params: PrepareParams) -> str:
    """The split of a row, from its group (its prompt when it names none) and the two fractions alone."""
    place = int(hashlib.sha256(_group(row).encode()).hexdigest()[:8], 16) / 2**32
    if place < params.test_fraction:
        return "test"
    return "validation" if place < params.test_fraction + params.validation_fraction else "train"


def _group(row: Row) -> str:
    return row.group if row.group is not None else _prompt_key(row)


def _read(data: Path) -> tuple[list[Row], list[Rejected]]:
    rows: list[Row] = []
    dropped: list[Rejected] = []
    for file in find_files(data):
        for row in read_rows(file):
            if isinstance(row, Row):
                rows.append(row)
            else:
                dropped.append(replace(row, reason=f"a row {row.reason}"))
    return rows, dropped


def _prompt_key(row: Row) -> str:
    """What is asked, whatever the answer: everything before the last turn, spaces and case folded."""
    asked = [[message["role"], " ".join(message["content"].casefold().split())] for message in row.messages[:-1]]
    return sha256_json([asked, row.tools])


def _asked(row: Row) -> set[str]:
    """Keys of every prompt that the row answers: the whole, and each earlier turn's."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    return {_prompt_key(replace(row, messages=row.messages[: i + 1])) for i in answers}


def _without_duplicates(rows: list[Row], dropped: list[Rejected]) -> list[Row]:
    seen: dict[tuple[str, str], str] = {}
    kept = []
    for row in rows:
        key = (_prompt_key(row), row.messages[-1]["content"])
        if key in seen:
            dropped.append(Rejected(row.source, DUPLICATE, row.messages))
        else:
            seen[key] = row.source
            kept.append(row)
    return kept


def _record(row: Row, split: str, encoded: Encoded, template: ChatTemplate, declared: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"id": sha256_json(row.messages)[:16], "task": row.task}
    if split != "test":
        return record | {"input_ids": encoded.input_ids, "labels": encoded.labels}
    prompt, prompt_ids = template.prompt(row.messages[:-1], row.tools)
    if encoded.input_ids[: len(prompt_ids)] != prompt_ids:
        raise RowError("its prompt has other tokens alone than before its answer")
    return record | {
        "group": _group(row),
        # Without any declaration every row counts for accuracy: an exact match is then a hard but honest score.
        "scoring": row.scoring or ("text" if declared else "exact"),
        "messages": json.dumps(row.messages[:-1], ensure_ascii=False),
        "tools": row.tools,
        "prompt": prompt,
        "input_ids": prompt_ids,
        "reference": row.messages[-1]["content"],
    }


def _schema(split: str) -> pa.Schema:
    tokens = pa.list_(pa.int32())
    common = [("id", pa.string()), ("task", pa.string())]
    if split == "test":
        text = [
            ("group", pa.string()),
            ("scoring", pa.string()),
            ("messages", pa.string()),
            ("tools", pa.string()),
            ("prompt", pa.string()),
        ]
        return pa.schema([*common, *text, ("input_ids", tokens), ("reference", pa.string())])
    return pa.schema([*common, ("input_ids", tokens), ("labels", tokens)])


def _check(params: PrepareParams, splits: dict[str, Any], dropped: list[Rejected], total: int) -> None:
    # A duplicate or a row that is too long is no sign of a broken source; the others are.
    unusable = [d for d in dropped if d.reason not in (OVERLONG, DUPLICATE, LEAKED)]
    if len(unusable) > params.max_dropped_fraction * total:
        worst = "; ".join(f"{n} × {reason}" for reason, n in Counter(d.reason for d in unusable).most_common(3))
        raise PrepareError(
            f"{len(unusable)} of {total} rows are unusable, more than prepare.max_dropped_fraction "
            f"({params.max_dropped_fraction:g}) allows: {worst}. The first is {unusable[0].source}"
        )
    overlong = sum(d.reason == OVERLONG for d in dropped)
    for split in ("train", "test"):
        if not splits[split]:
            hint = (
                f", {overlong} of them longer than prepare.max_length ({params.max_length} tokens)" if overlong else ""
            )
            way_out = "add rows" if split == "train" else "add rows, or raise prepare.test_fraction"
            raise PrepareError(f"the {split} split is empty: {total} rows came in{hint}; {way_out}")


def _report(
    splits: dict[str, list[dict[str, Any]]],
    dropped: list[Rejected],
    rows: list[Row],
    total: int,
    template: ChatTemplate,
) -> dict[str, Any]:
    train = splits["train"]
    lengths = sorted(len(record["input_ids"]) for record in train)
    return {
        "rows_in": total,
        "rows": {split: len(records) for split, records in splits.items()},
        "tasks": {s: dict(sorted(Counter(r["task"] for r in records).items())) for s, records in splits.items()},
        "dropped": dict(Counter(d.reason for d in dropped).most_common()),
        "dropped_examples": [f"{d.source}: {d.reason}" for d in dropped[:10]],
        "repaired": dict(Counter(repair for row in rows for repair in row.repairs).most_common()),
        "train_tokens": {
            "total": sum(lengths),
            "trained": sum(label != -100 for record in train for label in record["labels"]),
            "median_per_row": lengths[len(lengths) // 2],
            "max_per_row": lengths[-1],
        },
        "test_sha256": sha256_json([[r["id"], r["scoring"], r["input_ids"], r["reference"]] for r in splits["test"]]),
        "example": template.tokenizer.decode(train[0]["input_ids"]),
    }


def _markdown(report: dict[str, Any]) -> str:
    tokens = report["train_tokens"]
    lines = [
        "# Data report",
        "",
        f"{report['rows_in']:,} rows came in.",
        "",
        "| split | rows | by task |",
        "|---|---|---|",
    ]
    for split, count in report["rows"].items():
        tasks = ", ".join(f"{task} {n}" for task, n in report["tasks"][split].items())
        lines.append(f"| {split} | {count:,} | {tasks} |")
    lines += [
        "",
        f"Training tokens: {tokens['total']:,}, of which {tokens['trained']:,} carry loss "
        f"({tokens['trained'] / tokens['total']:.0%}); a row has {tokens['median_per_row']} at the median and "
        f"{tokens['max_per_row']} at most.",
        "",
    ]
    for what in ("dropped", "repaired"):
        lines += [f"{what.capitalize()}: {sum(report[what].values()):,} rows.", ""]
        lines += [f"- {count:,} × {reason}" for reason, count in report[what].items()]
    lines += ["", "One training row as the model sees it:", "", "```", report["example"], "```", ""]
    return "\n".join(lines)
