"""`make bench-merge`: merging shard by shard next to PEFT's merge_and_unload, on a random Llama of 1.7 GB in bfloat16.

Each merge is a process of its own, in turns, on one thread, with the files in the page cache; the median of three.
Memory is what the process itself allocated above its imports (anonymous pages, sampled every 2 ms).
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.chat.template import local_source
from pipeline.core.files import WORK_DIR
from pipeline.weights.loading import use_threads
from pipeline.weights.merging import merge_adapter
from tests.bench.measuring import header, row, timed

METHODS, ROUNDS = ("peft", "shards", "nf4"), 3
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    WORK_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR, prefix="bench-merge-") as folder:  # not /tmp, which may be memory
        make(Path(folder))
        rounds = [{method: _in_process(method, folder) for method in METHODS} for _ in range(ROUNDS)]
    header("method (nf4 quantises every weight and back, which PEFT's lacks)", "seconds", "allocated MiB", "of peft's")
    peft = median(each["peft"][1] for each in rounds)
    for method in METHODS:
        seconds, memory = (median(each[method][i] for each in rounds) for i in (0, 1))
        row(method, f"{seconds:.1f}", f"{memory / 2**20:.0f}", f"{memory / peft:.3f}")


def _in_process(method: str, folder: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.merge", method, folder]
    seconds, memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return seconds, memory


def measure(method: str, root: Path) -> tuple[float, int]:
    """Seconds, and the most bytes of anonymous memory above those before."""
    use_threads(1)
    target, done = root / method, threading.Event()
    before = peak = _anonymous()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    def merge() -> None:
        if method == "peft":
            base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
            merged = PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
            merged.save_pretrained(target, max_shard_size="500MB")
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


def _anonymous() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def make(root: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_key_value_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size="500MB")
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(root / "adapter")


if __name__ == "__main__":
    main()
