"""Which training settings go together: parameters come in, sentences about those that cannot come out.

Nothing is imported that takes time: this is asked whenever params.yaml is read.
"""

import re
from typing import Any

VIRTUAL_TOKENS = ("prefix", "prompt")  # these put trained vectors before the text and change no weight
INIT_ADAPTER = r"none|champion|[0-9a-f]{16}|[^@\s]+@[0-9a-f]{64}"
CLASS_METRICS = ("accuracy", "macro_f1")
CLASSIFICATION = "sequence-classification"
CLASS_PRESET = "`retune preset roberta-base-imdb` sets every parameter for a classifier, its base model among them"


def in_4bit(method: str, load_in_4bit: Any) -> Any:
    """`train.load_in_4bit` with `auto` resolved: QLoRA is LoRA on a 4-bit base, the others take the base as it is."""
    return method == "qlora" if load_in_4bit == "auto" else load_in_4bit


def conflict(train: Any) -> str | None:
    """Why the settings of a `TrainParams` cannot be trained with together; None if they can."""
    method, virtual = train.method, train.method in VIRTUAL_TOKENS
    if not re.fullmatch(INIT_ADAPTER, train.init_adapter):
        return (
            f"train.init_adapter is {train.init_adapter!r}; expected none, champion, a version's id (16 hexadecimal "
            "digits), or PATH@SHA256 with the sha256 of PATH/adapter_model.safetensors"
        )
    if method == "qlora" and not train.load_in_4bit:
        return (
            "train.method is qlora, which is LoRA on a 4-bit base, but train.load_in_4bit is false; set it to auto, "
            "or train.method to lora"
        )
    if method == "lora" and train.load_in_4bit:
        return (
            "train.method is lora and train.load_in_4bit true: that is qlora; set train.method to qlora, or "
            "train.load_in_4bit to auto"
        )
    if method == "full" and train.load_in_4bit:
        return (
            "train.method is full, which trains every weight, and 4-bit weights take no gradient; set "
            "train.load_in_4bit to auto, or train.method to qlora"
        )
    if method == "full" and train.init_adapter != "none":
        return (
            f"train.init_adapter is {train.init_adapter}, but train.method is full, which has no adapter; set it to "
            "none (prepare.model_name_or_path can be a model that was trained before)"
        )
    if virtual and train.packing:
        return (
            f"train.packing is true, but train.method is {method}: its trained vectors stand before a sequence, so of "
            "several rows in one only the first would have them; set train.packing to false"
        )
    if method == "prefix" and train.gradient_checkpointing:
        return (
            "train.gradient_checkpointing is true, but train.method is prefix, whose keys and values PEFT cannot "
            "recompute; set it to false"
        )
    if method == "adalora" and train.init_adapter != "none":
        return (
            f"train.init_adapter is {train.init_adapter}, but train.method is adalora, whose ranks were settled by "
            "the training before; set it to none, or train.method to lora"
        )
    return None


def class_conflicts(params: Any) -> list[str]:
    """Every parameter that does not go with sequence classification, a sentence each, and what sets them all."""
    if params.train.task != CLASSIFICATION:
        return []
    because, train = "but train.task is sequence-classification", params.train
    found = []
    if train.method in VIRTUAL_TOKENS:
        found.append(
            f"train.method is {train.method}, which changes no weight, {because}, whose models ship merged; set it to "
            "lora"
        )
    if train.packing:
        found.append(f"train.packing is true, {because}, where a sequence has one class; set it to false")
    if params.prepare.on_overlong == "split":
        found.append(
            f"prepare.on_overlong is split, {because}: a class is of the whole text; set it to drop, "
            "error or truncate_prompt"
        )
    if params.promote.primary_metric not in CLASS_METRICS:
        expected = " or ".join(CLASS_METRICS)
        found.append(
            f"promote.primary_metric is {params.promote.primary_metric}, which scores texts, {because}; set it to "
            f"{expected}"
        )
    settings = (
        *(("merge", key, nothing) for key, nothing in (("export", "[]"), ("combine", "null"))),
        *(("evaluate", key, nothing) for key, nothing in (("general", "null"), ("judge", "null"), ("prompts", "[]"))),
    )
    for section, key, nothing in settings:
        if getattr(getattr(params, section), key):
            found.append(f"{section}.{key} is set, {because}, which has none; set it to {nothing}")
    if params.evaluate.backend == "vllm":
        found.append(f"evaluate.backend is vllm, {because}; set it to auto")
    return [*found, CLASS_PRESET] if found else []


def whole_conflict(params: Any) -> str | None:
    """Why sections of `Params` do not go with each other; None if they do."""
    if params.merge.base == "nf4" and not params.train.load_in_4bit:
        return (
            f"merge.base is nf4, but with train.method {params.train.method} and train.load_in_4bit false there is no "
            "NF4 base to merge into"
        )
    if params.merge.combine is not None and params.evaluate.general is not None:
        return (
            "merge.combine is set, but evaluate.general measures what the adapter forgot before it is combined; set "
            "one of them to null"
        )
    store, pool, init = params.publish.artifact_store, params.operations.train_pool, params.train.init_adapter
    if pool != "local" and init != "none" and "@" not in init and _is_own_folder(store):
        return (
            f"train.init_adapter is {init}, which a worker of the pool {pool} fetches from publish.artifact_store, but "
            f"{store} lies in this folder; take a store that both reach"
        )
    return "\n".join(class_conflicts(params)) or None


def _is_own_folder(store: str) -> bool:
    return "://" not in store or (store.startswith("file://") and not store.startswith("file:///"))
