"""Which values of parameters cannot be combined, in one table. Imports nothing slow, because every command uses it."""

import re
from typing import Any, NamedTuple


class Method(NamedTuple):
    """Properties of a value of `train.method` that other parts need; `training/methods.py` makes the adapter."""

    peft_type: str | None  # None: no adapter, every weight is trained
    in_4bit: bool | None = None  # whether the name implies a 4-bit base; None: either
    trains_experts: bool = False  # PEFT supports it for the stacked weights of mixtures of experts
    continues: bool = True  # can start from an earlier adapter


METHODS = {
    "lora": Method("LORA", in_4bit=False, trains_experts=True),
    "qlora": Method("LORA", in_4bit=True, trains_experts=True),
    "dora": Method("LORA"),
    "rslora": Method("LORA", trains_experts=True),
    "ia3": Method("IA3"),
    "adalora": Method("ADALORA", continues=False),
    "prefix": Method("PREFIX_TUNING"),
    "prompt": Method("PROMPT_TUNING"),
    "full": Method(None, in_4bit=False, continues=False),
}
PEFT_TYPES = sorted({method.peft_type for method in METHODS.values() if method.peft_type})
# Methods that put trained vectors before the text and change no weights.
VIRTUAL_TOKENS = [name for name, method in METHODS.items() if (method.peft_type or "").endswith("_TUNING")]
CLASSIFICATION = "sequence-classification"
CLASS_PRESET = "`retune preset roberta-base-imdb` sets every parameter for a classifier, its base model among them"
INIT_ADAPTER = r"none|champion|[0-9a-f]{16}|[^@\s]+@[0-9a-f]{64}"
RENDERING = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}  # set for each rendering


def in_4bit(method: Any, load_in_4bit: Any) -> Any:
    """`train.load_in_4bit` with `auto` resolved: QLoRA is LoRA on a 4-bit base, the others take the base as it is."""
    entry = METHODS.get(method) if isinstance(method, str) else None
    return bool(entry and entry.in_4bit) if load_in_4bit == "auto" else load_in_4bit


def conflicts(params: Any) -> list[str]:
    """A sentence for each parameter whose value cannot work with the others, with what to do."""
    classes = params.train.task == CLASSIFICATION
    class_conflicts = [row for row in _class_rules(params) if row[1]] if classes else []
    because = f", but train.task is {CLASSIFICATION}"
    return [
        *(f"{_value(params, name)}; {why}" for name, broken, why in _rules(params) if broken),
        *(f"{_value(params, name)}{because}; {why}" for name, _, why in class_conflicts),
        *([CLASS_PRESET] if class_conflicts else []),
    ]


# fmt: off
def _rules(p: Any) -> list[tuple[str, bool, str]]:
    """Parameter, whether its value cannot work, and why."""
    t, publish, sharded = p.train, p.publish, p.train.strategy in ("fsdp", "deepspeed")
    fetched = re.fullmatch(r"champion|[0-9a-f]{16}", t.init_adapter) and p.operations.train_pool != "local"
    return [
        ("prepare.chat_template_kwargs", bool(RENDERING & set(p.prepare.chat_template_kwargs)),
         f"Retune itself sets {', '.join(sorted(RENDERING))}: remove these"),
        ("prepare.test_fraction", p.prepare.test_fraction + p.prepare.validation_fraction >= 1,
         "together with prepare.validation_fraction it leaves no rows to train on"),
        ("prepare.trust_remote_code", p.prepare.trust_remote_code and p.prepare.model_revision is None,
         "that runs code from the Hub: set prepare.model_revision to the commit you have read"),
        ("train.init_adapter", not re.fullmatch(INIT_ADAPTER, t.init_adapter),
         "expected none, champion, a version's id (16 hexadecimal digits), or PATH@SHA256 with the sha256 of "
         "PATH/adapter_model.safetensors"),
        ("train.init_adapter", t.init_adapter != "none" and not METHODS[t.method].continues,
         "train.method full has no adapter, and an adalora adapter's ranks are final: set it to none"),
        ("train.init_adapter", bool(fetched) and re.match(r"s3://|file:///", publish.artifact_store) is None,
         "a worker of operations.train_pool fetches it from publish.artifact_store, which is in this folder: use a "
         "store that both can reach"),
        ("train.load_in_4bit", METHODS[t.method].in_4bit not in (None, t.load_in_4bit),
         "train.method qlora needs a 4-bit base, lora and full need the base unquantised: set it to auto"),
        ("train.packing", t.packing and t.method in VIRTUAL_TOKENS,
         "with train.method prefix or prompt, only the first row of a packed sequence would get the trained vectors; "
         "set it to false"),
        ("train.gradient_checkpointing", t.gradient_checkpointing and t.method == "prefix",
         "PEFT cannot recompute the keys and values of train.method prefix: set it to false"),
        ("train.gradient_accumulation_steps",
         (t.gradient_accumulation_steps == "auto") != (t.tokens_per_step is not None),
         "auto needs a number for train.tokens_per_step, a number needs null there"),
        ("train.per_device_train_batch_size",
         t.per_device_train_batch_size == "auto" and t.gradient_accumulation_steps != "auto",
         "also set train.gradient_accumulation_steps to auto and train.tokens_per_step to a number"),
        ("train.max_steps", t.max_steps != -1 and t.max_steps < 1,
         "expected -1 (num_train_epochs decides) or more than 0"),
        ("train.strategy", (t.strategy == "single") != (t.num_processes == 1),
         "single needs train.num_processes 1, the others need 2 or more"),
        ("train.early_stopping_patience", t.early_stopping_patience is not None and sharded,
         "it saves the best weights whole, but train.strategy fsdp and deepspeed shard them: set it to null"),
        ("train.bnb_4bit_quant_storage",
         t.strategy == "fsdp" and t.load_in_4bit and t.bnb_4bit_quant_storage == "uint8",
         "train.strategy fsdp can only shard tensors of one type: set it to bfloat16 (float32 on CPUs)"),
        ("train.optim", t.strategy == "deepspeed" and t.optim == "paged_adamw_8bit",
         "train.strategy deepspeed shards the optimiser's state itself: set it to adamw_torch"),
        ("merge.base", p.merge.base == "nf4" and not t.load_in_4bit,
         "without train.load_in_4bit there is no NF4 base to merge into"),
        ("publish.require_signature", publish.require_signature and publish.verify_key is None,
         "publish.verify_key must name a key to check with"),
        ("publish.sse_kms_key_id", publish.sse_kms_key_id is not None and publish.server_side_encryption != "aws:kms",
         "a key needs publish.server_side_encryption aws:kms"),
        ("promote.declared_effect", p.promote.declared_effect <= p.promote.min_improvement,
         "the effect that the gate must be able to see has to exceed promote.min_improvement"),
        ("operations.mlflow_port", p.operations.mlflow_port == p.operations.prefect_port,
         "that is operations.prefect_port too, and two servers need two ports"),
    ]


def _class_rules(p: Any) -> list[tuple[str, bool, str]]:
    return [
        ("train.method", p.train.method in VIRTUAL_TOKENS, "it changes no weight: set it to lora"),
        ("train.packing", p.train.packing, "a sequence has one class: set it to false"),
        ("prepare.on_overlong", p.prepare.on_overlong == "split", "a class is for the whole text: set it to drop"),
        ("promote.primary_metric", p.promote.primary_metric not in ("accuracy", "macro_f1"),
         "it scores texts: set it to accuracy or macro_f1"),
        ("evaluate.general", p.evaluate.general is not None, "set it to null"),
        ("evaluate.prompts", bool(p.evaluate.prompts), "set it to []"),
        ("evaluate.backend", p.evaluate.backend == "vllm", "set it to auto"),
    ]
# fmt: on


def _value(params: Any, name: str) -> str:
    section, key = name.split(".")
    value = getattr(getattr(params, section), key)
    if isinstance(value, bool):
        return f"{name} is {str(value).lower()}"
    return f"{name} is {value}" if isinstance(value, str | int | float) else f"{name} is set"
