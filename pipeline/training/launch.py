"""Several processes for one training, by `accelerate launch`: the same `train` in each, and one result.

More than one machine: start `accelerate launch … -m pipeline stage train` on each with accelerate's own settings; a
process that finds itself in a group joins it instead of launching one.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.core.files import read_json, write_json
from pipeline.core.processes import run_forwarding_sigterm
from pipeline.params import TrainParams
from pipeline.training.watching import Interrupted, TrainError

INTERRUPTED, FAILED = 75, 1  # exit statuses of a process (75: try again, as sysexits.h has it)


def launch(params: TrainParams, **folders: Path | None) -> dict[str, Any]:
    """Run `train` with its `folders` in `params.num_processes` processes; returns the fields of its result."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and gpus < params.num_processes:
        raise TrainError(f"train.num_processes is {params.num_processes}, and this machine has {gpus} GPUs")
    with tempfile.TemporaryDirectory(prefix="retune-train-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        paths = {name: None if path is None else str(path.resolve()) for name, path in folders.items()}
        write_json(job, {"params": params.model_dump_json(), "result": str(result), "folders": paths})
        on_cpu = {} if cuda else {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        command = [*launcher(params), "-m", "pipeline.train", str(job)]
        status = run_forwarding_sigterm(command, os.environ | on_cpu)
        if result.is_file():
            answer = read_json(result)
            if "interrupted" in answer:
                raise Interrupted(answer["interrupted"])
            if status == 0:
                return answer
    raise TrainError(
        f"a training in {params.num_processes} processes ended with status {status}; the first error above says why"
    )


def launcher(params: TrainParams) -> list[str]:
    """The command that starts `params.num_processes` processes with `params.strategy`."""
    number = str(params.num_processes)
    if not torch.cuda.is_available():
        # accelerate's own launcher wants MPI for several processes on CPUs; torchrun is what it runs on GPUs.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", number, "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    match params.strategy:
        case "fsdp":
            return [*command, "--use_fsdp", *(part for key in FSDP for part in (f"--fsdp_{key}", FSDP[key]))]
        case "deepspeed":
            clip = str(params.max_grad_norm)
            return [*command, "--use_deepspeed", "--zero_stage", "2", "--gradient_clipping", clip]
    return [*command, "--multi_gpu"]


# accelerate's settings of FSDP: options of its launcher, and variables of a process that torchrun started.
FSDP = {
    "version": "1",  # 4-bit weights: FSDP 2 shards each tensor on its own, which bitsandbytes does not know
    "sharding_strategy": "FULL_SHARD",
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "use_orig_params": "false",
    "cpu_ram_efficient_loading": "false",
    "state_dict_type": "FULL_STATE_DICT",
}


def run_one(job_file: str, train: Callable[..., Any]) -> int:
    """One process of the group, which runs the stage's own `train`; its exit status."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    answer: dict[str, Any] | None = None
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what the first one says holds for all
    folders = {name: None if path is None else Path(path) for name, path in job["folders"].items()}
    try:
        status, answer = 0, asdict(train(TrainParams.model_validate_json(job["params"]), **folders))
    except Interrupted as error:
        status, answer = INTERRUPTED, {"interrupted": str(error)}
    except ValueError as error:
        status = FAILED
        if first:
            print(f"train: {error}", file=sys.stderr, flush=True)
    if first and answer is not None:
        write_json(Path(job["result"]), answer)
    return status
