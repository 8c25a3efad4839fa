"""Conversations to tokens and labels, by one chat template for training, evaluation and serving alike.

Each trained answer stands behind the tokens of the prompt that a server would send, and is tokenised by itself, as a
model writes it. A template that rewrites earlier turns makes several rows of one conversation: one an answer.
"""

import datetime
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.rendering import Renderer, RowError, Tools, with_objects
from pipeline.chat.tokens import TokenEncoder
from pipeline.chat.turns import PROBE_ANSWER, Turn, TurnWriter, left_out
from pipeline.core.files import sha256_json

Conversation = tuple[list[Message], str | None]  # messages, and the tools on offer as JSON

# What parameters, contracts and templates share.
SETTINGS = ("train_on", "on_control_tokens", "chat_template_kwargs", "chat_template_date", "reasoning", "on_left_out")
ESCAPED = "control tokens in its text escaped"
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
LEFT_OUT = "a part of it left out by the chat template"


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,) the token where it is trained, -100 where it is not
    repairs: tuple[str, ...] = ()  # what was done to the row, in the words of the data report
    earlier: tuple["Encoded", ...] = ()  # rows of the answers before, where the template rewrites earlier turns

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in (self, *self.earlier))


@dataclass(frozen=True)
class ChatTemplate:
    tokenizer: PreTrainedTokenizerBase
    text: str  # Jinja
    stop_ids: frozenset[int]  # tokens that end a turn
    train_on: str = "all_responses"
    on_control_tokens: str = "escape"
    name: str | None = None  # of a named template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_date: str | None = None  # YYYY-MM-DD, of a template that prints it
    reasoning: str = "drop"  # drop | inline | refuse reasoning that the template has no place for
    on_left_out: str = "drop"  # drop | keep a row of which the template leaves out a part

    def served_text(self) -> str:
        """The template as it ships: with its arguments and its date inside, so that every server renders what was
        trained without being told them."""
        values = "".join(f"{{%- set {key} = {value!r} -%}}" for key, value in self.chat_template_kwargs.items())
        if self.chat_template_date is None:
            return values + self.text
        day = datetime.date.fromisoformat(self.chat_template_date)
        return values + CLOCK.sub(lambda match: json.dumps(day.strftime(match[2])), self.text)

    def render(self, messages: list[Message], tools: str | None = None, add_generation_prompt: bool = False) -> str:
        """`messages` as the model reads them.

        Raises:
            RowError: see `encode`.
            TemplateError: the template is not Jinja or breaks out of its sandbox.
        """
        return self._encoder.text(self._renderer.render(*self._ready(messages, tools)[:2], add_generation_prompt))

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        """`messages` up to where the assistant's answer begins: the text, and its tokens (T,)."""
        rendered = self._renderer.render(*self._ready(messages, tools)[:2], add_generation_prompt=True)
        return self._encoder.text(rendered), self._encoder.ids(rendered)

    def prompt_ids(self, messages: list[Message], tools: str | None = None) -> list[int]:
        return self.prompt(messages, tools)[1]

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens of a conversation and the labels of its trained turns, each turn's end token included.

        Tool calls are answers and trained; tool results are not, nor are answers with a `weight` of 0. A control token
        of the model in somebody's text is tokenised as text, or refused, as `on_control_tokens` says.

        Raises:
            RowError: nothing to train on, tools that are not a list of objects, something the template refuses or (with
                `on_left_out: drop`) leaves out, or (with `drop`) control tokens in a text.
            TemplateError: the template breaks out of its sandbox.
        """
        ready, offered, escaped = self._ready(messages, tools)
        turns = [self._writer.turn(ready, offered, index) for index in self._trained(messages, ready)]
        last = turns[-1]
        lost = left_out(ready[: last.index + 1], last.prompt + last.answer)
        if lost is not None and self.on_left_out == "drop":
            raise RowError(f"has {lost} that the chat template leaves out (prepare.on_left_out)")
        marks = [ESCAPED] * escaped + [LEFT_OUT] * (lost is not None)
        repairs = (*marks, *dict.fromkeys(repair for turn in turns for repair in turn.repairs))
        *earlier, row = self._rows(turns)
        return replace(row, repairs=repairs, earlier=tuple(earlier))

    def golden(self, conversations: Sequence[Conversation] | None = None) -> list[dict[str, Any]]:
        """Tokens and labels of fixed conversations: the contract's fingerprint of rendering and tokenising.

        Without `conversations`: one turn, two turns, a system message, tools with a call, and an injected control
        token. Of those that the template refuses, `input_ids` and `labels` are null. `earlier` has the rows of earlier
        answers, where the template rewrites them.
        """
        golden: list[dict[str, Any]] = []
        for messages, tools in conversations or _golden_conversations(self._stops[0]):
            entry: dict[str, Any] = {"messages": messages, "tools": tools, "input_ids": None, "labels": None}
            with suppress(RowError):
                encoded = self.encode(messages, tools)
                entry |= {"input_ids": encoded.input_ids, "labels": encoded.labels}
                if encoded.earlier:
                    entry["earlier"] = [[row.input_ids, row.labels] for row in encoded.earlier]
            golden.append(entry)
        return golden

    def contract(self, model: dict[str, Any], golden: Sequence[Conversation] | None = None) -> dict[str, Any]:
        """What a later stage must find unchanged. `model` is `model_identity`'s answer.

        `prepare` adds what it knows of the data: `max_length`, and `trained_fraction`, the part of the training
        split's tokens that carries loss.
        """
        return {
            "model": model,
            "chat_template": self.text,
            "chat_template_name": self.name,
            "chat_template_sha256": sha256_json(self.text),
            "tokenizer_sha256": tokenizer_digest(self.tokenizer),
            "stop_ids": sorted(self.stop_ids),
            "pad_id": self.tokenizer.pad_token_id,
            **{key: getattr(self, key) for key in SETTINGS},
            "golden": self.golden(golden),
        }

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(
            self.text, self.tokenizer.special_tokens_map, self.chat_template_kwargs, self.chat_template_date
        )

    @cached_property
    def _encoder(self) -> TokenEncoder:
        return TokenEncoder(self.tokenizer, self.text, self.stop_ids)

    @cached_property
    def _writer(self) -> TurnWriter:
        eos = self.tokenizer.eos_token_id
        end = self._token(min(self.stop_ids) if eos is None else eos)
        return TurnWriter(self._renderer, self._stops, end, self.reasoning)

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        return tuple(map(self._token, sorted(self.stop_ids)))

    def written_ends(self) -> set[int]:
        """The control token that the template writes right behind an answer: it ends a turn, though a base that was
        never tuned may not name it."""
        try:
            rendered = self.render(_talk("Hello", PROBE_ANSWER))
        except RowError:
            return set()
        rest = rendered.partition(PROBE_ANSWER)[2].strip()
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {id for id, token in tokens if token.special and str(token) and rest.startswith(str(token))}

    def _token(self, id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(id))

    def _ready(self, messages: list[Message], tools: str | None) -> tuple[list[Message], Tools | None, bool]:
        """Messages and tools as the renderer takes them, and whether control tokens are hidden in them."""
        plain, parsed = with_objects(messages), None if tools is None else _parsed(tools)
        hidden, offered = self._encoder.hide_messages(plain), self._encoder.hide(parsed)
        escaped = hidden != plain or offered != parsed
        if escaped and self.on_control_tokens == "drop":
            raise RowError(f"contains the model's control token {self._encoder.first_hidden([hidden, offered])}")
        return *self._renderer.adapt(hidden, offered), escaped

    def _trained(self, messages: list[Message], ready: list[Message]) -> list[int]:
        """The places in `ready` of the answers that carry loss."""
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        places = [i for i, message in enumerate(ready) if message["role"] == "assistant"]
        if self.train_on == "last_response":
            weights[:-1] = [0] * len(weights[:-1])
        trained = [place for place, weight in zip(places, weights, strict=True) if weight]
        if not trained:
            raise RowError("has no answer to train on")
        return trained

    def _rows(self, turns: list[Turn]) -> list[Encoded]:
        """A row goes on as long as the next prompt begins with its tokens; else another one begins."""
        rows: list[tuple[list[int], list[int], str]] = []  # tokens, labels, and what is not generated behind them
        text = ""  # what is tokenised already
        ids: list[int] = []
        for turn in turns:
            if not turn.prompt.startswith(text):
                text, ids = "", []
            new = turn.prompt[len(text) :]
            new = self._token(ids[-1]) + new if ids else new
            prompt, answer, alike = self._ids(new, turn.answer)
            if not answer or answer[-1] not in self.stop_ids:
                raise RowError("has an answer that does not end with an end token of its own")
            prompt = [*ids, *prompt[1:]] if ids else prompt
            text, ids = (turn.prompt + turn.answer, [*prompt, *answer]) if alike else ("", [])
            before = self._labels_before(prompt, *rows[-1][:2]) if rows else None
            if before is not None:
                rows.pop()
            untrained = [-100] * (len(prompt) - len(before or []))
            rows.append(([*prompt, *answer], [*(before or []), *untrained, *answer], turn.rest))
        encoded = []
        for ids, labels, rest in rows:
            more = self._encoder.ids(self._token(ids[-1]) + rest)[1:] if rest else []
            encoded.append(Encoded([*ids, *more], [*labels, *[-100] * len(more)]))
        return encoded

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int], bool]:
        """The tokens of a prompt and of its answer, and whether these are the tokens of both as one text."""
        ids, joined = self._encoder.ids(prompt), self._encoder.ids(prompt + answer)
        if joined[: len(ids)] == ids:
            return ids, joined[len(ids) :], True
        return ids, self._encoder.continued(answer), False

    def _labels_before(self, prompt: list[int], ids: list[int], labels: list[int]) -> list[int] | None:
        """The labels of the row `ids` where `prompt` begins with it, else None.

        A template may close the last turn with an end token and let the next header close the others (ChatGLM3).
        """
        end = len(ids) - 1
        if len(prompt) <= end or prompt[:end] != ids[:end] or prompt[end] not in self.stop_ids:
            return None
        return [*labels[:end], prompt[end]]


def _parsed(tools: str) -> Tools:
    try:
        parsed = json.loads(tools)
    except ValueError:
        raise RowError("has tools that are not JSON") from None
    parsed = [parsed] if isinstance(parsed, dict) else parsed
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise RowError("has tools that are not a list of objects")
    return parsed


def _talk(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _golden_conversations(stop: str) -> list[Conversation]:
    call = {"name": "clock", "arguments": {"city": "北京", "utc": True}}
    tool = {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}}
    with_call: list[Message] = _talk("What time is it in Beijing?", "", "", "08:00.")
    with_call[1] |= {"tool_calls": [{"id": "call00001", "type": "function", "function": call}]}
    with_call[2] = {"role": "tool", "name": "clock", "tool_call_id": "call00001", "content": "08:00"}
    return [
        (_talk("Hello", "Good day."), None),
        (_talk("1 + 1 = ?\n", "2", "再见", "再见。"), None),
        ([{"role": "system", "content": "Be brief."}, *_talk("Hello", "Hi.")], None),
        (with_call, json.dumps([{"type": "function", "function": tool}])),
        (_talk(f"What does {stop} mean?", f"{stop} ends a turn."), None),
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    # Truncation and padding are run-time settings that calls leave behind in the Rust object; they are not identity.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return sha256_json(state)
