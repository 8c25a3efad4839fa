"""What a run checks before it trains: news that should not wait until hours of training are over."""

from pathlib import Path

from pipeline.params import Params
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
    champion = model.champion()
    task = model.manifest(champion)["params"]["train"]["task"] if champion else params.train.task
    if task != params.train.task:
        raise PreflightError(
            f"train.task is {params.train.task}, but version {model.label(champion)}, the champion of {model.name}, is "
            f"a {task} model, and their scores cannot be compared; set publish.registered_model_name to another name"
        )
