"""`params.yaml` as typed, frozen objects: one section a stage, and no other source of parameters.

Comes in: the YAML file. Goes out: `Params`. Refused, with key, value and line: unknown keys, wrong types, values out of
range and combinations that cannot work.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Metric = Literal["accuracy", "bleu", "rouge1", "rouge2", "rougeL"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class ParamsError(ValueError):
    """`params.yaml` cannot be used; the message names key, line and what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class IngestParams(Section):
    format: Literal["auto", "alpaca", "sharegpt", "messages"]


class PrepareParams(Section):
    model_name_or_path: str
    model_revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    trust_remote_code: bool
    chat_template: str | None
    train_on: Literal["all_responses", "last_response"]
    max_length: Positive
    on_overlong: Literal["drop", "error"]
    max_dropped_fraction: Fraction
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    validation_fraction: Fraction

    @model_validator(mode="after")
    def check(self) -> "PrepareParams":
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError("test_fraction and validation_fraction together leave no rows to train on")
        if self.trust_remote_code and self.model_revision is None:
            raise ValueError("trust_remote_code runs code from the Hub: set model_revision to the commit you have read")
        return self


class TrainParams(Section):
    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    lora_r: Positive
    lora_alpha: Positive
    lora_dropout: Fraction
    lora_target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_ratio: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: int
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    packing: bool
    packed_length: Positive
    gradient_checkpointing: bool
    optim: Literal["adamw_torch", "paged_adamw_8bit"]
    logging_steps: Positive
    save_steps: Positive
    num_threads: Literal["auto"] | Positive
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def check(self) -> "TrainParams":
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"train.max_steps is {self.max_steps}; expected -1 (num_train_epochs decides) or more than 0"
            )
        return self


class EvaluateParams(Section):
    max_new_tokens: Positive
    batch_size: Positive
    max_samples: Positive | None
    bootstrap_samples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]


class MergeParams(Section):
    base: Literal["auto", "full", "nf4"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    min_agreement: Annotated[float, Field(ge=0, le=1)]


class PublishParams(Section):
    artifact_store: Annotated[str, Field(pattern=r"^(file|s3)://.+")]
    endpoint_url: Annotated[str, Field(pattern=r"^https?://[^?#]+$")] | None
    region_name: str | None
    profile_name: str | None
    addressing_style: Literal["auto", "path", "virtual"]
    server_side_encryption: Literal["AES256", "aws:kms"] | None
    sse_kms_key_id: str | None
    max_concurrency: Annotated[int, Field(ge=1, le=64)]
    tracking_uri: Annotated[str, Field(pattern=r"^(sqlite:///.+|https?://[^@]+)$")]  # no password in a file
    registered_model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    price_per_hour: Annotated[float, Field(ge=0)] | None
    signing_key: str | None
    signing_certificate: str | None
    verify_key: str | None
    require_signature: bool
    keep_versions: Positive | None
    keep_champions: Positive

    @model_validator(mode="after")
    def check(self) -> "PublishParams":
        if self.require_signature and self.verify_key is None:
            raise ValueError("publish.require_signature is true, but publish.verify_key names no key to check with")
        if self.signing_certificate is not None and self.signing_key is None:
            raise ValueError("publish.signing_certificate needs publish.signing_key, the certificate's private key")
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise ValueError("publish.endpoint_url holds a user or password; credentials belong to boto3's own places")
        if self.sse_kms_key_id is not None and self.server_side_encryption != "aws:kms":
            raise ValueError("publish.sse_kms_key_id names a key, but publish.server_side_encryption is not aws:kms")
        return self


class PromoteParams(Section):
    primary_metric: Metric
    min_improvement: Annotated[float, Field(ge=0)]
    guard_metrics: dict[Metric, Annotated[float, Field(ge=0)]]
    seed: Annotated[int, Field(ge=0)]
    approval: Literal["auto", "manual"]
    approval_hours: Annotated[float, Field(gt=0)]
    webhooks: list[Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]]

    def gate(self) -> dict[str, Any]:
        """What decides: two versions are not compared twice by the same gate."""
        return self.model_dump(include={"primary_metric", "min_improvement", "guard_metrics", "seed"})


class Params(Section):
    ingest: IngestParams
    prepare: PrepareParams
    train: TrainParams
    evaluate: EvaluateParams
    merge: MergeParams
    publish: PublishParams
    promote: PromoteParams

    @model_validator(mode="after")
    def check(self) -> "Params":
        if self.merge.base == "nf4" and not self.train.load_in_4bit:
            raise ValueError("merge.base is nf4, but train.load_in_4bit is false: there is no NF4 base to merge into")
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check every section of `path`.

    Raises:
        ParamsError: one sentence for each key that is missing, unknown, of the wrong type or out of range.
    """
    tree: Any
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; run this command in the project's top folder") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start})") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} holds no sections; expected ingest, prepare, train, … as its keys")
    try:
        return Params.model_validate(_plain(tree))
    except ValidationError as error:
        # An unknown key is often the missing one misspelt: it comes first.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ParamsError("\n".join(_sentence(e, tree, path) for e in errors)) from None


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as plain Python values, which strict validation insists on."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _sentence(error: Any, tree: Any, path: Path) -> str:
    # Union branches ("str", "literal[...]") end up in pydantic's location; only real keys have a line.
    keys: list[str] = []
    line: int | None = None
    node: Any = tree
    for key in error["loc"]:
        if isinstance(node, dict) and key in node:
            line = node.lc.key(key)[0] + 1  # type: ignore[attr-defined]  # ruamel gives its dictionaries positions
            node = node[key]
        elif (isinstance(node, dict) and error["type"] != "missing") or not isinstance(node, dict):
            break
        keys.append(str(key))
    key = ".".join(keys)
    where = f" ({path}, line {line})" if line else f" ({path})"
    match error["type"]:
        case "extra_forbidden":
            field = Params.model_fields.get(keys[0]) if len(keys) > 1 else None
            known = getattr(field.annotation, "model_fields", {}) if field else Params.model_fields
            near = difflib.get_close_matches(keys[-1], [*known], 1)
            hint = f"did you mean {near[0]}?" if near else "remove it or correct its spelling"
            return f"{key} is not a parameter{where}; {hint}"
        case "missing":
            return f"{key} is missing{where}; every parameter is written out, copy it from the project's params.yaml"
        case "value_error":
            return f"{error['ctx']['error']!s}{where}"
    got = "null" if node is None else repr(node)
    return f"{key} is {got}; {error['msg'][0].lower()}{error['msg'][1:]}{where}"
