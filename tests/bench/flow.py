"""`make bench-flow`: what the flow costs next to `dvc repro`, and runs with nothing to do.

In a clone of the last commit with the caches of this project, on a server of its own; the project is left alone. The
job that both do is the same training, evaluation and merge, of about a minute: a comment makes their code new.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.settings import change_params
from tests.bench.measuring import header, row, timed

STEPS = 140  # of the job's training
REMADE = ("train", "evaluate", "merge")
SHIPPING = ("publish", "promote")  # stages of the flow that `dvc repro` does not have


def run(root: Path, module: str, *arguments: str) -> str:
    """`python -m module …` with the code of `root`; its output."""
    environment = os.environ | {"PYTHONPATH": str(root), "DVC_SITE_CACHE_DIR": str(root / ".retune" / "dvc")}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def clone(project: Path, folder: Path) -> Path:
    """The last commit in a folder of its own, its outputs taken from the project's cache."""
    root = folder / "project"
    subprocess.run(["git", "clone", "-q", str(project), str(root)], check=True)
    run(root, "dvc", "cache", "dir", "--local", str(project / ".dvc" / "cache"), "-q")
    run(root, "dvc", "checkout", "-q")
    # So short a training makes a model whose rarest class need not survive the merge; its time is what counts.
    short = {"operations.services": [], "train.max_steps": STEPS, "merge.max_metric_drop": 1.0}
    change_params(short, root / "params.yaml")
    return root


def one_run(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(root, "pipeline", "run", "--json").splitlines()[-1])
    return result


def compare(root: Path, rounds: int) -> None:
    """The same job by `dvc repro` and by the flow, in turns."""
    plain, flow, shipping = [], [], []
    for _ in range(rounds):
        for times in (plain, flow):
            for stage in REMADE:  # new code, so that no run before had it, that does the same
                with (root / "pipeline" / f"{stage}.py").open("a") as file:
                    file.write(f"# {time.time_ns()}\n")
            if times is plain:
                plain.append(timed(partial(run, root, "dvc", "repro", "-q"))[0])
                continue
            seconds, result = timed(partial(one_run, root))
            shipping.append(sum(stage["seconds"] for stage in result["stages"] if stage["stage"] in SHIPPING))
            flow.append(seconds - shipping[-1])
    row("flow over dvc repro, the same job", f"{min(flow) / min(plain):.3f}", "≤ 1.05")
    row("that job by dvc repro", f"{min(plain):.0f} s", "")
    row("publish and promote", f"{max(shipping):.0f} s", "")


def nothing_to_do(root: Path, number: int) -> None:
    seconds = []
    for i in range(number):
        took, result = timed(partial(one_run, root))
        if result["changed"]:
            raise RuntimeError(f"run {i} was to change nothing, but did: {result['stages']}")
        seconds.append(took)
    row(f"a run with nothing to do, median of {number}", f"{median(seconds):.1f} s", "≤ 3 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="jobs by dvc and by the flow, each")
    parser.add_argument("--no-ops", type=int, default=50, help="runs with nothing to do")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        root = clone(Path.cwd(), Path(folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run(root, "pipeline", "up", "--port", str(port))
        try:
            header("the flow next to dvc repro", "measured", "bar")
            compare(root, options.rounds)
            nothing_to_do(root, options.no_ops)
        finally:
            run(root, "pipeline", "down")


if __name__ == "__main__":
    main()
