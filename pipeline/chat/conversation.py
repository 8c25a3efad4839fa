"""Conversations to tokens and labels, by one chat template for training, evaluation and serving alike.

Comes in: messages and tools. Goes out: token ids, and labels that carry loss on answers and their end tokens alone.
Each answer is found by rendering the conversation up to it: what the generation prompt ends with is where it begins.
That holds for any template that only appends; one that rewrites earlier turns is refused, with the way out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from pipeline.chat.rendering import Renderer, RowError, TemplateError, Tools, bounded, with_objects
from pipeline.chat.tokens import Text, TokenEncoder
from pipeline.data.records import Message
from pipeline.files import sha256_json

Conversation = tuple[list[Message], str | None]  # messages, and the tools on offer as JSON

ESCAPED = "control tokens in its text escaped"
NOT_APPENDING = (
    "the chat template changes earlier turns when later ones follow, so what is trained is not what is served; set "
    "prepare.train_on to last_response, or prepare.chat_template to one that appends"
)

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


@dataclass(frozen=True)
class _Rendered:
    text: Text
    spans: list[tuple[int, int]]  # of the trained turns, in characters of text.marked


@dataclass(frozen=True)
class ChatTemplate:
    """May be pickled to worker processes."""

    tokenizer: PreTrainedTokenizerBase
    text: str  # Jinja
    stop_ids: frozenset[int]  # tokens that end a turn
    train_on: str = "all_responses"
    on_control_tokens: str = "escape"
    name: str | None = None  # of a named template

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a compiled template stays here

    def render(self, messages: list[Message], tools: str | None = None, add_generation_prompt: bool = False) -> str:
        """`messages` as the model reads them.

        Raises:
            RowError: see `encode`.
            TemplateError: the template is not Jinja, breaks out of its sandbox or runs away.
        """
        with bounded(1):
            ready, offered, escaped = self._ready(messages, tools)
            return self._show(self._renderer.render(ready, offered, add_generation_prompt), escaped).text

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        """`messages` up to where the assistant's answer begins: the text, and its tokens (T,)."""
        with bounded(1):
            ready, offered, escaped = self._ready(messages, tools)
            text = self._show(self._renderer.render(ready, offered, add_generation_prompt=True), escaped)
        [tokens] = self._encoder.encode_batch([text])
        if isinstance(tokens, RowError):
            raise tokens
        return text.text, tokens[0]

    def prompt_ids(self, messages: list[Message], tools: str | None = None) -> list[int]:
        return self.prompt(messages, tools)[1]

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens of a conversation and the labels of its trained turns, each turn's end token included.

        Tool calls are answers and trained; tool results are not. A control token of the model in somebody's text is
        tokenised as text, or refused, as `on_control_tokens` says.

        Raises:
            RowError: nothing to train on, an answer that does not begin on a token of its own, tools that are not a
                list of objects, something the template refuses, or (with `drop`) control tokens in a text.
            TemplateError: the template rewrites earlier turns or never ends a turn.
        """
        [encoded] = self.encode_batch([(messages, tools)])
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """`encode` of every conversation, in order, with its `RowError` where that is raised; much faster."""
        with bounded(sum(len(messages) for messages, _ in conversations)):
            rendered = [self._rendered(messages, tools) for messages, tools in conversations]
        tokens = iter(self._encoder.encode_batch([r.text for r in rendered if isinstance(r, _Rendered)]))
        return [r if isinstance(r, RowError) else self._labelled(r, next(tokens)) for r in rendered]

    def encode_text(self, text: str) -> Encoded:
        """Tokens of plain text, without any template around it, and the end token; all of them trained.

        Raises:
            RowError: control tokens in the text, with `on_control_tokens: drop`.
        """
        hidden = self._encoder.hide(text, answer=True)
        escaped = hidden != text
        if escaped and self.on_control_tokens == "drop":
            raise RowError(f"contains the model's control token {self._encoder.first_hidden(hidden)}")
        [tokens] = self._encoder.encode_batch([self._show(hidden, escaped)])
        if isinstance(tokens, RowError):
            raise tokens
        end = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.stop_ids)
        ids = [*tokens[0], end]
        return Encoded(ids, list(ids), (ESCAPED,) if escaped else ())

    def require_trainable(self) -> None:
        """Refuse what would make every row useless.

        Raises:
            TemplateError: the template does not append, ends no turn, or refuses a plain question with its answer.
        """
        golden = self.golden()
        if golden[0]["input_ids"] is None:
            try:
                self.encode(golden[0]["messages"])
            except RowError as error:
                raise TemplateError(f"with this chat template, every row {error}") from None

    def golden(self, conversations: Sequence[Conversation] | None = None) -> list[dict[str, Any]]:
        """Tokens and labels of fixed conversations: the contract's fingerprint of rendering and tokenising.

        Without `conversations`: one turn, two turns, a system message, tools with a call, and an injected control
        token. Of those that the template refuses, `input_ids` and `labels` are null.
        """
        if conversations is None:
            conversations = [(messages, None) for messages in self._golden_messages()]
            conversations.insert(3, (_golden_call(), json.dumps([_TOOL])))
        golden: list[dict[str, Any]] = []
        for (messages, tools), encoded in zip(conversations, self.encode_batch(conversations), strict=True):
            tokens = (None, None) if isinstance(encoded, RowError) else (encoded.input_ids, encoded.labels)
            golden.append({"messages": messages, "tools": tools, "input_ids": tokens[0], "labels": tokens[1]})
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
            "golden": self.golden(golden),
        }

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.text, self.tokenizer.special_tokens_map)

    @cached_property
    def _encoder(self) -> TokenEncoder:
        return TokenEncoder(self.tokenizer, self.text)

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        return tuple(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))))

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
            answers = [i for i, message in enumerate(ready) if message["role"] == "assistant"]
            if not answers:
                raise RowError("has no answer to train on")
            whole = self._renderer.render(ready, offered)
            spans = []
            for i in answers if self.train_on == "all_responses" else answers[-1:]:
                start = self._renderer.render(ready[:i], offered, add_generation_prompt=True)
                end = whole if i == len(ready) - 1 else self._renderer.render(ready[: i + 1], offered)
                place = self._end(whole, end)
                if place is None or not whole.startswith(start):
                    raise TemplateError(NOT_APPENDING)
                spans.append((len(start), place))
            if escaped:  # marks have another length
                spans = [(self._marked_length(whole[:a]), self._marked_length(whole[:b])) for a, b in spans]
            return _Rendered(self._show(whole, escaped), spans)
        except RowError as error:
            return error

    def _marked_length(self, rendered: str) -> int:
        return len(self._encoder.show(rendered).marked)

    def _end(self, whole: str, end: str) -> int | None:
        """Where in `whole` the turn is over that `end`, a rendering of its own, ends with; None if it is not there.

        A template may close the last turn with an end token and let the next header close the others (ChatGLM3).
        """
        if whole.startswith(end):
            return len(end)
        for stop in self._stops:
            body = len(end) - len(stop)
            if end.endswith(stop) and whole.startswith(end[:body]):
                return next((body + len(header) for header in self._stops if whole.startswith(header, body)), None)
        return None

    def _labelled(self, row: _Rendered, tokens: tuple[list[int], Encoding] | RowError) -> Encoded | RowError:
        if isinstance(tokens, RowError):
            return tokens
        ids, encoding = tokens
        labels = [-100] * len(ids)
        for start, end in row.spans:
            # Tokenizers that drop spaces have no token at some places.
            first = next((k for place in range(start, end) if (k := encoding.char_to_token(place)) is not None), None)
            if first is None or (encoding.token_to_chars(first) or (0, 0))[0] < start:
                return RowError("has one token that spans the prompt's end and the answer's beginning")
            last = next(
                k for place in range(end - 1, start - 1, -1) if (k := encoding.char_to_token(place)) is not None
            )
            # What the template appends after the end token is not generated, so not trained.
            while last >= first and ids[last] not in self.stop_ids:
                last -= 1
            if last < first:
                raise TemplateError(
                    "the chat template ends the assistant's turn with no end token, so the model would never learn to "
                    f"stop (end tokens: {list(self._stops)}); set prepare.chat_template to one that ends with one of "
                    "them"
                )
            labels[first : last + 1] = ids[first : last + 1]
        return Encoded(ids, labels, (ESCAPED,) if row.text.escaped else ())


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
