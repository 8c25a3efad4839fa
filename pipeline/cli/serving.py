"""Models that answer: the base, published versions or the workspace's adapter, each with its own template contract.

In a conversation, several adapters share one base model, and one of them answers; batches use a version's merged model.
A model is refused if its base, tokenizer or template differs from its contract, or if it cannot share the loaded base.
"""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from pipeline.chat import Message
from pipeline.chat import template as templates
from pipeline.chat.rendering import RowError
from pipeline.chat.responses import Answer, read_answer
from pipeline.chat.template import ChatTemplate, TemplateError
from pipeline.cli.project import BASE, WORKSPACE
from pipeline.core.files import read_json
from pipeline.core.sanitise import portable
from pipeline.params import Params
from pipeline.registry.model import RegisteredModel
from pipeline.scoring.generation import answer_limits
from pipeline.weights.loading import ModelError, input_device, is_whole, load_adapter
from pipeline.weights.placement import load_for_scoring, load_tuned

# Keys of the contract that must be equal if two adapters share a base; the others describe the training data.
SERVED = ("chat_template_sha256", "tokenizer_sha256", "stop_ids", "pad_id", "on_control_tokens")


class ServingError(RuntimeError):
    """There is no such model, or it cannot share a base with the others."""


class Talk:
    """One base model and the adapters loaded onto it; the one named `active` answers."""

    def __init__(self, params: Params, names: list[str], root: Path = Path(".")) -> None:
        self.params, self.root = params, root
        self.active = names[0]
        self._adapters: dict[str, str | None] = {}  # name → PEFT's name for it; None: without an adapter
        prepare, train = params.prepare, params.train
        if names[0] == BASE:
            self.template, identity = templates.load_template(prepare)
            self.contract = self.template.contract(identity)
            keys = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
            self.quantisation = {key: getattr(train, key) for key in keys}
        else:
            folder, _ = find_folder(params, names[0], "adapter", root)
            contract = read_json(folder / "contract.json")
            # A published contract has no path, so the base must be the project's.
            identity = templates.model_identity(
                prepare.model_name_or_path, prepare.model_revision, prepare.trust_remote_code
            )
            _require_base(names[0], contract, identity)
            self.contract = contract | {"model": identity}
            self.template = templates.load_contract(self.contract)
            self.quantisation = read_json(folder / "training.json")["quantisation"]
        self._is_full_model = names[0] != BASE and is_whole(folder)
        if self._is_full_model:  # train.method full: the model has no adapter
            self.model: Any = load_tuned(self.contract["model"], self.quantisation, folder)
            self._adapters[names[0]] = None
        else:
            self.model = load_for_scoring(self.contract["model"], self.quantisation)
        for name in (*names, names[0]):
            self.use(name)

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def use(self, name: str) -> None:
        """Let `name` answer from now on; load it if necessary."""
        if name not in self._adapters:
            if self._is_full_model:
                raise ServingError(f"{self.active} is a whole model, not an adapter; run `retune chat {name}` instead")
            self._adapters[name] = None if name == BASE else self._load(name)
        if (peft_name := self._adapters[name]) is not None:
            self.model.set_adapter(peft_name)
        self.active = name

    @torch.inference_mode()
    def answer(
        self,
        messages: list[Message],
        max_new_tokens: int,
        on_text: Callable[[str], None] = lambda _: None,
        on_reasoning: Callable[[str], None] = lambda _: None,
    ) -> Answer:
        """The active model's greedy answer; `on_text` and `on_reasoning` get its text while it is generated."""
        ids = self.template.prompt_ids(messages)
        (limit,) = answer_limits(self.model.config, [ids], max_new_tokens)
        tokens = torch.tensor([ids], device=input_device(self.model))
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(self.template.stop_ids),
            pad_token_id=self.template.tokenizer.pad_token_id,
        )
        bare = self._adapters[self.active] is None and hasattr(self.model, "disable_adapter")
        with self.model.disable_adapter() if bare else nullcontext():
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                streamer=AnswerStreamer(self.template, ids, reasoning=on_reasoning, text=on_text),
            )
        return read_answer(self.template, ids, output[0, len(ids) :].tolist())

    def _load(self, name: str) -> str:
        folder, _ = find_folder(self.params, name, "adapter", self.root)
        contract = read_json(folder / "contract.json")
        _require_base(name, contract, self.contract["model"])
        differ = templates.differing_keys({key: portable(self.contract)[key] for key in SERVED}, portable(contract))
        if read_json(folder / "training.json")["quantisation"] != self.quantisation:
            differ.append("the base's quantisation")
        if differ or is_whole(folder):
            keys = ", ".join(differ)
            problem = f"differs from {self.active} in {keys}" if keys else "is a whole model, not an adapter"
            raise ServingError(f"{name} {problem}; run `retune chat {name}` instead")
        peft_name = f"adapter{len(self._adapters)}"
        self.model = load_adapter(self.model, folder, peft_name)
        return peft_name


def _require_base(name: str, contract: dict[str, Any], identity: dict[str, Any]) -> None:
    if contract["model"]["digest"] != identity["digest"]:
        raise TemplateError(
            f"{name} was trained on a base with digest {contract['model']['digest'][:12]}, and "
            f"prepare.model_name_or_path {identity['name_or_path']} has {identity['digest'][:12]}; set it to that base"
        )


class AnswerStreamer(BaseStreamer):
    """Passes on reasoning and text as they grow, without characters that could move a terminal's cursor."""

    def __init__(self, template: ChatTemplate, prompt: list[int], **callbacks: Callable[[str], None]) -> None:
        self.template, self.prompt, self.callbacks = template, prompt, callbacks
        self.ids: list[int] | None = None  # None until `put` has received the prompt
        self.sent = dict.fromkeys(self.callbacks, "")

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._send(r"[<\[]\S*$|\ufffd$")  # hold back what may be the start of a control token or of a character

    def end(self) -> None:
        self._send("(?!)")

    def _send(self, held_back: str) -> None:
        answer = read_answer(self.template, self.prompt, self.ids or [])
        for part, callback in self.callbacks.items():
            text = printable(re.sub(held_back, "", getattr(answer, part) or "").rstrip())
            new = text.removeprefix(self.sent[part])
            if new and len(text) > len(self.sent[part]):
                callback(new if len(new) < len(text) or not self.sent[part] else f"\n{text}")
                self.sent[part] = text


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def find_folder(params: Params, name: str, part: str, root: Path = Path(".")) -> tuple[Path, str]:
    """Folder and id of the `adapter` or `merged` model of `name`: the workspace's, or a version's after its checks."""
    if name == WORKSPACE:
        folder = root / "artifacts" / part
        if not (folder / "contract.json").is_file():
            stage = {"adapter": "train", "merged": "merge"}[part]
            raise ServingError(f"{folder} has no model; `retune run` or `dvc repro {stage}` makes one")
        return folder, name
    model = RegisteredModel(params.publish, root)
    manifest = model.manifest(model.find(name))
    return model.fetch_signed(manifest, part), manifest["version"]


def load_for_batches(params: Params, name: str, root: Path = Path(".")) -> tuple[Any, ChatTemplate, dict[str, Any]]:
    """Model, template and identity of `name`; for a version or the workspace it is the merged model."""
    if name == BASE:
        template, identity = templates.load_template(params.prepare)
        return load_for_scoring(identity), template, {"model": BASE, "digest": identity["digest"]}
    folder, name = find_folder(params, name, "merged", root)
    template = templates.load_shipped(folder)
    digest = templates.model_identity(str(folder), None, False)["digest"]
    return load_for_scoring(templates.local_source(folder)), template, {"model": name, "digest": digest}


def read_prompts(file: Path) -> list[tuple[dict[str, Any], list[Message], str | None]]:
    """Row, conversation up to the answer, and tools as JSON of each line of a JSONL file. Raises ServingError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # texts may contain other line separators
    except UnicodeDecodeError as error:
        raise ServingError(f"{file} is not UTF-8 text (byte {error.start}); convert it") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tools = row.get("tools")
            messages = row.get("messages")
            if messages is None:
                messages = [{"role": "user", "content": row["prompt"] if "prompt" in row else row["text"]}]
            valid = [
                isinstance(m["role"], str) and ("tool_calls" in m or isinstance(m["content"], str)) for m in messages
            ]
            if not valid or not all(valid) or messages[-1]["role"] == "assistant":  # training rows have an answer
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServingError(
                f"{file}, line {number}: expected a JSON object with prompt or text, or messages (a list of role and "
                "content that ends before the answer)"
            ) from None
        prompts.append((row, messages, tools if tools is None or isinstance(tools, str) else json.dumps(tools)))
    return prompts


def prompt_or_fault(model: Any, template: ChatTemplate, messages: list[Message], tools: str | None) -> list[int] | str:
    """The tokens (T,) of a conversation up to the answer, or the reason why `model` cannot answer it."""
    try:
        ids = template.prompt_ids(messages, tools)
        answer_limits(model.config, [ids], max_new_tokens=1)
    except RowError as error:
        return f"the conversation {error}"
    except ModelError as error:
        return str(error)
    return ids
