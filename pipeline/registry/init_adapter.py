"""The adapter that a training starts from, out of the registry or a folder.

What `train.init_adapter: champion` means is pinned in .dvc/init_adapter.json, which DVC hashes. The pin moves when
`retune run` is about to train for another reason, never by itself, so a promotion alone trains nothing again.
"""

from pathlib import Path

from pipeline.core import graph
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.params import Params
from pipeline.registry.model import RegisteredModel

PIN = ".dvc/init_adapter.json"  # {"version": id or null}


def pin_champion(params: Params, root: Path = Path(".")) -> str | None:
    """Before a run trains: pin today's champion, if that is what `init_adapter` asks for. Returns the pinned version.

    Nothing moves while the train stage is up to date, or the champion is the one pinned.
    """
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
    """The folder of the adapter to start from, checked; None starts afresh.

    Raises:
        InitError: it is not there, or not the one that its digest names.
        StoreError, SignatureError: the version is damaged, or publish.require_signature is on and it is not signed.
    """
    from pipeline.training.warm_start import InitError  # brings torch, which the flow that pins does without

    name: str | None = params.train.init_adapter
    if name == "none":
        return None
    if name == "champion":
        name = read_json(root / PIN)["version"]
    if name is None:
        print("train · no champion is pinned yet (`retune run` does that): the adapter starts afresh", flush=True)
        return None
    if "@" in name:
        path, digest = name.rsplit("@", 1)
        weights = root / path / "adapter_model.safetensors"
        if not weights.is_file():
            raise InitError(f"train.init_adapter names {path}, which holds no adapter_model.safetensors")
        if (actual := sha256_file(weights)) != digest:
            raise InitError(f"{weights} is not the one that train.init_adapter names: its sha256 is {actual}")
        return root / path
    model = RegisteredModel(params.publish, root)
    return model.fetch_signed(model.manifest(name), "adapter")
