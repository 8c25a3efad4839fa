"""`python -m tests.bench stages|evaluate|merge|store|train`: Retune next to a named peer, on the same work.

`make bench-NAME` runs it; what takes a file of its own is `make bench-data`, `bench-flow` and `bench-gpu`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import uuid
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import boto3
import psutil
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.chat.template import local_source
from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json
from pipeline.core.progress import clock
from pipeline.params import TrainParams
from pipeline.registry.s3 import S3Store
from pipeline.registry.stores import upload
from pipeline.scoring.generation import generate_in_batches, generate_in_slots
from pipeline.settings import load_params
from pipeline.train import quantisation_of, train
from pipeline.training.packing import Collate, training_sequences
from pipeline.weights.loading import load_adapter, load_base, use_threads
from pipeline.weights.merging import merge_adapter
from tests.bench.measuring import TRL_LORA, header, in_turns, row, timed

MIB = 2**20


def bench_stages() -> None:
    """Time and peak memory of each stage's last run."""
    header("stage", "time", "peak memory")
    for path in (WORK_DIR / "stages" / f"{stage}.json" for stage in graph.STAGES):
        if not path.exists():
            sys.exit(f"stage {path.stem} has not run in this clone; `make run` runs all stages")
        last = read_json(path)
        row(path.stem, clock(last["seconds"]), f"{last['peak_memory_bytes'] / 2**30:.2f} GiB")


# --- answers of rows that come and go, next to batches of transformers' `generate` ------------------------------------

BATCH_SIZE, PROMPTS, MAX_NEW_TOKENS, VOCABULARY = 32, 160, 256, 8192
STOPS = SimpleNamespace(stop_ids=frozenset(range(3, VOCABULARY, 100)), tokenizer=SimpleNamespace(pad_token_id=0))


def random_llama() -> tuple[Any, list[list[int]]]:
    """The model, and prompts of 30 to 200 tokens in no order."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora).eval()
    for parameter in model.parameters():  # a fresh model repeats itself; this one depends on what it has read
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    draw = random.Random(0)
    lengths = [min(200, max(30, round(draw.lognormvariate(4.1, 0.5)))) for _ in range(PROMPTS)]
    return model, [[draw.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]


def bench_evaluate() -> None:
    """A random Llama with a LoRA adapter on it, unmerged; every hundredth token ends an answer, so lengths differ as
    those of real answers do. Only tokens of answers count, not what a batch computes after an answer's end."""
    torch.set_num_threads(1)  # the same for both, whatever else the machine does
    model, prompts = random_llama()
    given = (model, prompts, [MAX_NEW_TOKENS] * PROMPTS, STOPS, BATCH_SIZE)
    ways = {"`generate`, batches sorted by length": generate_in_batches, "Retune": generate_in_slots}
    runs = in_turns({name: lambda way=way: dict(way(*given)) for name, way in ways.items()})
    [[(first, expected)], _] = runs.values()
    header(f"{PROMPTS} prompts, 1 thread", "tokens/s", "against `generate`", "answers that differ")
    for name, [(seconds, answers)] in runs.items():
        tokens, differ = sum(map(len, answers.values())), sum(answers[i] != expected[i] for i in expected)
        row(name, f"{tokens / seconds:,.0f}", f"{first / seconds:.2f}", differ)
    lengths = sorted(map(len, expected.values()))
    print(f"\nanswers: {lengths[0]} to {lengths[-1]} tokens, {lengths[len(lengths) // 2]} at the median")


# --- merging shard by shard, next to PEFT's merge_and_unload ----------------------------------------------------------

METHODS = ("peft", "shards", "nf4")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WIDE = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}


def bench_merge(method: str = "", root: str = "") -> None:
    """A random Llama of 1.7 GB in bfloat16. Each merge is a process of its own, in turns, on one thread, with the files
    in the page cache; the median of three. Memory is what the process itself allocated above its imports."""
    if method:
        print(json.dumps(merged(method, Path(root))))
        return
    WORK_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR, prefix="bench-merge-") as folder:  # not /tmp, which may be memory
        torch.manual_seed(0)
        config = LlamaConfig(**WIDE, num_key_value_heads=4)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(f"{folder}/base", max_shard_size="500MB")
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(f"{folder}/adapter")
        command = [sys.executable, "-m", "tests.bench", "merge"]
        alone = partial(subprocess.run, check=True, stdout=subprocess.PIPE)
        runs = in_turns({name: partial(alone, [*command, name, folder]) for name in METHODS}, rounds=3)
    results = {name: [json.loads(done.stdout.splitlines()[-1]) for _, done in runs[name]] for name in METHODS}
    header("method (nf4 quantises every weight and back, which PEFT's lacks)", "seconds", "allocated MiB", "of peft's")
    for name in METHODS:
        seconds, memory = (median(each[i] for each in results[name]) for i in (0, 1))
        row(name, f"{seconds:.1f}", f"{memory / MIB:.0f}", f"{memory / median(m for _, m in results['peft']):.3f}")


def merged(method: str, root: Path) -> tuple[float, int]:
    """Seconds, and the most bytes of anonymous memory above those before, sampled every 2 ms."""
    use_threads(1)
    target, done = root / method, threading.Event()
    before = peak = anonymous()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    def merge() -> None:
        if method == "peft":
            base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
            model = PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
            model.save_pretrained(target, max_shard_size="500MB")
        else:
            merge_adapter(local_source(root / "base"), root / "adapter", target, NF4 if method == "nf4" else None)

    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, _ = timed(merge)
    done.set()
    watcher.join()
    return seconds, peak - before


def anonymous() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


# --- publishing a file to S3, next to boto3's `upload_file` -----------------------------------------------------------


def bench_store(mib: int = 1024, rounds: int = 5) -> None:
    """Both send to the same server (`s3_sink`, a process that only receives) on loopback; the median counts."""
    os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_EC2_METADATA_DISABLED="true")
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
    sink = [sys.executable, Path(__file__).parents[1] / "s3_sink.py"]
    server = subprocess.Popen(sink, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    settings = {"endpoint_url": server.stdout.readline().strip(), "addressing_style": "path"}
    params = load_params(Path("params.yaml")).publish.model_copy(update=settings)
    boto = boto3.client("s3", endpoint_url=params.endpoint_url, region_name="us-east-1")
    uris = [f"s3://bench/{uuid.uuid4().hex}" for _ in range(rounds)]
    stores = [S3Store(params.model_copy(update={"artifact_store": uri})) for uri in uris]
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        with path.open("wb") as file:
            for number in range(mib // 16):
                file.write(random.Random(number).randbytes(16 * MIB))
        for store in stores:
            store.probe()
        ways = {
            "boto3 `upload_file`, defaults": lambda: boto.upload_file(str(path), "bench", uuid.uuid4().hex),
            "Retune, SHA-256 of the file included": lambda: upload(stores.pop(), {"model": path}),
        }
        runs = in_turns(ways, rounds)
    server.stdin.close()
    server.wait()
    header(f"{mib} MiB to S3 on loopback, {params.max_concurrency} requests at once", "MiB/s", "times boto3")
    times = {name: median(seconds for seconds, _ in runs[name]) for name in ways}
    for name in ways:
        row(name, f"{mib / times[name]:,.0f}", f"{next(iter(times.values())) / times[name]:.1f}")


# --- training, next to `trl sft` with its defaults --------------------------------------------------------------------

EPOCHS = 2
TRL_BATCH = 8  # rows


def bench_train(rows: int = 1200) -> None:
    """Both read the tokenised rows of the last `prepare`, take learning rate, schedule and epochs from `params.yaml`
    and see every row as often. TRL keeps what it chooses for speed (8 padded rows a batch, gradient checkpointing,
    bfloat16). Quality is the validation loss of each adapter, computed by the same code."""
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as place:
        folder, source = Path(place), Path("artifacts/dataset")
        dataset, validation = folder / "dataset", pq.read_table(source / "validation.parquet")
        dataset.mkdir()
        (dataset / "contract.json").write_bytes((source / "contract.json").read_bytes())
        pq.write_table(pq.read_table(source / "train.parquet").slice(0, rows), dataset / "train.parquet")
        pq.write_table(validation, folder / "validation.parquet")
        pq.write_table(validation.slice(0, 0), dataset / "validation.parquet")  # TRL's speed does not have it either
        tokens = sum(map(len, pq.read_table(dataset / "train.parquet").column("input_ids").to_pylist()))
        # As many tokens a step as TRL's batch has on average, so both take as many steps; rows longer than that whole.
        line = TRL_BATCH * tokens // rows
        settings = {"packed_length": line, "tokens_per_step": line, "num_train_epochs": EPOCHS, "num_threads": "auto"}
        params = load_params().train.model_copy(update=settings)
        ours = (params, dataset, folder / "retune", folder / "checkpoints")
        ways: dict[str, Any] = {"trl": partial(with_trl, params, dataset, folder), "retune": partial(train, *ours)}
        runs = in_turns(ways, rounds=2)  # the better one of each counts, the other was disturbed more
        losses = {name: validation_loss(params, dataset, folder / "validation.parquet", folder / name) for name in ways}
    speeds = {"trl": EPOCHS * tokens / min(seconds for _, seconds in runs["trl"])}
    speeds["retune"] = max(done.tokens_per_second for _, done in runs["retune"])
    header(f"{rows} rows, {EPOCHS} epochs, {os.cpu_count()} cores", "real tokens/s", "validation loss")
    for name, words in (("trl", "`trl sft`, its defaults"), ("retune", "Retune")):
        row(words, f"{speeds[name]:,.0f}", f"{losses[name]:.4f}")
    print(f"\n{speeds['retune'] / speeds['trl']:.2f} times as fast (bar: 2.3)")


def with_trl(params: TrainParams, dataset: Path, folder: Path) -> float:
    """Seconds of its training loop."""
    rows, result = folder / "rows", folder / "result.json"
    rows.mkdir(exist_ok=True)
    pq.write_table(pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]), rows / "train.parquet")
    command: list[Any] = [sys.executable, "-m", "tests.bench.measuring", result, "--dataset_name", rows, *TRL_LORA]
    command += ["--model_name_or_path", read_json(dataset / "contract.json")["model"]["name_or_path"]]
    command += ["--lora_r", params.lora_r, "--lora_alpha", params.lora_alpha, "--lora_dropout", params.lora_dropout]
    command += ["--learning_rate", params.learning_rate, "--lr_scheduler_type", params.lr_scheduler_type]
    command += ["--warmup_steps", params.warmup_ratio, "--num_train_epochs", EPOCHS, "--seed", params.seed]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(rows)}
    environment.pop("OMP_NUM_THREADS", None)  # its default is all cores
    subprocess.run([*map(str, command), "--output_dir", str(folder / "trl")], env=environment, check=True)
    return float(read_json(result)["seconds"])


@torch.no_grad()
def validation_loss(params: TrainParams, dataset: Path, validation: Path, adapter: Path) -> float:
    """Nats a trained token, row by row, in float32."""
    model = load_adapter(load_base(read_json(dataset / "contract.json")["model"], quantisation_of(params)), adapter)
    nats, tokens = 0.0, 0
    for sequence in training_sequences(validation, params.model_copy(update={"packing": False})):
        batch = Collate(0, packed=False)([sequence])
        count = int((batch["labels"][:, 1:] != -100).sum())
        nats += count * float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        tokens += count
    return nats / tokens


if __name__ == "__main__":
    benches = (bench_stages, bench_evaluate, bench_merge, bench_store, bench_train)
    named = {bench.__name__.removeprefix("bench_"): bench for bench in benches}
    if len(sys.argv) < 2 or sys.argv[1] not in named:
        sys.exit(f"expected one of {', '.join(named)}")
    named[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))
