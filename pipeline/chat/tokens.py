"""Rendered conversations to tokens, where a control token is one only if the template wrote it.

Tokens have their places in the rendered text. Text that holds this module's own marks is refused, and so is a
tokenizer that cannot write a control token as ordinary text.

How: a control token in somebody's text becomes a mark before the template sees it. After rendering, what still reads
as a control token is the template's, and becomes another mark, while the first marks become text again. A second copy
of the tokenizer knows its control tokens by those marks alone, so it cannot find one in text, and everything around it
is split and merged exactly as ever. Marks are made of noncharacters, which Unicode reserves for such use.
"""

import json
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Text:
    """Rendered text as its reader sees it, as the tokenizer's copy gets it, and whether these differ."""

    text: str
    marked: str
    escaped: bool


class TokenEncoder:
    """The fast tokenizer without what moves tokens or places (special tokens added, truncation, padding)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, stop_ids: Set[int]) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        # Not all_special_tokens: that lacks those that tokenizer.json marks as special and no role names.
        special = {str(token): number for number, token in added.items() if token.special or number in stop_ids}
        # Tokens like <tool_call> are ordinary in an answer, which the model writes itself, and control elsewhere.
        written = {str(token): number for number, token in added.items() if str(token) in template}
        self._special = _any_of(special)
        self._control = _any_of(special | written)
        self._first = sorted({token[0] for token in special | written} | {HIDDEN, SHOWN, END})
        self._id = special | written
        # Such a token is looked for after normalising, which may make it of other characters (NFKC: ＜s＞ is <s>).
        folded = any(token.normalized for token in added.values() if str(token) in self._id)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if folded else None
        self._unknown = tokenizer.unk_token_id  # what any text may become
        self._text = {number: token for token, number in self._id.items()}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(state))

        self._added = _any_of({str(token): number for number, token in added.items()})

    @cached_property
    def _marked(self) -> tuple[Tokenizer, dict[int, int]]:
        return _known_by_marks(json.loads(self._plain.to_str()), self._id)

    @cached_property
    def _continued(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(_without_prefix(json.loads(self._plain.to_str()))))

    @cached_property
    def _marked_continued(self) -> tuple[Tokenizer, dict[int, int]]:
        return _known_by_marks(_without_prefix(json.loads(self._plain.to_str())), self._id)

    def since_last_added(self, text: str) -> str | None:
        """`text` from its last added token on, which tokenizers split off first: what stands before has no effect."""
        places = [match.start() for match in self._added.finditer(text)]
        return text[places[-1] :] if places else None

    def hide(self, value: Any, answer: bool = False) -> Any:
        """`value` (text, or lists and objects of it) with every control token in it hidden; itself if there is none.

        Args:
            answer: the text is the assistant's own.

        Raises:
            RowError: noncharacters that this module uses as marks, or what normalising makes a control token of.
        """
        if isinstance(value, str):
            if not self._suspicious(value):
                return value
            if found := NONCHARACTERS.search(value):
                raise RowError(f"contains the noncharacter U+{ord(found[0]):04X}, which is not for text")
            control = self._special if answer else self._control
            hidden = control.sub(lambda m: f"{HIDDEN}{self._id[m[0]]}{END}", value)
            if self._normalizer is not None and control.search(self._normalizer.normalize_str(hidden)):
                raise RowError("contains what this tokenizer's normaliser makes a control token of")
            return hidden
        if isinstance(value, dict):
            return {self.hide(key, answer): self.hide(item, answer) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, answer) for item in value]
        return value

    def hide_messages(self, messages: list[Message]) -> list[Message]:
        """`messages` with every control token in their texts and calls hidden; themselves if there can be none."""
        if all(len(message) == 2 and not self._suspicious(message["content"]) for message in messages):
            return messages
        return [
            {
                key: item if key == "role" else self.hide(item, message["role"] == "assistant")
                for key, item in message.items()
            }
            for message in messages
        ]

    def _suspicious(self, text: str) -> bool:
        return self._normalizer is not None or any(map(text.__contains__, self._first))

    def first_hidden(self, values: Any) -> str | None:
        """The first control token that was hidden in `values`."""
        found = HIDDEN_TOKEN.search(json.dumps(values, ensure_ascii=False))
        return self._text[int(found[1])] if found else None

    def show(self, rendered: str) -> Text:
        """Rendered text that holds hidden control tokens, with these as text again.

        Raises:
            RowError: the template took a mark apart.
        """
        marked = self._control.sub(lambda m: f"{SHOWN}{self._id[m[0]]}{END}", rendered)
        marked, text = (HIDDEN_TOKEN.sub(lambda m: self._text[int(m[1])], t) for t in (marked, rendered))
        if NONCHARACTERS.search(text) or "\\ufdd" in text:
            raise RowError("contains a control token that the chat template rewrites")
        return Text(text, marked, escaped=True)

    def encode_batch(self, texts: Sequence[Text]) -> list[list[int] | RowError]:
        """For each text its token ids (T,)."""
        plain = iter(
            self._plain.encode_batch_fast([t.marked for t in texts if not t.escaped], add_special_tokens=False)
        )
        return [self._by_marks(t, *self._marked) if t.escaped else next(plain).ids for t in texts]

    def continuation(self, text: Text) -> list[int] | RowError:
        """Token ids (T,) of a text that others stand before: without the space that tokenizers put at a beginning."""
        if text.escaped:
            return self._by_marks(text, *self._marked_continued)
        return list(self._continued.encode(text.marked, add_special_tokens=False).ids)

    def _by_marks(self, text: Text, tokenizer: Tokenizer, original: dict[int, int]) -> list[int] | RowError:
        encoding = tokenizer.encode(text.marked, add_special_tokens=False)
        ids = [original.get(number, number) for number in encoding.ids]
        if sum(number in self._text and number != self._unknown for number in ids) != text.marked.count(SHOWN):
            return RowError("contains a control token that this tokenizer cannot write as ordinary text")
        return ids


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's `state` with nothing put before a text: no "▁" of SentencePiece, no space of GPT-2."""
    for name, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = state.get(name)
        if part is None:
            continue
        members = part[parts] if part["type"] == "Sequence" else [part]
        members = [member for member in members if member["type"] != "Prepend"]
        for member in members:
            if "prepend_scheme" in member:
                member["prepend_scheme"] = "never"
            if "add_prefix_space" in member:
                member["add_prefix_space"] = False
        state[name] = {"type": "Sequence", parts: members} if members else None
    return state


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
    # What merges make is a piece of ordinary text as well; `_by_marks` finds it in the result and refuses the row.
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
