"""`make bench-gpu`: training and generation with a random Llama-3.1-8B on this GPU, next to `trl sft`, in one table.

Needs torch with CUDA and the packages of requirements.lock on the path, but no installed Retune, DVC, Prefect or
network. Each row is a process of its own, so its peak of memory is its own; one that fails says why in the table, and
the others go on. `--device cpu --tiny` takes a tiny model through the same code.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.measuring import TRL_LORA, header, row, timed, trl_sft
from tests.tiny_model import CHATML, byte_level

GIB = 2**30
ROWS = 853
MAX_TOKENS = 1024  # of a row: none is cut by `trl sft`
ROW_SECONDS = 200  # a row that takes longer is ended
Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    model: dict[str, int]  # of LlamaConfig
    line: int  # tokens of a packed sequence
    row: float  # logarithm of a row's median tokens; 4.9 gives Alpaca's mean by Llama 3.1's tokenizer, 174
    steps: int
    prompts: int
    new_tokens: int
    product: int  # side of the matrices whose product gives the card's rate


LLAMA_3_1_8B = Size(
    {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    line=2048, row=4.9, steps=24, prompts=96, new_tokens=96, product=8192,
)  # fmt: skip
TINY = Size(
    {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    line=128, row=3.5, steps=4, prompts=4, new_tokens=4, product=512,
)  # fmt: skip
FIXED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "tokens_per_step": None}
AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": "auto"}  # with 16 lines a step
TRL, BF16, GENERATION = "trl sft, its defaults", "LoRA on bf16, 2 lines", "generation, QLoRA adapter"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QLORA, CHECKPOINTED = "QLoRA, 2 lines", "QLoRA, 2 lines, checkpointing"
TRAININGS: dict[str, dict[str, Any]] = {
    "QLoRA, auto": AUTO,
    QLORA: FIXED,
    CHECKPOINTED: FIXED | {"gradient_checkpointing": True},
    BF16: FIXED | {"method": "lora", "load_in_4bit": "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    parser.add_argument("--seconds", type=float, default=480, help="no row begins when so much time is spent")
    parser.add_argument("--folder", type=Path, help="where 20 GB of files may lie for that time (default: TMPDIR)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one row, whose result is written to the folder
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    size = TINY if options.tiny else LLAMA_3_1_8B
    if options.only:
        _write(options.folder / "result.json", _measure(options.only, size, options.folder))
        return
    with tempfile.TemporaryDirectory(prefix="retune-bench-gpu-", dir=options.folder) as folder:
        table(size, Path(folder), options)


def table(size: Size, folder: Path, options: argparse.Namespace) -> None:
    """Print a line for each row as it is measured."""
    started = time.monotonic()
    machine = _in_process("machine", folder, options, options.seconds)
    if "error" in machine:
        sys.exit(f"bench-gpu: {machine['error']}")
    print(f"{machine['name']}, torch {machine['torch']}: {machine['flops'] / 1e12:,.3g} TFLOP/s on a bf16 product")
    header("run", "tokens/s", "of the matrix rate", "peak GiB", "planned GiB", "micro-batch", "seconds in all")
    for name in (TRL, *TRAININGS, GENERATION):
        left = options.seconds - (time.monotonic() - started)
        if left < 30:
            row(name, "not run: the time is spent")
            continue
        seconds, result = timed(partial(_in_process, name, folder, options, min(left, ROW_SECONDS)))
        if "error" in result:
            row(name, f"failed: {result['error']}")
            continue
        for label, numbers in ({name: result} | result.get("others", {})).items():
            share = numbers.get("flops_per_token", 0) * numbers["tokens_per_s"] / machine["flops"]
            row(
                label, f"{numbers['tokens_per_s']:,.0f}", f"{share:.0%}" if share else "",
                f"{numbers['peak'] / GIB:.2f}" if numbers.get("peak") else "",
                f"{numbers['planned'] / GIB:.2f}" if "planned" in numbers else "", numbers.get("rows", ""),
                f"{numbers.get('seconds', seconds):.0f}",
            )  # fmt: skip


def _in_process(name: str, folder: Path, options: argparse.Namespace, seconds: float) -> Result:
    """A row in a process of its own, ended after `seconds`; its error is the last line that it wrote."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", options.device, "--only", name]
    command += ["--folder", str(folder), *(["--tiny"] if options.tiny else [])]
    log = folder / "log.txt"
    with log.open("w") as file:
        try:
            subprocess.run(command, stdout=file, stderr=file, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s"}
    if result.is_file():
        read: Result = json.loads(result.read_text())
        return read
    lines = log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
    print("\n".join(lines[-20:]), file=sys.stderr)
    return {"error": lines[-1][:300].replace("|", "/")}


def _measure(name: str, size: Size, folder: Path) -> Result:
    if name == "machine":
        return make(size, folder)
    if name == TRL:
        return with_trl(size, folder)
    return generation(size, folder) if name == GENERATION else training(name, size, folder)


def make(size: Size, folder: Path) -> Result:
    """Base model, tokenizer and dataset in `folder`; the GPU's name and the rate of its matrix product."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from pipeline.chat.template import load_template

    cuda = torch.cuda.is_available()
    if not cuda and size is not TINY:
        sys.exit("PyTorch finds no CUDA GPU; --device cpu --tiny tries the benchmark without one")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    base = folder / "base"
    config = LlamaConfig(**size.model, architectures=["LlamaForCausalLM"], eos_token_id=2, pad_token_id=0)
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    index: dict[str, str] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        index[name] = f"model-{layer}.safetensors"
    torch.manual_seed(0)
    saved = []
    with ThreadPoolExecutor() as pool:
        for file in sorted(set(index.values())):
            tensors = {}
            for name in (name for name in index if index[name] == file):
                weight = torch.empty(shapes[name], dtype=dtype, device=device)
                tensors[name] = (weight.fill_(1) if len(weight.shape) == 1 else weight.normal_(std=0.02)).cpu()
            saved.append(pool.submit(save_file, tensors, base / file, metadata={"format": "pt"}))
    for future in saved:
        future.result()
    _write(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    # Rows are numbers, but a contract names its tokenizer.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(base)
    dataset = folder / "dataset"
    dataset.mkdir()
    template, identity = load_template(_params(size, folder, {}).prepare)
    _write(dataset / "contract.json", template.contract(identity) | {"max_length": MAX_TOKENS})
    _make_rows(dataset, size)
    a, b = (torch.randn(size.product, size.product, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(12):
        if cuda:
            torch.cuda.synchronize()
        times.append(timed(lambda: (a @ b)[0, 0].item())[0])  # reading a number waits for the product
    name = torch.cuda.get_device_name() if cuda else "CPU"
    return {"name": name, "torch": torch.__version__, "flops": 2 * size.product**3 / statistics.median(times)}


def _make_rows(dataset: Path, size: Size) -> None:
    """Random tokens in rows as long as Alpaca's, the loss on the last two thirds; no validation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    lengths = [min(MAX_TOKENS, max(24, round(draw.lognormvariate(size.row, 0.7)))) for _ in range(ROWS)]
    ids = [[draw.randrange(300, size.model["vocab_size"]) for _ in range(length)] for length in lengths]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    names = [f"row:{i}" for i in range(ROWS)]
    table = pa.table({"id": names, "source": names, "input_ids": ids, "labels": labels})
    pq.write_table(table, dataset / "train.parquet")
    pq.write_table(table.slice(0, 0), dataset / "validation.parquet")
    (dataset / "trl").mkdir()
    pq.write_table(table.select(["input_ids", "labels"]), dataset / "trl" / "train.parquet")


def _params(size: Size, folder: Path, train: dict[str, Any]) -> Any:
    from pipeline.params import Params
    from pipeline.settings import load_params

    tree = load_params(Path(__file__).parents[2] / "params.yaml").model_dump()
    tree["prepare"] |= {"model_name_or_path": str(folder / "base"), "max_length": MAX_TOKENS}
    tree["train"] |= {"method": "qlora", "load_in_4bit": "auto", "lora_target_modules": "all-linear", "lora_r": 16}
    tree["train"] |= {"packed_length": size.line, "tokens_per_step": 16 * size.line, "learning_rate": 1e-4}
    tree["train"] |= {"max_steps": size.steps, "logging_steps": 1, "save_steps": 10_000, "max_loss_rise": None} | train
    return Params.model_validate(tree)


def with_trl(size: Size, folder: Path) -> Result:
    options: list[Any] = ["--model_name_or_path", folder / "base", "--dataset_name", folder / "dataset" / "trl"]
    options += [*TRL_LORA, "--lora_r", 16, "--max_steps", size.steps, "--logging_steps", 1]
    return trl_sft([*options, "--output_dir", folder / "trl"])


def training(name: str, size: Size, folder: Path) -> Result:
    """The train stage with the settings of the row `name`; median tokens a second of its logged steps."""
    import torch

    from pipeline.train import train
    from pipeline.training.plan import plan

    params = _params(size, folder, TRAININGS[name])
    if TRAININGS[name] is AUTO:
        params = _params(size, folder, AUTO | {"max_steps": max(size.steps // 3, 4)})
    output = folder / name.replace(" ", "-")
    train(params.train, folder / "dataset", output / "adapter", output / "checkpoints", tables=output / "tables")
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    with (output / "tables" / "speed.csv").open() as file:
        speeds = [float(step["tokens_per_second"]) for step in csv.DictReader(file)]
    rows = json.loads((output / "tables" / "run.json").read_text())["micro_batch"]
    result = {"tokens_per_s": statistics.median(speeds[len(speeds) // 5 :]), "peak": peak, "rows": rows}
    used = _params(size, folder, TRAININGS[name] | FIXED | {"per_device_train_batch_size": rows})
    kind = _kind(torch.cuda.get_device_name()) if cuda else None
    planned = plan(used, folder / "dataset", kind)
    result["flops_per_token"] = planned.flops_per_token
    return result if cuda and kind is None else result | {"planned": planned.memory["peak"]}


def _kind(device_name: str) -> str | None:
    """The entry of infra/gpus.yaml for a card as its driver calls it: `NVIDIA H100 80GB HBM3` is `H100-80GB`."""
    from ruamel.yaml import YAML

    from pipeline.training.plan import GPUS

    words = set(device_name.replace("-", " ").split())
    kinds = list(YAML(typ="safe").load(GPUS.read_text(encoding="utf-8")))
    whole = [kind for kind in kinds if words.issuperset(kind.split("-"))]
    return next(iter(whole + [kind for kind in kinds if kind.split("-")[0] in words]), None)


def generation(size: Size, folder: Path) -> Result:
    """New tokens a second of a LoRA adapter on the base as QLoRA rounds it: all answers of one length, and of many.

    Random weights never end an answer, so each prompt has a limit of its own; only tokens up to it count.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.chat.template import load_contract
    from pipeline.scoring.generation import generate_in_batches, generate_tokens, rows_at_once
    from pipeline.weights.placement import load_for_scoring

    contract = json.loads((folder / "dataset" / "contract.json").read_text())
    template, base = load_contract(contract), load_for_scoring(contract["model"], NF4)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).eval()
    draw = random.Random(1)
    prompts = [
        [draw.randrange(300, size.model["vocab_size"]) for _ in range(draw.randrange(30, 200))]
        for _ in range(4 * size.prompts)
    ]
    limits = [min(2 * size.new_tokens, max(1, round(draw.lognormvariate(size.row, 0.7)))) for _ in prompts]
    alike, most = [size.new_tokens] * len(prompts), rows_at_once(model, "auto", 200 + 2 * size.new_tokens)

    def measure(way: Any, rows: int, limits: list[int], asked: list[int]) -> Result:
        if cuda := torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed(lambda: list(way(model, prompts[: len(limits)], asked, template, rows)))
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return {"tokens_per_s": sum(limits) / seconds, "rows": rows, "seconds": seconds, "peak": peak}

    def retune(*given: Any) -> Any:
        return generate_tokens(*given, limited_by="bench")

    few = alike[: size.prompts]
    measure(retune, size.prompts, few, [4] * len(few))  # the first time
    names = [f"{GENERATION}, {len(prompts)} prompts", f"{GENERATION}, {len(prompts)} answers of 1 to {max(limits)}"]
    others = {names[0]: measure(retune, most, alike, alike), names[1]: measure(retune, most, limits, limits)}
    others["the same by transformers' generate"] = measure(
        generate_in_batches, most, limits, [max(limits)] * len(limits)
    )
    return measure(retune, size.prompts, few, few) | {"others": others}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    main()
