"""Rows of a text and its class, as encoder models read them: no chat template, one label a row.

They come as conversations of one question and one short answer, which is what `formats` makes of `text, label` rows.
Any other row, a text that does not fit, and classes that cannot be learned or told apart are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.conversation import Conversation, Encoded, tokenizer_digest
from pipeline.chat.rendering import RowError, TemplateError
from pipeline.chat.template import differing_keys, model_identity, require_rows, text_config
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.vetting import check_model
from pipeline.params import PrepareParams

CUT = "end of the text cut to fit prepare.max_length"
MAX_CLASSES = 1000
LONGEST_NAME = 200  # characters of a class; more is an answer
# Their positions begin after the padding token's, so the last of them are never reached.
SHIFTED = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}
GOLDEN = ("A fine film, and not a minute too long.", "  Spaces,\ttabs\nand a line — 电影不错。 ", "")


class ClassError(ValueError):
    """The classes of a dataset cannot be trained; the message says which and why."""


@dataclass(frozen=True)
class TextEncoder:
    """What prepare asks of a template, for texts that have a class instead of an answer."""

    tokenizer: PreTrainedTokenizerBase
    cut_at: int | None  # tokens; None: a longer text is left as it is, for prepare.on_overlong

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """Tokens of each text; no token carries loss, the class does."""
        return [self._encode(messages, tools) for messages, tools in conversations]

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        return messages[-1]["content"], self._tokens(messages[-1]["content"])

    def contract(self, model: dict[str, Any]) -> dict[str, Any]:
        """What a later stage must find unchanged; prepare adds the `labels`."""
        return {
            "task": CLASSIFICATION,
            "model": model,
            "tokenizer_sha256": tokenizer_digest(self.tokenizer),
            "pad_id": self.tokenizer.pad_token_id,
            "cut_at": self.cut_at,
            "golden": [{"text": text, "input_ids": self._tokens(text)} for text in GOLDEN],
        }

    def _encode(self, messages: list[Message], tools: str | None) -> Encoded | RowError:
        if [message["role"] for message in messages] != ["user", "assistant"] or tools:
            return RowError("is no text with one class; train.task is sequence-classification")
        name = messages[-1]["content"]
        if messages[-1].get("tool_calls") or len(name) > LONGEST_NAME or "\n" in name:
            return RowError(f"has an answer of {len(name)} characters where a class is expected")
        ids = self._tokens(messages[0]["content"])
        whole = self.tokenizer(messages[0]["content"])["input_ids"] if self.cut_at else ids
        return Encoded(ids, [-100] * len(ids), (CUT,) if len(whole) > len(ids) else ())

    def _tokens(self, text: str) -> list[int]:
        cut = {"truncation": True, "max_length": self.cut_at} if self.cut_at else {}
        ids: list[int] = self.tokenizer(text, **cut)["input_ids"]
        return ids


def load_encoder(params: PrepareParams) -> tuple[TextEncoder, dict[str, Any]]:
    """The encoder of the base model that `params` name, and the model's identity.

    Raises:
        TemplateError: there is no such model or tokenizer, or it is too small for `max_length`.
    """
    identity = model_identity(params.model_name_or_path, params.model_revision, params.trust_remote_code)
    encoder = _load(identity, params.max_length if params.on_overlong == "truncate_prompt" else None)
    config = text_config(identity)
    require_rows(config, encoder.tokenizer, set(encoder.tokenizer.get_vocab().values()))
    limit = _context(config, encoder.tokenizer)
    if limit is not None and params.max_length > limit:
        raise TemplateError(
            f"prepare.max_length is {params.max_length}; {params.model_name_or_path} was made for {limit} tokens at "
            "most"
        )
    return encoder, identity


def load_classes(contract: dict[str, Any], source: dict[str, Any] | None = None) -> TextEncoder:
    """The encoder of a contract, after checking that base model and tokenizer are what they were.

    Args:
        source: a shipped model's folder as `local_source`; its base model need not be here.

    Raises:
        TemplateError: any of them differs.
    """
    model = contract["model"]
    if source is None:
        source = model_identity(model["name_or_path"], model["revision"], model["trust_remote_code"])
        if source != model:
            raise TemplateError(
                f"the base model {model['name_or_path']} is not the one the dataset was prepared for "
                f"(digest {source['digest'][:12]}, expected {model['digest'][:12]}); run `dvc repro`, or put it back"
            )
    encoder = _load(source, contract["cut_at"])
    differ = differing_keys(encoder.contract(model), contract)
    if differ:
        raise TemplateError(f"{', '.join(differ)} differ from the contract of the dataset; run `dvc repro prepare`")
    return encoder


def class_names(train: set[str], other: set[str]) -> list[str]:
    """The classes in the order of their numbers: by value where all are numbers, else by alphabet.

    Raises:
        ClassError: there are fewer than two or too many, or one is in no training row.
    """
    if not 2 <= len(train) <= MAX_CLASSES:
        names = ", ".join(sorted(train)[:5])
        raise ClassError(f"the training rows have {len(train):,} classes ({names}); expected 2 to {MAX_CLASSES:,}")
    if other - train:
        raise ClassError(
            f"the class {min(other - train)} is in test or validation rows and in no training row; add rows of it, or "
            "leave it out"
        )
    return sorted(train, key=lambda name: (int(name), "") if name.isdecimal() else (1 << 62, name))


def _load(source: dict[str, Any], cut_at: int | None) -> TextEncoder:
    path = source["name_or_path"]
    check_model(path, source["revision"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=source["revision"], trust_remote_code=source["trust_remote_code"]
        )
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TemplateError(f"no tokenizer could be loaded from {path}: {reason}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise TemplateError(
                f"the tokenizer of {path} has neither a padding nor an end token, so rows fill no batch"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return TextEncoder(tokenizer, cut_at)


def _context(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in SHIFTED:
        limit -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    return int(min(limit, tokenizer.model_max_length))
