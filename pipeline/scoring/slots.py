"""Decoding on a GPU by a CUDA graph, which starts a step's kernels at once; one by one takes 4 to 7 times as long.

A graph repeats the same addresses and shapes. So each row of the batch has a slot in a cache that stays where it is:
rows that end leave their slot to others, and tokens have their position as their column. `decoding_batch` computes a
step in this way and as `RollingBatch` does, and uses slots only if the logits are the same.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from pipeline.core.memory import out_of_memory
from pipeline.core.progress import note
from pipeline.scoring.rolling import RollingBatch
from pipeline.weights.loading import input_device

COLUMNS = 256  # by which the cache grows; the graph is captured anew
TOLERANCE = 0.01  # of the logits' norm, or three times what they change with other rows in the batch


class SlotBatch:
    """As `RollingBatch`, with at most `slots` rows of up to `longest` tokens."""

    def __init__(self, model: Any, slots: int, longest: int) -> None:
        self.model, self.device, self.longest = model, input_device(model), longest
        self.last: list[int] = []
        self.slots: list[int] = []  # of each row
        self.lengths: list[int] = []  # tokens in the cache, by row
        self.free, self.all = list(range(slots)), torch.arange(slots, device=self.device)
        self.tokens, self.positions = torch.zeros(2, slots, dtype=torch.long, device=self.device)  # the newest, by slot
        self.layers: list[_SlotLayer] = []
        self.graph: Any = None  # torch.cuda.CUDAGraph
        self.logits: Tensor  # of the graph's step

    def join(self, prompts: Sequence[Sequence[int]]) -> int:
        new = RollingBatch(self.model)
        joined = new.join(prompts)
        self.add(new)
        return joined

    def add(self, rows: RollingBatch) -> None:
        """Copy `rows` into free slots."""
        slots, self.free = self.free[: len(rows.last)], self.free[len(rows.last) :]
        index, width = torch.tensor(slots, device=self.device), rows.cache.layers[0].keys.shape[2]
        if not self.layers:
            self.layers = [_SlotLayer(layer, self) for layer in rows.cache.layers]
        self._make_room(width + 1)
        # From the right end of the columns to the left; what is copied behind a row's end is overwritten or masked.
        columns = torch.arange(width, device=self.device) + (width - rows.lengths)[:, None]
        columns = columns.clamp(max=width - 1)[:, None, :, None]
        for layer, new_layer in zip(self.layers, rows.cache.layers, strict=True):
            for cached, new in ((layer.keys, new_layer.keys), (layer.values, new_layer.values)):
                cached[index, :, :width] = new.gather(2, columns.expand(-1, new.shape[1], -1, new.shape[3]))
        self.tokens[index], self.positions[index] = torch.tensor(rows.last, device=self.device), rows.lengths
        self.slots, self.last = self.slots + slots, self.last + rows.last
        self.lengths = self.lengths + rows.lengths.tolist()

    def step(self, eager: bool = False) -> Tensor:
        """Add one token to each row; returns the logits that chose them (slots, V)."""
        self._make_room(max(self.lengths) + 1)
        if eager or self.device.type != "cuda":
            logits = self._forward()
        else:
            if self.graph is None:
                self._capture()
            self.graph.replay()
            logits = self.logits
        tokens = self.tokens.tolist()
        self.last, self.lengths = [tokens[slot] for slot in self.slots], [length + 1 for length in self.lengths]
        return logits

    def keep(self, rows: list[int]) -> None:
        kept = set(rows)
        self.free += [slot for row, slot in enumerate(self.slots) if row not in kept]
        self.slots, self.last, self.lengths = ([of[r] for r in rows] for of in (self.slots, self.last, self.lengths))

    def _forward(self) -> Tensor:
        """A token for each slot, also for free ones."""
        columns = torch.arange(self.layers[0].keys.shape[2], device=self.device)
        self.positions.clamp_(max=len(columns) - 1)  # of free slots
        logits = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=(columns <= self.positions[:, None])[:, None, None],
            position_ids=self.positions[:, None],
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.tokens.copy_(logits.argmax(-1))
        self.positions.add_(1)
        return logits

    def _make_room(self, columns: int) -> None:
        capacity = self.layers[0].keys.shape[2]
        if columns > capacity:
            for layer in self.layers:
                layer.grow(min(self.longest, -(-columns // COLUMNS) * COLUMNS) - capacity)
            self.graph = None

    def _capture(self) -> None:
        """Record `_forward` as a graph, without a change of the rows' state."""
        state = self.tokens.clone(), self.positions.clone()
        mode, stream = torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU cannot be captured
            try:
                self._forward()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._forward()
        self.graph = graph
        for tensor, before in zip((self.tokens, self.positions), state, strict=True):
            tensor.copy_(before)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of a layer (slots, heads, columns, width); a new token is written at its slot's position."""

    is_sliding = False

    def __init__(self, like: DynamicLayer, batch: SlotBatch) -> None:
        super().__init__()
        self.batch, self.is_initialized = batch, True
        self.keys, self.values = (
            x.new_zeros(len(batch.all), x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values)
        )

    def grow(self, columns: int) -> None:
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, columns)) for x in (self.keys, self.values))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached[self.batch.all, :, self.batch.positions] = new[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_length = get_seq_length


def decoding_batch(model: Any, prompts: Sequence[Sequence[int]], longest: int, rows: int) -> RollingBatch | SlotBatch:
    """An empty batch for at most `rows` rows of up to `longest` tokens, on a GPU with a CUDA graph if possible."""
    if input_device(model).type != "cuda":
        return RollingBatch(model)
    if reason := why_no_slots(model, prompts, longest):
        note(f"answers without a CUDA graph, several times slower: {reason}")
        return RollingBatch(model)
    return SlotBatch(model, min(rows, len(prompts)), longest)


def why_no_slots(model: Any, prompts: Sequence[Sequence[int]], longest: int) -> str | None:
    """Why the answers to `prompts` cannot be computed in slots, or None; tried with the longest and shortest prompt."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family, attention = base.config.model_type, base.config._attn_implementation
    if attention != "sdpa":
        return f"{family} has {attention} attention"
    if any(getattr(layer, "sliding_window", longest) < longest for layer in DynamicCache(config=base.config).layers):
        return f"{family} has layers that see less than the {longest} tokens of a prompt and its answer"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    try:
        return _try_slots(model, [max(prompts, key=len), min(prompts, key=len)])
    except Exception as error:
        if out_of_memory(error):
            raise
        return f"{family}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _try_slots(model: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Compare two steps of `prompts`, the second by a graph, with those that each takes alone."""
    alone, together = [RollingBatch(model) for _ in prompts], RollingBatch(model)
    for prompt, single in zip(prompts, alone, strict=True):
        single.join([prompt])
        together.join([prompt])
    together.last = [single.last[0] for single in alone]
    batch = SlotBatch(model, len(prompts) + 1, max(map(len, prompts)) + 2)
    batch.add(together)
    for eager in (True, False):
        expected = torch.cat([single.step() for single in alone])
        noise, error = (
            float((logits[: len(prompts)] - expected).norm() / expected.norm())
            for logits in (together.step(), batch.step(eager))
        )
        if not error <= max(3 * noise, TOLERANCE):
            return f"in slots, its logits differ by {error:.1%}, by its own noise {noise:.1%}"
        # Of two tokens that are about equally likely, all go on with the same one.
        together.last = [single.last[0] for single in alone]
        batch.tokens[: len(prompts)] = expected.argmax(-1)
    return None
