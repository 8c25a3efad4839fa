"""Loads chat templates, and checks the contract: the chat template, tokenizer and base model that belong together."""

import datetime
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.chat.conversation import SETTINGS
from pipeline.chat.conversation import ChatTemplate as ChatTemplate
from pipeline.chat.rendering import RowError as RowError
from pipeline.chat.rendering import TemplateError as TemplateError
from pipeline.core.files import read_json, sha256_file, sha256_json
from pipeline.core.sanitise import portable
from pipeline.core.vetting import check_model
from pipeline.params import PrepareParams

TEMPLATES = Path(__file__).parent / "templates"
IDENTIFYING = {".json", ".safetensors", ".model", ".jinja", ".txt", ".py"}  # files in a base model's digest
FROM_TRL = {"qwen": "qwen2_5", "gemma": "gemma3"}  # named templates that TRL ships as the families publish them

# For each named template: tokens that the tokenizer must have, and those that end a turn. `bos_token` and `eos_token`
# are the tokenizer's own.
NAMED = {
    "chatml": ("<|im_start|> <|im_end|>", "<|im_end|>"),
    "llama2": ("bos_token eos_token", "eos_token"),
    "llama3": ("bos_token <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>"),
    "qwen": ("<|im_start|> <|im_end|>", "<|im_end|>"),
    # The next turn's header ends a turn, as in the family's own fine-tuning code.
    "chatglm3": (
        "[gMASK] sop <|system|> <|user|> <|assistant|> <|observation|> eos_token",
        "<|user|> <|observation|> eos_token",
    ),
    "alpaca": ("eos_token", "eos_token"),
    "vicuna": ("eos_token", "eos_token"),
    "zephyr": ("eos_token", "eos_token"),
    "gemma": ("bos_token <start_of_turn> <end_of_turn>", "<end_of_turn>"),
    "mistral": (
        "bos_token eos_token [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS]",
        "eos_token",
    ),
}


def load_template(params: PrepareParams) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template that `params` name, and the identity of its base model; TemplateError if one cannot be used."""
    identity = model_identity(params.model_name_or_path, params.model_revision, params.trust_remote_code)
    name = text = None
    if params.chat_template in NAMED:
        name, text = params.chat_template, named_text(params.chat_template)
    elif params.chat_template is not None:
        path = Path(params.chat_template)
        if not path.is_file():
            raise TemplateError(
                f"prepare.chat_template is {path}, which does not exist; expected a Jinja file, or one of "
                f"{', '.join(NAMED)}"
            )
        text = path.read_text(encoding="utf-8")
    template = _load(identity, text, name, {key: getattr(params, key) for key in SETTINGS})
    names = template.renderer.variables()
    for argument in params.chat_template_kwargs.keys() - names:
        near = difflib.get_close_matches(argument, names, 1)
        raise TemplateError(
            f"prepare.chat_template_kwargs has {argument}, which the chat template does not read; "
            + (f"did you mean {near[0]}?" if near else "remove it")
        )
    config, tokenizer = load_config(identity).get_text_config(), template.tokenizer
    # Of the control tokens, only those that the template writes can occur, because those in messages are escaped; some
    # published tokenizers have others beyond the model's vocabulary.
    written = {number for entry in template.golden() for number in entry["input_ids"] or []} | template.stop_ids
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    require_embeddings(config, tokenizer, written | ordinary)
    require_context(params, getattr(config, "max_position_embeddings", None))
    return template, identity


def require_context(params: PrepareParams, limit: int | None) -> None:
    """Refuse a `max_length` above the number of positions of the model; None or 0 means no limit."""
    if limit and params.max_length > limit:
        raise TemplateError(
            f"prepare.max_length is {params.max_length}; {params.model_name_or_path} takes at most {limit} tokens"
        )


def named_text(name: str) -> str:
    """The Jinja text of a named template."""
    if name not in FROM_TRL:
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    trl = distribution("trl")  # importing it takes seconds
    return Path(str(trl.locate_file(f"trl/chat_templates/{FROM_TRL[name]}.jinja"))).read_text(encoding="utf-8")


def load_contract(contract: dict[str, Any], shipped: Path | None = None) -> ChatTemplate:
    """The template of a contract, or of a `shipped` folder; TemplateError if base, tokenizer or rendering differ."""
    if "labels" in contract:
        raise TemplateError(
            "this is a classifier (train.task is sequence-classification), which has no chat template; use "
            "`retune classify TEXT`"
        )
    source = local_source(shipped) if shipped else require_same_model(contract)
    settings = {key: contract[key] for key in SETTINGS if key in contract}
    template = _load(source, contract["chat_template"], contract.get("chat_template_name"), settings)
    # The conversations come from the contract, so that later versions of Retune may use others.
    golden = [(entry["messages"], entry["tools"]) for entry in contract["golden"]] or None
    of = f"it was shipped with in {shipped}" if shipped else "of the dataset; run `dvc repro prepare`"
    require_same_contract(template.contract(contract["model"], golden), contract, of)
    return template


def require_same_model(contract: dict[str, Any]) -> dict[str, Any]:
    """Refuse a base model that differs from the contract's; returns its identity."""
    model: dict[str, Any] = contract["model"]
    identity = model_identity(model["name_or_path"], model["revision"], model["trust_remote_code"])
    if identity != model:
        raise TemplateError(
            f"the base model {model['name_or_path']} is not the one the dataset was prepared for "
            f"(digest {identity['digest'][:12]}, expected {model['digest'][:12]}); run `dvc repro`, or restore it"
        )
    return identity


def load_shipped(folder: Path) -> ChatTemplate:
    """The template of a merged model, checked against the contract in its folder."""
    return load_contract(read_json(folder / "contract.json"), folder)


def differing_keys(contract: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of `contract` that are missing or different in `other`, sorted."""
    return sorted(key for key in contract if contract[key] != other.get(key))


def local_source(folder: Path) -> dict[str, Any]:
    """The source of a model in a folder that Retune wrote, for `load_base` and `load_tokenizer`."""
    return {"name_or_path": str(folder), "revision": None, "trust_remote_code": False}


def model_identity(name_or_path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What identifies a base model: the commit of a Hub repository, or a digest of a local folder's files."""
    folder, digest = Path(name_or_path), revision
    if folder.is_dir():
        files = [path for path in folder.iterdir() if path.suffix in IDENTIFYING]
        if not any(path.suffix == ".safetensors" for path in files):
            raise TemplateError(f"{folder} has no .safetensors weights; pickled weights are not loaded, convert them")
        digest = sha256_json({path.name: sha256_file(path) for path in files})
    elif name_or_path.startswith((".", "/", "data/")) or revision is None:
        raise TemplateError(
            f"prepare.model_name_or_path is {name_or_path}, which is not a folder (`dvc pull data.dvc` fetches the "
            "sample base model); a Hub name also needs prepare.model_revision, a commit"
        )
    return {
        "name_or_path": name_or_path,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "digest": digest,
    }


def load_tokenizer(source: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a `model_identity` or `local_source`; TemplateError if it cannot be loaded."""
    path = source["name_or_path"]
    check_model(path, source["revision"])
    with _loading("tokenizer", source) as options:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    return tokenizer


@contextmanager
def _loading(what: str, source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the options for `from_pretrained`; an error becomes a TemplateError with its first line."""
    try:
        yield {key: source[key] for key in ("revision", "trust_remote_code")}
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TemplateError(f"no {what} could be read from {source['name_or_path']}: {reason}") from None


def _load(identity: dict[str, Any], text: str | None, name: str | None, settings: dict[str, Any]) -> ChatTemplate:
    path = identity["name_or_path"]
    tokenizer = load_tokenizer(identity)
    if not tokenizer.is_fast:
        raise TemplateError(f"{path} has no fast tokenizer (tokenizer.json), which Retune needs to find answer tokens")
    text = text if text is not None else tokenizer.chat_template
    if not isinstance(text, str):
        raise TemplateError(
            f"{path} has no chat template; set prepare.chat_template to one of {', '.join(NAMED)}, or to a Jinja file"
        )
    try:
        stops = GenerationConfig.from_pretrained(path, revision=identity["revision"]).eos_token_id
    except OSError:
        stops = None
    stop_ids = {stops} if isinstance(stops, int) else set(stops or [])
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    if name is not None:
        stop_ids |= named_stop_ids(tokenizer, name, path)
    if not stop_ids:
        raise TemplateError(f"{path} has no end-of-sequence token, so a generation could never end")
    if tokenizer.pad_token_id is None:
        # Padding with an end token is safe here: labels and attention masks are built by position, never by token.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(stop_ids))
    tokenizer.padding_side = "left"
    if "strftime_now" not in text:
        settings["chat_template_date"] = None
    elif settings.get("chat_template_date") == "today":
        settings["chat_template_date"] = datetime.date.today().isoformat()
    template = ChatTemplate(tokenizer, text, frozenset(stop_ids), name=name, **settings)
    return replace(template, stop_ids=template.stop_ids | template.find_end_tokens())


def named_stop_ids(tokenizer: PreTrainedTokenizerBase, name: str, path: str) -> set[int]:
    """The ids of the end tokens of a named template; TemplateError if the tokenizer lacks a token of it."""
    required, ends = (tokens.split() for tokens in NAMED[name])
    ids: dict[str, int] = {}
    missing = []
    for token in required:
        text = getattr(tokenizer, token) if token in ("bos_token", "eos_token") else token
        token_ids = tokenizer.encode(text, add_special_tokens=False) if text is not None else []
        if len(token_ids) == 1 and token_ids[0] in tokenizer.added_tokens_decoder:
            ids[token] = token_ids[0]
        else:
            missing.append(token if text in (None, token) else f"{token} {text}")
    if missing:
        raise TemplateError(
            f"prepare.chat_template is {name}, but the tokenizer of {path} has no single token for "
            f"{', '.join(missing)}, so the model would read them as ordinary text; use the template of the model's "
            "family, or one without such control tokens (alpaca, vicuna, zephyr)"
        )
    return {ids[token] for token in ends}


def load_config(source: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a `model_identity` or `local_source`; TemplateError if it cannot be read."""
    with _loading("model configuration", source) as options:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source["name_or_path"], **options)
        config.get_text_config()  # fails if the model has several texts, as an encoder and a decoder
    return config


def require_embeddings(config: Any, tokenizer: PreTrainedTokenizerBase, token_ids: set[int]) -> None:
    """Refuse token ids that the model has no embedding for."""
    unknown = [number for number in token_ids if number >= config.vocab_size]
    if unknown:
        raise TemplateError(
            f"{config.name_or_path} has embeddings for {config.vocab_size} tokens, fewer than its tokenizer has: "
            f"{tokenizer.convert_ids_to_tokens(min(unknown))} has the id {min(unknown)}; restore the model's own "
            "tokenizer, or resize the model's embeddings to the tokenizer and save the model"
        )


def require_same_contract(contract: dict[str, Any], other: dict[str, Any], of: str) -> None:
    """Refuse `contract` if it differs from `other`; `of` says whose contract that is, and what to do."""
    different = differing_keys(portable(contract), portable(other))  # shipped contracts name no local folders
    if different:
        raise TemplateError(f"{', '.join(different)} differ from the contract {of}")
