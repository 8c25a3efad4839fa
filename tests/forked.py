"""A process that has imported everything and forks a child for each promotion that is to be killed.

Reads one JSON object a line: {"root", "publish": parameters, "step": kill itself at this step, or null, "seconds": be
killed after these, or null}. A step is a write to a file, a link, a removal, or an SQL statement. Answers with how the
child ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import sqlalchemy
from conftest import ROOT, environment, with_

from pipeline import promote as gate
from pipeline.settings import load_params

DIES_AT = [0]
STEPS = [0]


def step(*_: Any) -> None:
    STEPS[0] += 1
    if STEPS[0] == DIES_AT[0]:
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    # Writing, making, linking and removing of files; what is only read cannot be left half done.
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    if writes or event in ("os.link", "os.remove", "os.rename", "os.mkdir"):
        step()


class Forker:
    """Such a process, seen from the tests."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def promote(
        self, root: Path, publish: dict[str, Any], step: int | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"root": str(root), "publish": publish, "step": step, "seconds": seconds}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def promote(root: Path, publish: dict[str, Any], dies_at: int, report: Path) -> None:
    params = with_(load_params(ROOT / "params.yaml"), publish=publish)
    DIES_AT[0] = dies_at
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", step)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", step)
    sys.addaudithook(audit)
    decision = gate.promote(params.publish, params.promote, None, root)
    steps = STEPS[0]
    DIES_AT[0] = 0
    report.write_text(json.dumps({"decision": decision.decision, "warnings": decision.warnings, "steps": steps}))


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        root = Path(order["root"])
        report = root / "report.json"
        report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                promote(root, order["publish"], order["step"] or 0, report)
            except BaseException as error:
                report.write_text(json.dumps({"error": repr(error)}))
            os._exit(0)
        if order["seconds"] is not None:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
        started = time.monotonic()
        _, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status), "seconds": time.monotonic() - started}
        if not answer["killed"]:
            answer |= json.loads(report.read_text())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
