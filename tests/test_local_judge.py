"""A judge on this machine: a model behind transformers' own server, with nothing that speaks for it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import install, make_base
from transformers import AutoTokenizer, LlamaForCausalLM

from pipeline.scoring.generation import Answer
from pipeline.scoring.judge.endpoint import Endpoint
from pipeline.scoring.judge.judging import judge, questions

PACKAGES = ("openai==3.54.0", "jiter", "distro")  # what `transformers serve` lacks in Retune's environment
SYSTEMS = {"adapter": [(Answer("four", [1], False), Answer("two", [1], False))] * 3,
           "base": [(Answer("six", [1], False), Answer("one", [1], False))] * 3}  # fmt: skip
Messages = list[dict[str, str]]


def verdict(messages: Messages) -> str:
    return "[[C]]" if "assistant B's answers" in messages[-1]["content"] else "[[7]]"


def asked_of_a_judge() -> list[Messages]:
    asked: list[Messages] = []

    def complete(messages: Messages) -> str:
        asked.append(messages)
        return verdict(messages)

    judge(complete, questions(["en"])[:3], SYSTEMS, 1, 50, 0)
    return asked


@pytest.fixture
def judge_model(tmp_path: Path) -> Path:
    """A tiny model that has learned what a judge is asked, and to rate everything 7 and prefer nothing."""
    folder = make_base(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = []
    for messages in asked_of_a_judge():
        turns = [*messages, {"role": "assistant", "content": verdict(messages)}]
        rows.append(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"])
    for step in range(300):
        ids = rows[step % len(rows)]
        labels = ids.clone()
        labels[:, :-12] = -100  # the verdict and its end
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def served(judge_model: Path, tmp_path: Path) -> Iterator[str]:
    packages = tmp_path / "packages"
    install(packages, *PACKAGES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(judge_model)]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.integration
def test_a_model_on_this_machine_judges_through_transformers_own_server(served: str, judge_model: Path) -> None:
    endpoint = Endpoint(served, str(judge_model), "", 60.0, 16)
    result = judge(endpoint.complete, questions(["en"])[:3], SYSTEMS, 1, 50, 0).summary
    assert (result["replies"], result["unreadable"]) == (3 * (4 + 2), 0)
    assert result["adapter"]["rating"]["score"] == result["base"]["rating"]["score"] == 7
    assert (result["pairwise"]["wins"], result["pairwise"]["ties"], result["pairwise"]["losses"]) == (0, 3, 0)
