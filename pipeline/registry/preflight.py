"""What a run checks before it trains: news that should not wait until hours of training are over."""

from pathlib import Path

from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.decisions import champion, read_log
from pipeline.registry.manifest import read_manifest
from pipeline.registry.mlflow import open_registry
from pipeline.weights.gguf import require_programs


class PreflightError(RuntimeError):
    """What a run would make could not be published or compared."""


def require_ready(params: Params, root: Path = Path(".")) -> None:
    """Check that the store can be written, that programs of exports are there, and that the champion can be compared.

    Raises:
        StoreError, ExportError: the store or a program.
        PreflightError: the champion under this name is another kind of model.
    """
    store, name = open_store(params.publish, root), params.publish.registered_model_name
    store.probe()
    require_programs(params.merge.export)
    version = champion(read_log(store, name))
    manifest = read_manifest(store, version) if version else None
    task = manifest["params"]["train"].get("task", "causal-lm") if manifest else params.train.task
    if task != params.train.task:
        label = open_registry(params.publish, root).label(version)
        raise PreflightError(
            f"train.task is {params.train.task}, but version {label}, the champion of {name}, is a {task} model, and "
            "the scores of two kinds of models cannot be compared; set publish.registered_model_name to another name "
            f"for this one, such as {name}-{'classifier' if 'classification' in params.train.task else 'chat'}"
        )
