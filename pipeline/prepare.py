"""prepare: instruction data in, tokenised train, validation and test splits with their template contract out.

Every row gets a verdict: kept, repaired or dropped with a reason; dropped rows are kept in `dropped.jsonl`. A row's
split follows from the hash of its group alone, so a row never moves between splits when data is added or removed. A row
of the test split is dropped on no other row's account; a copy of one, near or exact, is never trained on.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.dependencies import code_digests
from pipeline.core.files import sha256_file, sha256_json, whole_directory, write_json
from pipeline.core.progress import Progress
from pipeline.core.workers import Workers
from pipeline.data.benchmark_files import read_benchmark_files
from pipeline.data.classes import TextEncoder, class_names
from pipeline.data.conversion import read_batches
from pipeline.data.default_scoring import Choice, choose_scoring
from pipeline.data.encoding import ROWS, SIGNATURES, TEXT, TOKENS, Encoder, compared_text, encode_shard, load_encoding
from pipeline.data.formats import UnclearFormatError, find_files
from pipeline.data.records import Rejected
from pipeline.data.report import DataStats, write_report
from pipeline.data.shards import ShardWriter, is_shard, read_rejected, read_snapshot
from pipeline.data.shingles import signature_version
from pipeline.data.verdicts import SPLITS, Verdicts, decide
from pipeline.params import PrepareParams

PARALLEL_ROWS = 20_000  # fewer are encoded before a second process has imported its libraries
COMMON = ("id", "source", "task", "language")
TRAIN = pa.schema([*((name, pa.string()) for name in COMMON), ("input_ids", TOKENS), ("labels", TOKENS)])
TEST = pa.schema(
    [
        *((name, pa.string()) for name in (*COMMON, "group", "scoring", "messages", "tools", "prompt")),
        ("input_ids", TOKENS),
        ("reference", pa.string()),
    ]
)


class PrepareError(ValueError):
    """The data cannot become a dataset; the message says what is wrong with how many rows, and the way out."""


@dataclass(frozen=True)
class Prepared:
    rows: dict[str, int]  # split → rows
    dropped: dict[str, int]  # reason → rows
    trained_tokens: int  # of the training split: tokens that carry loss
    tokens: int  # of the training split
    scoring: dict[str, Choice]  # task → how its rows are scored that do not say it


@dataclass(frozen=True)
class _Part:
    """A canonical shard, and the file that its rows come from."""

    shard: Path
    file: str
    format: str


@dataclass(frozen=True)
class _Data:
    parts: list[_Part]
    rejected: list[tuple[Rejected, str, str]]  # with file and format


def prepare(
    params: PrepareParams, data: Path, output: Path, cache: Path | None = None, task: str = "causal-lm"
) -> Prepared:
    """Write `train|validation|test.parquet`, `contract.json`, `report.json|md|html` and `dropped.jsonl` to `output`.

    Train and validation shards have `id, source, task, language, input_ids, labels` (labels −100 where a token carries
    no loss); the test shard, ordered by id, has `id, source, task, language, group, scoring, messages` (JSON), `tools,
    prompt` (rendered), `input_ids` (its tokens) and `reference`, the expected answer. Lengths are in tokens.
    With `task` (train.task) sequence-classification no token carries loss; train and validation shards have the class
    as `label`, the test shard as `reference`, and the contract lists the classes of the training rows as `labels`.
    Encoded shards stay in `cache`, if one is given: the next call reads from there what has not changed.

    Raises:
        FormatError, TemplateError: see `read_rows` and `load_template`.
        PrepareError: too many unusable rows, an overlong row with `on_overlong: error`, or an empty split.
        ClassError: see `class_names`.
    """
    template, identity = load_encoding(params, task)
    with _workspace(cache) as work:
        found = _parts(data, work / "shards")
        folders = _encode([part.shard for part in found.parts], params, template.contract(identity), work, task)
        verdicts = decide(folders, params.near_duplicate_threshold)
        _check(params, folders, verdicts, found)
        with whole_directory(output) as folder:
            _note_benchmarks(params, folder)
            return _write(found, folders, verdicts, template, identity, params, folder)


@contextmanager
def _workspace(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        (cache / "encoded").mkdir(parents=True, exist_ok=True)
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="retune-") as folder:
        (Path(folder) / "encoded").mkdir()
        yield Path(folder)


def _parts(data: Path, scratch: Path) -> _Data:
    """The shards that `retune ingest` wrote to `data`, and those made in `scratch` of files put there by hand."""
    notes = read_snapshot(data) if data.is_dir() else None
    files = [file for source in (notes or {"sources": []})["sources"] for file in source["files"]]
    origin = {shard: (file["name"], file["format"]) for file in files for shard in file["shards"]}
    formats = {file["name"]: file["format"] for file in files}
    parts: list[_Part] = []
    rejected = []
    for row in read_rejected(data) if notes else ():
        name = row.source.rpartition(":")[0]
        rejected.append((row, name, formats.get(name, "unknown")))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in find_files(data):
        name = path.name if path == data else path.relative_to(data).as_posix()
        if is_shard(path):
            parts.append(_Part(path, *origin.get(path.name, (name, "messages"))))
            continue
        writer, format = ShardWriter(scratch, name), "unknown"
        progress = Progress("prepare", max(path.stat().st_size >> 20, 1), f"MiB of {name}", every=2.0)
        try:
            for batch in read_batches(path):
                progress.update(batch.position >> 20)
                format = batch.recipe.format
                writer.add(batch.table)
                rejected += [(row, name, format) for row in batch.rejected]
        except UnclearFormatError:
            raise PrepareError(
                f"{path} fits no known format, or several, and ingest.columns is not for files put into {data} by "
                f"hand: move it out and take it in with `retune ingest {path.name}`"
            ) from None
        parts += [_Part(scratch / shard, name, format) for shard in writer.close()]
    order = {shard: place for place, shard in enumerate(notes["shards"])} if notes else {}
    return _Data(sorted(parts, key=lambda part: order.get(part.shard.name, len(order))), rejected)


def _encode(shards: list[Path], params: PrepareParams, contract: dict[str, Any], work: Path, task: str) -> list[Path]:
    """A folder of encoded rows for each shard, in order; what an earlier call left in `work` is used again."""
    settings = params.model_dump(exclude={"max_dropped_fraction", "default_scoring"})
    benchmarks = [sha256_file(Path(name)) for name in params.decontaminate if Path(name).is_file()]
    code = code_digests("pipeline.data.encoding")
    identity = sha256_json([settings, contract, benchmarks, code, signature_version()])
    folders = [work / "encoded" / sha256_json([identity, sha256_file(shard)])[:32] for shard in shards]
    todo = {folder: shard for folder, shard in zip(folders, shards, strict=True) if not _is_whole(folder, params)}
    sizes = [pq.read_metadata(shard).num_rows for shard in todo.values()]
    progress = Progress("prepare", sum(sizes), "rows", every=2.0)
    done = iter(np.cumsum(sizes).tolist())
    arguments = params.model_dump_json()
    if sum(sizes) < PARALLEL_ROWS:
        for folder, shard in todo.items():
            encode_shard(arguments, shard, folder, task)
            progress.update(next(done))
    else:
        with Workers(_begin_worker) as workers:
            calls = [workers.submit(encode_shard, arguments, shard, folder, task) for folder, shard in todo.items()]
            for call in calls:
                call.result()
                progress.update(next(done))
    for left_over in set((work / "encoded").iterdir()) - set(folders):
        shutil.rmtree(left_over)
    return folders


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores


def _is_whole(folder: Path, params: PrepareParams) -> bool:
    """Whether an earlier call's rows can be used; what a full disk or a power cut left is encoded again."""
    if not folder.is_dir():
        return False
    try:
        rows = pq.read_metadata(folder / ROWS).num_rows
        with pa.memory_map(str(folder / TEXT)) as file:
            texts = pa.ipc.open_file(file).read_all().num_rows
        signed = rows
        if params.near_duplicate_threshold is not None:
            signed = len(np.load(folder / SIGNATURES, mmap_mode="r"))
        whole = rows == texts == signed
    except (OSError, ValueError, pa.ArrowException):
        whole = False
    if not whole:
        shutil.rmtree(folder)
    return whole


def _check(params: PrepareParams, folders: list[Path], verdicts: Verdicts, found: _Data) -> None:
    total = len(verdicts.reason) + len(found.rejected)
    overlong = verdicts.cause == "overlong"
    if params.on_overlong == "error" and overlong.any():
        source, detail = _first(folders, overlong)
        raise PrepareError(f"{source} {detail}: raise it, or set prepare.on_overlong to drop, truncate_prompt or split")
    unusable = verdicts.cause == "unusable"
    count = int(unusable.sum()) + len(found.rejected)
    if count > params.max_dropped_fraction * total:
        reasons = Counter(verdicts.reason[unusable]) + Counter(f"a row {row.reason}" for row, *_ in found.rejected)
        first = found.rejected[0][0].source if found.rejected else _first(folders, unusable)[0]
        raise PrepareError(
            f"{count} of {total} rows are unusable, more than prepare.max_dropped_fraction "
            f"({params.max_dropped_fraction:g}) allows: "
            f"{'; '.join(f'{n} × {reason}' for reason, n in reasons.most_common(3))}. The first is {first}"
        )
    too_long = int(overlong.sum())
    for split, way_out in (("train", "add rows"), ("test", "add rows, or raise prepare.test_fraction")):
        if not (verdicts.kept & (verdicts.split == split)).any():
            long = f", {too_long} of them longer than prepare.max_length ({params.max_length} tokens)"
            if 2 * too_long > total:
                way_out = "raise it, or set prepare.on_overlong to truncate_prompt or split"
            raise PrepareError(f"the {split} split is empty: {total} rows came in{long if too_long else ''}; {way_out}")


def _note_benchmarks(params: PrepareParams, output: Path) -> None:
    """Say, and write to `benchmarks.json`, which items of the benchmarks could not be searched for."""
    files = read_benchmark_files(params.decontaminate, compared_text)
    for line in (line for file in files for line in file.warnings()):
        print(f"prepare: {line}", file=sys.stderr, flush=True)
    if files:
        write_json(output / "benchmarks.json", {file.name: file.as_json() for file in files})


def _first(folders: list[Path], which: NDArray[np.bool_]) -> tuple[str, str | None]:
    """Source and detail of the first row that `which` (N,) marks."""
    place = int(np.argmax(which))
    for folder in folders:
        rows = pq.read_table(folder / ROWS, columns=["source", "detail"])
        if place < len(rows):
            return rows["source"][place].as_py(), rows["detail"][place].as_py()
        place -= len(rows)
    raise IndexError(place)


def _write(
    found: _Data,
    folders: list[Path],
    verdicts: Verdicts,
    template: Encoder,
    identity: dict[str, Any],
    params: PrepareParams,
    output: Path,
) -> Prepared:
    """Stream the kept rows to their split's file and the others to `dropped.jsonl`, and report on all of them."""
    stats = DataStats()
    default = "exact" if isinstance(template, TextEncoder) else params.default_scoring
    scoring = choose_scoring(folders, ROWS, verdicts.kept, default)
    test: list[pa.Table] = []
    example: list[tuple[str, bool]] = []
    seen: dict[str, set[str]] = {name: set() for name in SPLITS}  # classes
    by_class = isinstance(template, TextEncoder)
    schema = TRAIN.append(pa.field("label", pa.string())) if by_class else TRAIN
    start = 0
    with (
        pq.ParquetWriter(output / "train.parquet", schema) as train,
        pq.ParquetWriter(output / "validation.parquet", schema) as validation,
        (output / "dropped.jsonl").open("w", encoding="utf-8") as dropped,
    ):
        for rejected, file, format in found.rejected:
            stats.add_read(format, file, 1)
            rejected = Rejected(rejected.source, f"a row {rejected.reason}", rejected.record)
            stats.add_dropped(rejected.reason, rejected.source, rejected.record)
            dropped.write(json.dumps(vars(rejected), default=str) + "\n")
        progress = Progress("prepare", len(verdicts.reason), "rows written", every=2.0)
        for part, folder in zip(found.parts, folders, strict=True):
            progress.update(start)
            rows = pq.read_table(folder / ROWS)
            came = pq.read_metadata(part.shard).num_rows
            stats.add_read(part.format, part.file, came)
            stats.add_split(len(rows) - came)
            numbers = np.arange(start, start + len(rows))
            start += len(rows)
            kept, split = verdicts.kept[numbers], verdicts.split[numbers]
            for name in SPLITS:
                of_split = _by_answer(rows.filter(pa.array(kept & (split == name))), name, stats)
                _count(stats, name, of_split)
                if by_class:
                    answers = [json.loads(record)[-1]["content"] for record in of_split["record"].to_pylist()]
                    of_split = of_split.append_column("label", pa.array(answers, pa.string()))
                    seen[name].update(answers)
                if name == "test":
                    test.append(_as_test(of_split, numbers[kept & (split == name)], scoring))
                else:
                    (train if name == "train" else validation).write_table(of_split.select(schema.names))
                if name == "train" and len(of_split) and not example:
                    example = _segments(of_split.slice(0, 1), template)
            for place in np.nonzero(~kept)[0]:
                dropped.write(_dropped(stats, rows, int(place), int(numbers[place]), verdicts) + "\n")
    table = _one_group_for_near_copies(pa.concat_tables(test), verdicts)
    pq.write_table(table.drop_columns("number"), output / "test.parquet")
    report = stats.report(params.max_length, _digest(table), example, verdicts.crowded, scoring)
    write_report(report, output)
    tokens = report["train_tokens"]
    known: dict[str, Any] = {"max_length": params.max_length, "trained_fraction": tokens["trained"] / tokens["total"]}
    if by_class:
        known["labels"] = class_names(seen["train"], seen["validation"] | seen["test"])
    write_json(output / "contract.json", template.contract(identity) | known)
    return Prepared(report["rows"], report["dropped"], tokens["trained"], tokens["total"], scoring)


def _by_answer(rows: pa.Table, split: str, stats: DataStats) -> pa.Table:
    """`rows` with one more for each earlier answer of a conversation whose template rewrites earlier turns.

    A test item asks for the last answer alone, whatever the template.
    """
    more = pc.list_value_length(rows["earlier_ids"])
    if split == "test" or not pc.any(pc.greater(more, 0)).as_py():
        return rows
    stats.add_rewritten(pc.sum(pc.greater(more, 0)).as_py(), pc.sum(more).as_py())
    parts = []
    for row in rows.to_pylist():
        earlier = zip(row["earlier_ids"], row["earlier_labels"], strict=True)
        for number, (ids, labels) in enumerate(earlier, start=1):
            parts.append(row | {"id": f"{row['id']}.{number}", "input_ids": ids, "labels": labels, "repairs": []})
        parts.append(row)
    return pa.Table.from_pylist(parts, schema=rows.schema)


def _count(stats: DataStats, split: str, rows: pa.Table) -> None:
    lengths = pc.list_value_length(rows["input_ids"]).to_pylist()
    trained: list[int] = []
    if split == "train":
        labels = rows["labels"].combine_chunks()
        carries = pc.greater_equal(labels.flatten(), 0).to_numpy(zero_copy_only=False)
        owners = pc.list_parent_indices(labels).to_numpy()
        trained = np.bincount(owners[carries], minlength=len(rows)).tolist()
    stats.add_kept(split, rows["task"].to_pylist(), lengths, trained, rows["language"].to_pylist())
    stats.untrained += pc.sum(pc.count_substring(rows["record"], '"weight": 0')).as_py() or 0
    repaired = rows.filter(pc.greater(pc.list_value_length(rows["repairs"]), 0))
    for repairs, source, record in zip(
        *(repaired[n].to_pylist() for n in ("repairs", "source", "record")), strict=True
    ):
        stats.add_repaired(repairs, source, json.loads(record))


def _as_test(rows: pa.Table, numbers: NDArray[np.int64], choices: dict[str, Choice]) -> pa.Table:
    """Rows of the test split with the columns of TEST, and their `number`."""
    own = zip(rows["scoring"].to_pylist(), rows["task"].to_pylist(), strict=True)
    scoring = pa.array([said or choices[task]["scoring"] for said, task in own], pa.string())
    prompts = [json.dumps(json.loads(record)[:-1], ensure_ascii=False) for record in rows["record"].to_pylist()]
    made = {"scoring": scoring, "messages": pa.array(prompts, pa.string()), "input_ids": rows["prompt_ids"]}
    table = pa.table({name: made.get(name, rows[name] if name not in made else None) for name in TEST.names})
    return table.cast(TEST).append_column("number", pa.array(numbers, pa.int64()))


def _one_group_for_near_copies(table: pa.Table, verdicts: Verdicts) -> pa.Table:
    """The test split by id; near copies and all that shares a group with them are one group, as they fail together."""
    table = table.sort_by([("id", "ascending"), ("prompt", "ascending")])
    groups: list[str] = table["group"].to_pylist()
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while (above := parent.get(name, name)) != name:
            name = above
        return name

    clusters = verdicts.cluster[table["number"].to_numpy()]
    for _, members in groupby(
        sorted((c, g) for c, g in zip(clusters.tolist(), groups, strict=True) if c >= 0), key=lambda pair: pair[0]
    ):
        names = sorted({top(group) for _, group in members})
        parent.update(dict.fromkeys(names[1:], names[0]))
    return table.set_column(table.column_names.index("group"), "group", pa.array(map(top, groups), pa.string()))


def _digest(test: pa.Table) -> str:
    """Of what is asked and expected in the test split; two datasets with the same one can be compared."""
    digest = hashlib.sha256()
    for batch in test.select(["id", "scoring", "input_ids", "reference"]).to_batches(1024):
        for row in batch.to_pylist():
            digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


def _segments(row: pa.Table, template: Encoder) -> list[tuple[str, bool]]:
    ids, labels = (row[name][0].as_py() for name in ("input_ids", "labels"))
    parts = groupby(zip(ids, labels, strict=True), key=lambda token: token[1] >= 0)
    return [(template.tokenizer.decode([id for id, _ in tokens]), trained) for trained, tokens in parts]


def _dropped(stats: DataStats, rows: pa.Table, place: int, number: int, verdicts: Verdicts) -> str:
    """Count a row that is not kept; its line of `dropped.jsonl`."""
    source, record = rows["source"][place].as_py(), json.loads(rows["record"][place].as_py())
    line = {"source": source, "reason": verdicts.reason[number], "record": record}
    stats.add_dropped(line["reason"], source, record)
    if detail := rows["detail"][place].as_py():
        line["detail"] = detail
    if (original := int(verdicts.copy_of[number])) >= 0:
        line["copy_of"] = verdicts.sources[original].as_py()
        similarity = float(verdicts.similarity[number])
        text = verdicts.texts(original)
        stats.add_duplicate(line["reason"], source, line["copy_of"], similarity, record, text)
    return json.dumps(line)
