"""`make bench-merge`: merging shard by shard against PEFT's merge_and_unload, on a random Llama of 1.7 GB in bfloat16.

Each merge is a process of its own, in turns, on one thread, with the files in the page cache; the median of three, the
merge into the NF4 round trip (which PEFT has nothing to compare with) once. Time is from the first
read to the last write. Memory is what the process holds above what its imports left: anonymous pages sampled every
2 ms (what the program itself allocated), and the kernel's own high-water mark, in which pages of mapped files count.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.chat.template import local_source
from pipeline.core.files import WORK_DIR
from pipeline.weights.checkpoint import open_checkpoint
from pipeline.weights.loading import use_threads
from pipeline.weights.merging import merge_adapter

SHARD = "500MB"
REPEATS = 3
MIB = 2**20


def main() -> None:
    if len(sys.argv) > 1:
        _child(sys.argv[1], Path(sys.argv[2]))
        return
    WORK_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR, prefix="bench-merge-") as name:  # not /tmp, which may be memory
        root = Path(name)
        _run("make", root)
        rounds = [{method: _run(method, root) for method in ("peft", "shards")} for _ in range(REPEATS)]
        rounds[0]["nf4"] = _run("nf4", root)
        adapter = (root / "adapter" / "adapter_model.safetensors").stat().st_size / MIB
        checkpoint = open_checkpoint(root / "base")
        largest = max(tensor.size for tensor in checkpoint.tensors.values()) / MIB
        size = sum(tensor.size for tensor in checkpoint.tensors.values()) / MIB
        merged, reference = (open_checkpoint(root / method).tensors for method in ("shards", "peft"))
        differ = 0
        for key in reference:
            with safe_open(merged[key].path, "pt") as a, safe_open(reference[key].path, "pt") as b:
                differ += not torch.equal(a.get_tensor(key), b.get_tensor(key))
    print(
        f"{size:.0f} MiB in {checkpoint.num_shards} shards, {len(reference)} tensors, the largest {largest:.0f} MiB; "
        f"an adapter of {adapter:.0f} MiB"
    )
    print(f"tensors that differ between shards and peft: {differ}")
    print("| method | seconds | anonymous, MiB | high-water mark, MiB | time / peft | anonymous / peft |")
    print("|---|---|---|---|---|---|")
    middle = {
        method: {key: statistics.median(each[method][key] for each in rounds if method in each) for key in figures}
        for method, figures in rounds[0].items()
    }
    for method, row in middle.items():
        print(
            f"| {method} | {row['seconds']:.1f} | {row['anonymous']:.0f} | {row['high_water']:.0f} "
            f"| {row['seconds'] / middle['peft']['seconds']:.2f} "
            f"| {row['anonymous'] / middle['peft']['anonymous']:.3f} |"
        )


def _run(method: str, root: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.merge", method, str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if method != "make" else {}


def _child(method: str, root: Path) -> None:
    use_threads(1)
    if method == "make":
        _make(root)
        return
    target = root / method
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    before, marked = _status("RssAnon"), _status("VmHWM")
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if method == "peft":
        base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, root / "adapter").merge_and_unload().save_pretrained(
            target, max_shard_size=SHARD
        )
    else:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        merge_adapter(local_source(root / "base"), root / "adapter", target, nf4 if method == "nf4" else None)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    result = {
        "seconds": seconds,
        "anonymous": (peak[0] - before) / MIB,
        "high_water": (_status("VmHWM") - marked) / MIB,
    }
    print(json.dumps(result))


def _make(root: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_key_value_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size=SHARD)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(root / "adapter")


def _status(field: str) -> int:
    """A memory figure of this process from the kernel, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
