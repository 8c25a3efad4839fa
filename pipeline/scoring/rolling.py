"""A batch that rows can join and leave, with transformers' own cache: no step is spent on an ended row.

Rows are padded on the left, as by `generate`, so masks and positions are the same as there. New prompts bring their own
cache, which is padded to fit; columns that no row needs any more are cut off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.weights.loading import input_device

PREFILL_TOKENS = 16_384  # in one forward pass over prompts; limits its memory


def has_only_kv_cache(model: Any) -> bool:
    """Whether rows of `model` can join and leave a batch.

    False for models with other state (Mamba), trained vectors before the text, or code from their repository.
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
    """Rows of token ids, the cache of their keys and values, and the newest token of each row."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, input_device(model)
        self.cache = DynamicCache()
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)  # tokens in the cache, by row
        self.last: list[int] = []  # the newest tokens, which are not in the cache yet

    def join(self, prompts: Sequence[Sequence[int]]) -> int:
        """Add as many `prompts` (the longest first) as fit one pass, with their first new tokens; returns how many."""
        prompts = prompts[: max(1, PREFILL_TOKENS // len(prompts[0]))]
        width = len(prompts[0])
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        lengths = torch.tensor(list(map(len, prompts)), device=self.device)
        cache = DynamicCache()
        tokens = self._forward(ids, lengths, cache).argmax(-1).tolist()
        if self.last:
            longest = max(width, int(self.lengths.max()))
            for layer, new_layer in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    tensors = (getattr(layer, name), getattr(new_layer, name))
                    setattr(layer, name, torch.cat([pad(x, (0, 0, longest - x.shape[2], 0)) for x in tensors]))
        else:
            self.cache = cache
        self.lengths, self.last = torch.cat([self.lengths, lengths]), self.last + tokens
        return len(prompts)

    def step(self) -> torch.Tensor:
        """Add one token to each row; returns the logits that chose them (rows, V)."""
        self.lengths = self.lengths + 1
        logits = self._forward(torch.tensor(self.last, device=self.device)[:, None], self.lengths, self.cache)
        self.last = logits.argmax(-1).tolist()
        return logits

    def keep(self, rows: list[int]) -> None:
        """Remove all rows but `rows`."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.lengths, self.last = self.lengths[index], [self.last[row] for row in rows]
        longest = int(self.lengths.max()) if rows else 0
        for layer in self.cache.layers:
            start = layer.keys.shape[2] - longest
            layer.keys, layer.values = (x[index.to(x.device), :, start:] for x in (layer.keys, layer.values))

    def _forward(self, ids: torch.Tensor, lengths: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits after each row (B, V); `ids` (B, T) are its newest tokens, `lengths` includes them."""
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
        logits: torch.Tensor = output.logits[:, -1]
        return logits
