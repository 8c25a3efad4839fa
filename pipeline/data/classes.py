"""Rows of a text and its class, as encoder models read them: no chat template, one label a row.

They come as conversations of one question and one short answer, which is what `formats` makes of `text, label` rows.
Any other row, a text that does not fit, and classes that cannot be learned or told apart are refused.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.conversation import Encoded, tokenizer_digest
from pipeline.chat.rendering import RowError, TemplateError
from pipeline.chat.template import (
    differing_keys,
    load_tokenizer,
    model_identity,
    require_context,
    require_rows,
    same_model,
    text_config,
)
from pipeline.core.combinations import CLASSIFICATION
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

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens of a text; none carries loss, the class does.

        Raises:
            RowError: it is no text with one class.
        """
        if [message["role"] for message in messages] != ["user", "assistant"] or tools:
            raise RowError("is no text with one class; train.task is sequence-classification")
        name = messages[-1]["content"]
        if messages[-1].get("tool_calls") or len(name) > LONGEST_NAME or "\n" in name:
            raise RowError(f"has an answer of {len(name)} characters where a class is expected")
        ids = self._tokens(messages[0]["content"])
        whole = self.tokenizer(messages[0]["content"])["input_ids"] if self.cut_at else ids
        return Encoded(ids, [-100] * len(ids), (CUT,) if len(whole) > len(ids) else ())

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
    require_context(params, _context(config, encoder.tokenizer))
    return encoder, identity


def load_classes(contract: dict[str, Any], source: dict[str, Any] | None = None) -> TextEncoder:
    """The encoder of a contract, after checking that base model and tokenizer are what they were.

    Args:
        source: a shipped model's folder as `local_source`; its base model need not be here.

    Raises:
        TemplateError: any of them differs.
    """
    encoder = _load(source or same_model(contract), contract["cut_at"])
    differ = differing_keys(encoder.contract(contract["model"]), contract)
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
        raise ClassError(f"classes in the training rows: {len(train):,} ({names}); expected 2 to {MAX_CLASSES:,}")
    if other - train:
        raise ClassError(
            f"the class {min(other - train)} is in test or validation rows and in no training row; add rows of it, or "
            "leave it out"
        )
    return sorted(train, key=lambda name: (int(name), "") if name.isdecimal() else (1 << 62, name))


def _load(source: dict[str, Any], cut_at: int | None) -> TextEncoder:
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise TemplateError(
                f"the tokenizer of {source['name_or_path']} has no padding and no end token, so rows fill no batch"
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
