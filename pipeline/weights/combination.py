"""Several adapters of one base combined into one by PEFT, which is then merged, scored and proved like a trained one.

An adapter whose weights are not those that the parameters name by digest, or that was trained with another template
contract, is refused.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.chat.template import require_same_contract
from pipeline.core.files import read_json, sha256_file, write_json
from pipeline.params import CombineParams
from pipeline.weights.loading import load_adapter, sort_sets
from pipeline.weights.merging import empty_base

OF_THE_DATA = ("trained_fraction", "max_length")  # keys of the contract in which adapters of other data may differ


class CombinationError(ValueError):
    """The adapters cannot be combined; the message says which and why."""


def combine(params: CombineParams, contract: dict[str, Any], adapter: Path, folder: Path) -> Path:
    """Write the weighted combination of `params.adapters` to `folder`, as PEFT saves an adapter, and return it.

    Args:
        adapter: the one trained in this run; a path of null stands for it.

    Raises:
        CombinationError: an adapter is missing, is not the one named, or PEFT cannot combine them (different ranks).
        TemplateError: an adapter was trained with another contract.
    """
    sources = []
    for part in params.adapters:
        source = adapter if part.path is None else Path(part.path)
        weights = source / "adapter_model.safetensors"
        if not weights.is_file():
            raise CombinationError(f"merge.combine names {source}, which holds no adapter_model.safetensors")
        digest = sha256_file(weights)
        if part.sha256 not in (None, digest):
            raise CombinationError(
                f"{weights} is not the one that merge.combine names: its sha256 is {digest}, not {part.sha256}"
            )
        require_same_contract(contract, read_json(source / "contract.json"), source, OF_THE_DATA)
        sources.append(source)
    names = ["default", *(f"adapter_{number}" for number in range(1, len(sources)))]
    model = load_adapter(empty_base(contract["model"]), sources[0], empty=True)
    for name, source in zip(names[1:], sources[1:], strict=True):
        model.load_adapter(str(source), name, low_cpu_mem_usage=True)
    torch.manual_seed(params.seed)  # DARE drops at random
    try:
        model.add_weighted_adapter(
            names,
            [part.weight for part in params.adapters],
            "combined",
            combination_type=params.combination_type,
            density=params.density,
        )
    except (ValueError, RuntimeError) as error:
        raise CombinationError(f"PEFT cannot combine these adapters: {str(error).splitlines()[0]}") from None
    model.save_pretrained(str(folder), selected_adapters=["combined"])
    for path in list((folder / "combined").iterdir()):
        path.rename(folder / path.name)
    (folder / "combined").rmdir()
    sort_sets(folder)
    write_json(folder / "contract.json", contract)
    return folder
