"""`retune doctor`: checks everything a run needs, and says how to fix what is missing.

All checks run, even if one fails. Nothing is changed, except that a new artifact store is probed as on its first use.
"""

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.core import git, graph
from pipeline.core.checks import Check
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.progress import counted
from pipeline.core.redaction import redact
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.params import Params
from pipeline.registry.model import RegisteredModel
from pipeline.services import stack
from pipeline.settings import ParamsError, load_params

REMOTE_SECONDS = 60.0
Finding = tuple[bool | None, str] | tuple[bool | None, str, str]  # passed, detail, advice


def doctor(root: Path = Path(".")) -> list[Check]:
    """All checks, in the order in which to fix their failures."""
    try:
        params = load_params(root / "params.yaml")
    except ParamsError as error:
        return [Check("parameters", False, str(error), "fix params.yaml; all other checks need it")]
    model = RegisteredModel(params.publish, root)
    functions: dict[str, Callable[[], Finding]] = {
        "gpu": _gpu,
        "git": lambda: _git(root),
        "data": lambda: _data(root),
        "dvc remote": lambda: _remote(root),
        "base model": lambda: _base(params, root, checks),
        "artifact store": lambda: _store(model),
        "registry": lambda: (
            True,
            f"{params.publish.tracking_uri}, {counted(len(model.registry.numbers()), 'version')}",
        ),
        "servers": lambda: _servers(root),
    }
    checks = [Check("parameters", True, "params.yaml is valid")]
    for name, function in functions.items():
        try:
            passed, detail, *advice = function()
            checks.append(Check(name, passed, detail, *([] if passed else advice)))
        except Exception as error:  # whatever is broken, the next check still runs
            for_people = type(error).__module__.startswith("pipeline.")
            checks.append(Check(name, False, redact(str(error) if for_people else f"{type(error).__name__}: {error}")))
    return checks


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return True, ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    if Path("/proc/driver/nvidia/version").exists():
        return False, "this torch does not see it", "install the same version of torch with CUDA"
    return None, "none; training runs on the CPU"


def _git(root: Path) -> Finding:
    try:
        changed = len(git.run(root, "status", "--porcelain").splitlines())
    except git.GitError as error:
        return False, str(error), "`git init`: a version's manifest names the commit that it was made from"
    return True, counted(changed, "uncommitted change") if changed else "clean"


def _data(root: Path) -> Finding:
    if not (root / "data.dvc").exists():
        return False, "data.dvc is missing", "`git checkout data.dvc` restores it"
    name = f"snapshot {graph.snapshot(root)['md5'][:8]}"
    try:
        with only_run(root):
            pass  # DVC does not answer while a stage writes
    except RunUnderWay as error:
        return None, f"{name}; {error}"
    if "data.dvc" not in graph.stale(root):
        return True, f"data/ is {name}, as in data.dvc"
    arguments = ("data", "status", "--json", "--not-in-remote", "data")
    missing = json.loads(graph.run(root, *arguments, timeout_s=REMOTE_SECONDS))
    if not missing.get("uncommitted"):
        return None, f"data/ is {name}, but DVC's cache lacks it; a run stores it"
    if missing.get("not_in_cache"):
        if missing.get("not_in_remote") or graph.sharing_remote(root) is None:
            return False, graph.missing_snapshot(root)
        return None, f"{name} is not on this machine; a run fetches it from {graph.sharing_remote(root)}"
    if (root / "data").exists():
        advice = "`dvc checkout --force data.dvc` restores the snapshot, `retune ingest` makes a new one"
        return False, f"data/ is not the {name} of data.dvc", advice
    return None, f"{name} is in DVC's cache; a run checks it out"


def _remote(root: Path) -> Finding:
    """Whether the remote has the data's snapshot, and DVC has credentials for it."""
    remote = graph.sharing_remote(root) if (root / "data.dvc").exists() else graph.team_remote(root)
    if remote is None:
        advice = "`dvc remote add -d team s3://BUCKET/PATH`, commit .dvc/config, `dvc push`"
        return None, "none; your own data is on this machine only", advice
    address = redact(graph.run(root, "config", f"remote.{remote}.url").strip())
    try:
        missing = json.loads(graph.run(root, "status", "--cloud", "--json", "data.dvc", timeout_s=REMOTE_SECONDS))
    except graph.GraphError as error:
        return False, f"{remote} {address}: {redact(str(error))}", "check address and credentials: `dvc remote list`"
    advice = f"the data's snapshot is missing there; `dvc push --remote {remote} data.dvc`"
    return not missing, f"{remote} {address}", advice


def _base(params: Params, root: Path, checks: list[Check]) -> Finding:
    model = Path(params.prepare.model_name_or_path)
    data_comes = any(check.name == "data" and check.passed is None for check in checks)
    if data_comes and model.parts[:1] == ("data",) and not (root / model).exists():
        return None, f"{model} is part of the data snapshot; a run fetches it"
    from pipeline.chat.template import load_template
    from pipeline.data.classes import load_encoder

    classes = params.train.task == CLASSIFICATION
    _, identity = (load_encoder if classes else load_template)(params.prepare)
    template = "classes" if classes else params.prepare.chat_template or "its own chat template"
    return True, f"{identity['name_or_path']} (digest {identity['digest'][:12]}), {template}"


def _store(model: RegisteredModel) -> Finding:
    model.store.probe()
    return True, f"{model.store.uri}, champion {model.registry.cached_name(model.champion())}"


def _servers(root: Path) -> Finding:
    if not (state := stack.state(root)):
        return None, "not running; `retune up` starts them"
    failed = [service for service in state["services"] if service["state"] not in ("healthy", "running", "starting")]
    wrong = "; ".join(f"{service['name']} {service['state']}, {service['log']}" for service in failed)
    return not wrong, wrong or f"dashboard at {state['url']}", "read the log, then `retune down` and `retune up`"
