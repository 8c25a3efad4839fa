"""`retune doctor`: looks at everything a run needs, and answers with one line each: in order, or what to do.

Every check is made, whatever the others found. Nothing is changed, except that an artifact store never used before is
probed as its first use would.
"""

import json
import shutil
import subprocess
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
from pipeline.core.processes import environment, python_ending_with_parent
from pipeline.core.redaction import redact
from pipeline.core.run_lock import RunUnderWay, only_run
from pipeline.params import Params
from pipeline.services import stack
from pipeline.settings import ParamsError, load_params

DISK_GIB, MEMORY_GIB, CLOCK_SECONDS = 5.0, 2.0, 60.0
REMOTE_SECONDS = 60.0


class CheckError(RuntimeError):
    """A check could not be made; the message says why."""


def doctor(root: Path = Path(".")) -> list[Check]:
    """Every check, in the order in which their failures should be mended."""
    checks = [_guarded("python", _python), _guarded("packages", _packages), _guarded("disk", lambda: _disk(root))]
    checks += [_guarded("memory", _memory), _guarded("gpu", _gpu)]
    try:
        params = load_params(root / "params.yaml")
    except ParamsError as error:
        return [*checks, Check("parameters", False, str(error), "mend params.yaml; the checks below it need it")]
    checks.append(Check("parameters", True, "params.yaml is valid"))
    of_project: dict[str, Callable[[], Check]] = {
        "git": lambda: _git(root),
        "data": lambda: _data(root),
        "dvc remote": lambda: _remote(root),
        "base model": lambda: _template(params),
        "exports": lambda: _exports(params),
        "artifact store": lambda: _store(params, root),
        "registry": lambda: _registry(params, root),
        "signing": lambda: _signing(params),
        "servers": lambda: _servers(root),
        "clock": lambda: _clock(params, root),
    }
    return checks + [_guarded(name, check) for name, check in of_project.items()]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that raises has failed, and its error says what to do: errors of this project are written so."""
    try:
        return check()
    except Exception as error:  # whatever a broken machine comes up with, the next check is still made
        ours = type(error).__module__.startswith("pipeline.")
        return Check(name, False, redact(str(error) if ours else f"{type(error).__name__}: {error}"))


def _python() -> Check:
    return Check("python", True, f"{sys.version.split()[0]} in {sys.prefix}")


def _packages() -> Check:
    """What pyproject.toml asks for, against what is installed."""
    try:
        wanted = [Requirement(line) for line in requires("retune") or []]
    except PackageNotFoundError:
        return Check("packages", False, "retune itself is not installed", "`make run` installs it")
    wrong = []
    for requirement in (each for each in wanted if each.marker is None or each.marker.evaluate()):
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            here = "missing"
        if here == "missing" or not requirement.specifier.contains(here, prereleases=True):
            wrong.append(f"{requirement.name} is {here}, expected {requirement.specifier}")
    if wrong:
        return Check("packages", False, "; ".join(wrong), "`make clean run` installs what requirements.lock names")
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "dvc", "prefect"))
    return Check("packages", True, named)


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(root).free / 2**30
    advice = "`retune prune`, `retune gc --delete`, `dvc gc --workspace` make room"
    return Check("disk", free >= DISK_GIB, f"{free:.1f} GiB free here", "" if free >= DISK_GIB else advice)


def _memory() -> Check:
    free = psutil.virtual_memory().available / 2**30
    advice = "`retune plan` says what a training takes" if free < MEMORY_GIB else ""
    return Check("memory", free >= MEMORY_GIB, f"{free:.1f} GiB available", advice)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        cards = Path("/proc/driver/nvidia/version").exists()
        advice = "this torch has no CUDA: install one that has, of the same version" if cards else ""
        return Check("gpu", False if cards else None, "none; training runs on the CPU", advice)
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(f"{each.name} with {each.total_memory / 2**30:.0f} GiB" for each in names))


def _git(root: Path) -> Check:
    if shutil.which("git") is None:
        return Check("git", False, "not installed, and DVC needs it", "apt-get install git, brew install git, …")
    try:
        changed = len(git.run(root, "status", "--porcelain").splitlines())
    except git.GitError as error:
        return Check("git", False, str(error), "a version's manifest names the commit it came from: `git init`")
    return Check("git", True, f"{changed} uncommitted changes" if changed else "clean")


def _data(root: Path) -> Check:
    if not (root / "data.dvc").exists():
        return Check("data", False, "data.dvc is missing", "`git checkout data.dvc` restores it")
    named = f"snapshot {graph.snapshot(root)['md5'][:8]}"
    try:
        with only_run(root):
            pass  # only looked at, as by `retune status`: DVC does not answer while a stage writes
    except RunUnderWay as error:
        return Check("data", None, f"{named}; {error}")
    if "data.dvc" not in graph.stale(root):
        return Check("data", True, f"data/ is {named}, as data.dvc says")
    lacking = json.loads(_dvc(root, "data", "status", "--json", "--not-in-remote", "data"))
    if lacking.get("not_in_cache"):
        if lacking.get("not_in_remote") or graph.sharing_remote(root) is None:
            return Check("data", False, graph.missing_snapshot(root))
        return Check("data", None, f"{named} is not here yet; a run fetches it from {graph.sharing_remote(root)}")
    if (root / "data").exists():
        advice = "`dvc checkout --force data.dvc` puts the snapshot back, `retune ingest` makes a new one"
        return Check("data", False, f"data/ is not the {named} that data.dvc names", advice)
    return Check("data", None, f"{named} is in DVC's cache; a run checks it out")


def _remote(root: Path) -> Check:
    """Asks the remote of the data's snapshot for it, with the credentials that DVC finds."""
    remote = graph.sharing_remote(root) if (root / "data.dvc").exists() else graph.team_remote(root)
    if remote is None:
        advice = "`dvc remote add -d team s3://BUCKET/PATH`, commit .dvc/config, `dvc push`"
        return Check("dvc remote", None, "none for your own data: it is on this machine only", advice)
    lacks = json.loads(_dvc(root, "status", "--cloud", "--json", "data.dvc"))
    address = _dvc(root, "config", f"remote.{remote}.url").strip()
    advice = f"it lacks the data's snapshot: `dvc push --remote {remote} data.dvc` sends it" if lacks else ""
    return Check("dvc remote", not lacks, f"{remote} {redact(address)}", advice)


def _dvc(root: Path, *arguments: str) -> str:
    """What a DVC command prints; a remote that does not answer fails the check, not the whole command."""
    command = python_ending_with_parent("dvc", *arguments)
    try:
        done = subprocess.run(
            command, cwd=root, env=environment(), capture_output=True, text=True, timeout=REMOTE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"no answer within {REMOTE_SECONDS} s; check its address: `dvc remote list`") from None
    if done.returncode != 0:
        reason = next(iter(done.stderr.strip().splitlines()), "it failed").removeprefix("ERROR: ")
        raise CheckError(f"{reason}; check address and credentials: `dvc remote list`, ~/.aws")
    return done.stdout


def _template(params: Params) -> Check:
    from pipeline.chat.template import load_template
    from pipeline.data.classes import load_encoder

    _, identity = (load_encoder if params.train.task == CLASSIFICATION else load_template)(params.prepare)
    name = "classes" if params.train.task == CLASSIFICATION else params.prepare.chat_template or "its own chat template"
    return Check("base model", True, f"{identity['name_or_path']} (digest {identity['digest'][:12]}), {name}")


def _exports(params: Params) -> Check:
    if not params.merge.export:
        return Check("exports", None, "none asked for")
    from pipeline.weights.gguf import require_programs

    require_programs(params.merge.export)
    return Check("exports", True, ", ".join(params.merge.export))


def _store(params: Params, root: Path) -> Check:
    from pipeline.registry.artifact_store import open_store
    from pipeline.registry.decisions import champion, read_log
    from pipeline.registry.mlflow import open_registry

    store = open_store(params.publish, root)
    store.probe()
    serving = champion(read_log(store, params.publish.registered_model_name))
    name = open_registry(params.publish, root).remembered(serving) if serving else "none yet"
    return Check("artifact store", True, f"{store.uri}, champion {name}")


def _registry(params: Params, root: Path) -> Check:
    from pipeline.registry.mlflow import open_registry

    registry = open_registry(params.publish, root)
    return Check("registry", True, f"{params.publish.tracking_uri}, {len(registry.numbers())} versions")


def _signing(params: Params) -> Check:
    named = [params.publish.signing_key, params.publish.signing_certificate, params.publish.verify_key]
    missing = [path for path in named if path is not None and not Path(path).is_file()]
    if missing:
        return Check("signing", False, f"{', '.join(missing)} is not there", "docs/operations.md, Signing")
    on = params.publish.signing_key is not None
    return Check("signing", True if on else None, "versions are signed" if on else "versions are not signed")


def _servers(root: Path) -> Check:
    if not (known := stack.state(root)):
        return Check("servers", None, "not running; `retune up` starts them")
    services = [each for each in known["services"] if each["state"] not in ("healthy", "running", "starting")]
    wrong = [f"{each['name']} {each['state']}, {each['log']}" for each in services]
    detail = "; ".join(wrong) or f"dashboard at {known['url']}"
    return Check("servers", not wrong, detail, "look at the log; `retune down` and `retune up`" if wrong else "")


def _clock(params: Params, root: Path) -> Check:
    """Against the store's clock, by which sweeps decide what is old; and against the last commit."""
    from pipeline.registry.artifact_store import open_store

    off = time.time() - open_store(params.publish, root).now()
    ahead = float(git.ask(root, "log", "-1", "--format=%ct") or 0) - time.time()
    advice = "set this machine's clock (timedatectl set-ntp true)"
    if abs(off) > CLOCK_SECONDS:
        return Check("clock", False, f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the store's", advice)
    if ahead > CLOCK_SECONDS:
        return Check("clock", False, f"the last commit is {ahead:.0f} s in the future", advice)
    return Check("clock", True, f"within {max(abs(off), 1):.0f} s of the store's")
