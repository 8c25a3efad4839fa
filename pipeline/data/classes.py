"""Encodes texts for classification without a chat template: a row is a question, the text, and an answer, its class."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.conversation import Encoded, tokenizer_digest
from pipeline.chat.rendering import RowError, TemplateError
from pipeline.chat.template import (
    load_config,
    load_tokenizer,
    model_identity,
    require_context,
    require_embeddings,
    require_same_contract,
    require_same_model,
)
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.progress import counted
from pipeline.params import PrepareParams

CUT = "end of the text cut to fit prepare.max_length"
MAX_CLASSES = 1000
SHOWN = 10  # classes that an error names
MAX_CLASS_NAME = 200  # characters; a longer one is an answer, not a class
# Models whose positions start after the padding token's id, so the last ones are never used.
SHIFTED = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}
GOLDEN = ("A fine film, and not a minute too long.", "  Spaces,\ttabs\nand a line — 电影不错。 ", "")


class ClassError(ValueError):
    """The classes of a dataset cannot be trained."""


@dataclass(frozen=True)
class TextEncoder:
    """The interface of `ChatTemplate` that prepare uses, for texts with a class instead of an answer."""

    tokenizer: PreTrainedTokenizerBase
    cut_at: int | None  # tokens; None: a longer text is not cut, and prepare.on_overlong decides

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens of a text, none with loss; RowError if the row is not a text with one class."""
        if [message["role"] for message in messages] != ["user", "assistant"] or tools:
            raise RowError("is not one text with one class, which train.task sequence-classification needs")
        name = messages[-1]["content"]
        if messages[-1].get("tool_calls") or len(name) > MAX_CLASS_NAME or "\n" in name:
            raise RowError(f"has an answer of {len(name)} characters; expected the name of a class")
        ids = self._tokens(messages[0]["content"])
        uncut_ids = self.tokenizer(messages[0]["content"])["input_ids"] if self.cut_at else ids
        return Encoded(ids, [-100] * len(ids), (CUT,) if len(uncut_ids) > len(ids) else ())

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        return messages[-1]["content"], self._tokens(messages[-1]["content"])

    def contract(self, model: dict[str, Any]) -> dict[str, Any]:
        """What must be the same in later stages; prepare adds the `labels`."""
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
    """The encoder of the base model in `params`, and the model's identity; TemplateError as `load_template`."""
    identity = model_identity(params.model_name_or_path, params.model_revision, params.trust_remote_code)
    encoder = _load(identity, params.max_length if params.on_overlong == "truncate_prompt" else None)
    config = load_config(identity).get_text_config()
    require_embeddings(config, encoder.tokenizer, set(encoder.tokenizer.get_vocab().values()))
    require_context(params, _context_length(config, encoder.tokenizer))
    return encoder, identity


def load_classes(contract: dict[str, Any], source: dict[str, Any] | None = None) -> TextEncoder:
    """The encoder of a contract, or of a shipped model's `source`; TemplateError if base or tokenizer has changed."""
    encoder = _load(source or require_same_model(contract), contract["cut_at"])
    require_same_contract(encoder.contract(contract["model"]), contract, "of the dataset; run `dvc repro prepare`")
    return encoder


def order_classes(train: Counter[str], other: Counter[str]) -> list[str]:
    """The classes in the order of their label ids: numbers by value, then names by alphabet.

    `train` and `other` count each class's rows, in the training split and in the others; raises ClassError.
    """
    if not 2 <= len(train) <= MAX_CLASSES:
        names = ", ".join(sorted(train)[:5])
        raise ClassError(f"the training rows have {len(train):,} classes ({names}); expected 2 to {MAX_CLASSES:,}")
    if missing := sorted(other.keys() - train.keys()):
        similar = {name.casefold(): f"; differs from {name} only in case" for name in train}
        named = [f"{name} ({counted(other[name], 'row')}{similar.get(name.casefold(), '')})" for name in missing]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ClassError(
            f"the training rows lack {counted(len(missing), 'class')} of the test and validation rows: "
            f"{', '.join(named[:SHOWN])}{more}; add rows of each, or rename or remove its rows"
        )
    return sorted(train, key=lambda name: (int(name), "") if name.isdecimal() else (1 << 62, name))


def _load(source: dict[str, Any], cut_at: int | None) -> TextEncoder:
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise TemplateError(
                f"the tokenizer of {source['name_or_path']} has no padding token and no end token; batches need one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return TextEncoder(tokenizer, cut_at)


def _context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in SHIFTED:
        limit -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    return int(min(limit, tokenizer.model_max_length))
