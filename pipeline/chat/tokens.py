"""Rendered conversations to tokens, where a control token is one only if the template wrote it.

A control token in somebody's text becomes a mark before the template sees it. After rendering, what still reads as a
control token is the template's, and becomes another mark, while the first marks become text again. A second copy of
the tokenizer knows its control tokens by those marks alone, so it cannot find one in text, and everything around it is
split and merged exactly as ever. Marks are made of noncharacters, which Unicode reserves for such use.
"""

import json
import re
from collections.abc import Set
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.rendering import RowError
from pipeline.chat.turns import PLACE

HIDDEN, SHOWN, END = "\ufdd0", "\ufdd1", "\ufdd2"  # begin a hidden and a template's control token; end either
NONCHARACTERS = re.compile(f"[{HIDDEN}{SHOWN}{END}{PLACE}]")
HIDDEN_TOKEN = re.compile(f"{HIDDEN}([0-9]+){END}")
BROKEN = re.compile(f"[{HIDDEN}{SHOWN}{END}]|" + r"\\ufdd[0-2]")  # as JSON may write them, too


class TokenEncoder:
    """The fast tokenizer without special tokens of its own, truncation and padding, which would shift tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, stop_ids: Set[int]) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        # Not all_special_tokens: that lacks those that tokenizer.json marks as special and no role names.
        special = {str(token): number for number, token in added.items() if token.special or number in stop_ids}
        # Tokens like <tool_call> are ordinary in an answer, which the model writes itself, and control elsewhere.
        written = {str(token): number for number, token in added.items() if str(token) in template}
        self._id = special | written
        self._text = {number: token for token, number in self._id.items()}
        self._special, self._control = _any_of(special), _any_of(self._id)
        # Such a token is looked for after normalising, which may make it of other characters (NFKC: ＜s＞ is <s>).
        folded = any(token.normalized for token in added.values() if str(token) in self._id)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if folded else None
        self._unknown = tokenizer.unk_token_id  # what any text may become
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _marked(self) -> tuple[Tokenizer, dict[int, int]]:
        return _known_by_marks(json.loads(self._plain.to_str()), self._id)

    def hide(self, value: Any, answer: bool = False) -> Any:
        """`value` (text, or lists and objects of it) with every control token in it hidden.

        `answer` is for the assistant's own text. Noncharacters that this module uses as marks are a RowError, and so is
        what normalising makes a control token of.
        """
        if isinstance(value, dict):
            return {self.hide(key, answer): self.hide(item, answer) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, answer) for item in value]
        if not isinstance(value, str):
            return value
        if found := NONCHARACTERS.search(value):
            raise RowError(f"contains the noncharacter U+{ord(found[0]):04X}, which is not for text")
        control = self._special if answer else self._control
        hidden = control.sub(lambda m: f"{HIDDEN}{self._id[m[0]]}{END}", value)
        if self._normalizer is not None and control.search(self._normalizer.normalize_str(hidden)):
            raise RowError("contains what this tokenizer's normaliser makes a control token of")
        return hidden

    def hide_messages(self, messages: list[Message]) -> list[Message]:
        """`messages` with every control token in their texts and calls hidden."""
        return [self.hide(each, each["role"] == "assistant") | {"role": each["role"]} for each in messages]

    def first_hidden(self, values: Any) -> str | None:
        """The first control token that was hidden in `values`."""
        found = HIDDEN_TOKEN.search(json.dumps(values, ensure_ascii=False))
        return self._text[int(found[1])] if found else None

    def text(self, rendered: str) -> str:
        """Rendered text as its reader sees it; a RowError where the template took the mark of a hidden token apart."""
        text = HIDDEN_TOKEN.sub(lambda m: self._text[int(m[1])], rendered)
        if BROKEN.search(text):
            raise RowError("contains a control token that the chat template rewrites")
        return text

    def ids(self, rendered: str) -> list[int]:
        """The tokens (T,) of rendered text; a RowError as `text`, or where a control token cannot be ordinary text."""
        if not BROKEN.search(rendered):
            return list(self._plain.encode(rendered, add_special_tokens=False).ids)
        self.text(rendered)
        marked = self._control.sub(lambda m: f"{SHOWN}{self._id[m[0]]}{END}", rendered)
        marked = HIDDEN_TOKEN.sub(lambda m: self._text[int(m[1])], marked)
        tokenizer, original = self._marked
        ids = [original.get(id, id) for id in tokenizer.encode(marked, add_special_tokens=False).ids]
        if sum(id in self._text and id != self._unknown for id in ids) != marked.count(SHOWN):
            raise RowError("contains a control token that this tokenizer cannot write as ordinary text")
        return ids

    def continued(self, rendered: str) -> list[int]:
        """`ids` of text that other text stands before: without the space that tokenizers put at a beginning."""
        line_end, joined = self.ids("\n"), self.ids(f"\n{rendered}")
        return joined[len(line_end) :] if joined[: len(line_end)] == line_end else self.ids(rendered)


def _any_of(tokens: dict[str, int]) -> re.Pattern[str]:
    """Any of `tokens`, the longest first, as the tokenizer matches them."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _known_by_marks(state: dict[str, Any], control: dict[str, int]) -> tuple[Tokenizer, dict[int, int]]:
    """A copy of the tokenizer that knows its control tokens by their marks, and its ids → the original's.

    The vocabulary is renamed too: a model that looks whole words or pieces up would find a control token there.
    """
    mark = {token: f"{SHOWN}{number}{END}" for token, number in control.items()}
    for token in state["added_tokens"]:
        if token["content"] in mark:
            token |= {"content": mark[token["content"]], "normalized": False}
    model = state["model"]
    # A token that merges can produce keeps its name; `ids` finds it in the result and refuses the row.
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", [])}
    rename = {token: name for token, name in mark.items() if token not in merged}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in rename:
        model["unk_token"] = rename[model["unk_token"]]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    # Added tokens outside the vocabulary are numbered anew, in order: where the original has gaps, they shift.
    numbers = {token["content"]: token["id"] for token in state["added_tokens"]}
    new = {tokenizer.token_to_id(content): number for content, number in numbers.items()}
    return tokenizer, {found: number for found, number in new.items() if found is not None and found != number}
