"""Batches whose rows have slots in a cache that stays where it is: rows that end leave their slot to waiting prompts.

Fixed addresses and shapes let a GPU repeat a step as a CUDA graph, which starts its 3,000 kernels at once instead of
one by one. A token's position is its column in the cache, so masks are Retune's own, for layers that see all earlier
tokens or a window of them. `why_no_slots` compares the logits of two prompts with those that each gets alone.
"""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.core.memory import out_of_memory
from pipeline.core.progress import note
from pipeline.weights.loading import input_device

PREFILL_TOKENS = 16_384  # in one forward pass over prompts; limits its memory
COLUMNS = {"cpu": 32, "cuda": 256}  # by which the cache grows; each time, a graph is captured anew
TRIAL = 64, 32  # tokens of the two prompts on which slots are tried
TOLERANCE = 0.01  # of the logits' norm, or three times what another prompt in the batch changes
WINDOW, ALL = "sliding_attention", "full_attention"
CPU = torch.device("cpu")


class SlotBatch:
    """At most `rows` rows of token ids, each of up to `longest` tokens, and the newest token of each."""

    def __init__(self, model: Any, rows: int, longest: int, columns: int | None = None) -> None:
        self.model, self.device, self.rows, self.longest = model, input_device(model), rows, longest
        self.columns = columns or COLUMNS[self.device.type]
        self.last: list[int] = []  # the newest tokens, which are not in the cache yet
        self.lengths: list[int] = []  # tokens in the cache, by row
        self.slots: list[int] = []  # of each row
        self.layers: list[_SlotLayer] = []
        # By slot: the newest token, its position, and whether a row has the slot. A free slot stays at position 0.
        self.tokens, self.positions, self.taken = torch.zeros(3, 0, dtype=torch.long, device=self.device)
        self.uses_graphs = False
        self.graph: Any = None  # torch.cuda.CUDAGraph
        self.logits: Tensor | None = None  # of the graph's step
        self.config = model.config.get_text_config()
        layers = DynamicCache(config=self.config).layers
        self.window = max((layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")), default=None)
        self.kinds = set(getattr(self.config, "layer_types", None) or [WINDOW if self.window else ALL])

    def join(self, prompts: Sequence[Sequence[int]]) -> int:
        """Add as many `prompts` (the longest first) as fit one pass, with their first new tokens; returns how many."""
        prompts = prompts[: max(1, PREFILL_TOKENS // len(prompts[0]))]
        prefilled, width, lengths = DynamicCache(), len(prompts[0]), [len(prompt) for prompt in prompts]
        tokens = padded_logits(self.model, prompts, lengths, prefilled).argmax(-1)
        if not self.layers:
            self.layers = [_SlotLayer(layer, self) for layer in prefilled.layers]
            # After a pass, offloaded weights are on the meta device again.
            self.uses_graphs = {parameter.device for parameter in self.model.parameters()} == {self.device} != {CPU}
        rows, width_now = len(self.slots) + len(prompts), self.layers[0].keys.shape[2]
        if rows > len(self.tokens) or width >= width_now:
            self._resize(max(rows, self.rows), max(width_now, self._columns_for(width + 1)))
        taken = set(self.slots)
        slots = [slot for slot in range(len(self.tokens)) if slot not in taken][: len(prompts)]
        index, ends = (torch.tensor(x, device=self.device) for x in (slots, lengths))
        # From the right end of the columns to the left; what is copied behind a row's end is overwritten or masked.
        columns = (torch.arange(width, device=self.device) + (width - ends)[:, None]).clamp(max=width - 1)
        for layer, new_layer in zip(self.layers, prefilled.layers, strict=True):
            for cached, new in ((layer.keys, new_layer.keys), (layer.values, new_layer.values)):
                source = columns.to(new.device)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                # Zeros behind it: a NaN of the row before would pass through the mask.
                cached[index.to(new.device)] = pad(new.gather(2, source), (0, 0, 0, cached.shape[2] - width))
        self.tokens[index], self.positions[index], self.taken[index] = tokens, ends, 1
        self.slots, self.last, self.lengths = self.slots + slots, self.last + tokens.tolist(), self.lengths + lengths
        return len(prompts)

    def step(self) -> None:
        """Add one token to each row."""
        self._fit()
        if self.uses_graphs and self.graph is None:
            self._capture()
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        tokens = self.tokens.tolist()
        self.last, self.lengths = [tokens[slot] for slot in self.slots], [length + 1 for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Remove all rows but `rows`."""
        kept = set(rows)
        freed = torch.tensor([slot for row, slot in enumerate(self.slots) if row not in kept], device=self.device)
        self.positions[freed], self.taken[freed] = 0, 0
        self.slots, self.last, self.lengths = ([of[r] for r in rows] for of in (self.slots, self.last, self.lengths))

    def _forward(self) -> Tensor:
        """A token for each slot, also for free ones; returns the logits that chose them (slots, V)."""
        logits: Tensor = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=self._masks(),
            position_ids=self.positions[:, None],
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.tokens.copy_(logits.argmax(-1))
        self.positions.add_(self.taken)
        return logits

    def _masks(self) -> Any:
        """What the token of each slot sees (slots, 1, 1, columns), in the form that the model's layers take."""
        columns, positions = torch.arange(self.layers[0].keys.shape[2], device=self.device), self.positions[:, None]
        seen = {ALL: columns <= positions}
        if self.window:
            seen[WINDOW] = seen[ALL] & (columns > positions - self.window)
        forms = {kind: mask[:, None, None] for kind, mask in seen.items()}
        if self.config._attn_implementation == "eager":
            least, zero = torch.finfo(self.model.dtype).min, self.positions.new_zeros((), dtype=self.model.dtype)
            forms = {kind: zero.expand(mask.shape).masked_fill(~mask, least) for kind, mask in forms.items()}
        return {kind: forms[kind] for kind in self.kinds} if len(self.kinds) > 1 else forms[next(iter(self.kinds))]

    def _columns_for(self, tokens: int) -> int:
        return min(self.longest, -(-tokens // self.columns) * self.columns)

    def _fit(self) -> None:
        """Room for a token more; less room where it is worth moving the cache, or capturing a graph anew."""
        slots, columns, needed = len(self.tokens), self.layers[0].keys.shape[2], max(self.lengths) + 1
        few = len(self.slots) < slots // (4 if self.uses_graphs else 2)
        if needed > columns or few or self._columns_for(needed) <= columns // 2:
            self._resize(len(self.slots) if few else slots, self._columns_for(needed))

    def _resize(self, slots: int, columns: int) -> None:
        """Give the cache these sizes; rows move to the first slots."""
        self.graph = self.logits = None
        kept = torch.tensor(self.slots, dtype=torch.long, device=self.device)
        more = slots - len(kept)
        self.slots = list(range(len(kept)))
        self.tokens, self.positions, self.taken = (
            pad(x[kept], (0, more)) for x in (self.tokens, self.positions, self.taken)
        )
        for layer in self.layers:
            layer.numbers = torch.arange(slots, device=layer.keys.device)
            for name in ("keys", "values"):
                tensor = getattr(layer, name)[kept.to(layer.keys.device), :, :columns]
                setattr(layer, name, pad(tensor, (0, 0, 0, columns - tensor.shape[2], 0, 0, 0, more)))

    def _capture(self) -> None:
        """Record `_forward` as a graph, without a change of the rows' state; if that fails, go on without graphs."""
        state = self.tokens.clone(), self.positions.clone()
        mode, stream = torch.cuda.get_sync_debug_mode(), _stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that this mode is a prototype
                    torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU cannot be captured
                self._forward()
                torch.cuda.set_sync_debug_mode(mode)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self.logits = self._forward()
            self.graph = graph
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            note(f"answers without a CUDA graph, several times slower: {str(error).splitlines()[0]}")
            self.uses_graphs = False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, before in zip((self.tokens, self.positions), state, strict=True):
                tensor.copy_(before)


@cache
def _stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of a layer (slots, heads, columns, width); a new token is written at its slot's position."""

    is_sliding = False

    def __init__(self, like: DynamicLayer, batch: SlotBatch) -> None:
        super().__init__()
        self.batch, self.is_initialized = weakref.proxy(batch), True  # a cycle would keep the cache in memory
        self.keys, self.values = (x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values))
        self.numbers = torch.arange(0)  # of the slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        positions = self.batch.positions.to(self.keys.device)
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached[self.numbers, :, positions] = new[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_length = get_seq_length


def padded_logits(model: Any, ids: Sequence[Sequence[int]], lengths: Sequence[int], cache: DynamicCache) -> Tensor:
    """The logits after each row (B, V), padded on the left as by `generate`.

    `ids` are the newest tokens of rows that have `lengths` tokens in all; the others are in `cache`.
    """
    device, width, end = input_device(model), max(map(len, ids)), max(lengths)
    positions = torch.arange(end, device=device) - (end - torch.tensor(lengths, device=device))[:, None]
    return model(
        input_ids=torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device),
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0)[:, -width:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


@torch.inference_mode()
def why_no_slots(model: Any, prompts: Iterable[Sequence[int]], longest: int) -> str | None:
    """Why answers to `prompts`, with up to `longest` tokens together, cannot be computed in slots, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family, config = base.config.model_type, base.config.get_text_config()
    if base is not model and model.active_peft_config.is_prompt_learning:
        return "the adapter has vectors before the text"
    if not type(base).__module__.startswith("transformers."):
        return f"{family} is code from its own repository"
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in known for layer in DynamicCache(config=base.config).layers) or base._is_stateful:
        return f"{family} remembers more than keys and values"
    if others := set(getattr(config, "layer_types", None) or [ALL]) - {ALL, WINDOW}:
        return f"{family} has {min(others)} layers"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{family} has {config._attn_implementation} attention"
    by_length = sorted(prompts, key=len)
    try:
        return _try_slots(model, [by_length[-1][-TRIAL[0] :], by_length[0][-TRIAL[1] :]], longest)
    except Exception as error:
        if out_of_memory(error):
            raise
        return f"{family}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _try_slots(model: Any, prompts: Sequence[Sequence[int]], longest: int) -> str | None:
    """Compare a step of `prompts` in slots with those that each takes alone, at the cache's full size."""
    batch, caches = SlotBatch(model, len(prompts), longest, columns=longest), [DynamicCache() for _ in prompts]
    batch.join(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for prompt, alone in zip(prompts, caches, strict=True):
        padded_logits(model, [prompt], [len(prompt)], alone)
    newest, lengths = [[token] for token in batch.last], [length + 1 for length in lengths]
    rows = zip(newest, lengths, caches, strict=True)
    expected = torch.cat([padded_logits(model, [ids], [length], alone) for ids, length, alone in rows]).float()
    batch.step()
    assert batch.logits is not None
    if (error := _difference(batch.logits, expected)) <= TOLERANCE:
        return None
    together = DynamicCache()
    padded_logits(model, prompts, [length - 1 for length in lengths], together)
    noise = _difference(padded_logits(model, newest, lengths, together), expected)
    return None if error <= 3 * noise else f"in slots, its logits differ by {error:.1%}, by its own noise {noise:.1%}"


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected).norm() / expected.norm())
