"""Turns conversations into tokens and labels, with one chat template for training, evaluation and serving.

Each trained answer follows exactly the tokens of the prompt that a server would send, and is tokenised separately, as a
model generates it. If the template rewrites earlier turns, one conversation becomes several rows.
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

from pipeline.chat import Message, alternating
from pipeline.chat.rendering import Renderer, RowError, Tools, with_arguments
from pipeline.chat.tokens import HIDDEN_TOKEN, TokenEncoder
from pipeline.chat.turns import PROBE_ANSWER, Turn, TurnWriter, left_out
from pipeline.core.files import sha256_json

Conversation = tuple[list[Message], str | None]  # messages, and the offered tools as JSON

# Fields that the prepare parameters, the contract and ChatTemplate have in common.
SETTINGS = ("train_on", "on_control_tokens", "chat_template_kwargs", "chat_template_date", "reasoning", "on_left_out")
ESCAPED = "control tokens in its text escaped"
LEFT_OUT = "a part of it left out by the chat template"
STRFTIME_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class Encoded:
    """A conversation as a training row."""

    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,) the token if it is trained, else -100
    repairs: tuple[str, ...] = ()  # changes to the row, as the data report names them
    earlier: tuple["Encoded", ...] = ()  # rows of earlier answers, if the template rewrites earlier turns

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
    chat_template_date: str | None = None  # YYYY-MM-DD, for a template that prints the date
    reasoning: str = "drop"  # drop | inline | refuse reasoning that the template cannot write
    on_left_out: str = "drop"  # drop | keep a row if the template leaves out a part of it

    def served_text(self) -> str:
        """The template as it ships, with its arguments, its date and the prelude of `Renderer` built in."""
        text = self.text
        if self.chat_template_date is not None:
            day = datetime.date.fromisoformat(self.chat_template_date)
            text = STRFTIME_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), text)
        assignments = (f"{{%- set {key} = {value!r} -%}}" for key, value in self.chat_template_kwargs.items())
        return "".join([*assignments, self.renderer.prelude, text])

    def render(self, messages: list[Message], tools: str | None = None, add_generation_prompt: bool = False) -> str:
        """The text that the model reads; raises what `encode` raises."""
        return self._encoder.text(self.renderer.render(*self._adapt(messages, tools)[:2], add_generation_prompt))

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        """`messages` up to where the assistant's answer begins: the text, and its tokens (T,)."""
        rendered = self.renderer.render(*self._adapt(messages, tools)[:2], add_generation_prompt=True)
        return self._encoder.text(rendered), self._encoder.ids(rendered)

    def prompt_ids(self, messages: list[Message], tools: str | None = None) -> list[int]:
        return self.prompt(messages, tools)[1]

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens and labels of a conversation. Answers are trained, each with its end token, unless `weight` is 0.

        Raises:
            RowError: the conversation cannot be written or has nothing to train on, or a setting refuses what it has.
            TemplateError: the template does something that its sandbox forbids.
        """
        adapted, offered, escaped = self._adapt(messages, tools)
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        answers = [index for index, message in enumerate(adapted) if message["role"] == "assistant"]
        pairs = list(zip(answers, weights, strict=True))[-1 if self.train_on == "last_response" else 0 :]
        turns = [self._writer.turn(adapted, offered, index) for index, weight in pairs if weight]
        if not turns:
            raise RowError("has no answer to train on")
        last = turns[-1]
        missing = left_out(adapted[: last.index + 1], last.prompt + last.answer)
        if missing is not None and self.on_left_out == "drop":
            raise RowError(f"has {missing} that the chat template leaves out (prepare.on_left_out)")
        repairs = [ESCAPED] * escaped + [LEFT_OUT] * (missing is not None)
        repairs += dict.fromkeys(repair for turn in turns for repair in turn.repairs)
        *earlier, row = self._rows(turns)
        return replace(row, repairs=tuple(repairs), earlier=tuple(earlier))

    def golden(self, conversations: Sequence[Conversation] | None = None) -> list[dict[str, Any]]:
        """Tokens and labels (null if refused) of fixed conversations: a fingerprint of rendering and tokenising."""
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
        """What later stages must find unchanged; `model` comes from `model_identity`, and `prepare` adds facts."""
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

    def find_end_tokens(self) -> set[int]:
        """The control token that the template writes right after an answer; an untuned base may not declare it."""
        after = self.renderer.attempt(alternating("Hello", PROBE_ANSWER)).partition(PROBE_ANSWER)[2].strip()
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {number for number, token in tokens if token.special and str(token) and after.startswith(str(token))}

    @cached_property
    def renderer(self) -> Renderer:
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
        return TurnWriter(self.renderer, self._stops, end, self.reasoning)

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        return tuple(map(self._token, sorted(self.stop_ids)))

    def _token(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def _adapt(self, messages: list[Message], tools: str | None) -> tuple[list[Message], Tools | None, bool]:
        """Messages and tools as the renderer takes them, and whether control tokens were hidden in them."""
        try:
            parsed = None if tools is None else json.loads(tools)
        except ValueError:
            raise RowError("has tools that are not JSON") from None
        parsed = [parsed] if isinstance(parsed, dict) else parsed
        if not isinstance(parsed, list | None) or not all(isinstance(tool, dict) for tool in parsed or ()):
            raise RowError("has tools that are not a list of objects")
        # With arguments as objects, no control token hides in JSON escapes.
        plain = [with_arguments(message) if "tool_calls" in message else message for message in messages]
        hide = self._encoder.hide
        hidden = [hide(message, message["role"] == "assistant") | {"role": message["role"]} for message in plain]
        offered = hide(parsed)
        escaped = hidden != plain or offered != parsed
        if escaped and self.on_control_tokens == "drop":
            first = next(HIDDEN_TOKEN.finditer(json.dumps([hidden, offered], ensure_ascii=False)))
            raise RowError(f"contains the model's control token {self._encoder.text(first[0])}")
        return *self.renderer.adapt(hidden, offered), escaped

    def _rows(self, turns: list[Turn]) -> list[Encoded]:
        """Training rows: a turn extends the last row if its prompt begins with that row's tokens, else begins one."""
        rows: list[tuple[list[int], list[int], str]] = []  # tokens, labels, untrained text after them
        text = ""  # already tokenised
        ids: list[int] = []  # of `text`
        for turn in turns:
            if not turn.prompt.startswith(text):
                text, ids = "", []
            new_text = turn.prompt[len(text) :]
            if ids:
                new_text = self._token(ids[-1]) + new_text
            prompt, answer, same_as_joined = self._ids(new_text, turn.answer)
            if not answer or answer[-1] not in self.stop_ids:
                raise RowError("has an answer that does not end with an end token of its own")
            prompt = [*ids, *prompt[1:]] if ids else prompt
            text, ids = (turn.prompt + turn.answer, [*prompt, *answer]) if same_as_joined else ("", [])
            labels = self._labels_of_start(prompt, *rows[-1][:2]) if rows else []
            if labels:
                rows.pop()
            untrained = [-100] * (len(prompt) - len(labels))
            rows.append(([*prompt, *answer], [*labels, *untrained, *answer], turn.rest))
        encoded = []
        for ids, labels, rest in rows:
            rest_ids = self._encoder.ids(self._token(ids[-1]) + rest)[1:] if rest else []
            encoded.append(Encoded([*ids, *rest_ids], [*labels, *[-100] * len(rest_ids)]))
        return encoded

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int], bool]:
        """Tokens of a prompt and of its answer, and whether both as one text have the same tokens."""
        ids, joined = self._encoder.ids(prompt), self._encoder.ids(prompt + answer)
        if joined[: len(ids)] == ids:
            return ids, joined[len(ids) :], True
        return ids, self._encoder.continued(answer), False

    def _labels_of_start(self, prompt: list[int], ids: list[int], labels: list[int]) -> list[int]:
        """Labels of the row `ids` if `prompt` begins with it, else [].

        The last token may be another end token: ChatGLM3 ends the last turn with one, and others by the next header.
        """
        end = len(ids) - 1
        if len(prompt) <= end or prompt[:end] != ids[:end] or prompt[end] not in self.stop_ids:
            return []
        return [*labels[:end], prompt[end]]


def _golden_conversations(stop: str) -> list[Conversation]:
    call = {"name": "clock", "arguments": {"city": "北京", "utc": True}}
    tool = {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}}
    with_call = alternating("What time is it in Beijing?", "", "", "08:00.")
    with_call[1] |= {"tool_calls": [{"id": "call00001", "type": "function", "function": call}]}
    with_call[2] = {"role": "tool", "name": "clock", "tool_call_id": "call00001", "content": "08:00"}
    return [
        (alternating("Hello", "Good day."), None),
        (alternating("1 + 1 = ?\n", "2", "再见", "再见。"), None),
        ([{"role": "system", "content": "Be brief."}, *alternating("Hello", "Hi.")], None),
        (with_call, json.dumps([{"type": "function", "function": tool}])),
        (alternating(f"What does {stop} mean?", f"{stop} ends a turn."), None),
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the fast tokenizer without truncation and padding, which calls leave behind in the Rust object."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return sha256_json({key: value for key, value in state.items() if key not in ("truncation", "padding")})
