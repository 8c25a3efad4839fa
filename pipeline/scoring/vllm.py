"""Greedy answers by vLLM, if it is installed: the unmerged adapter and its base in one engine on a CUDA GPU.

A base that was quantised for training is refused: vLLM would round it differently and so score another model.
"""

from pathlib import Path
from typing import Any

from pipeline.chat.template import load_config
from pipeline.core.files import read_json
from pipeline.core.vetting import check_adapter, check_model
from pipeline.scoring.generation import answer_limits

RANKS = (8, 16, 32, 64, 128, 256, 512)  # of its kernels


class BackendError(ValueError):
    """The backend in `evaluate.backend` cannot be used here."""


def vllm_tokens(
    identity: dict[str, Any],
    adapter: Path,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    quantised: bool,
) -> dict[str, list[list[int]]]:
    """The new tokens, with the end token, for each prompt, by system (`adapter` and `base`).

    Raises:
        BackendError: vLLM is not installed, or the base was quantised in training.
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
    limits = answer_limits(load_config(identity), prompts, max_new_tokens)
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
        max_model_len=max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
        seed=0,
    )
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=sorted(stop_ids), detokenize=False)
        for limit in limits
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    requests = {"adapter": LoRARequest("adapter", 1, str(adapter)), "base": None}
    return {
        system: [
            list(answer.outputs[0].token_ids) for answer in engine.generate(inputs, sampling, lora_request=request)
        ]
        for system, request in requests.items()
    }
