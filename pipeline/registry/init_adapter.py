"""The adapter that a training starts from, out of the registry or a folder."""

from pathlib import Path

from pipeline.core.files import WORK_DIR, read_json, sha256_file
from pipeline.params import Params
from pipeline.registry.artifact_store import open_store
from pipeline.registry.manifest import read_manifest
from pipeline.registry.pin import PIN
from pipeline.registry.verify import fetch_signed
from pipeline.training.warm_start import InitError


def fetch_init(params: Params, root: Path = Path(".")) -> Path | None:
    """The folder of the adapter to start from, checked; None starts afresh.

    Raises:
        InitError: it is not there, or not the one that its digest names.
        StoreError, SignatureError: the version is damaged, or publish.require_signature is on and it is not signed.
    """
    wanted: str | None = params.train.init_adapter
    if wanted == "none":
        return None
    if wanted == "champion":
        wanted = read_json(root / PIN)["version"]
        if wanted is None:
            print("train · no champion is pinned yet (`retune run` does that): the adapter starts afresh", flush=True)
            return None
    assert wanted is not None
    if "@" in wanted:
        path, digest = wanted.rsplit("@", 1)
        weights = root / path / "adapter_model.safetensors"
        if not weights.is_file():
            raise InitError(f"train.init_adapter names {path}, which holds no adapter_model.safetensors")
        if (found := sha256_file(weights)) != digest:
            raise InitError(f"{weights} is not the one that train.init_adapter names: its sha256 is {found}")
        return root / path
    store = open_store(params.publish, root)
    manifest = read_manifest(store, wanted)
    if manifest is None:
        raise InitError(
            f"train.init_adapter is version {wanted}, which is not published in {store.uri}; `retune history` lists "
            "the versions there are"
        )
    return fetch_signed(params.publish, manifest, "adapter", root / WORK_DIR / "init" / wanted, root)
