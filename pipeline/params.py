"""All parameters as typed, frozen objects: `Params` has a section for each stage. `settings` reads them from the file.

Unknown keys, wrong types, values out of range and combinations that cannot work are errors.
"""

import datetime
import string
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.core.combinations import conflicts, in_4bit

Metric = Literal[
    "accuracy", "macro_f1", "exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "perplexity"
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
BatchSize = Positive | Literal["auto"]


IN_WORDS: dict[str, str] = {}  # pattern → what errors call a text of it


def like(pattern: str, words: str) -> Any:
    """A field with this pattern; errors say `words` instead of it."""
    IN_WORDS[pattern] = words
    return Field(pattern=pattern)


NAME = "letters, digits, '.', '_' and '-', and first a letter or digit"
TRACKING = "sqlite:/// and a file, or an http or https address without a user"
URL = like(r"^https?://[^@?#]+$", "an http or https address without user, query and fragment")


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


# fmt: off
Format = Literal[
    "auto", "alpaca", "belle", "classification", "dolly", "messages", "openassistant", "openorca",
    "prompt-completion", "question-answer", "self-instruct", "sharegpt", "text", "turn-pairs", "ultrachat"
]
# fmt: on


class ColumnsParams(Section):
    """Which column of a source has which role; a role without a column does not occur."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    task: str | None = None
    group: str | None = None
    scoring: str | None = None
    template: str | None = None  # the prompt as text with {column} in it, instead of the prompt column

    @model_validator(mode="after")
    def check(self) -> "ColumnsParams":
        if self.template is None:
            if (self.prompt is None) != (self.response is None):
                raise ValueError("ingest.columns needs prompt and response, or a template instead of prompt")
            return self
        if self.prompt is not None:
            raise ValueError("ingest.columns has prompt and template; remove prompt, which the template replaces")
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"ingest.columns.template: {error}; write {{{{ for a brace itself") from None
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise ValueError(
                "ingest.columns.template takes {column} only, without ! and :; write {{ for a brace itself"
            )
        return self


class SourceParams(Section):
    uri: Annotated[str, Field(min_length=1)]
    format: Format = "auto"
    columns: ColumnsParams | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    cap: Positive | None = None


class IngestParams(Section):
    format: Format
    columns: ColumnsParams | None
    sources: Annotated[list[SourceParams], Field(min_length=1)] | None
    s3_endpoint_url: Annotated[str, URL] | None
    max_download_gib: Annotated[float, Field(gt=0)]
    max_rejected_fraction: Fraction


class FilterParams(Section):
    min_answer_chars: Positive | None
    max_answer_chars: Positive | None
    min_chars: Positive | None
    max_chars: Positive | None
    languages: Annotated[list[Annotated[str, like("^[a-z]{2,3}$", "codes such as en")]], Field(min_length=1)] | None

    @model_validator(mode="after")
    def check(self) -> "FilterParams":
        for least, most in (("min_answer_chars", "max_answer_chars"), ("min_chars", "max_chars")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"prepare.filters.{least} is {low} and {most} is {high}; no row can pass both")
        return self


class PrepareParams(Section):
    model_name_or_path: str
    model_revision: Annotated[str, like(r"^[0-9a-f]{40}$", "a commit of 40 hexadecimal digits")] | None
    trust_remote_code: bool
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    chat_template_date: str
    reasoning: Literal["drop", "inline", "refuse"]
    on_left_out: Literal["drop", "keep"]
    train_on: Literal["all_responses", "last_response"]
    max_length: Positive
    on_overlong: Literal["drop", "error", "truncate_prompt", "split"]
    on_control_tokens: Literal["escape", "drop"]
    near_duplicate_threshold: Annotated[float, Field(ge=0.3, le=1)] | None
    max_dropped_fraction: Fraction
    default_scoring: Literal["auto", "exact", "text"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    validation_fraction: Fraction
    filters: FilterParams

    @field_validator("chat_template_date", mode="before")
    @classmethod
    def check_date(cls, value: Any) -> Any:
        date = value.isoformat() if isinstance(value, datetime.date) else value  # YAML reads 2026-01-31 as a date
        try:
            valid = date == "today" or len(datetime.date.fromisoformat(date).isoformat()) == len(date)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"is {value}; expected today, or a date like 2026-01-31")
        return date


class TrainParams(Section):
    task: Literal["causal-lm", "sequence-classification"]
    method: Literal["lora", "qlora", "dora", "rslora", "ia3", "adalora", "prefix", "prompt", "full"]
    init_adapter: str
    load_in_4bit: bool  # `auto` in the file; see `combinations.in_4bit`
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    lora_r: Positive
    lora_alpha: Positive
    lora_dropout: Fraction
    lora_target_modules: Literal["auto", "attention", "all-linear"] | Annotated[list[str], Field(min_length=1)]
    num_virtual_tokens: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_ratio: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: int
    per_device_train_batch_size: Literal["auto"] | Positive
    gradient_accumulation_steps: Literal["auto"] | Positive
    tokens_per_step: Positive | None
    packing: bool
    packed_length: Positive
    gradient_checkpointing: bool
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
    use_liger_kernel: Literal["auto"] | bool
    torch_compile: bool
    optim: Literal["adamw_torch", "paged_adamw_8bit"]
    logging_steps: Positive
    save_steps: Positive
    eval_steps: Positive | None
    early_stopping_patience: Positive | None
    max_loss_rise: Annotated[float, Field(gt=0)] | None
    max_hours: Annotated[float, Field(gt=0)] | None
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"]
    num_processes: Positive
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"]
    num_threads: Literal["auto"] | Positive
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="before")
    @classmethod
    def resolve(cls, values: Any) -> Any:
        if isinstance(values, dict) and "load_in_4bit" in values:
            return values | {"load_in_4bit": in_4bit(values.get("method"), values["load_in_4bit"])}
        return values


class GeneralParams(Section):
    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, like(r"^[0-9a-f]{64}$", "a SHA-256 digest of 64 hexadecimal digits")]


class EvaluateParams(Section):
    backend: Literal["auto", "transformers", "vllm"]
    max_new_tokens: Literal["auto"] | Positive
    batch_size: BatchSize
    max_samples: Positive | None
    bootstrap_samples: Annotated[int, Field(ge=100)]
    prompts: list[Annotated[str, Field(min_length=1)]]
    general: GeneralParams | None
    seed: Annotated[int, Field(ge=0)]


class MergeParams(Section):
    base: Literal["auto", "full", "nf4"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    min_agreement: Annotated[float, Field(ge=0, le=1)]
    max_logit_error: Annotated[float, Field(gt=0)]
    max_metric_drop: Annotated[float, Field(ge=0, le=1)]


class PublishParams(Section):
    artifact_store: Annotated[str, like(r"^(file|s3)://.+", "file:// and a folder, or s3:// and a bucket")]
    endpoint_url: Annotated[str, URL] | None  # no password in a file
    region_name: str | None
    profile_name: str | None
    addressing_style: Literal["auto", "path", "virtual"]
    server_side_encryption: Literal["AES256", "aws:kms"] | None
    sse_kms_key_id: str | None
    max_concurrency: Annotated[int, Field(ge=1, le=64)]
    tracking_uri: Annotated[str, like(r"^(sqlite:///.+|https?://[^@]+)$", TRACKING)]
    registered_model_name: Annotated[str, like(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", f"up to 64 {NAME}")]
    price_per_hour: Annotated[float, Field(ge=0)] | None
    signing_key: str | None
    verify_key: str | None
    require_signature: bool
    keep_versions: Positive | None
    keep_champions: Positive


class PromoteParams(Section):
    primary_metric: Metric
    min_improvement: Annotated[float, Field(ge=0)]
    declared_effect: Annotated[float, Field(gt=0)]
    guard_metrics: dict[Metric, Annotated[float, Field(gt=0)]]
    max_forgetting: dict[Literal["accuracy", "perplexity"], Annotated[float, Field(gt=0)]]
    seed: Annotated[int, Field(ge=0)]
    approval: Literal["auto", "manual"]
    approval_hours: Annotated[float, Field(gt=0)]
    webhooks: list[Annotated[str, like(r"^[A-Z_][A-Z0-9_]*$", "names of environment variables")]]

    def gate(self) -> dict[str, Any]:
        """The parameters that affect a decision: the same gate does not decide twice on the same version."""
        return self.model_dump(exclude={"approval", "approval_hours", "webhooks"})


class OperationsParams(Section):
    services: list[Literal["cpu", "gpu", "mlflow"]]
    prefect_port: Annotated[int, Field(ge=1, le=65535)]
    mlflow_port: Annotated[int, Field(ge=1, le=65535)]
    min_new_rows: Positive
    train_pool: Literal["local", "gpu"]
    git_remote: Annotated[str, like(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", NAME)]
    train_attempts: Annotated[int, Field(ge=1, le=10)]
    worker_wait_minutes: Annotated[float, Field(gt=0)]
    git_branch: Annotated[str, like(r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", f"the name of a branch: {NAME} or /")] | None


class Params(Section):
    ingest: IngestParams
    prepare: PrepareParams
    train: TrainParams
    evaluate: EvaluateParams
    merge: MergeParams
    publish: PublishParams
    promote: PromoteParams
    operations: OperationsParams

    @model_validator(mode="after")
    def check(self) -> "Params":
        if sentences := conflicts(self):
            raise ValueError("\n".join(sentences))
        return self
