"""Trains in several processes with `accelerate launch`: each runs the same `train`, and the first returns the result.

For several machines, start `accelerate launch … -m pipeline stage train` on each with accelerate's own settings; a
process that is already in a group joins it instead of launching one.
"""

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
from pipeline.core.progress import note
from pipeline.params import TrainParams
from pipeline.training.watching import Interrupted, TrainError


def launch(params: TrainParams, **folders: Path | None) -> dict[str, Any]:
    """Run `train` with its `folders` in `params.num_processes` processes; returns its result as a dictionary."""
    cuda, gpus, number = torch.cuda.is_available(), torch.cuda.device_count(), params.num_processes
    if cuda and gpus < number:
        raise TrainError(f"train.num_processes is {number}, but this machine has {gpus} GPUs")
    with tempfile.TemporaryDirectory(prefix="retune-train-") as folder:
        job, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        paths = {name: None if path is None else str(path.resolve()) for name, path in folders.items()}
        write_json(job, {"params": params.model_dump_json(), "result": str(result_file), "folders": paths})
        on_cpu = {} if cuda else {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        command = [*launcher(params), "-m", "pipeline.train", str(job)]
        status = run_forwarding_sigterm(command, os.environ | on_cpu)
        if result_file.is_file():
            result = read_json(result_file)
            if "interrupted" in result:
                raise Interrupted(result["interrupted"])
            if status == 0:
                return result
    raise TrainError(f"training in {number} processes failed with status {status}; the first error above says why")


def launcher(params: TrainParams) -> list[str]:
    """The command that starts `params.num_processes` processes with `params.strategy`."""
    number = str(params.num_processes)
    if not torch.cuda.is_available():
        # On CPUs accelerate's launcher needs MPI; torchrun, which it uses on GPUs, does not.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", number, "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options = {
        "ddp": ["--multi_gpu"],
        "deepspeed": ["--use_deepspeed", "--zero_stage", "2", "--gradient_clipping", str(params.max_grad_norm)],
        "fsdp": [
            # FSDP 2 shards each tensor separately, which bitsandbytes does not support for 4-bit weights.
            "--use_fsdp", "--fsdp_version", "1", "--fsdp_sharding_strategy", "FULL_SHARD", "--fsdp_auto_wrap_policy",
            "TRANSFORMER_BASED_WRAP", "--fsdp_use_orig_params", "false", "--fsdp_cpu_ram_efficient_loading", "false",
            "--fsdp_state_dict_type", "FULL_STATE_DICT",
        ],
    }  # fmt: skip
    return command + options[params.strategy]


def run_one(job_file: str, train: Callable[..., Any]) -> int:
    """Run `train` as one process of the group; returns the exit status."""
    job = read_json(Path(job_file))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # all processes print the same
    folders = {name: None if path is None else Path(path) for name, path in job["folders"].items()}
    try:
        status, result = 0, asdict(train(TrainParams.model_validate_json(job["params"]), **folders))
    except Interrupted as error:
        status, result = 1, {"interrupted": str(error)}
    except ValueError as error:
        if first:
            note(f"train: {error}")
        return 1
    if first:
        write_json(Path(job["result"]), result)
    return status
