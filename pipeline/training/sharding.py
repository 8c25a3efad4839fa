"""Checkpoints of models that FSDP shards over processes; accelerate does the sharding.

Only the trained weights are gathered, into safetensors, so no process ever holds the whole base.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, load_checkpoint_in_model
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from trl import SFTTrainer

WRAPPER = "_fsdp_wrapped_module."  # part of the names of a sharded model's weights
ADAPTER = "adapter_model.safetensors"


def shard_on_cpus(trainer: SFTTrainer) -> None:
    """Let `trainer` shard its model on CPUs; accelerate does so only on GPUs."""
    for state in (PartialState(), trainer.accelerator.state):  # accelerate copies the first into the second repeatedly
        state.distributed_type = DistributedType.FSDP
        state.device = torch.device("cpu")  # accelerate's device has an index, so FSDP treats it as another device
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True


def gather_trained(model: Any) -> dict[str, torch.Tensor] | None:
    """The trained weights of a sharded `model` by name, on the CPU, if every process calls it; None if not sharded."""
    if not isinstance(model, FSDP):
        return None
    weights = {}
    for path, unit in model.named_modules():
        if not isinstance(unit, FSDP) or not any(p.requires_grad for p in unit.module.parameters(recurse=False)):
            continue
        with FSDP.summon_full_params(unit, recurse=False, writeback=False):
            for name, weight in unit.module.named_parameters():
                if "_flat_param" not in name:  # units inside this one are handled by themselves
                    weights[f"{path}.{name}".lstrip(".").removeprefix(WRAPPER)] = weight.detach().cpu().clone()
    return weights


class ShardedTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints of a sharded model have the usual files, with one optimiser state per process."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = gather_trained(self.model)
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        if not self.args.should_save:
            return
        # Write the names of an unsharded model. PEFT finds its weights only by the sharded names, and saves those.
        folder = Path(output_dir or self.args.output_dir)
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            weights = {name.replace(WRAPPER, ""): weight for name, weight in weights.items()}
        self._save(str(folder), state_dict=weights)
        if (folder / ADAPTER).exists():
            named = {name.replace(WRAPPER, ""): weight for name, weight in load_file(folder / ADAPTER).items()}
            save_file(named, folder / ADAPTER, metadata={"format": "pt"})

    def load_before_sharding(self, checkpoint: Path) -> None:
        """Load a checkpoint's trained weights; transformers would load them after sharding, into the parts."""
        if (checkpoint / ADAPTER).exists():
            set_peft_model_state_dict(self.model, load_file(checkpoint / ADAPTER))
        else:
            load_checkpoint_in_model(self.model, str(checkpoint))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if not isinstance(self.model, FSDP):
            super()._load_from_checkpoint(checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not isinstance(self.model, FSDP):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.optimizer.state_dict(), Path(output_dir) / f"optimizer-{self.args.process_index}.pt")
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not isinstance(self.model, FSDP):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for part, file in (
            (self.optimizer, f"optimizer-{self.args.process_index}.pt"),
            (self.lr_scheduler, "scheduler.pt"),
        ):
            part.load_state_dict(torch.load(Path(checkpoint) / file, map_location="cpu", weights_only=True))
