"""What a run checks before it trains: news that should not wait until hours of training are over."""

from pathlib import Path

from pipeline.params import Params
from pipeline.registry.manifest import read_manifest
from pipeline.registry.model import RegisteredModel


class PreflightError(RuntimeError):
    """What a run would make could not be published or compared."""


def require_ready(params: Params, root: Path = Path(".")) -> None:
    """Check that the store can be written and that the champion can be compared.

    Raises:
        StoreError: the store cannot be written.
        PreflightError: the champion under this name is another kind of model.
    """
    model = RegisteredModel(params.publish, root)
    model.store.probe()
    version = model.champion()
    manifest = read_manifest(model.store, version) if version else None
    kind = "classifier" if "classification" in params.train.task else "chat"
    task = manifest["params"]["train"]["task"] if manifest else params.train.task
    if task != params.train.task:
        raise PreflightError(
            f"train.task is {params.train.task}, but version {model.label(version)}, the champion of {model.name}, "
            f"is a {task} model, and the scores of two kinds of models cannot be compared; set "
            f"publish.registered_model_name to another name for this one, such as {model.name}-{kind}"
        )
