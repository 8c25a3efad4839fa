"""prepare: makes tokenised train, validation and test splits, and the template contract, from the data snapshot.

Every row is kept, repaired, or listed in `dropped.jsonl` with a reason. The hash of a row's group decides its split, so
no row changes its split when data is added or removed. The only rows that can remove a test row are exact copies of it
in the test split; no copy of a test row, exact or near, is trained on.
"""

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.dependencies import code_digests
from pipeline.core.files import sha256_file, sha256_json, whole_directory, write_json
from pipeline.core.processes import available_cores, end_with_parent
from pipeline.core.progress import Progress
from pipeline.data.classes import TextEncoder, order_classes
from pipeline.data.data_report import SPLITS, DataStats, write_report
from pipeline.data.default_scoring import Choice, choose_scoring
from pipeline.data.encoding import ROWS, SCHEMA, Encoder, encode_shard, load_encoding
from pipeline.data.outcomes import Outcomes, decide_outcomes, merge_groups
from pipeline.data.records import Rejected
from pipeline.data.shards import Rejection, Shard, canonical_shards
from pipeline.data.shingles import signature_version
from pipeline.params import PrepareParams

PARALLEL_ROWS = 20_000  # fewer are encoded sooner than a second process can start
COMMON = ("id", "source", "task", "language")
TRAIN = pa.schema([SCHEMA.field(name) for name in (*COMMON, "input_ids", "labels")])
OF_TEST = ("group", "scoring", "messages", "tools", "prompt", "input_ids", "reference", "answer_tokens")
TEST = pa.schema([SCHEMA.field(name) for name in (*COMMON, *OF_TEST)])


class PrepareError(ValueError):
    """The data cannot become a dataset; the message says why, for how many rows, and what to do."""


@dataclass(frozen=True)
class PrepareResult:
    rows: dict[str, int]  # split → rows
    dropped: dict[str, int]  # reason → rows
    trained_tokens: int  # tokens of the training split that carry loss
    tokens: int  # of the training split
    scoring: dict[str, Choice]  # task → scoring of its rows without a scoring column


def prepare(
    params: PrepareParams, data: Path, output: Path, cache: Path | None = None, train_task: str = "causal-lm"
) -> PrepareResult:
    """Write `train|validation|test.parquet`, `contract.json`, `report.json|md|html` and `dropped.jsonl` to `output`.

    Train and validation files have the columns of `TRAIN`; a label of −100 means no loss. The test file has those of
    `TEST`, ordered by id; `encoding.SCHEMA` describes them all. With the `train_task` sequence-classification, no token
    carries loss: `label` (in test rows, `reference`) is the class, and the contract lists the classes of the training
    rows as `labels`.
    Encoded shards are kept in `cache`, if one is given, and reused if nothing they depend on has changed.
    Raises PrepareError, FormatError, TemplateError or ClassError: rows, a file, the model or classes cannot be used.
    """
    template, identity = load_encoding(params, train_task)
    with nullcontext(cache) if cache else TemporaryDirectory(prefix="retune-") as work:
        shards, rejected = canonical_shards(data, Path(work) / "shards")
        contract = template.contract(identity)
        folders = _encode([shard.path for shard in shards], params, contract, Path(work) / "encoded", train_task)
        outcomes = decide_outcomes(folders, params.near_duplicate_threshold)
        _require_usable(params, outcomes, [row for row, *_ in rejected])
        with whole_directory(output) as folder:
            return _write(shards, rejected, folders, outcomes, template, contract, params, folder)


def _encode(
    shards: list[Path], params: PrepareParams, contract: dict[str, Any], cache: Path, train_task: str
) -> list[Path]:
    """A folder of encoded rows for each shard, in order; folders that are already in `cache` are reused."""
    settings = params.model_dump(exclude={"max_dropped_fraction", "default_scoring"})
    code = code_digests("pipeline.data.encoding")
    identity = sha256_json([settings, contract, code, signature_version()])
    cache.mkdir(parents=True, exist_ok=True)
    folders = [cache / sha256_json([identity, sha256_file(shard)])[:32] for shard in shards]
    todo = {folder: shard for folder, shard in zip(folders, shards, strict=True) if not folder.exists()}
    sizes = [pq.read_metadata(shard).num_rows for shard in todo.values()]
    progress = Progress("prepare", sum(sizes), "rows", every=2.0)
    encode = partial(encode_shard, params.model_dump_json(), train_task)
    with nullcontext() if sum(sizes) < PARALLEL_ROWS else _process_pool() as pool:
        results = (pool.map if pool else map)(encode, todo.values(), todo)
        for done, _ in zip(np.cumsum(sizes).tolist(), results, strict=True):
            progress.update(done)
    for outdated in set(cache.iterdir()) - set(folders):
        shutil.rmtree(outdated)
    return folders


@contextmanager
def _process_pool() -> Iterator[ProcessPoolExecutor]:
    """One process per core; spawned, because a fork would copy this process's threads and locks in an unsafe state."""
    pool = ProcessPoolExecutor(available_cores(), get_context("spawn"), _start_process, (os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool:
        raise PrepareError("a process was killed, probably because memory ran out; free memory and retry") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(parent: int) -> None:
    end_with_parent(parent=parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core


def _require_usable(params: PrepareParams, outcomes: Outcomes, rejected: list[Rejected]) -> None:
    """Refuse too many unusable rows, an overlong row with `on_overlong: error`, and an empty split."""
    total = len(outcomes.reason) + len(rejected)
    overlong, unusable = outcomes.cause == "overlong", outcomes.cause == "unusable"
    if params.on_overlong == "error" and overlong.any():
        first = int(np.argmax(overlong))
        row = f"{outcomes.sources[first].as_py()} {outcomes.details[first].as_py()}"
        raise PrepareError(f"{row}; raise it, or set prepare.on_overlong to drop, truncate_prompt or split")
    count = int(unusable.sum()) + len(rejected)
    if count > params.max_dropped_fraction * total:
        reasons = Counter(outcomes.reason[unusable]) + Counter(row.reason for row in rejected)
        source = rejected[0].source if rejected else outcomes.sources[int(np.argmax(unusable))].as_py()
        raise PrepareError(
            f"{count} of {total} rows are unusable, more than prepare.max_dropped_fraction "
            f"({params.max_dropped_fraction:g}) allows: {_list_reasons(reasons)}. The first is {source}"
        )
    for split in ("train", "test"):
        if not (outcomes.kept & (outcomes.split == split)).any():
            reasons = Counter(outcomes.reason[~outcomes.kept])
            raise PrepareError(
                f"the {split} split is empty: {total} rows were read, dropped: {_list_reasons(reasons)} "
                f"(prepare.max_length is {params.max_length} tokens); add rows, or change prepare.test_fraction, "
                "prepare.max_length, prepare.on_overlong or prepare.filters"
            )


def _list_reasons(counts: Counter[str]) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in counts.most_common(3)) or "none"


def _write(
    shards: list[Shard],
    rejected: list[Rejection],
    folders: list[Path],
    outcomes: Outcomes,
    template: Encoder,
    contract: dict[str, Any],
    params: PrepareParams,
    output: Path,
) -> PrepareResult:
    """Write the kept rows to the files of their splits, the others to `dropped.jsonl`, and the report."""
    classifies = isinstance(template, TextEncoder)
    schema = TRAIN.append(pa.field("label", pa.string())) if classifies else TRAIN
    scoring = choose_scoring(folders, ROWS, outcomes.kept, "exact" if classifies else params.default_scoring)
    stats = DataStats()
    tests: list[pa.Table] = []
    classes: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    longest = 0
    with (
        pq.ParquetWriter(output / "train.parquet", schema) as train,
        pq.ParquetWriter(output / "validation.parquet", schema) as validation,
        (output / "dropped.jsonl").open("w", encoding="utf-8") as dropped,
    ):
        for row, file, format in rejected:
            stats.add_read(format, file, 1)
            dropped.write(_dropped_line(stats, row.source, row.reason, row.record) + "\n")
        for rows in _numbered_rows(shards, folders, len(outcomes.reason), stats):
            numbers = rows["number"].to_numpy()
            kept, split = outcomes.kept[numbers], outcomes.split[numbers]
            for name in SPLITS:
                split_rows = rows.filter(pa.array(kept & (split == name)))
                if name != "test":  # a test item always asks only for the last answer
                    split_rows = _one_row_per_answer(split_rows, stats)
                _count(stats, name, split_rows)
                classes[name].update(split_rows["label"].to_pylist())
                longest = max(longest, pc.max(split_rows["answer_tokens"]).as_py() or 0)
                if name == "test":
                    tests.append(split_rows.select([*TEST.names, "number"]))
                else:
                    (train if name == "train" else validation).write_table(split_rows.select(schema.names))
            for row in rows.filter(pa.array(~kept)).select(["source", "record", "number"]).to_pylist():
                dropped.write(_encoded_row_line(stats, row, outcomes) + "\n")
    test = _test_table(tests, outcomes, scoring)
    pq.write_table(test, output / "test.parquet")
    example = _segments(next(pq.ParquetFile(output / "train.parquet").iter_batches(1)), template)
    facts = {"max_length": params.max_length, "crowded": outcomes.crowded, "scoring": scoring}
    report = stats.report(example, test_sha256=_digest(test), **facts)
    write_report(report, output)
    tokens = report["train_tokens"]
    contract |= {"max_length": params.max_length, "max_answer_tokens": longest}  # of the longest last answer
    contract["trained_fraction"] = tokens["trained"] / tokens["total"]  # of the training split
    if classifies:
        contract["labels"] = order_classes(classes["train"], classes["validation"] + classes["test"])
    write_json(output / "contract.json", contract)
    return PrepareResult(report["rows"], report["dropped"], tokens["trained"], tokens["total"], scoring)


def _numbered_rows(shards: list[Shard], folders: list[Path], total: int, stats: DataStats) -> Iterator[pa.Table]:
    """The encoded rows of each shard, with their index in `Outcomes` as `number`."""
    progress, start = Progress("prepare", total, "rows written", every=2.0), 0
    for shard, folder in zip(shards, folders, strict=True):
        progress.update(start)
        rows = pq.read_table(folder / ROWS)
        rows_read = pq.read_metadata(shard.path).num_rows
        stats.add_read(shard.format, shard.file, rows_read)
        stats.added += len(rows) - rows_read
        yield rows.append_column("number", pa.array(np.arange(start, start + len(rows))))
        start += len(rows)


def _test_table(tests: list[pa.Table], outcomes: Outcomes, choices: dict[str, Choice]) -> pa.Table:
    """The test split, sorted by id; near copies in it are in one group, and every row has a scoring."""
    test = pa.concat_tables(tests).sort_by([("id", "ascending"), ("prompt", "ascending")])
    groups = merge_groups(test["group"].to_pylist(), outcomes.cluster[test["number"].to_numpy()])
    pairs = zip(test["scoring"].to_pylist(), test["task"].to_pylist(), strict=True)
    scoring = [scoring or choices[task]["scoring"] for scoring, task in pairs]
    for name, values in (("group", groups), ("scoring", scoring)):
        test = test.drop_columns(name).append_column(name, pa.array(values, pa.string()))
    return test.select(TEST.names).cast(TEST)


def _one_row_per_answer(rows: pa.Table, stats: DataStats) -> pa.Table:
    """`rows`, with an additional row per earlier answer if the template rewrites earlier turns."""
    earlier_answers = pc.list_value_length(rows["earlier_ids"])
    rewritten = pc.sum(pc.greater(earlier_answers, 0)).as_py()
    if not rewritten:
        return rows
    stats.rewritten += rewritten
    stats.added += pc.sum(earlier_answers).as_py()
    records = []
    for row in rows.to_pylist():
        earlier = zip(row["earlier_ids"], row["earlier_labels"], strict=True)
        for number, (ids, labels) in enumerate(earlier, start=1):
            records.append(row | {"id": f"{row['id']}.{number}", "input_ids": ids, "labels": labels, "repairs": []})
        records.append(row)
    return pa.Table.from_pylist(records, schema=rows.schema)


def _count(stats: DataStats, split: str, rows: pa.Table) -> None:
    stats.tasks[split].update(rows["task"].to_pylist())
    stats.languages[split].update(rows["language"].to_pylist())
    if split == "train":
        stats.lengths.update(pc.list_value_length(rows["input_ids"]).to_pylist())
        stats.trained_tokens += pc.sum(pc.greater_equal(rows["labels"].combine_chunks().flatten(), 0)).as_py() or 0
    stats.untrained += pc.sum(pc.count_substring(rows["record"], '"weight": 0')).as_py() or 0
    repaired = rows.filter(pc.greater(pc.list_value_length(rows["repairs"]), 0))
    for row in repaired.select(["repairs", "source", "record"]).to_pylist():
        for repair in row["repairs"]:
            stats.repaired.add(repair, source=row["source"], text=json.loads(row["record"]))


def _digest(test: pa.Table) -> str:
    """Digest of the prompts and references of the test split; scores on equal ones can be compared."""
    digest = hashlib.sha256()
    for batch in test.select(["id", "scoring", "input_ids", "reference"]).to_batches(1024):
        for row in batch.to_pylist():
            digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


def _segments(row: pa.RecordBatch, template: Encoder) -> list[tuple[str, bool]]:
    """The text of a row in parts (text, has loss)."""
    tokens = zip(row["input_ids"][0].as_py(), row["labels"][0].as_py(), strict=True)
    parts = groupby(tokens, key=lambda token: token[1] >= 0)
    return [(template.tokenizer.decode([id for id, _ in tokens]), trained) for trained, tokens in parts]


def _encoded_row_line(stats: DataStats, row: dict[str, Any], outcomes: Outcomes) -> str:
    """As `_dropped_line`, with the detail and the original from `outcomes`."""
    number, source, record = row["number"], row["source"], json.loads(row["record"])
    reason, original = outcomes.reason[number], int(outcomes.copy_of[number])
    details = {"detail": detail} if (detail := outcomes.details[number].as_py()) else {}
    if original >= 0:
        details["copy_of"] = outcomes.sources[original].as_py()
        texts = {"text": record, "of_text": outcomes.texts[original].as_py()}
        similarity = float(outcomes.similarity[number])
        stats.duplicates.add(reason, source=source, of=details["copy_of"], similarity=similarity, **texts)
    return _dropped_line(stats, source, reason, record, **details)


def _dropped_line(stats: DataStats, source: str, reason: str, record: Any, **details: str) -> str:
    """Count a row that is not kept; returns its line of `dropped.jsonl`."""
    stats.dropped.add(reason, source=source, text=record)
    return json.dumps({"source": source, "reason": reason, "record": record, **details}, default=str)
