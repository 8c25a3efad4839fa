"""Tokenises rendered conversations so that a control token in a message stays text.

Before rendering, each control token in a message is replaced by a mark of noncharacters. Control tokens found after
rendering were written by the template and get another kind of mark; the first marks become text again. A copy of the
tokenizer knows its control tokens by their marks only, and splits and merges everything else as before.
"""

import json
import re
from collections.abc import Set
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.chat.rendering import RowError
from pipeline.chat.turns import PLACEHOLDER

HIDDEN, WRITTEN, END = "\ufdd0", "\ufdd1", "\ufdd2"  # begin a mark for a message's or a template's token; end a mark
NONCHARACTERS = re.compile(f"[{HIDDEN}{WRITTEN}{END}{PLACEHOLDER}]")
HIDDEN_TOKEN = re.compile(f"{HIDDEN}([0-9]+){END}")
PART_OF_MARK = re.compile(f"[{HIDDEN}{WRITTEN}{END}]|" + r"\\ufdd[0-2]")  # also as JSON may escape it


class TokenEncoder:
    """The fast tokenizer without the special tokens, truncation and padding that it would add itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, stop_ids: Set[int]) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        # Not all_special_tokens, which lacks special tokens of tokenizer.json that have no role such as eos_token.
        special = {str(token): number for number, token in added.items() if token.special or number in stop_ids}
        # The model itself writes tokens like <tool_call>: they are ordinary in an answer, control tokens elsewhere.
        in_template = {str(token): number for number, token in added.items() if str(token) in template}
        self._id = special | in_template
        self._text = {number: token for token, number in self._id.items()}
        self._special, self._control = _any_of(special), _any_of(self._id)
        # A `normalized` token is matched after normalising, which may produce it from other characters (NFKC: ＜s＞).
        normalises = any(token.normalized for token in added.values() if str(token) in self._id)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if normalises else None
        self._unknown = tokenizer.unk_token_id  # any text may become it
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _marked(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy of the tokenizer that knows its control tokens by their marks, and its differing ids → the original's.

        The vocabulary is renamed too, because a model that looks up whole words would find a control token there.
        """
        state = json.loads(self._plain.to_str())
        mark = {token: f"{WRITTEN}{number}{END}" for token, number in self._id.items()}
        for token in state["added_tokens"]:
            if token["content"] in mark:
                token |= {"content": mark[token["content"]], "normalized": False}
        model = state["model"]
        # A token that merges can produce keeps its name; if it comes up, `ids` refuses the row.
        merged = {
            "".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", [])
        }
        rename = {token: name for token, name in mark.items() if token not in merged}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in rename:
            model["unk_token"] = rename[model["unk_token"]]
        tokenizer = Tokenizer.from_str(json.dumps(state))
        # The copy renumbers added tokens outside the vocabulary without gaps, so their ids may differ.
        new_ids = {tokenizer.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}
        return tokenizer, {new: old for new, old in new_ids.items() if new is not None and new != old}

    def hide(self, value: Any, answer: bool = False) -> Any:
        """`value` (text, or lists and objects of texts) with a mark in place of each control token.

        In the assistant's text (`answer`), words such as <tool_call> are ordinary. Raises RowError.
        """
        if isinstance(value, dict):
            return {self.hide(key, answer): self.hide(item, answer) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, answer) for item in value]
        if not isinstance(value, str):
            return value
        if noncharacter := NONCHARACTERS.search(value):
            raise RowError(f"contains the noncharacter U+{ord(noncharacter[0]):04X}; remove it from the text")
        control = self._special if answer else self._control
        hidden = control.sub(lambda token: f"{HIDDEN}{self._id[token[0]]}{END}", value)
        if self._normalizer is not None and control.search(self._normalizer.normalize_str(hidden)):
            raise RowError("contains characters that this tokenizer normalises to a control token")
        return hidden

    def text(self, rendered: str) -> str:
        """Rendered text with hidden control tokens as text again; RowError if the template changed a mark."""
        text = HIDDEN_TOKEN.sub(lambda mark: self._text[int(mark[1])], rendered)
        if PART_OF_MARK.search(text):
            raise RowError("contains a control token that the chat template rewrites")
        return text

    def ids(self, rendered: str) -> list[int]:
        """The tokens (T,) of rendered text; RowError as `text`, or if a control token in a message cannot be text."""
        if not PART_OF_MARK.search(rendered):
            return list(self._plain.encode(rendered, add_special_tokens=False).ids)
        self.text(rendered)
        marked = self._control.sub(lambda token: f"{WRITTEN}{self._id[token[0]]}{END}", rendered)
        marked = HIDDEN_TOKEN.sub(lambda mark: self._text[int(mark[1])], marked)
        tokenizer, original = self._marked
        ids = [original.get(number, number) for number in tokenizer.encode(marked, add_special_tokens=False).ids]
        if sum(number in self._text and number != self._unknown for number in ids) != marked.count(WRITTEN):
            raise RowError("contains a control token that this tokenizer cannot write as ordinary text")
        return ids

    def continued(self, rendered: str) -> list[int]:
        """`ids` of text that continues other text: without the space that tokenizers add at the beginning."""
        line_end, joined = self.ids("\n"), self.ids(f"\n{rendered}")
        return joined[len(line_end) :] if joined[: len(line_end)] == line_end else self.ids(rendered)


def _any_of(tokens: dict[str, int]) -> re.Pattern[str]:
    """A pattern for any of `tokens`, the longest first, as the tokenizer matches them."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
