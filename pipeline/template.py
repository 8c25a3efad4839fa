"""The chat template as a contract: the same tokens in training, evaluation and serving, or a refusal.

A conversation is rendered by the tokenizer's own sandboxed Jinja environment, and each assistant turn is found by
rendering the conversation up to it: what the generation prompt ends with is where the answer begins. That holds for any
template that only appends; one that rewrites earlier turns is refused, with the way out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.files import sha256_file, sha256_json
from pipeline.formats import Message
from pipeline.params import PrepareParams
from pipeline.vetting import check_model

GOLDEN = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}],
    [
        {"role": "user", "content": "1 + 1 = ?\n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "再见"},
        {"role": "assistant", "content": "再见。"},
    ],
]


class TemplateError(ValueError):
    """The template, tokenizer or base model is not the one the dataset was made with, or cannot be trained with."""


class RowError(ValueError):
    """One conversation that this template cannot carry; the others are fine."""


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,) the token where it is trained, -100 where it is not


@dataclass(frozen=True)
class ChatTemplate:
    tokenizer: PreTrainedTokenizerBase
    text: str  # Jinja
    stop_ids: frozenset[int]  # tokens that end a turn
    train_on: str = "all_responses"

    def render(self, messages: list[Message], tools: str | None = None, add_generation_prompt: bool = False) -> str:
        if tools is not None and "tools" not in self.text:
            # A template without tools would drop them without a word: they become part of the system message.
            offer = f"You can use these tools:\n{tools}"
            system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
            rest = messages[1:] if system else messages
            messages, tools = [{"role": "system", "content": system + offer}, *rest], None
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.text,
                tools=json.loads(tools) if tools is not None else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from None
        except jinja2.TemplateError as error:  # what the template itself raises, e.g. for a system message
            raise RowError(f"is refused by the chat template: {error}") from None
        except (TypeError, ValueError) as error:  # values that the template, or transformers, cannot use, e.g. as tools
            raise RowError(f"cannot be rendered by the chat template: {str(error).splitlines()[0]}") from None
        return str(rendered)

    def prompt(self, messages: list[Message], tools: str | None = None) -> tuple[str, list[int]]:
        """`messages` up to where the assistant's answer begins: the text, and its tokens (T,)."""
        text = self.render(messages, tools, add_generation_prompt=True)
        return text, list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, messages: list[Message], tools: str | None = None) -> list[int]:
        return self.prompt(messages, tools)[1]

    def encode(self, messages: list[Message], tools: str | None = None) -> Encoded:
        """Tokens of a conversation and the labels of its trained turns, each turn's end token included.

        Raises:
            RowError: control tokens in a message's text, or an answer that does not begin on a token of its own.
            TemplateError: the template rewrites earlier turns or never ends a turn.
        """
        self._refuse_control_tokens([*(message["content"] for message in messages), tools or ""])
        whole = self.render(messages, tools)
        spans = []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers if self.train_on == "all_responses" else answers[-1:]:
            start = self.render(messages[:i], tools, add_generation_prompt=True)
            end = self.render(messages[: i + 1], tools)
            if not (whole.startswith(start) and whole.startswith(end)):
                raise TemplateError(
                    "the chat template changes earlier turns when later ones follow, so what is trained is not what "
                    "is served; set prepare.train_on to last_response, or prepare.chat_template to one that appends"
                )
            spans.append((len(start), len(end)))
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        labels = [-100] * len(ids)
        for start_char, end_char in spans:
            inside = [k for k, (a, b) in enumerate(offsets) if a >= start_char and b <= end_char and b > a]
            if not inside or offsets[inside[0]][0] != start_char:
                raise RowError("one token spans the prompt's end and the answer's beginning")
            stops = [k for k in inside if ids[k] in self.stop_ids]
            if not stops:
                raise TemplateError(
                    "the chat template ends the assistant's turn with no end token, so the model would never learn to "
                    f"stop (end tokens: {self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))})"
                )
            for k in inside:
                if k <= stops[-1]:  # what the template appends after the end token is not generated, so not trained
                    labels[k] = ids[k]
        return Encoded(ids, labels)

    def golden(self) -> list[dict[str, list[int]]]:
        """Tokens and labels of two fixed conversations: the contract's fingerprint of rendering and tokenising."""
        encoded = [self.encode(messages) for messages in GOLDEN]
        return [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]

    def contract(self, model: dict[str, Any]) -> dict[str, Any]:
        """What a later stage must find unchanged. `model` is `model_identity`'s answer."""
        return {
            "model": model,
            "chat_template": self.text,
            "chat_template_sha256": sha256_json(self.text),
            "tokenizer_sha256": _tokenizer_digest(self.tokenizer),
            "stop_ids": sorted(self.stop_ids),
            "pad_id": self.tokenizer.pad_token_id,
            "train_on": self.train_on,
            "golden": self.golden(),
        }

    def _refuse_control_tokens(self, texts: list[str]) -> None:
        # Not all_special_tokens: that lacks those that tokenizer.json marks as special and no role names.
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for text in texts:
            for token in special:
                if token in text:
                    raise RowError(f"contains the model's control token {token}")


def load_template(params: PrepareParams) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template that `params` name, and the identity of the base model it belongs to.

    Raises:
        TemplateError: there is no such model, tokenizer, template or end token.
    """
    identity = model_identity(params.model_name_or_path, params.model_revision, params.trust_remote_code)
    text = None
    if params.chat_template is not None:
        path = Path(params.chat_template)
        if not path.is_file():
            raise TemplateError(f"prepare.chat_template is {path}, which does not exist")
        text = path.read_text(encoding="utf-8")
    return _load(identity, text, params.train_on), identity


def load_contract(contract: dict[str, Any]) -> ChatTemplate:
    """The template of a contract, after checking that base model, tokenizer and rendering are what they were.

    Raises:
        TemplateError: any of them differs.
    """
    model = contract["model"]
    identity = model_identity(model["name_or_path"], model["revision"], model["trust_remote_code"])
    if identity != model:
        raise TemplateError(
            f"the base model {model['name_or_path']} is not the one the dataset was prepared for "
            f"(digest {identity['digest'][:12]}, expected {model['digest'][:12]}); run `dvc repro`, or put it back"
        )
    template = _load(identity, contract["chat_template"], contract["train_on"])
    differ = differing_keys(template.contract(identity), contract)
    if differ:
        raise TemplateError(
            f"{', '.join(differ)} differ from the template contract of the dataset; run `dvc repro prepare`"
        )
    return template


def load_shipped(folder: Path) -> ChatTemplate:
    """The template of a merged model that was written with its contract; its base model need not be here.

    Raises:
        TemplateError: tokenizer or template are not the contract's.
    """
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    template = _load(local_source(folder), contract["chat_template"], contract["train_on"])
    now = template.contract(contract["model"])
    differ = differing_keys(now, contract)
    if differ:
        raise TemplateError(f"{', '.join(differ)} in {folder} differ from the contract it was shipped with")
    return template


def differing_keys(contract: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of `contract` that `other` lacks or has another value for, sorted."""
    return sorted(key for key in contract if contract[key] != other.get(key))


def local_source(folder: Path) -> dict[str, Any]:
    """A folder that Retune wrote, as `load_base` and the tokenizer's loader take it."""
    return {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}


def model_identity(name_or_path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What pins a base model: the commit of a Hub repository, or a digest over a local folder's files.

    Raises:
        TemplateError: not a folder and not pinned, or no safetensors weights.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "data/")) or revision is None:
            raise TemplateError(
                f"prepare.model_name_or_path is {name_or_path}: there is no such folder (`dvc pull` fetches the sample "
                "base model), and as a Hub name it needs prepare.model_revision, the commit to use"
            )
        digest = revision
    else:
        files = sorted(
            p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt", ".py"}
        )
        if not any(p.suffix == ".safetensors" for p in files):
            raise TemplateError(f"{folder} has no .safetensors weights; pickled weights are not loaded, convert them")
        digest = sha256_json({p.name: sha256_file(p) for p in files})
    return {
        "name_or_path": name_or_path,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "digest": digest,
    }


def _load(identity: dict[str, Any], text: str | None, train_on: str) -> ChatTemplate:
    name = identity["name_or_path"]
    check_model(name, identity["revision"])
    source = {"revision": identity["revision"], "trust_remote_code": identity["trust_remote_code"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TemplateError(f"no tokenizer could be loaded from {name}: {reason}") from None
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{name} has no fast tokenizer (tokenizer.json), which is needed to find the answers' tokens"
        )
    text = text if text is not None else tokenizer.chat_template
    if not isinstance(text, str):
        raise TemplateError(f"{name} has no chat template; name one with prepare.chat_template")
    try:
        stops = GenerationConfig.from_pretrained(name, revision=identity["revision"]).eos_token_id
    except OSError:
        stops = None
    stop_ids = {stops} if isinstance(stops, int) else set(stops or [])
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    if not stop_ids:
        raise TemplateError(f"{name} names no end-of-sequence token, so a generation could never end")
    if tokenizer.pad_token_id is None:
        # Safe here, though not in general: labels and attention masks are built by position, never by token.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(stop_ids))
    tokenizer.padding_side = "left"
    return ChatTemplate(tokenizer, text, frozenset(stop_ids), train_on)


def _tokenizer_digest(tokenizer: Any) -> str:
    # Truncation and padding are run-time settings that calls leave behind in the Rust object; they are not identity.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return sha256_json(state)
