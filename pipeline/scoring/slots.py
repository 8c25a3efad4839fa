"""Batches whose rows have slots in a cache that stays where it is: rows that end leave their slot to waiting prompts.

Fixed addresses and shapes let a GPU repeat a step as a CUDA graph, which starts its 3,000 kernels at once instead of
one by one. A token's position is its column in the cache, so masks are Retune's own, for layers that see all earlier
tokens or a window of them; `why_no_slots` compares what they give with what the model computes by itself.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.core.memory import out_of_memory
from pipeline.weights.loading import input_device

PREFILL_TOKENS = 16_384  # in one forward pass over prompts; limits its memory
COLUMNS = {"cpu": 32, "cuda": 256}  # by which the cache grows; each time, a graph is captured anew
TRIAL = 64, 32  # tokens of two prompts, on which slots are tried
TOLERANCE = 0.01  # of the logits' norm, or three times what they change with other rows in the batch
WINDOW, ALL = "sliding_attention", "full_attention"


class SlotBatch:
    """Rows of token ids and the newest token of each; a row has at most `longest` tokens."""

    def __init__(self, model: Any, longest: int) -> None:
        self.model, self.device, self.longest = model, input_device(model), longest
        devices = {parameter.device for parameter in model.parameters()}
        self.uses_graphs = len(devices) == 1 and self.device.type == "cuda"
        self.last: list[int] = []  # the newest tokens, which are not in the cache yet
        self.lengths: list[int] = []  # tokens in the cache, by row
        self.slots: list[int] = []  # of each row
        self.tokens, self.positions, self.numbers = torch.zeros(3, 0, dtype=torch.long, device=self.device)  # by slot
        self.layers: list[_SlotLayer] = []
        self.graph: Any = None  # torch.cuda.CUDAGraph
        self.logits: Tensor  # of the graph's step

    def join(self, prompts: Sequence[Sequence[int]]) -> int:
        """Add as many `prompts` (the longest first) as fit one pass, with their first new tokens; returns how many."""
        prompts = prompts[: max(1, PREFILL_TOKENS // len(prompts[0]))]
        cache, width = DynamicCache(), len(prompts[0])
        tokens = padded_logits(self.model, prompts, [len(prompt) for prompt in prompts], cache).argmax(-1)
        if not self.layers:
            self.layers = [_SlotLayer(layer, self) for layer in cache.layers]
        self._make_room(len(self.slots) + len(prompts), width + 1)
        slots = [slot for slot in range(len(self.tokens)) if slot not in set(self.slots)][: len(prompts)]
        index, lengths = (torch.tensor(x, device=self.device) for x in (slots, [len(prompt) for prompt in prompts]))
        # From the right end of the columns to the left; what is copied behind a row's end is overwritten or masked.
        columns = (torch.arange(width, device=self.device) + (width - lengths)[:, None]).clamp(max=width - 1)
        for layer, new_layer in zip(self.layers, cache.layers, strict=True):
            for cached, new in ((layer.keys, new_layer.keys), (layer.values, new_layer.values)):
                source = columns.to(new.device)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                cached[index.to(new.device), :, :width] = new.gather(2, source)
        self.tokens[index], self.positions[index] = tokens, lengths
        self.slots, self.last = self.slots + slots, self.last + tokens.tolist()
        self.lengths = self.lengths + lengths.tolist()
        return len(prompts)

    def step(self, eager: bool = False) -> Tensor:
        """Add one token to each row; returns the logits that chose them (slots, V)."""
        self._make_room(len(self.slots), max(self.lengths) + 1)
        if eager or not self.uses_graphs:
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
        """Remove all rows but `rows`."""
        self.slots, self.last, self.lengths = ([of[r] for r in rows] for of in (self.slots, self.last, self.lengths))

    def _forward(self) -> Tensor:
        """A token for each slot, also for free ones."""
        columns = torch.arange(self.layers[0].keys.shape[2], device=self.device)
        self.positions.clamp_(max=len(columns) - 1)  # of free slots
        logits = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=masks(self.model, columns, self.positions),
            position_ids=self.positions[:, None],
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.tokens.copy_(logits.argmax(-1))
        self.positions.add_(1)
        return logits

    def _make_room(self, rows: int, columns: int) -> None:
        """Grow to at least these sizes; on a CPU, shrink to `rows` when most slots are free (a graph would be lost)."""
        slots, capacity = len(self.tokens), self.layers[0].keys.shape[2]
        step = COLUMNS[self.device.type]
        columns = capacity if columns <= capacity else min(self.longest, -(-columns // step) * step)
        if self.device.type == "cpu" and rows < slots // 2:
            kept = torch.tensor(self.slots, dtype=torch.long)
            self.tokens, self.positions, slots = self.tokens[kept], self.positions[kept], rows
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[kept], layer.values[kept]
            self.slots, self.numbers = list(range(rows)), torch.arange(rows)
        if (more := max(0, rows - slots)) or columns > capacity:
            self.tokens, self.positions = pad(self.tokens, (0, more)), pad(self.positions, (0, more))
            self.numbers = torch.arange(slots + more, device=self.device)
            for layer in self.layers:
                sizes = (0, 0, 0, columns - capacity, 0, 0, 0, more)
                layer.keys, layer.values = pad(layer.keys, sizes), pad(layer.values, sizes)
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
        self.keys, self.values = (x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        slots, positions = (x.to(self.keys.device) for x in (self.batch.numbers, self.batch.positions))
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached[slots, :, positions] = new[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_length = get_seq_length


def masks(model: Any, columns: Tensor, positions: Tensor) -> Any:
    """What the token of each slot sees (slots, 1, 1, columns), in the form that the model's layers take."""
    config = model.config.get_text_config()
    seen = {ALL: columns <= positions[:, None]}
    if window := _window(config):
        seen[WINDOW] = seen[ALL] & (columns > positions[:, None] - window)

    def form(mask: Tensor) -> Tensor:
        mask = mask[:, None, None]
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )

    kinds = set(getattr(config, "layer_types", None) or [WINDOW if window else ALL])
    if len(kinds) == 1:
        return form(seen[kinds.pop()])
    return {kind: form(seen[kind]) for kind in kinds}


def _window(config: Any) -> int | None:
    windows = {layer.sliding_window for layer in DynamicCache(config=config).layers if hasattr(layer, "sliding_window")}
    return max(windows, default=None)


def padded_logits(model: Any, ids: Sequence[Sequence[int]], lengths: Sequence[int], cache: DynamicCache) -> Tensor:
    """The logits after each row (B, V), padded on the left as by `generate`; `ids` end the rows of `lengths` tokens."""
    device, width, end = input_device(model), max(map(len, ids)), max(lengths)
    positions = torch.arange(end, device=device) - (end - torch.tensor(lengths, device=device))[:, None]
    logits: Tensor = model(
        input_ids=torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device),
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0)[:, -width:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits


@torch.inference_mode()
def why_no_slots(model: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Why the answers to `prompts` cannot be computed in slots, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family, config = base.config.model_type, base.config.get_text_config()
    if base is not model and model.active_peft_config.is_prompt_learning:
        return "the adapter has vectors before the text"
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in known for layer in DynamicCache(config=base.config).layers) or base._is_stateful:
        return f"{family} remembers more than keys and values"
    if others := set(getattr(config, "layer_types", None) or [ALL]) - {ALL, WINDOW}:
        return f"{family} has {sorted(others)[0]} layers"
    if base.config._attn_implementation not in ("sdpa", "eager"):
        return f"{family} has {base.config._attn_implementation} attention"
    try:
        return _try_slots(model, [max(prompts, key=len)[-TRIAL[0] :], min(prompts, key=len)[-TRIAL[1] :]])
    except Exception as error:
        if out_of_memory(error):
            raise
        return f"{family}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _try_slots(model: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Compare two steps of `prompts`, the second by a graph, with those that each takes alone."""
    lengths, caches, together = [len(prompt) for prompt in prompts], [DynamicCache() for _ in prompts], DynamicCache()
    batch = SlotBatch(model, max(lengths) + 2)
    batch.join(prompts)
    newest = prompts
    for step in range(3):
        singles = zip(newest, lengths, caches, strict=True)
        expected = torch.cat([padded_logits(model, [ids], [length], cache) for ids, length, cache in singles])
        padded = padded_logits(model, newest, lengths, together)
        if step:
            actual = batch.step(eager=step == 1)
            noise, error = (float((x - expected).norm() / expected.norm()) for x in (padded, actual))
            if not error <= max(3 * noise, TOLERANCE):
                return f"in slots, its logits differ by {error:.1%}, by its own noise {noise:.1%}"
        # Of two tokens that are about equally likely, all go on with the same one.
        newest, lengths = [[token] for token in expected.argmax(-1).tolist()], [length + 1 for length in lengths]
        batch.tokens.copy_(expected.argmax(-1))
    return None
