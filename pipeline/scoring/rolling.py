"""A batch whose rows come and go, over transformers' own cache: no step is spent on a row that has ended.

Rows stand flush right, as `generate` pads them, so the model makes masks and positions as it does there. Prompts join
with their own cache, padded on the left; columns that no row needs are cut off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.weights.loading import input_device

PREFILL_TOKENS = 16_384  # of one forward pass over prompts: what bounds its memory


def remembers_keys_and_values_alone(model: Any) -> bool:
    """Whether rows of `model` can join and leave, by transformers' own rules.

    Not where it has another memory (Mamba), trained vectors before the text, or code from its repository.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base is not model and model.active_peft_config.is_prompt_learning:
        return False
    if not type(base).__module__.startswith("transformers."):
        return False
    layers = DynamicCache(config=base.config).layers
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and base._supports_default_dynamic_cache() and not base._is_stateful


class RollingBatch:
    """`last` is the newest token of each row, which is not in the cache yet."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, input_device(model)
        self.cache = DynamicCache()
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)  # tokens in the cache, by row
        self.last: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> int:
        """Add as many of `prompts`, the longest first, as one pass takes, each with its first new token; how many."""
        prompts = prompts[: max(1, PREFILL_TOKENS // len(prompts[0]))]
        width = len(prompts[0])
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        lengths = torch.tensor(list(map(len, prompts)), device=self.device)
        cache = DynamicCache()
        tokens = self._forward(ids, lengths, cache)
        if self.last:
            most = max(width, int(self.lengths.max()))
            for layer, added in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = (getattr(each, name) for each in (layer, added))
                    setattr(layer, name, torch.cat([pad(x, (0, 0, most - x.shape[2], 0)) for x in both]))
        else:
            self.cache = cache
        self.lengths, self.last = torch.cat([self.lengths, lengths]), self.last + tokens
        return len(prompts)

    def step(self) -> None:
        """One more token of each row."""
        self.lengths = self.lengths + 1
        self.last = self._forward(torch.tensor(self.last, device=self.device)[:, None], self.lengths, self.cache)

    def keep(self, rows: list[int]) -> None:
        """Let all other rows go."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.lengths, self.last = self.lengths[index], [self.last[row] for row in rows]
        most = int(self.lengths.max()) if rows else 0
        for layer in self.cache.layers:
            start = layer.keys.shape[2] - most
            layer.keys, layer.values = (x[index.to(x.device), :, start:] for x in (layer.keys, layer.values))

    def _forward(self, ids: torch.Tensor, lengths: torch.Tensor, cache: DynamicCache) -> list[int]:
        """The first choice after the last token of each row; `ids` (B, T), of rows that are `lengths` long with it."""
        columns = torch.arange(int(lengths.max()), device=self.device)
        positions = columns - (len(columns) - lengths)[:, None]
        output = self.model(
            input_ids=ids,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return tokens
