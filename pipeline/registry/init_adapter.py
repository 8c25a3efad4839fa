"""The adapter that a training starts from: a published version's, or one in a folder.

For `train.init_adapter: champion`, the version is pinned in .dvc/init_adapter.json, which DVC hashes. The pin moves
only when `retune run` is about to train for another reason, so a promotion alone does not cause a training.
"""

from pathlib import Path

from pipeline.core import graph
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.params import Params
from pipeline.registry.model import RegisteredModel

PIN = ".dvc/init_adapter.json"  # {"version": id or null}


def pin_champion(params: Params, root: Path = Path(".")) -> str | None:
    """Pin the champion if `init_adapter` is `champion` and the train stage is stale; returns the pinned version."""
    if params.train.init_adapter != "champion":
        return None
    pinned: str | None = read_json(root / PIN)["version"]
    if "train" not in graph.stale(root):
        return pinned
    serving = RegisteredModel(params.publish, root).champion()
    if serving != pinned:
        write_json(root / PIN, {"version": serving})
    return serving


def fetch_init(params: Params, root: Path = Path(".")) -> Path | None:
    """The folder of the adapter to start from; None: a new one. Raises TrainError, StoreError, SignatureError."""
    from pipeline.training.watching import TrainError  # imports torch, which `pin_champion` does not need

    name: str | None = params.train.init_adapter
    if name == "none":
        return None
    if name == "champion":
        name = read_json(root / PIN)["version"]
    if name is None:
        print("train · no champion is pinned yet (`retune run` pins it); starting with a new adapter", flush=True)
        return None
    if "@" in name:
        path, digest = name.rsplit("@", 1)
        weights = root / path / "adapter_model.safetensors"
        if not weights.is_file():
            raise TrainError(f"train.init_adapter names {path}, which has no adapter_model.safetensors")
        if (actual := sha256_file(weights)) != digest:
            raise TrainError(f"{weights} has the sha256 {actual}; train.init_adapter has {digest}")
        return root / path
    model = RegisteredModel(params.publish, root)
    return model.fetch_signed(model.manifest(name), "adapter")
