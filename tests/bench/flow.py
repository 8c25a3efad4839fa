"""`make bench-flow`: what the flow costs beside `dvc repro`, runs with nothing to do, and a dashboard with many runs.

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
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.core.http_client import HttpError, send
from pipeline.core.progress import Progress, clock
from pipeline.services import server
from pipeline.settings import change_params

STEPS = 140  # of the job's training
REMADE = ("train", "evaluate", "merge")
SHIPPING = ("publish", "promote")  # stages of the flow that `dvc repro` does not have
# What the dashboard asks for when its pages are opened: the runs, their number, the newest of them.
PAGES: dict[str, dict[str, Any]] = {
    "flow_runs/filter": {"sort": "START_TIME_DESC", "limit": 200},
    "flow_runs/count": {},
    "flow_runs/paginate": {"sort": "START_TIME_DESC", "limit": 50, "page": 10},
    "flows/paginate": {"limit": 50},
    "ui/flow_runs/count-task-runs": {"flow_run_ids": []},
}


def retune(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = os.environ | {"PYTHONPATH": str(root), "DVC_SITE_CACHE_DIR": str(root / ".retune" / "dvc")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`retune {' '.join(arguments)}` failed: {done.stderr.strip() or done.stdout[-500:]}")
    return done.stdout


def dvc(root: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(root), "DVC_SITE_CACHE_DIR": str(root / ".retune" / "dvc")}
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=root, env=environment, check=True)


def clone(project: Path, folder: Path) -> Path:
    """The last commit in a folder of its own, its outputs taken from the project's cache."""
    root = folder / "project"
    subprocess.run(["git", "clone", "-q", str(project), str(root)], check=True)
    dvc(root, "cache", "dir", "--local", str(project / ".dvc" / "cache"))
    dvc(root, "checkout")
    change_params({"operations.services": []}, root / "params.yaml")
    return root


def timed(work: Any) -> tuple[float, Any]:
    started = time.monotonic()
    result = work()
    return time.monotonic() - started, result


def one_run(root: Path) -> tuple[float, dict[str, Any]]:
    seconds, output = timed(lambda: retune(root, "run", "--json"))
    return seconds, json.loads(output.splitlines()[-1])


def make_stale(root: Path) -> None:
    """New code, so that no run before had it, that does the same."""
    for stage in REMADE:
        with (root / "pipeline" / f"{stage}.py").open("a") as file:
            file.write(f"# {time.time_ns()}\n")


def beside_dvc(root: Path, rounds: int) -> tuple[list[float], list[float], float]:
    """Seconds of the same job by `dvc repro` and by the flow, in turns; and the flow's stages that DVC lacks."""
    plain, flow, shipping = [], [], 0.0
    # So short a training makes a model whose rarest class need not survive the merge; its time is what counts.
    change_params({"train.max_steps": STEPS, "merge.max_metric_drop": 1.0}, root / "params.yaml")
    for _ in range(rounds):
        make_stale(root)
        plain.append(timed(lambda: dvc(root, "repro"))[0])
        make_stale(root)
        seconds, result = one_run(root)
        own = sum(stage["seconds"] for stage in result["stages"] if stage["stage"] in SHIPPING)
        flow.append(seconds - own)
        shipping = max(shipping, own)
    return plain, flow, shipping


def memory(stack: psutil.Process) -> float:
    """MiB of the supervisor and the server that it keeps."""
    family = [stack, *stack.children(recursive=True)]
    return sum(process.memory_info().rss for process in family) / 2**20


def ask(url: str, path: str, body: dict[str, Any]) -> Any:
    return json.loads(send(f"{url}/{path}", body))


def record_runs(url: str, number: int) -> None:
    """Finished runs of the retrain flow in the server's own history."""
    flow = ask(url, "flows/filter", {"flows": {"name": {"any_": ["retrain"]}}})[0]["id"]
    progress = Progress("bench-flow", number, "runs recorded")
    for i in range(number):
        state = {"type": "COMPLETED", "name": "Completed"}
        run = {"flow_id": flow, "name": f"recorded-{i}", "state": state, "tags": ["trigger:bench"]}
        while True:
            try:
                ask(url, "flow_runs/", run)
                break
            except HttpError as error:
                if error.status != 503:  # SQLite is busy; Prefect's own client waits and asks again
                    raise
                time.sleep(0.5)
        progress.update(i + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="jobs by dvc and by the flow, each")
    parser.add_argument("--no-ops", type=int, default=200, help="runs with nothing to do")
    parser.add_argument("--recorded", type=int, default=1000, help="runs in the dashboard's history")
    asked = parser.parse_args()
    table = Table("what", "measured", "bar", title="The flow beside dvc repro", title_justify="left")
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        root = clone(Path.cwd(), Path(folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        retune(root, "up", "--port", str(port))
        try:
            api = f"http://127.0.0.1:{port}/api"
            stack = psutil.Process(int(server.known_stack(root)["process"].partition(":")[0]))
            plain, flow, shipping = beside_dvc(root, asked.rounds)
            ratio = min(flow) / min(plain)
            table.add_row("flow over dvc repro, the same job", f"{ratio:.3f}", "≤ 1.05")
            table.add_row("  that job by dvc repro", clock(min(plain)), "about 1:00")
            table.add_row("  publish and promote beside it", clock(shipping), "")
            seconds, sizes = [], []
            progress = Progress("bench-flow", asked.no_ops, "runs with nothing to do")
            for i in range(asked.no_ops):
                took, result = one_run(root)
                if result["changed"]:
                    raise RuntimeError(f"run {i} was to change nothing, but did: {result['stages']}")
                seconds.append(took)
                sizes.append(memory(stack))
                progress.update(i + 1)
            table.add_row("a run with nothing to do, median", f"{median(seconds):.1f} s", "≤ 3 s")
            table.add_row(f"  of {asked.no_ops}, the slowest", f"{max(seconds):.1f} s", "")
            tenth = max(1, len(sizes) // 10)
            before, after = median(sizes[tenth : 2 * tenth] or sizes), median(sizes[-tenth:])
            table.add_row(
                f"  memory of the server, run {2 * tenth} → {len(sizes)}", f"{before:.0f} → {after:.0f} MiB", ""
            )
            record_runs(api, asked.recorded)
            newest = ask(api, "flow_runs/filter", PAGES["flow_runs/filter"])
            PAGES["ui/flow_runs/count-task-runs"]["flow_run_ids"] = [run["id"] for run in newest]
            slowest = max((median(timed(lambda p=p, b=b: ask(api, p, b))[0] for _ in range(5)), p)
                          for p, b in PAGES.items())  # fmt: skip
            table.add_row(
                f"slowest query of a page, {asked.recorded:,} runs", f"{slowest[0]:.2f} s ({slowest[1]})", "< 1 s"
            )
        finally:
            retune(root, "down")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
