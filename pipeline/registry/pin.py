"""Which version `train.init_adapter: champion` means: pinned in .dvc/init_adapter.json, which DVC hashes.

The pin moves when `retune run` is about to train for another reason, never by itself, so a promotion alone trains
nothing again. Apart from `warm_start.py` because the flow, which calls this, loads no PyTorch.
"""

from pathlib import Path

from pipeline.core import graph
from pipeline.core.files import read_json, write_json
from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import champion, read_log

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
    serving = champion(read_log(open_store(params.publish, root), params.publish.registered_model_name))
    if serving != pinned:
        write_json(root / PIN, {"version": serving})
    return serving
