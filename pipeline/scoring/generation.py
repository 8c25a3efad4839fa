"""Greedy answers to tokenised prompts, by transformers or by vLLM.

Rows in a batch are rounded differently, in the last bits, than a single row. If two tokens are about equally likely, an
answer may therefore depend on `batch_size`; the same batch gives the same answers.

Each answer is saved at once, so a killed evaluation continues where it stopped. The files of the last run stay: another
metric or report scores the same answers without generating them again.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.chat.responses import Answer, read_answer
from pipeline.chat.template import ChatTemplate, load_config
from pipeline.core.dependencies import code_digests
from pipeline.core.files import read_json, sha256_json, write_text
from pipeline.core.memory import OutOfMemory, free, out_of_memory
from pipeline.core.progress import Progress, note
from pipeline.core.vetting import check_adapter, check_model
from pipeline.params import BatchSize
from pipeline.scoring.slots import SlotBatch, why_no_slots
from pipeline.weights.architecture import attention_widths
from pipeline.weights.loading import ModelError, input_device

ROWS_ON_A_CPU, MOST_ROWS = 64, 256  # with `batch_size: auto`; beyond 256 rows, a GPU is no faster per row
CACHE_SHARE = 0.7  # of a GPU's free memory; the rest is for activations, logits and the copy of a growing layer
RANKS = (8, 16, 32, 64, 128, 256, 512)  # of vLLM's kernels
Prompts = Sequence[Sequence[int]]


class BackendError(ValueError):
    """The backend in `evaluate.backend` cannot be used here."""


@torch.inference_mode()
def generate(
    model: Any,
    template: ChatTemplate,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: BatchSize,
    stage: str,
    system: str,
    keep: Path | None = None,
    tools: Sequence[str | None] | None = None,
    limited_by: str = "evaluate.max_new_tokens",
) -> list[Answer]:
    """Answers to `prompts` (token ids), in their order; they end where the model's context does.

    Args:
        keep: file of finished answers (`kept_file`), which are not generated again.
        tools: the tools of each prompt, as JSON.
        limited_by: the option that sets `max_new_tokens`, for errors.

    Raises:
        ModelError: a prompt fills the model's context.
        OutOfMemory: out of memory even with a single prompt; before that, the batch is halved.
    """
    if not prompts:
        return []
    limits = answer_limits(model.config, prompts, max_new_tokens)
    model.eval()
    answers = KeptAnswers(keep)
    missing = [i for i in range(len(prompts)) if i not in answers]
    progress = Progress(stage, len(prompts), f"answers of {system}")
    progress.resume_at(len(answers))
    rows = rows_at_once(model, batch_size, _longest(prompts, limits))
    waiting, most = [prompts[i] for i in missing], [limits[i] for i in missing]
    for number, ids in generate_tokens(model, waiting, most, template, rows, limited_by):
        answers[missing[number]] = ids
        progress.update(len(answers))
    tools = tools or [None] * len(prompts)
    return [read_answer(template, prompts[i], answers[i], tools[i]) for i in range(len(prompts))]


def kept_file(
    folder: Path, model: dict[str, Any], prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int]
) -> Path:
    """The file for the answers of `model` (digests of base, adapter, …), named after everything that they depend on."""
    depends_on = {
        "model": model,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "stop_ids": sorted(stop_ids),
        "code": code_digests("pipeline.scoring.generation"),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }
    return folder / f"{sha256_json(depends_on)}.jsonl"


class KeptAnswers(dict[int, list[int]]):
    """An answer's tokens by the number of its prompt, read from `path`; a new one is appended there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            lines = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
            self.update(map(json.loads, lines.splitlines()))  # without a last line that a kill cut short
            write_text(path, f"{lines}\n" if lines else "")

    def __setitem__(self, number: int, answer: list[int]) -> None:
        super().__setitem__(number, answer)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, answer]) + "\n")


def answer_limits(config: Any, prompts: Prompts, max_new_tokens: int) -> list[int]:
    """The most tokens of each answer: `max_new_tokens`, or fewer where the context ends; ModelError if none is left."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 62
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    if min(limits, default=1) < 1:
        raise ModelError(
            f"a conversation has {max(map(len, prompts))} tokens, and the model takes {context} with the answer; "
            "shorten it"
        )
    return limits


def rows_at_once(model: Any, batch_size: BatchSize, tokens: int) -> int:
    """The number of rows (of `tokens` each) that are answered at once; with `auto`, as many as fit a GPU's memory."""
    if batch_size != "auto":
        return batch_size
    if input_device(model).type == "cpu":
        return ROWS_ON_A_CPU
    free()
    config = model.config.get_text_config()
    try:
        _, key_width = attention_widths(config)
    except AttributeError:  # Mamba has no attention
        return MOST_ROWS
    bytes_of_a_token = 2 * config.num_hidden_layers * key_width * model.dtype.itemsize  # keys and values
    unused, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST_ROWS, int(unused * CACHE_SHARE / (bytes_of_a_token * tokens))))


def generate_tokens(
    model: Any, prompts: Prompts, limits: Sequence[int], template: ChatTemplate, batch_size: int, limited_by: str
) -> Iterator[tuple[int, list[int]]]:
    """Yield each prompt's number and up to `limits` greedy tokens, with the end token, as soon as the answer ends."""
    done: set[int] = set()
    write: Any = None
    while remaining := [i for i in range(len(prompts)) if i not in done]:
        waiting, most = [prompts[i] for i in remaining], [limits[i] for i in remaining]
        answers: Any = None
        try:
            write = write or _fastest(model, waiting, most)
            answers = write(model, waiting, most, template, batch_size)
            for number, ids in answers:
                done.add(remaining[number])
                yield remaining[number], ids
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside of `except`, whose traceback holds the tensors of the failed attempt.
        del answers
        free()
        size = min(batch_size, len(remaining))
        if size == 1:
            raise OutOfMemory(
                f"out of memory with one prompt of {max(map(len, waiting))} tokens ({reason}); lower {limited_by} or "
                "prepare.max_length, or use a machine with more memory"
            )
        batch_size = (size + 1) // 2
        note(f"out of memory with {size} prompts at once; retrying with {batch_size}")


def _fastest(model: Any, prompts: Prompts, limits: Sequence[int]) -> Any:
    """The function that answers `prompts` fastest."""
    if len(prompts) == 1 and input_device(model).type == "cpu":
        return generate_in_batches  # there is no row to exchange, and no graph
    if reason := why_no_slots(model, prompts, _longest(prompts, limits)):
        note(f"this model answers in fixed batches, each as slow as its longest answer: {reason}")
        return generate_in_batches
    return generate_in_slots


def _longest(prompts: Prompts, limits: Sequence[int]) -> int:
    """The tokens of a prompt and its answer."""
    return max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))


@torch.inference_mode()
def generate_in_slots(
    model: Any, prompts: Prompts, limits: Sequence[int], template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `generate_tokens`; when a row ends it leaves the batch, and waiting prompts join."""
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory fails early
    batch = SlotBatch(model, min(batch_size, len(prompts)), _longest(prompts, limits))
    rows: list[int] = []  # the prompt of each row
    new: list[list[int]] = [[] for _ in prompts]
    while rows or waiting:
        first, room = 0, batch_size - len(rows)
        # Wait for room for several prompts: one pass over them is cheaper than a pass for each.
        if waiting and (not rows or room >= max(1, batch_size // 8)):
            first, joined = len(rows), batch.join([prompts[i] for i in waiting[:room]])
            rows, waiting = rows + waiting[:joined], waiting[joined:]
        else:
            batch.step()
        for i, token in zip(rows[first:], batch.last[first:], strict=True):
            new[i].append(token)
        ended = [row for row, i in enumerate(rows) if new[i][-1] in template.stop_ids or len(new[i]) == limits[i]]
        if ended:
            yield from ((rows[row], new[rows[row]]) for row in ended)
            running = [row for row in range(len(rows)) if row not in ended]
            batch.keep(running)
            rows = [rows[row] for row in running]


@torch.inference_mode()
def generate_in_batches(
    model: Any, prompts: Prompts, limits: Sequence[int], template: ChatTemplate, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """As `generate_tokens`, with transformers' `generate`, for models that cache more than keys and values."""
    pad = template.tokenizer.pad_token_id
    config = GenerationConfig(do_sample=False, eos_token_id=sorted(template.stop_ids), pad_token_id=pad)
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        # The end of the context leaves long prompts fewer tokens, each length another number.
        batch = [i for i in order[:batch_size] if limits[i] == limits[order[0]]]
        order = order[len(batch) :]
        config.max_new_tokens = limits[batch[0]]
        width = len(prompts[batch[0]])
        ids = torch.tensor([[*[pad] * (width - len(prompts[i])), *prompts[i]] for i in batch], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for i, new in zip(batch, output, strict=True):
            end = next((k for k, token in enumerate(new) if token in template.stop_ids), len(new))
            yield i, new[: end + 1]


def vllm_tokens(
    identity: dict[str, Any], adapter: Path, prompts: Prompts, limit: int, stop_ids: frozenset[int], quantised: bool
) -> dict[str, list[list[int]]]:
    """The new tokens, with the end token, for each prompt, by system: the unmerged `adapter` and its `base`.

    Raises BackendError if vLLM is not installed, or would round the base differently than training did.
    """
    if quantised:
        raise BackendError(
            "evaluate.backend is vllm, but the adapter was trained on a 4-bit base, which vLLM rounds differently; set "
            "evaluate.backend to auto, or train.load_in_4bit to false"
        )
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise BackendError(
            f"evaluate.backend is vllm, which cannot be imported ({error}); install it on a machine with a CUDA GPU "
            "(pip install vllm), or set evaluate.backend to auto"
        ) from None
    check_model(identity["name_or_path"], identity["revision"])
    check_adapter(adapter)
    limits = answer_limits(load_config(identity), prompts, limit)
    rank = read_json(adapter / "adapter_config.json")["r"]
    engine = LLM(
        model=identity["name_or_path"],
        revision=identity["revision"],
        trust_remote_code=identity["trust_remote_code"],
        load_format="safetensors",
        skip_tokenizer_init=True,  # input and output are token ids
        enable_lora=True,
        max_lora_rank=next(known for known in RANKS if known >= rank),
        enable_prefix_caching=True,
        max_model_len=_longest(prompts, limits),
        seed=0,
    )
    settings = {"temperature": 0.0, "stop_token_ids": sorted(stop_ids), "detokenize": False}
    sampling = [SamplingParams(max_tokens=most, **settings) for most in limits]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    requests = {"adapter": LoRARequest("adapter", 1, str(adapter)), "base": None}
    tokens = {}
    for system, request in requests.items():
        answers = engine.generate(inputs, sampling, lora_request=request)
        tokens[system] = [list(answer.outputs[0].token_ids) for answer in answers]
    return tokens
