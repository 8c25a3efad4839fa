"""The template contract: which chat template, tokenizer and base model belong together, and a refusal when they change.

`load_template` makes the `ChatTemplate` that parameters name, `load_contract` that of a contract, checked against
model and tokenizer; what cannot be trained with, or differs from the contract, is a `TemplateError`.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.chat.conversation import SETTINGS
from pipeline.chat.conversation import ChatTemplate as ChatTemplate
from pipeline.chat.conversation import Encoded as Encoded
from pipeline.chat.rendering import RowError as RowError
from pipeline.chat.rendering import TemplateError as TemplateError
from pipeline.core.files import sha256_file, sha256_json
from pipeline.core.sanitise import portable
from pipeline.core.vetting import check_model
from pipeline.params import PrepareParams

TEMPLATES = Path(__file__).parent / "templates"
FROM_TRL = {"qwen": "qwen2_5", "gemma": "gemma3"}  # named templates that TRL has as the families publish them


# What a named template needs of a tokenizer, each as one token (bos_token is what it calls so), and which of these
# end a turn.
NAMED = {
    "chatml": ("<|im_start|> <|im_end|>", "<|im_end|>"),
    "llama2": ("bos_token eos_token", "eos_token"),
    "llama3": ("bos_token <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>"),
    "qwen": ("<|im_start|> <|im_end|>", "<|im_end|>"),
    # The header of the next turn ends this one, as in the family's own fine-tuning code.
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
    """The template that `params` name, and the identity of the base model it belongs to.

    Raises:
        TemplateError: there is no such model, tokenizer, template or end token, the template cannot be trained with,
            or the model is too small for `max_length` or for its tokenizer.
    """
    identity = model_identity(params.model_name_or_path, params.model_revision, params.trust_remote_code)
    name = params.chat_template if params.chat_template in NAMED else None
    text = named_text(name) if name is not None else None
    if params.chat_template is not None and name is None:
        path = Path(params.chat_template)
        if not path.is_file():
            raise TemplateError(
                f"prepare.chat_template is {path}, which does not exist; expected a Jinja file, or one of "
                f"{', '.join(NAMED)}"
            )
        text = path.read_text(encoding="utf-8")
    template = _load(identity, text, name, {key: getattr(params, key) for key in SETTINGS})
    config = text_config(identity)
    _require_vocabulary(config, template)
    require_context(params, getattr(config, "max_position_embeddings", None))
    return template, identity


def require_context(params: PrepareParams, limit: int | None) -> None:
    """Refuse rows longer than the positions that the model has; None or 0: it has no limit."""
    if limit and params.max_length > limit:
        raise TemplateError(
            f"prepare.max_length is {params.max_length}; {params.model_name_or_path} was made for {limit} tokens at "
            "most"
        )


def named_text(name: str) -> str:
    """The Jinja text of a named template."""
    if name not in FROM_TRL:
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    trl = distribution("trl")  # importing it would take seconds
    return Path(str(trl.locate_file(f"trl/chat_templates/{FROM_TRL[name]}.jinja"))).read_text(encoding="utf-8")


def load_contract(contract: dict[str, Any]) -> ChatTemplate:
    """The template of a contract, after checking that base model, tokenizer and rendering are what they were.

    Raises:
        TemplateError: any of them differs.
    """
    template, differ = _of_contract(same_model(contract), contract)
    if differ:
        raise TemplateError(
            f"{', '.join(differ)} differ from the template contract of the dataset; run `dvc repro prepare`"
        )
    return template


def same_model(contract: dict[str, Any]) -> dict[str, Any]:
    """The identity of a contract's base model, after checking that it is the one that is here."""
    model: dict[str, Any] = contract["model"]
    identity = model_identity(model["name_or_path"], model["revision"], model["trust_remote_code"])
    if identity != model:
        raise TemplateError(
            f"the base model {model['name_or_path']} is not the one the dataset was prepared for "
            f"(digest {identity['digest'][:12]}, expected {model['digest'][:12]}); run `dvc repro`, or put it back"
        )
    return identity


def load_shipped(folder: Path) -> ChatTemplate:
    """The template of a merged model that was written with its contract; its base model need not be here.

    Raises:
        TemplateError: tokenizer or template are not the contract's.
    """
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    template, differ = _of_contract(local_source(folder), contract)
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
                f"prepare.model_name_or_path is {name_or_path}: there is no such folder (`dvc pull data.dvc` fetches "
                "the sample base model), and as a Hub name it needs prepare.model_revision, the commit to use"
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


def _of_contract(source: dict[str, Any], contract: dict[str, Any]) -> tuple[ChatTemplate, list[str]]:
    """The contract's template with the tokenizer at `source`, and the keys in which it differs from the contract."""
    if "labels" in contract:
        raise TemplateError(
            "the dataset is for train.task sequence-classification, which has no conversations; `retune classify TEXT` "
            "asks its model"
        )
    settings = {key: contract[key] for key in SETTINGS if key in contract}
    template = _load(source, contract["chat_template"], contract.get("chat_template_name"), settings)
    # The conversations are those of the contract, so that later versions may have others.
    golden = [(entry["messages"], entry["tools"]) for entry in contract["golden"]] or None
    return template, differing_keys(template.contract(contract["model"], golden), contract)


def load_tokenizer(source: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's identity, or of `local_source`.

    Raises:
        TemplateError: there is none that could be loaded.
    """
    path = source["name_or_path"]
    check_model(path, source["revision"])
    where = {key: source[key] for key in ("revision", "trust_remote_code")}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **where)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TemplateError(f"no tokenizer could be loaded from {path}: {reason}") from None
    return tokenizer


def _load(identity: dict[str, Any], text: str | None, name: str | None, settings: dict[str, Any]) -> ChatTemplate:
    path = identity["name_or_path"]
    tokenizer = load_tokenizer(identity)
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{path} has no fast tokenizer (tokenizer.json), which is needed to find the answers' tokens"
        )
    text = text if text is not None else tokenizer.chat_template
    if not isinstance(text, str):
        raise TemplateError(
            f"{path} has no chat template; name one with prepare.chat_template: {', '.join(NAMED)}, or a Jinja file"
        )
    try:
        stops = GenerationConfig.from_pretrained(path, revision=identity["revision"]).eos_token_id
    except OSError:
        stops = None
    stop_ids = {stops} if isinstance(stops, int) else set(stops or [])
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    if name is not None:
        stop_ids |= named_ends(tokenizer, name, path)
    if not stop_ids:
        raise TemplateError(f"{path} names no end-of-sequence token, so a generation could never end")
    if tokenizer.pad_token_id is None:
        # Safe here, though not in general: labels and attention masks are built by position, never by token.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(stop_ids))
    tokenizer.padding_side = "left"
    if "strftime_now" not in text:
        settings["chat_template_date"] = None
    elif settings.get("chat_template_date") == "today":
        settings["chat_template_date"] = datetime.date.today().isoformat()
    template = ChatTemplate(tokenizer, text, frozenset(stop_ids), name=name, **settings)
    return replace(template, stop_ids=template.stop_ids | template.written_ends())


def named_ends(tokenizer: PreTrainedTokenizerBase, name: str, path: str) -> set[int]:
    """The ids of the tokens that end a turn of the named template, each of whose tokens must be one."""
    needed, ends = (tokens.split() for tokens in NAMED[name])
    ids: dict[str, int] = {}
    lacking = []
    for token in needed:
        text = getattr(tokenizer, token) if token in ("bos_token", "eos_token") else token
        found = tokenizer.encode(text, add_special_tokens=False) if text is not None else []
        if len(found) == 1 and found[0] in tokenizer.added_tokens_decoder:
            ids[token] = found[0]
        else:
            lacking.append(token if text in (None, token) else f"{token} {text}")
    if lacking:
        raise TemplateError(
            f"prepare.chat_template is {name}, whose {', '.join(lacking)} the tokenizer of {path} does not have as "
            "one token: the model would read it as ordinary text; choose the template of the model's own family, or "
            "one that writes no control tokens but the end of the sequence (alpaca, vicuna, zephyr)"
        )
    return {ids[token] for token in ends}


def text_config(identity: dict[str, Any]) -> Any:
    """The configuration of the model's text part; weights are not read.

    Raises:
        TemplateError: there is none that transformers knows.
    """
    name = identity["name_or_path"]
    source = {key: identity[key] for key in ("revision", "trust_remote_code")}
    try:
        return AutoConfig.from_pretrained(name, **source).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TemplateError(f"no model configuration could be read from {name}: {reason}") from None


def _require_vocabulary(config: Any, template: ChatTemplate) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for and that a row could hold.

    Control tokens that the template does not write cannot come up: in people's texts they are escaped. (Some published
    tokenizers have such beyond the model's vocabulary.)
    """
    tokenizer = template.tokenizer
    used = {id for entry in template.golden() for id in entry["input_ids"] or []} | template.stop_ids
    added = set(tokenizer.added_tokens_decoder)
    require_rows(config, tokenizer, used | {id for id in tokenizer.get_vocab().values() if id not in added})


def require_rows(config: Any, tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> None:
    """Refuse token ids that are no row of the model's embedding; see `require_vocabulary`."""
    if max(ids, default=0) >= config.vocab_size:
        first = min(id for id in ids if id >= config.vocab_size)
        raise TemplateError(
            f"{config.name_or_path} has an embedding for {config.vocab_size} tokens, fewer than its tokenizer knows: "
            f"{tokenizer.convert_ids_to_tokens(first)} has the id {first}; put the model's own tokenizer back, or save "
            "the model with its embedding resized to the tokenizer"
        )


def require_same_contract(
    contract: dict[str, Any], other: dict[str, Any], where: Path, but: Sequence[str] = ()
) -> None:
    """Refuse a contract that differs from the dataset's in a key other than `but`."""
    wanted = {key: value for key, value in contract.items() if key not in but}
    differ = differing_keys(portable(wanted), portable(other))  # what ships names no folder of this machine
    if differ:
        raise TemplateError(f"{', '.join(differ)} of the template contract differ between the dataset and {where}")
