"""`retune doctor`: everything a run needs, one line each: in order, or what to do.

Every check is made, whatever the others found. Nothing is changed, except that an artifact store never used before is
probed as its first use would.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from pipeline.core import git, graph
from pipeline.core.checks import Check
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.redaction import redact
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.params import Params
from pipeline.services import stack
from pipeline.settings import ParamsError, load_params

DISK_GIB, MEMORY_GIB, CLOCK_SECONDS, REMOTE_SECONDS = 5.0, 2.0, 60.0, 60.0
Finding = tuple[bool | None, str] | tuple[bool | None, str, str]  # passed, detail, advice


def doctor(root: Path = Path(".")) -> list[Check]:
    """Every check, in the order in which their failures should be mended."""
    checks = [_made("packages", _packages), _made("disk", lambda: _disk(root)), _made("memory", _memory)]
    checks.append(_made("gpu", _gpu))
    try:
        params = load_params(root / "params.yaml")
    except ParamsError as error:
        return [*checks, Check("parameters", False, str(error), "mend params.yaml; the checks below it need it")]
    checks.append(Check("parameters", True, "params.yaml is valid"))
    of_project: dict[str, Callable[[], Finding]] = {
        "git": lambda: _git(root),
        "data": lambda: _data(root),
        "dvc remote": lambda: _remote(root),
        "base model": lambda: _base(params),
        "exports": lambda: _exports(params),
        "artifact store": lambda: _store(params, root),
        "registry": lambda: _registry(params, root),
        "signing": lambda: _signing(params),
        "servers": lambda: _servers(root),
        "clock": lambda: _clock(params, root),
    }
    return checks + [_made(name, look) for name, look in of_project.items()]


def _made(name: str, look: Callable[[], Finding]) -> Check:
    """A check that raises has failed, and its error says what to do: errors of this project are written so."""
    try:
        return Check(name, *look())
    except Exception as error:  # whatever a broken machine comes up with, the next check is still made
        ours = type(error).__module__.startswith("pipeline.")
        return Check(name, False, redact(str(error) if ours else f"{type(error).__name__}: {error}"))


def _packages() -> Finding:
    """What pyproject.toml asks for, against what is installed."""
    try:
        requirements = [Requirement(line) for line in requires("retune") or []]
    except PackageNotFoundError:
        return False, "retune itself is not installed", "`make run` installs it"
    wrong = []
    for requirement in (each for each in requirements if each.marker is None or each.marker.evaluate()):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, expected {requirement.specifier}")
    names = ("torch", "transformers", "trl", "peft", "dvc", "prefect")
    named = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in names)
    return not wrong, "; ".join(wrong) or named, "`make clean run` installs requirements.lock" if wrong else ""


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free / 2**30
    advice = "" if free >= DISK_GIB else "`retune prune`, `retune gc --delete`, `dvc gc --workspace` make room"
    return free >= DISK_GIB, f"{free:.1f} GiB free here", advice


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    advice = "" if free >= MEMORY_GIB else "`retune plan` says what a training takes"
    return free >= MEMORY_GIB, f"{free:.1f} GiB available", advice


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return True, ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    if Path("/proc/driver/nvidia/version").exists():
        return False, "this torch does not see it", "install a torch with CUDA, of the same version"
    return None, "none; training runs on the CPU"


def _git(root: Path) -> Finding:
    if shutil.which("git") is None:
        return False, "not installed, and DVC needs it", "apt-get install git, brew install git, …"
    try:
        changed = len(git.run(root, "status", "--porcelain").splitlines())
    except git.GitError as error:
        return False, str(error), "a version's manifest names the commit it came from: `git init`"
    return True, f"{changed} uncommitted changes" if changed else "clean"


def _data(root: Path) -> Finding:
    if not (root / "data.dvc").exists():
        return False, "data.dvc is missing", "`git checkout data.dvc` restores it"
    name = f"snapshot {graph.snapshot(root)['md5'][:8]}"
    try:
        with only_run(root):
            pass  # only looked at, as by `retune status`: DVC does not answer while a stage writes
    except RunUnderWay as error:
        return None, f"{name}; {error}"
    if "data.dvc" not in graph.stale(root):
        return True, f"data/ is {name}, as data.dvc says"
    arguments = ("data", "status", "--json", "--not-in-remote", "data")
    missing = json.loads(graph.ask(root, *arguments, timeout_s=REMOTE_SECONDS))
    if missing.get("not_in_cache"):
        if missing.get("not_in_remote") or graph.sharing_remote(root) is None:
            return False, graph.missing_snapshot(root)
        return None, f"{name} is not here yet; a run fetches it from {graph.sharing_remote(root)}"
    if (root / "data").exists():
        advice = "`dvc checkout --force data.dvc` puts the snapshot back, `retune ingest` makes a new one"
        return False, f"data/ is not the {name} that data.dvc names", advice
    return None, f"{name} is in DVC's cache; a run checks it out"


def _remote(root: Path) -> Finding:
    """Asks the remote of the data's snapshot for it, with the credentials that DVC finds."""
    remote = graph.sharing_remote(root) if (root / "data.dvc").exists() else graph.team_remote(root)
    if remote is None:
        advice = "`dvc remote add -d team s3://BUCKET/PATH`, commit .dvc/config, `dvc push`"
        return None, "none for your own data: it is on this machine only", advice
    address = redact(graph.ask(root, "config", f"remote.{remote}.url").strip())
    try:
        missing = json.loads(graph.ask(root, "status", "--cloud", "--json", "data.dvc", timeout_s=REMOTE_SECONDS))
    except graph.GraphError as error:
        return False, f"{remote} {address}: {redact(str(error))}", "check address and credentials: `dvc remote list`"
    advice = f"it lacks the data's snapshot: `dvc push --remote {remote} data.dvc` sends it" if missing else ""
    return not missing, f"{remote} {address}", advice


def _base(params: Params) -> Finding:
    from pipeline.chat.template import load_template
    from pipeline.data.classes import load_encoder

    classes = params.train.task == CLASSIFICATION
    _, identity = (load_encoder if classes else load_template)(params.prepare)
    template = "classes" if classes else params.prepare.chat_template or "its own chat template"
    return True, f"{identity['name_or_path']} (digest {identity['digest'][:12]}), {template}"


def _exports(params: Params) -> Finding:
    from pipeline.weights.gguf import require_programs

    require_programs(params.merge.export)
    return True if params.merge.export else None, ", ".join(params.merge.export) or "none asked for"


def _store(params: Params, root: Path) -> Finding:
    from pipeline.registry.model import RegisteredModel

    model = RegisteredModel(params.publish, root)
    model.store.probe()
    serving = model.champion()
    name = model.registry.remembered(serving) if serving else "none yet"
    return True, f"{model.store.uri}, champion {name}"


def _registry(params: Params, root: Path) -> Finding:
    from pipeline.registry.model import RegisteredModel

    numbers = RegisteredModel(params.publish, root).registry.numbers()
    return True, f"{params.publish.tracking_uri}, {len(numbers)} versions"


def _signing(params: Params) -> Finding:
    paths = [params.publish.signing_key, params.publish.signing_certificate, params.publish.verify_key]
    missing = [path for path in paths if path is not None and not Path(path).is_file()]
    if missing:
        return False, f"{', '.join(missing)} is not there", "docs/operations.md, Signing"
    signed = params.publish.signing_key is not None
    return True if signed else None, f"versions are {'' if signed else 'not '}signed"


def _servers(root: Path) -> Finding:
    if not (known := stack.state(root)):
        return None, "not running; `retune up` starts them"
    services = [each for each in known["services"] if each["state"] not in ("healthy", "running", "starting")]
    wrong = "; ".join(f"{each['name']} {each['state']}, {each['log']}" for each in services)
    advice = "look at the log; `retune down` and `retune up`" if wrong else ""
    return not wrong, wrong or f"dashboard at {known['url']}", advice


def _clock(params: Params, root: Path) -> Finding:
    """Against the store's clock, by which sweeps decide what is old."""
    from pipeline.registry.artifact_store import open_store

    off = time.time() - open_store(params.publish, root).now()
    if abs(off) > CLOCK_SECONDS:
        advice = "set this machine's clock (timedatectl set-ntp true)"
        return False, f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the store's", advice
    return True, f"within {max(abs(off), 1):.0f} s of the store's"
