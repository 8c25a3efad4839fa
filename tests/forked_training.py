"""A process that has imported everything and forks a child for each training that is to be killed (`test_resuming.py`).

Reads one JSON object a line: {"params", "dataset", "folder", "event": kill itself at this one, or null}. An event is a
step of the optimiser, a forward pass of the model's output, or a write to a file. Answers with how the child ended.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: F401  # sets the environment
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.params import Params
from pipeline.train import train
from pipeline.training.watching import Interrupted

EVENTS = [0, 0]  # seen, and the one to die at


def event(*_: Any) -> None:
    EVENTS[0] += 1
    if EVENTS[0] == EVENTS[1]:
        os.kill(os.getpid(), signal.SIGKILL)


def audit(name: str, arguments: tuple[Any, ...]) -> None:
    writes = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    if writes or name in ("os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
        event()


def run(order: dict[str, Any], report: Path) -> None:
    torch.set_num_threads(1)
    folder = Path(order["folder"])
    EVENTS[1] = order["event"] or 0
    register_optimizer_step_post_hook(event)
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: event() if isinstance(module, torch.nn.Embedding) else None
    )
    sys.addaudithook(audit)
    params = Params.model_validate_json(order["params"])
    try:
        done = train(
            params.train, Path(order["dataset"]), folder / "adapter", folder / "checkpoints", tables=folder / "tables"
        )
        answer: dict[str, Any] = {"resumed": done.resumed_from_step, "steps": done.steps}
    except Interrupted as error:
        answer = {"interrupted": str(error)}
    events = EVENTS[0]
    EVENTS[1] = 0
    report.write_text(json.dumps(answer | {"events": events}))


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        report = Path(order["folder"]) / "report.json"
        report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            log = (Path(order["folder"]) / "log").open("a")
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    run(order, report)
                except BaseException as error:
                    report.write_text(json.dumps({"error": repr(error)}))
                log.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status)}
        if not answer["killed"]:
            answer |= json.loads(report.read_text())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
