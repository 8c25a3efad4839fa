"""Conversations to tokens and labels, by one chat template for training, evaluation and serving alike.

Each trained answer stands behind the tokens of the prompt that a server would send, and is tokenised by itself, as a
model writes it. A template that rewrites earlier turns makes several rows of one conversation: one an answer.
"""

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.chat import Message
from pipeline.chat.rendering import Renderer, RowError, Tools, with_objects
from pipeline.chat.tokens import HIDDEN, Text, TokenEncoder
from pipeline.chat.turns import PLACE, Turn, TurnWriter, left_out
from pipeline.core.files import sha256_json

Conversation = tuple[list[Message], str | None]  # messages, and the tools on offer as JSON

ESCAPED = "control tokens in its text escaped"
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
LONGEST_CUE = 100  # characters of a text between contents that is worth remembering
LEFT_OUT = "a part of it left out by the chat template"

_CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "clock", "arguments": {"city": "北京", "utc": True}},
}
_TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}},
}


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
class _Rendered:
    rows: list[list[Turn]]  # in each, every turn's prompt begins with all that stands before it in the row
    escaped: bool
    repairs: tuple[str, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """May be pickled to worker processes."""

    tokenizer: PreTrainedTokenizerBase
    text: str  # Jinja
    stop_ids: frozenset[int]  # tokens that end a turn
    train_on: str = "all_responses"
    on_control_tokens: str = "escape"
    name: str | None = None  # of a named template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None  # YYYY-MM-DD, of a template that prints it
    reasoning: str = "drop"  # drop | inline | refuse reasoning that the template has no place for
    on_left_out: str = "drop"  # drop | keep a row of which the template leaves out a part

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a compiled template stays here

    def served_text(self) -> str:
        """The template as it ships: with its arguments and its date inside, so that every server renders what was
        trained without being told them."""
        values = "".join(f"{{%- set {key} = {value!r} -%}}" for key, value in self.chat_template_kwargs.items())
        if self.date is None:
            return values + self.text
        day = datetime.date.fromisoformat(self.date)
        return values + CLOCK.sub(lambda match: json.dumps(day.strftime(match[2])), self.text)

    def render(self, messages: list[Message], tools: str | None = None, add_generation_prompt: bool = False) -> str:
        """`messages` as the model reads them.

        Raises:
            RowError: see `encode`.
            TemplateError: the template is not Jinja or breaks out of its sandbox.
        """
        ready, offered, escaped = self._ready(messages, tools)
        return self._show(self._renderer.render(ready, offered, add_generation_prompt), escaped).text

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        """`messages` up to where the assistant's answer begins: the text, and its tokens (T,)."""
        ready, offered, escaped = self._ready(messages, tools)
        text = self._show(self._renderer.render(ready, offered, add_generation_prompt=True), escaped)
        return text.text, self._ids(text)

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
        [encoded] = self.encode_batch([(messages, tools)])
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """`encode` of every conversation, in order, with its `RowError` where that is raised; much faster."""
        rendered = [self._rendered(messages, tools) for messages, tools in conversations]
        texts: list[Text] = []
        for conversation in rendered:
            if isinstance(conversation, _Rendered):
                texts += [text for row in conversation.rows for text in self._texts(row, conversation.escaped)]
        tokens = iter(self._encoder.encode_batch(texts))
        return [r if isinstance(r, RowError) else self._encoded(r, tokens) for r in rendered]

    def encode_text(self, text: str) -> Encoded:
        """Tokens of plain text, without any template around it, and the end token; all of them trained.

        Raises:
            RowError: control tokens in the text, with `on_control_tokens: drop`.
        """
        hidden = self._encoder.hide(text, answer=True)
        escaped = hidden != text
        if escaped and self.on_control_tokens == "drop":
            raise RowError(f"contains the model's control token {self._encoder.first_hidden(hidden)}")
        ids = [*self._ids(self._show(hidden, escaped)), self.end_id]
        return Encoded(ids, list(ids), (ESCAPED,) if escaped else ())

    def golden(self, conversations: Sequence[Conversation] | None = None) -> list[dict[str, Any]]:
        """Tokens and labels of fixed conversations: the contract's fingerprint of rendering and tokenising.

        Without `conversations`: one turn, two turns, a system message, tools with a call, and an injected control
        token. Of those that the template refuses, `input_ids` and `labels` are null. `earlier` has the rows of earlier
        answers, where the template rewrites them.
        """
        if conversations is None:
            conversations = [(messages, None) for messages in self._golden_messages()]
            conversations.insert(3, (_golden_call(), json.dumps([_TOOL])))
        golden: list[dict[str, Any]] = []
        for (messages, tools), encoded in zip(conversations, self.encode_batch(conversations), strict=True):
            entry: dict[str, Any] = {"messages": messages, "tools": tools, "input_ids": None, "labels": None}
            if isinstance(encoded, Encoded):
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
            "train_on": self.train_on,
            "on_control_tokens": self.on_control_tokens,
            "chat_template_kwargs": self.chat_template_kwargs,
            "chat_template_date": self.date,
            "reasoning": self.reasoning,
            "on_left_out": self.on_left_out,
            "golden": self.golden(golden),
        }

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.text, self.tokenizer.special_tokens_map, self.chat_template_kwargs, self.date)

    @cached_property
    def _encoder(self) -> TokenEncoder:
        return TokenEncoder(self.tokenizer, self.text, self.stop_ids)

    @cached_property
    def _writer(self) -> TurnWriter:
        return TurnWriter(self._renderer, self._stops, self._token(self.end_id), self.reasoning)

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        return tuple(map(self._token, sorted(self.stop_ids)))

    @property
    def end_id(self) -> int:
        """The token that ends a text of which no template says how it ends."""
        end = self.tokenizer.eos_token_id
        return int(end) if end is not None else min(self.stop_ids)

    def written_ends(self) -> set[int]:
        """The control token that the template writes right behind an answer: it ends a turn, though a base that was
        never tuned may not name it."""
        try:
            rendered = self.render(_talk("Hello", PLACE))
        except RowError:
            return set()
        rest = rendered.partition(PLACE)[2].strip()
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {id for id, token in tokens if token.special and str(token) and rest.startswith(str(token))}

    @cached_property
    def _cue(self) -> str:
        """What prompts mostly end with, from its last added token on; empty if there is none."""
        try:
            prompt = self.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except RowError:
            return ""
        return self._encoder.since_last_added(prompt) or ""

    def _token(self, id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(id))

    def _ids(self, text: Text) -> list[int]:
        [ids] = self._encoder.encode_batch([text])
        if isinstance(ids, RowError):
            raise ids
        return ids

    def _golden_messages(self) -> list[list[Message]]:
        return [
            _talk("Hello", "Good day."),
            _talk("1 + 1 = ?\n", "2", "再见", "再见。"),
            [{"role": "system", "content": "Be brief."}, *_talk("Hello", "Hi.")],
            _talk(f"What does {self._stops[0]} mean?", f"{self._stops[0]} ends a turn."),
        ]

    def _ready(self, messages: list[Message], tools: str | None) -> tuple[list[Message], Tools | None, bool]:
        """Messages and tools as the renderer takes them, and whether control tokens are hidden in them."""
        hidden = self._encoder.hide_messages(with_objects(messages))
        offered = None
        if tools is not None:
            offered = self._encoder.hide(_parsed(tools))
        token = None
        if hidden is not messages or offered is not None:
            token = self._encoder.first_hidden([hidden, offered])
        if token is not None and self.on_control_tokens == "drop":
            raise RowError(f"contains the model's control token {token}")
        return *self._renderer.adapt(hidden, offered), token is not None

    def _show(self, rendered: str, escaped: bool) -> Text:
        return self._encoder.show(rendered) if escaped else Text(rendered, rendered, False)

    def _rendered(self, messages: list[Message], tools: str | None) -> _Rendered | RowError:
        try:
            ready, offered, escaped = self._ready(messages, tools)
            turns = [self._writer.turn(ready, offered, index) for index in self._trained(messages, ready)]
            last = turns[-1]
            lost = left_out(ready[: last.index + 1], last.prompt + last.answer)
            if lost is not None and self.on_left_out == "drop":
                raise RowError(f"has {lost} that the chat template leaves out (prepare.on_left_out)")
            rows: list[list[Turn]] = []
            for turn in turns:
                before = self._writer.as_continued(rows[-1][-1], turn.prompt) if rows else None
                rows = [*rows[:-1], [*rows[-1][:-1], before, turn]] if before else [*rows, [turn]]
            repairs = dict.fromkeys(repair for turn in turns for repair in turn.repairs)
            marks = [ESCAPED] * escaped + ([LEFT_OUT] if lost is not None else [])
            return _Rendered(rows, escaped, (*marks, *repairs))
        except RowError as error:
            return error

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

    def _texts(self, row: list[Turn], escaped: bool) -> Iterator[Text]:
        """Of each turn what is new in its prompt, behind the end of the turn before, and its answer behind the cue."""
        for before, turn in zip([None, *row], row, strict=False):
            prompt = turn.prompt
            if before is not None:
                end = len(before.prompt) + len(before.answer)
                prompt = self._end_of(before.answer) + prompt[end:]
            yield self._show(prompt, escaped)
            yield self._show(self._tail(turn) + turn.answer, escaped)

    def _encoded(self, conversation: _Rendered, tokens: Iterator[list[int] | RowError]) -> Encoded | RowError:
        """One row of tokens for each row of text, or more: a turn starts another row where its prompt as a whole has
        other tokens than what is trained before it."""
        done: list[Encoded] = []
        failed: RowError | None = None
        for row in conversation.rows:
            ids: list[int] = []
            labels: list[int] = []
            for number, turn in enumerate(row):
                prompt, joined = next(tokens), next(tokens)
                try:
                    answer, alike = self._answer_ids(turn, joined, conversation.escaped)
                    if isinstance(prompt, RowError):
                        raise prompt
                    if ids:
                        prompt = prompt[1:]  # the end of the turn before
                    elif number:
                        prompt = self._ids(self._show(turn.prompt, conversation.escaped))
                except RowError as error:
                    failed = error
                    continue
                ids += [*prompt, *answer]
                labels += [*([-100] * len(prompt)), *answer]
                if not alike or number + 1 == len(row):
                    rest = self._rest_ids(turn)
                    done.append(Encoded([*ids, *rest], [*labels, *([-100] * len(rest))]))
                    ids, labels = [], []
        if failed is not None:
            return failed
        if len(done) == 1 and not conversation.repairs:
            return done[0]
        return replace(done[-1], repairs=conversation.repairs, earlier=tuple(done[:-1]))

    def _answer_ids(self, turn: Turn, joined: list[int] | RowError, escaped: bool) -> tuple[list[int], bool]:
        """The tokens of an answer as a model writes them, and whether they are those of prompt and answer as one text.

        `joined` are the tokens of the answer behind the prompt's tail.
        """
        if isinstance(joined, RowError):
            raise joined
        tail = self._tail_ids(self._tail(turn))
        alike = joined[: len(tail)] == tail
        answer = joined[len(tail) :] if alike else self._encoder.continuation(self._show(turn.answer, escaped))
        if isinstance(answer, RowError):
            raise answer
        if not answer or answer[-1] not in self.stop_ids:
            raise RowError("has an answer that does not end with an end token of its own")
        return answer, alike

    def _rest_ids(self, turn: Turn) -> list[int]:
        if not turn.rest:
            return []
        return self._tail_ids(self._end_of(turn.answer) + turn.rest)[1:]

    def _tail_ids(self, text: str) -> list[int]:
        """Tokens of what the template writes between contents: mostly the same few texts."""
        if text not in self._known:
            ids = self._ids(self._show(text, HIDDEN in text))
            if len(text) > LONGEST_CUE:
                return ids
            self._known[text] = ids
        return self._known[text]

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def _tail(self, turn: Turn) -> str:
        """The end of a prompt, from an added token on: nothing before that decides how an answer is tokenised."""
        return self._cue if self._cue and turn.prompt.endswith(self._cue) else turn.prompt

    def _end_of(self, answer: str) -> str:
        return max((stop for stop in self._stops if answer.endswith(stop)), key=len)


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


def _golden_call() -> list[Message]:
    return [
        {"role": "user", "content": "What time is it in Beijing?"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "clock", "tool_call_id": "call00001", "content": "08:00"},
        {"role": "assistant", "content": "08:00."},
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    # Truncation and padding are run-time settings that calls leave behind in the Rust object; they are not identity.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return sha256_json(state)
