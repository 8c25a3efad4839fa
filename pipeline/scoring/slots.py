"""A batch whose rows come and go: a KV cache with one slot a row, each row at its own position from 0 on.

A row that has ended makes room for another at once, so no step is spent on it. `why_unfit` compares, for each model,
what this changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pipeline.weights.loading import input_device

PREFILL_TOKENS = 16_384  # of one forward pass over prompts: what bounds its memory
NOISE_FACTOR = 4.0  # times the model's own noise, and so many rounding steps, may slots change logits
ROUNDING_STEPS = 8.0


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, capacity, head_dim) each."""

    is_sliding = False  # a sliding window is the mask's business: nothing is thrown away

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots, self.capacity = slots, capacity
        self.first, self.positions, self.length = 0, torch.zeros(0), 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty: what is masked is still multiplied, and 0 × NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the states, (rows, heads, T, head_dim), into their places; returns all that the rows may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (
            kept[self.first : self.first + len(key_states), :, : self.length] for kept in (self.keys, self.values)
        )
        rows, width = self.positions.shape
        if width == 1:
            row, position = torch.arange(rows, device=keys.device), self.positions[:, 0].to(keys.device)
            keys[row, :, position] = key_states[:, :, 0]
            values[row, :, position] = value_states[:, :, 0]
        else:  # prompts all begin at the same position
            keys[:, :, self.length - width :] = key_states
            values[:, :, self.length - width :] = value_states
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class _Cache(Cache):
    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.place: tuple[int, torch.Tensor, int] = (0, torch.zeros(0), 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self.slots, self.capacity))
        layer = self.layers[layer_idx]
        layer.first, layer.positions, layer.length = self.place
        return layer.update(key_states, value_states)


class Slots:
    """Up to `slots` rows of at most `capacity` tokens, all of which begin with `prefix`, computed once for all."""

    def __init__(self, model: Any, slots: int, capacity: int, prefix: Sequence[int] = ()) -> None:
        self.model, self.slots, self.prefix = model, slots, len(prefix)
        self.device = input_device(model)
        config = model.config.get_text_config()
        self.window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self.window = None
        self.kinds: set[str] = set(getattr(config, "layer_types", None) or ())
        self.bool_mask = config._attn_implementation == "sdpa"
        self.cache = _Cache(slots, capacity)
        self.tokens: list[int] = []  # the last token of each row: known, and not yet in the cache
        self.positions: list[int] = []  # where it stands
        if prefix:
            self._forward([list(prefix)], 0, 0)
            for layer in self.cache.layers:
                for kept in (layer.keys, layer.values):
                    kept[1:, :, : self.prefix] = kept[:1, :, : self.prefix]

    @property
    def free(self) -> int:
        return self.slots - len(self.tokens)

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """Let rows in, behind those that are there; each prompt begins with the prefix and goes on after it."""
        bodies = [list(prompt[self.prefix : -1]) for prompt in prompts]
        start = 0
        while start < len(bodies):
            rows = max(1, PREFILL_TOKENS // max(1, max(map(len, bodies[start:]))))
            if any(bodies[start : start + rows]):
                self._forward(bodies[start : start + rows], len(self.tokens) + start, self.prefix)
            start += rows
        self.tokens += [prompt[-1] for prompt in prompts]
        self.positions += [len(prompt) - 1 for prompt in prompts]

    def step(self) -> torch.Tensor:
        """The logits after each row's last token, (rows, V)."""
        ids = torch.tensor(self.tokens, device=self.device)[:, None]
        positions = torch.tensor(self.positions, device=self.device)[:, None]
        return self._call(ids, positions, 0, max(self.positions) + 1)

    def append(self, tokens: Sequence[int]) -> None:
        """One more token of each row."""
        self.tokens = list(tokens)
        self.positions = [position + 1 for position in self.positions]

    def drop(self, row: int) -> None:
        """Let a row go; the last one takes its place."""
        last = len(self.tokens) - 1
        if row != last:
            end = self.positions[last] + 1
            for layer in self.cache.layers:
                for kept in (layer.keys, layer.values):
                    kept[row, :, self.prefix : end] = kept[last, :, self.prefix : end]
        for values in (self.tokens, self.positions):
            values[row] = values[last]
            values.pop()

    def _forward(self, bodies: Sequence[Sequence[int]], first: int, start: int) -> None:
        """Compute keys and values of `bodies`, which begin at position `start`, in the slots from `first` on.

        They are padded on the right: what lies beyond a row's end is overwritten before anything may look at it.
        """
        width = max(map(len, bodies))
        ids = torch.tensor([[*body, *[0] * (width - len(body))] for body in bodies], device=self.device)  # (R, T)
        positions = torch.arange(start, start + width, device=self.device).expand(len(bodies), -1)
        self._call(ids, positions, first, start + width)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, first: int, length: int) -> torch.Tensor:
        self.cache.place = (first, positions, length)
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _masks(self, positions: torch.Tensor, length: int) -> Any:
        """Who sees whom, (R, 1, T, length); one mask a kind of layer where a model has several."""
        keys = torch.arange(length, device=self.device)
        full = (keys <= positions[:, :, None])[:, None]
        masks = {"full_attention": full}
        if self.window is not None:
            masks["sliding_attention"] = full & (keys > positions[:, :, None] - self.window)[:, None]
        if not self.bool_mask:
            dtype = self.model.dtype
            masks = {
                kind: torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(
                    ~mask, torch.finfo(dtype).min
                )
                for kind, mask in masks.items()
            }
        if len(self.kinds) > 1:
            return masks
        [kind] = self.kinds or {"full_attention" if self.window is None else "sliding_attention"}
        return masks[kind]


@torch.inference_mode()
def why_unfit(model: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Why `model` says something else in slots than by itself; None if it does not.

    It does where keys and values are not all that a row remembers (Mamba), or positions come from the mask (ALiBi). Two
    prompts are compared with each alone, without any cache. How far may they differ? Not much more than the same two as
    a batch with transformers' own cache, since kernels round otherwise for other shapes.
    """
    longest = max(prompts, key=len)
    shortest = min(prompts, key=len)
    if len(shortest) == len(longest):
        shortest = longest[: max(1, len(longest) // 2)]
    pair = [list(longest), list(shortest)]
    prefix = pair[1][: len(pair[1]) // 2] if pair[0][: len(pair[1]) // 2] == pair[1][: len(pair[1]) // 2] else []
    try:
        slots = Slots(model, 2, len(longest) + 2, prefix)
        slots.add(pair[:1])
        slots.add(pair[1:])
        first = slots.step()
        chosen = first.argmax(-1).tolist()
        slots.append(chosen)
        in_slots = torch.stack([first, slots.step()])  # (2 steps, 2 rows, V)
        in_batch = _as_batch(model, pair, chosen)
        alone = torch.stack(
            [
                torch.stack([_logits_alone(model, ids) for ids in rows])
                for rows in (pair, [[*ids, token] for ids, token in zip(pair, chosen, strict=True)])
            ]
        )
    except Exception as error:  # whatever a model says of a cache that it was not made for
        return f"the model does not take them ({type(error).__name__})"
    scale = alone.std()
    difference, noise = (float((logits.float() - alone).abs().max() / scale) for logits in (in_slots, in_batch))
    if difference <= NOISE_FACTOR * noise + ROUNDING_STEPS * torch.finfo(first.dtype).eps:
        return None
    return f"they would change its logits by {difference:.2g} of their deviation; its own noise is {noise:.2g}"


def _logits_alone(model: Any, ids: Sequence[int]) -> torch.Tensor:
    tokens = torch.tensor([ids], device=input_device(model))
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return logits


def _as_batch(model: Any, pair: Sequence[Sequence[int]], chosen: Sequence[int]) -> torch.Tensor:
    """The logits after two rows, and after one more token each, by transformers' own cache, (2, 2, V)."""
    device, width = input_device(model), max(map(len, pair))
    rows = [[0] * (width - len(ids)) + [*ids, token] for ids, token in zip(pair, chosen, strict=True)]
    masks = [[0] * (width - len(ids)) + [1] * (len(ids) + 1) for ids in pair]
    tokens, mask = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
    first = model(input_ids=tokens[:, :-1], use_cache=True, logits_to_keep=1, **start)
    step = {"attention_mask": mask, "position_ids": positions[:, -1:], "past_key_values": first.past_key_values}
    second = model(input_ids=tokens[:, -1:], use_cache=True, **step)
    return torch.stack([first.logits[:, -1], second.logits[:, -1]])
